"""The standby as a state machine: it copies the coordinator's journal and repeats it, and takes over when it may.

Before that it lets nobody in. It may take over while its journal ends in a bond of its own, the coordinator is away
for `fault.takeover_s`, and half of the bond's witnesses vote for it (see `diloco.coordinator.bond`): then it is a
`Lead` in the next epoch, and tells the old coordinator so whenever that one can be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diloco.comms.following import PRIMARY, STANDBY, Ack, Beat, Entry, Follow, Parted, Reached, Turned, link
from diloco.comms.machine import Action, Compute, Computed, Event, Lost, Persist, Received, Send, Stop
from diloco.comms.messages import Buffer, Claim, Join, Message, Refused, Vote
from diloco.config import RunConfig
from diloco.coordinator.bond import bond_of, standing
from diloco.coordinator.journal import Record
from diloco.coordinator.lead import CLAIM_S, Lead
from diloco.coordinator.replay import replay
from diloco.coordinator.state import Coordinator
from diloco.errors import RefusedError, StorageError

NOT_LEADING = "a standby: it does not lead this run"
DIVERGED = "diverged"  # the reason of a Stop: begin again with an empty journal


class Standby:
    """`handle(event, now) -> actions`; `deadline`; `check()`. See `diloco.comms.machine`.

    `node` names this standby as long as its journal exists, which holds `records`; `read(n)` returns its first n, on
    any thread. Repeating them is left to the driver as `Compute`: an acknowledgement never waits for it.
    """

    def __init__(
        self,
        config: RunConfig,
        node: str,
        records: Sequence[Record],
        read: Callable[[int], Sequence[Record]],
        now: float,
    ) -> None:
        self.config, self.node, self._read = config, node, read
        self.chain: list[str] = []
        self.epoch = 0  # the highest in the journal
        self.bond = next(reversed(standing(record for record, _ in records)), None)
        self.lead: Lead | None = None
        self.stopped = False
        self.now = now
        self._copy: Copy | None = None  # None: the journal has to be repeated from its beginning
        self._cold = Coordinator(config)
        self._away: float | None = now  # since when the coordinator is not there
        self._heard = now
        self._joins: dict[str, Join] = {}
        self._next_claim = now
        for record, _ in records:
            self._link(record)
        if records:
            self._copy = Copy()
            self._copy.repeat(config, records, now)

    # ---- the machine's interface ----

    def handle(self, event: Event, now: float) -> list[Action]:
        self.now = now
        if self.stopped:
            return []
        if self.lead is not None:
            return self._leading(self.lead, event)
        actions = self._react(event)
        if self.stopped:
            return actions
        patience_s = self.config.fault.takeover_s
        if self._away is None and now >= self._heard + patience_s:
            self._away = self._heard
        if self._away is not None and self._may_lead() and now >= self._away + patience_s:
            actions += self._claim()
        return actions

    @property
    def deadline(self) -> float | None:
        if self.stopped:
            return None
        if self.lead is not None:
            return self.lead.deadline
        patience_s = self.config.fault.takeover_s
        if self._away is None:
            return self._heard + patience_s
        return max(self._next_claim, self._away + patience_s) if self._may_lead() else None

    def check(self) -> None:
        if self.lead is not None:
            self.lead.check()
        assert self.lead is None or self.lead.coordinator is self.coordinator

    def facts(self) -> dict[str, Any]:
        """For the status: whether it would take over now."""
        here = self._away is None
        return {
            "state": "in step" if self._may_lead() else "copying",
            "coordinator": here,
            "records": len(self.chain),
        }

    @property
    def coordinator(self) -> Coordinator:
        """The run as far as the journal has been repeated."""
        return self._copy.coordinator if self._copy is not None and self._copy.coordinator else self._cold

    # ---- what arrives ----

    def _leading(self, lead: Lead, event: Event) -> list[Action]:
        message = event.message if isinstance(event, Received) and event.sender == PRIMARY else None
        if isinstance(message, Reached):
            return [Send(PRIMARY, self._follow(self.coordinator.epoch))]
        return [] if isinstance(message, Parted | Turned | Entry | Beat) else lead.handle(event, self.now)

    def _react(self, event: Event) -> list[Action]:
        if isinstance(event, Lost):
            self._joins.pop(event.peer, None)
        if isinstance(event, Computed):
            return self._repeated(event.result)
        if not isinstance(event, Received):
            return []
        match event.message:
            case Reached():
                return [*self._here(), Send(PRIMARY, self._follow(self.epoch))]
            case Parted() if event.sender == PRIMARY:
                self._away = self.now if self._away is None else self._away
            case Beat(count):
                begin = [self._begin()] if count == len(self.chain) and self._copy is None else []
                return [*self._here(), *begin, self._ack()]
            case Entry():
                return [*self._here(), *self._entry(event.message)]
            case Turned():
                return self._turned(event.message)
            case Follow():
                return [Send(STANDBY, Turned("standby", NOT_LEADING))]
            case Join():
                return self._join(event.message)
            case Vote() if self.bond is not None:
                self.bond.hear(event.message)
                return self._take_over_if_won() if self._may_lead() else self._send_away()
            case Vote() | Parted():
                pass
            case _ if event.sender not in self._joins:
                return [Send(event.sender, self._refusal())]
        return []

    def _here(self) -> list[Action]:
        """The coordinator is there: who came to us shall go to it."""
        self._away, self._heard = None, self.now
        return self._send_away()

    def _send_away(self) -> list[Action]:
        """Who waits here waits in vain."""
        names = list(self._joins)
        self._joins.clear()
        return [Send(name, Refused("standby", NOT_LEADING)) for name in names]

    def _follow(self, epoch: int) -> Follow:
        c = self.coordinator
        chain = self.chain[-1] if self.chain else ""
        return Follow(self.node, self.config.run.run_id, c.settings, epoch, len(self.chain), chain)

    def _ack(self) -> Send:
        return Send(
            PRIMARY, Ack(len(self.chain), self._copy is not None and self._copy.coordinator is not None)
        )

    def _entry(self, entry: Entry) -> list[Action]:
        if entry.index > len(self.chain):
            return [Send(PRIMARY, self._follow(self.epoch))]
        if entry.index < len(self.chain):
            return [self._ack()]
        record = dict(entry.record)
        self._link(record)
        if record["type"] == "standby":
            self.bond = bond_of(record, entry.index)
        if record["type"] == "commit" and not entry.blobs:
            self._copy = None  # a later snapshot stands for it: repeat everything once that is here
        actions: list[Action] = [Persist(record, entry.blobs), self._ack()]
        if self._copy is not None:
            actions.append(self._copy.more(record, entry.blobs, self.now))
        if record["type"] == "complete":
            self.stopped = True
            actions.append(Stop("complete"))
        return actions

    def _turned(self, turned: Turned) -> list[Action]:
        mine = self.chain[turned.count - 1] if 0 < turned.count <= len(self.chain) else ""
        kind = turned.kind
        if kind == "ahead" and mine != turned.chain:
            kind = DIVERGED
        if kind not in (DIVERGED, "ahead", "run", "settings", "off", "identity"):
            return []  # it may be another time
        self.stopped = True
        if kind == DIVERGED and (self.bond is None or self.bond.node != self.node):
            return [Stop(DIVERGED)]
        if kind in (DIVERGED, "ahead"):
            fix = (
                "the coordinator has lost records, or its journal is another run's: if this journal is the right one, "
                "stop the coordinator and continue here with --resume instead of --standby; else move this journal away"
            )
            return [
                Stop(kind, StorageError(f"this standby's journal is not a copy of the coordinator's: {fix}"))
            ]
        return [Stop(kind, RefusedError(f"refused by the coordinator: {turned.reason}"))]

    def _join(self, join: Join) -> list[Action]:
        if self._away is None or not self._may_lead():
            return [Send(join.worker, self._refusal())]
        self._joins[join.worker] = join
        self._next_claim = min(self._next_claim, self.now)
        return []

    def _refusal(self) -> Refused:
        """To the coordinator with them; or, if it may be ours soon, let them join and wait."""
        waits = self._away is not None and self._may_lead()
        return Refused("incarnation", "join again") if waits else Refused("standby", NOT_LEADING)

    # ---- the copy ----

    def _link(self, record: Any) -> None:
        self.chain.append(link(self.chain[-1] if self.chain else "", record))
        self.epoch = max(self.epoch, int(record.get("epoch", 0)))

    def _begin(self) -> Compute:
        """Repeat the whole journal."""
        count, now, self._copy = len(self.chain), self.now, Copy(jobs=1)
        copy, read, config = self._copy, self._read, self.config
        return Compute(lambda: copy.attempt(lambda: copy.repeat(config, read(count), now)))

    def _repeated(self, copy: Copy) -> list[Action]:
        copy.jobs -= 1
        if copy.error is not None and copy is self._copy:
            self.stopped = True
            return [Stop("damaged", copy.error)]
        return self._take_over_if_won()

    # ---- taking over ----

    def _may_lead(self) -> bool:
        """Whether the journal has all that was ever announced, as far as is known here."""
        bond = self.bond
        return bond is not None and bond.node == self.node and not bond.ended_by_coordinator()

    def _claim(self) -> list[Action]:
        if self.now < self._next_claim or self.bond is None:
            return []
        self._next_claim = self.now + CLAIM_S
        asked = [name for name in self.bond.missing() if name in self._joins]
        return [Send(name, Claim(self.bond.name, self.node)) for name in asked]

    def _take_over_if_won(self) -> list[Action]:
        """As soon as the votes are there and everything has been repeated."""
        won = self.bond is not None and self.bond.ended_by_standby() and self._may_lead()
        if not won or self._away is None:
            return []
        if self._copy is None:
            return [self._begin()]
        if self._copy.jobs or self._copy.coordinator is None:
            return []
        self.lead = Lead(self.coordinator)
        actions = self.lead.take_over(self.node, self.chain, self.now)
        for name, join in self._joins.items():
            actions += self.lead.handle(Received(name, join), self.now)
        self._joins.clear()
        return actions


@dataclass(slots=True)
class Copy:
    """A coordinator that repeats a journal, on the driver's thread for that; `jobs` are not done yet."""

    coordinator: Coordinator | None = None
    jobs: int = 0
    error: StorageError | None = None

    def more(self, record: Mapping[str, Any], blobs: Sequence[Buffer], now: float) -> Compute:
        self.jobs += 1
        return Compute(lambda: self.attempt(lambda: self._one(record, blobs, now)))

    def attempt(self, step: Callable[[], None]) -> Copy:
        """Do `step`, unless an earlier one failed."""
        try:
            if self.error is None:
                step()
        except StorageError as error:
            self.error = error
        return self

    def repeat(self, config: RunConfig, records: Sequence[Record], now: float) -> None:
        """From the beginning. Raises StorageError when a digest differs, or when bulk data is missing."""
        coordinator = Coordinator(config)
        replay(coordinator, records, now)
        self.coordinator = coordinator

    def _one(self, record: Mapping[str, Any], blobs: Sequence[Buffer], now: float) -> None:
        assert self.coordinator is not None
        replay(self.coordinator, [(record, blobs)], now)


def peer_of(message: Message) -> str | None:
    """PRIMARY or STANDBY for what goes to one of them, None for what goes to a worker."""
    if isinstance(message, Follow | Ack):
        return PRIMARY
    return STANDBY if isinstance(message, Entry | Beat | Turned) else None
