"""The end of a run at a worker: after its last contribution it waits until the run's value is final, and holds it.

Plain functions on a `Replica`. The coordinator says what the final value's digest is; commits and snapshots that lead
there come as they always do. A worker that hears of the end while it still works has been given up: it stops, and
takes the value as it is. Asynchronous runs have no value that everybody holds, and no such end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diloco.comms.machine import Action
from diloco.worker import replica_jobs

if TYPE_CHECKING:
    from diloco.worker.replica import Replica


@dataclass(slots=True)
class End:
    """`asked`: we have nothing more to give. `final`: digest of the run's final value, "" until told; `held`: of ours."""

    asked: bool = False
    final: str = ""
    held: str = ""

    @property
    def near(self) -> bool:
        """Nothing more is measured from the anchors: they may move at any time."""
        return self.asked or bool(self.final)

    @property
    def waits(self) -> bool:
        return self.asked and (not self.final or self.held != self.final)


def ask(r: Replica, now: float) -> list[Action]:
    """After the flush: be `blocked` until the run's final value is here; `merge` then writes it."""
    if r.mode == "async":
        return []
    r.now, r.end.asked, r.end.held = now, True, r.digest()
    opened = [action for slot in r.slots for action in replica_jobs.open_waiting(r, slot)]
    return [*replica_jobs.flushed(r), *opened]


def told(r: Replica, digest: str) -> list[Action]:
    """The run's value is final. Whoever is not through yet has nothing to add to it: its rounds end here."""
    if r.mode == "async":
        return []
    r.end.final = digest
    if not r.end.asked:
        r.step = max(r.step, r.config.run.inner_steps_total)
        for slot in r.slots:
            slot.turn = slot.carry = None
            if slot.flight is not None:
                if not slot.flight.outcome and slot.feedback is not None:
                    slot.feedback.rollback()
                slot.flight.outcome, slot.flight.overwrite = slot.flight.outcome or "left-out", True
    return [action for slot in r.slots for action in replica_jobs.open_waiting(r, slot)]


def after_job(r: Replica) -> None:
    """What a job may have changed."""
    if r.end.asked and not any(slot.jobs for slot in r.slots):
        r.end.held = r.digest()


def over(r: Replica) -> bool:
    """The final value is here: that the run is complete is no refusal then."""
    busy = any(slot.jobs for slot in r.slots)
    return bool(r.end.final) and not busy and r.digest() == r.end.final


def write(r: Replica) -> None:
    """With the final value here: the model is the run's."""
    if r.end.asked and not r.end.waits:
        for slot in r.slots:
            if slot.shard is not None:
                r.parameters.write(slot.index, slot.shard.params)
