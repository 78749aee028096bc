"""Bugs planted on purpose, to show that the simulation finds them. Each is a context in which the product has it.

`python -m tests.sim.mutations` looks for the first seed that catches each, and prints the table of docs/simulation.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

from diloco.comms import feedback, frame
from diloco.comms.machine import Action, Event, Persist, Received
from diloco.coordinator import bond, contributions, gates, lateness, leasing
from diloco.coordinator.lead import Lead
from diloco.coordinator.membership import Member
from diloco.coordinator.rounds import Verdict
from diloco.coordinator.state import Coordinator
from diloco.errors import CorruptDataError
from diloco.worker import replica, replica_jobs, replica_slots
from tests.sim.scenario import Scenario, scenario
from tests.sim.trial import outcome_of, undisturbed

SEEDS = 300  # among which each bug must be found


@contextmanager
def reply_before_persist() -> Iterator[None]:
    """The coordinator answers first and writes its journal afterwards."""
    handle = Coordinator.handle

    def hasty(self: Coordinator, event: Event, now: float) -> list[Action]:
        return sorted(handle(self, event, now), key=lambda action: isinstance(action, Persist))

    with mock.patch.object(Coordinator, "handle", hasty):
        yield


@contextmanager
def count_a_resend_twice() -> Iterator[None]:
    """A contribution that comes again after its commit is taken for a new one."""
    check = gates.check_contribution

    def careless(*a: Any, **k: Any) -> gates.Checked:
        return check(*a[:-1], **k) if len(a) == 8 else check(*a, **k)  # without the newest version

    with (
        mock.patch.object(contributions, "check_contribution", careless),
        mock.patch.object(contributions, "_ended", lambda *a: False),
    ):
        yield


@contextmanager
def merge_on_arrival() -> Iterator[None]:
    """A worker takes a commit in when it comes, not tau steps after it sent its part."""
    settle = replica.Replica._settle

    def at_once(self: replica.Replica, slot: Any, commit: Any) -> None:
        settle(self, slot, commit)
        if slot.flight is not None:
            slot.flight.due = min(slot.flight.due, self.step)

    with mock.patch.object(replica.Replica, "_settle", at_once):
        yield


@contextmanager
def wait_for_the_dead() -> Iterator[None]:
    """Rounds and the end of the run wait for members that have died."""

    def expire(self: Member, fault: Any, now: float) -> bool:
        return False

    with (
        mock.patch.object(Member, "expire", expire),
        mock.patch.object(Member, "expires", lambda self, fault: None),
        mock.patch("diloco.coordinator.rounds.Round.judge", _only_when_all_have_answered),
    ):
        yield


def _only_when_all_have_answered(self: Any, expected: Any, *_: Any) -> Verdict:
    if self.waits_for(expected):
        return Verdict.WAIT
    return Verdict.COMMIT if self.answers else Verdict.ABORT


@contextmanager
def keep_the_lease_of_the_dead() -> Iterator[None]:
    """Blocks of data that a dead worker held are given to nobody."""
    with mock.patch.object(leasing, "sweep", lambda c: None):
        yield


@contextmanager
def accept_a_former_life() -> Iterator[None]:
    """What a former life of a worker said counts as if its present life had said it."""
    received, check = Coordinator._received, gates.check_header

    def lenient(self: Coordinator, event: Received) -> None:
        message, member = event.message, self.members.get(event.sender)
        if member is not None and hasattr(message, "incarnation"):
            spoken: Any = message
            event = Received(event.sender, dataclasses.replace(spoken, incarnation=member.incarnation))
        received(self, event)

    def any_life(framed: Any, *a: Any) -> Any:
        arguments = list(a)
        if arguments[4] is not None:
            life = frame.read_header(framed).incarnation
            arguments[4] = dataclasses.replace(arguments[4], incarnation=life)
        return check(framed, *arguments)

    with (
        mock.patch.object(Coordinator, "_received", lenient),
        mock.patch.object(gates, "check_header", any_life),
    ):
        yield


@contextmanager
def skip_the_digest_check() -> Iterator[None]:
    """A worker keeps what a commit gave it, whatever digest the commit names."""
    apply = replica_slots.apply_commit

    def trusting(slot: Any, *a: Any, **k: Any) -> None:
        try:
            apply(slot, *a, **k)
        except CorruptDataError:
            if not slot.differs:
                raise
            slot.differs = ""

    with mock.patch.object(replica_jobs, "apply_commit", trusting):
        yield


@contextmanager
def divide_by_the_configured_workers() -> Iterator[None]:
    """The mean is over all workers of the configuration, not over those who contributed."""

    def shares(c: Coordinator, answers: Any) -> list[float]:
        return [1.0 / c.config.topology.workers for _ in answers]

    with mock.patch.object(lateness, "shares", shares):
        yield


@contextmanager
def forget_the_rollback() -> Iterator[None]:
    """Error feedback believes that a contribution that did not count had counted."""

    def keep(self: feedback.ErrorFeedback) -> None:
        self.commit()

    with mock.patch.object(feedback.ErrorFeedback, "rollback", keep):
        yield


@contextmanager
def take_over_without_a_vote() -> Iterator[None]:
    """The standby leads as soon as its coordinator is away and anybody has answered."""
    with mock.patch.object(bond.Bond, "ended_by_standby", lambda self: True):
        yield


@contextmanager
def take_over_in_the_same_epoch() -> Iterator[None]:
    """The standby leads on without raising the epoch."""
    take_over = Lead.take_over

    def quietly(self: Lead, node: str, chain: Any, now: float) -> list[Action]:
        epoch, actions = self.coordinator.epoch, take_over(self, node, chain, now)
        self.coordinator.epoch = epoch
        return actions

    with mock.patch.object(Lead, "take_over", quietly):
        yield


@contextmanager
def apply_commits_out_of_order() -> Iterator[None]:
    """A worker applies whatever commit is here, though the one before it is not."""
    take = replica_jobs.open_waiting

    def any_order(r: Any, slot: Any) -> list[Action]:
        if slot.waiting and slot.kept is None and not slot.broken and not slot.restoring:
            first = min(slot.waiting)
            if first > slot.reached + 1 and slot.shard is not None:
                slot.shard.version = slot.target = first - 1
        return take(r, slot)

    def keen(self: replica.Replica, message: Any) -> list[Action]:
        slot = self.slots[message.fragment]
        if slot.shard is None or message.version <= slot.known:
            return []
        slot.waiting[message.version] = message
        return any_order(self, slot)

    with (
        mock.patch.object(replica_jobs, "open_waiting", any_order),
        mock.patch.object(replica.Replica, "_commit", keen),
    ):
        yield


@contextmanager
def move_momentum_on_an_empty_round() -> Iterator[None]:
    """A round that ends without a commit lets the outer momentum decay all the same."""
    close = contributions.close

    def decaying(c: Coordinator, p: int, ended: Any, *, aborted: bool) -> dict[int, int]:
        momentum = c.ledgers[p].shard.state.get("momentum") if aborted else None
        if momentum is not None:
            momentum.mul_(c.config.outer.momentum)
        return close(c, p, ended, aborted=aborted)

    with mock.patch.object(contributions, "close", decaying):
        yield


MUTATIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    made.__name__: made
    for made in (
        reply_before_persist,
        count_a_resend_twice,
        merge_on_arrival,
        wait_for_the_dead,
        keep_the_lease_of_the_dead,
        accept_a_former_life,
        skip_the_digest_check,
        divide_by_the_configured_workers,
        forget_the_rollback,
        take_over_without_a_vote,
        take_over_in_the_same_epoch,
        apply_commits_out_of_order,
        move_momentum_on_an_empty_round,
    )
}


def _kinds(s: Scenario) -> set[str]:
    return {fault.kind for fault in s.faults}


def _value(s: Scenario, section: str, key: str) -> object:
    return dict(dict(s.sections)[section]).get(key)


# Seeds in which a bug can show itself at all: the others are passed over.
WHERE: dict[str, Callable[[Scenario], bool]] = {
    "accept_a_former_life": lambda s: "restart worker" in _kinds(s),
    "keep_the_lease_of_the_dead": lambda s: "data" in dict(s.sections) and "kill worker" in _kinds(s),
    "wait_for_the_dead": lambda s: not s.delays_only and "kill worker" in _kinds(s),
    "skip_the_digest_check": lambda s: s.tampered,
    "divide_by_the_configured_workers": lambda s: not s.delays_only,
    "forget_the_rollback": lambda s: not s.delays_only and _value(s, "codec", "ef") == "on",
    "take_over_without_a_vote": lambda s: s.standby,
    "take_over_in_the_same_epoch": lambda s: s.standby and bool(_kinds(s) & {"kill coordinator", "isolate"}),
    "apply_commits_out_of_order": lambda s: (
        not s.delays_only and _value(s, "codec", "down") in ("relay", "mean_q", "q4_ef")
    ),
    "move_momentum_on_an_empty_round": lambda s: "nan" in _kinds(s) and s.workers == 1,
}


def caught(name: str, seeds: range = range(SEEDS)) -> tuple[int, str] | None:
    """The first seed under which the bug breaks a promise, and which; None if none does."""
    with ExitStack() as stack:
        undisturbed.cache_clear()  # results of runs with and without the bug must not mix
        stack.callback(undisturbed.cache_clear)
        stack.enter_context(MUTATIONS[name]())
        for seed in seeds:
            drawn = scenario(seed)
            found = "" if name in WHERE and not WHERE[name](drawn) else outcome_of(drawn).violation
            if found:
                return seed, found
    return None


def table(names: list[str]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield "| planted bug | first seed that catches it | broken promise: what was seen |"
    yield "|---|---|---|"
    for name in names:
        words = (MUTATIONS[name].__doc__ or "").strip()
        found = caught(name)
        seed, what = (str(found[0]), found[1].split(" (event")[0]) if found else ("none", "")
        yield f"| {words} | {seed} | {what.removeprefix('Violation: ')} |"


if __name__ == "__main__":
    for line in table(sys.argv[1:] or list(MUTATIONS)):
        print(line, flush=True)
