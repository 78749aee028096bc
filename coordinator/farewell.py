"""How a run ends: until when the run's value moves, who is waited for, and what is said to whoever leaves.

A worker that has sent its last contribution says so (a `Leave` with reason "flushed") and waits. Once no member that is
alive owes anything more, the run's value is final: its digest is written down and told to everybody, and nothing counts
any more. From when more than half of them are done, the others have `fault.round_timeout_s`; before that, whoever still
makes steps is waited for, so that no single worker can end the run for the others. So all that are alive at the end hold the same value. Asynchronous workers end with different ones and do not
wait. Plain functions on the `Coordinator` of `diloco.coordinator.state`, which decides when to call them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diloco.comms.machine import Stop
from diloco.comms.messages import FLUSHED, Contribution, Heartbeat, Initial, Leave, Refused, Skip
from diloco.coordinator import contributions
from diloco.coordinator.membership import Member, Status

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator

STEPS = 4  # of an inner step's time without the next one: the trainer hangs


def leave(c: Coordinator, member: Member, message: Leave) -> None:
    """Said again until it is answered."""
    if message.reason == FLUSHED and member.status is not Status.GONE:
        member.done = True
        if c.final or c.asynchronous:
            c.send(member.name, Refused("final", c.final))
        return
    if member.status is not Status.GONE:
        member.status, member.progress, member.digest = Status.GONE, message.progress, message.digest
        member.finished = "complete" if message.reason == "complete" else ""
        c.persist(
            {"type": "leave", "worker": member.name, "reason": message.reason, "digest": message.digest}
        )
    c.send(member.name, Refused("left", "goodbye"))


def moved(c: Coordinator, member: Member, message: Any) -> None:
    """Note that the member's trainer lives: its steps go on, or it has answered a round."""
    if not isinstance(message, Heartbeat) or message.progress.step > member.progress.step:
        member.moved = c.now


def too_late(c: Coordinator, member: Member, message: Any) -> bool:
    """Tell whoever still works that the run's value is final; True if the message counts no more."""
    if not c.final or c.asynchronous or not isinstance(message, Heartbeat | Contribution | Skip | Initial):
        return False
    if not member.done:
        c.send(member.name, Refused("final", c.final))
    return not isinstance(message, Heartbeat)  # which also says what the worker lacks


def settle(c: Coordinator) -> None:
    """The run's value becomes final when nobody owes anything, or has had its time; the run ends with its last member."""
    if c.complete or not c.started:
        return
    live = [m for m in c.members.values() if m.live]
    if not _most_are_done(c):
        c.ending_at = None
    elif c.ending_at is None and not c.asynchronous:
        c.ending_at = c.now
    if any(m.done for m in live) and not c.final and not c.asynchronous:
        over = c.ending_at is not None and c.now >= c.ending_at + c.config.fault.round_timeout_s
        if over or not (c.rounds or any(c.now < _patience(c, m) for m in _owing(c))):
            c.rounds.clear()
            contributions.commit_held(c)
            c.final = c.global_digest()
            c.persist({"type": "final", "versions": list(c.versions()), "digest": c.final})
            for member in live:
                c.send(member.name, Refused("final", c.final))
    if not live and any(m.finished for m in c.members.values()):
        c.complete, c.final = True, c.global_digest()
        c.persist({"type": "complete", "versions": list(c.versions()), "digest": c.final})
        c.actions.append(Stop("complete"))


def deadlines(c: Coordinator) -> list[float]:
    """When the wait for somebody ends."""
    if c.final or c.asynchronous or not any(m.live and m.done for m in c.members.values()):
        return []
    ends = [at for m in _owing(c) if (at := _patience(c, m)) > c.now]
    return ends if c.ending_at is None else [c.ending_at + c.config.fault.round_timeout_s, *ends]


def _counting(c: Coordinator) -> list[Member]:
    """Who is there and can contribute: a quarantined member cannot."""
    return [m for m in c.members.values() if m.live and not m.conduct.barred(c.ended)]


def _most_are_done(c: Coordinator) -> bool:
    members = _counting(c)
    return 2 * sum(m.done for m in members) > len(members)


def _owing(c: Coordinator) -> list[Member]:
    """Who is heard, can contribute, and has not sent its last contribution."""
    return [m for m in _counting(c) if m.status is not Status.SUSPECT and not m.done]


def _patience(c: Coordinator, member: Member) -> float:
    """Until when a member whose trainer stands still is waited for: as long as a silent one, or for slow steps longer."""
    fault, pace = c.config.fault, member.progress.steps_per_s
    allowed = max(fault.dead_s, c.arrivals.grace_s(fault), STEPS / pace if pace > 0 else 0.0)
    return member.moved + min(fault.round_timeout_s, allowed)
