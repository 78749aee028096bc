"""A round that a commit did not count: what its worker does with its values, its work and its error feedback.

Plain functions on a `Replica`, by the policy `fault.late` (the words are in `diloco.late`). Where late contributions may
count in the next commit, the round stays open until the coordinator has said which: its sender must know what became of
the message before it encodes the next one. Only a contribution that came late gets this; one that was refused for what
is in it, and a round that ends the run, go as under ``skip``. Taking in what was committed between two rounds is no late
round: only ``isolate`` keeps the worker's values then too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diloco.comms.messages import COUNTS_LATER, Rejected
from diloco.late import COUNTING
from diloco.worker.replica_slots import Flight, Slot

if TYPE_CHECKING:
    from diloco.worker.replica import Replica


def undecided(r: Replica, flight: Flight) -> bool:
    """A commit went by without this round: whether the coordinator may still count it in the next one."""
    offered = flight.frame is not None or flight.delta is not None
    ended = flight.rejected or flight.accepted or flight.refused or flight.overwrite
    return r.config.fault.late in COUNTING and offered and not ended


def told(r: Replica, message: Rejected) -> None:
    """The coordinator's word on a round: it does not count, or not in its own commit but in the next."""
    slot = r.slots[message.fragment]
    flight = slot.flight if slot.flight is not None and slot.flight.round == message.round else None
    if message.reason != COUNTS_LATER:
        r.rejections.append(message)
        if flight is not None:
            if slot.feedback is not None:
                slot.feedback.rollback()
            flight.rejected, flight.refused = True, flight.refused or message.reason != "late"
    elif flight is not None and not flight.outcome:
        if slot.feedback is not None:
            slot.feedback.commit()
        flight.accepted = True
    if flight is not None and flight.passed and not flight.outcome:
        flight.outcome = "left-out"


def stays(r: Replica, slot: Slot, flight: Flight) -> bool:
    """``isolate``: the worker keeps its values, and its work goes into the next round, measured from the newest value."""
    if r.config.fault.late != "isolate" or not _late(flight):
        return False
    slot.steps, slot.tokens = slot.steps + flight.steps, slot.tokens + flight.tokens
    return True


def rolls_back(r: Replica, slot: Slot, flight: Flight) -> bool:
    """``rollback``: the worker's values become the run's. What it did since it sent is lost too, and not told."""
    if r.config.fault.late != "rollback" or flight.frame is None or not _late(flight):
        return False
    slot.steps = slot.tokens = 0
    return True


def recover(r: Replica, slot: Slot, flight: Flight) -> None:
    """``codec.ef_recover``: what the merge takes away of a late round's work goes into the error feedback.

    ``e <- e_before + (1 - alpha) D``: the share alpha of D stays in the worker's values and is in its next update.
    """
    lost = _late(flight) and not flight.accepted
    if r.config.codec.ef_recover and slot.feedback is not None and flight.own is not None and lost:
        slot.feedback.recover(flight.own, 1.0 - flight.alpha)


def _late(flight: Flight) -> bool:
    return flight.outcome == "left-out" and not (flight.refused or flight.overwrite or flight.final)
