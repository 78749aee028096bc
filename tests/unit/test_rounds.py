"""When a round commits, waits or gives up; what silence means."""

from __future__ import annotations

from diloco.config import Fault
from diloco.coordinator.membership import Member, Status
from diloco.coordinator.rounds import GRACE_FLOOR_S, Answer, Arrivals, Round, Verdict


def answered(*indices: int, skipped: tuple[int, ...] = ()) -> Round:
    opened = Round(opened=100.0)
    for index in indices:
        opened.answers[index] = Answer(index, 1, 10, b"")
    opened.skipped.update({index: 1 for index in skipped})
    return opened


def test_a_round_commits_when_everyone_expected_has_answered() -> None:
    """No waiting once nobody is missing; members nobody expects do not matter."""
    assert answered(0, 1).judge([0, 1], 1, 30.0, 600.0, 100.0) is Verdict.COMMIT
    assert answered(0, 5).judge([0], 1, 30.0, 600.0, 100.0) is Verdict.COMMIT
    assert answered(0).judge([], 1, 30.0, 600.0, 100.0) is Verdict.COMMIT


def test_a_quorum_waits_for_the_rest_for_the_grace_period_only() -> None:
    """Grace starts when the quorum is there, and ends to the instant of `deadline`."""
    opened = answered(0)
    assert opened.judge([0, 1], 1, 30.0, 600.0, 110.0) is Verdict.WAIT
    assert opened.deadline(30.0, 600.0) == 140.0
    assert opened.judge([0, 1], 1, 30.0, 600.0, 139.9) is Verdict.WAIT
    assert opened.judge([0, 1], 1, 30.0, 600.0, 140.0) is Verdict.COMMIT


def test_without_a_quorum_a_round_ends_at_its_timeout() -> None:
    """One of three where two are needed: nothing before the timeout, then an abort."""
    opened = answered(0)
    assert opened.judge([0, 1, 2], 2, 30.0, 600.0, 699.0) is Verdict.WAIT
    assert opened.deadline(30.0, 600.0) == 700.0
    assert opened.judge([0, 1, 2], 2, 30.0, 600.0, 700.0) is Verdict.ABORT


def test_a_quorum_that_is_lost_again_restarts_the_wait() -> None:
    """A new life takes its answer back: the deadline must not stay in the past, or a driver would spin."""
    opened = answered(0, 1)
    assert opened.judge([0, 1, 2], 2, 30.0, 600.0, 110.0) is Verdict.WAIT
    del opened.answers[1]
    assert opened.judge([0, 1, 2], 2, 30.0, 600.0, 150.0) is Verdict.WAIT
    assert opened.deadline(30.0, 600.0) > 150.0


def test_a_skip_counts_as_an_answer_but_never_as_a_contribution() -> None:
    """It is not waited for; a round of skips alone aborts."""
    assert answered(0, skipped=(1,)).judge([0, 1], 1, 30.0, 600.0, 100.0) is Verdict.COMMIT
    assert answered(skipped=(0, 1)).judge([0, 1], 1, 30.0, 600.0, 100.0) is Verdict.ABORT
    assert answered(skipped=(0,)).judge([0, 1], 1, 30.0, 600.0, 100.0) is Verdict.WAIT
    assert answered(0, skipped=(1,)).waits_for([0, 1, 2]) == [2]


def test_grace_follows_the_spread_of_arrivals() -> None:
    """A floor, three times the observed spread above it, and the operator's word before both."""
    arrivals = Arrivals()
    assert arrivals.grace_s(Fault()) == GRACE_FLOOR_S
    arrivals.learn(0.0, 50.0)
    assert arrivals.grace_s(Fault()) == 150.0
    assert arrivals.grace_s(Fault(fixed_grace_s=2.0)) == 2.0
    for _ in range(60):
        arrivals.learn(0.0, 1.0)
    assert arrivals.grace_s(Fault()) == GRACE_FLOOR_S


def test_silence_makes_a_member_suspect_and_then_dead() -> None:
    """After 10 and 40 seconds by default, each announced by `expires`."""
    fault, member = Fault(), Member("w", 1, 1, last_seen=5.0, status=Status.ACTIVE)
    assert not member.expire(fault, 14.9)
    seen = []
    for now in (15.0, 45.0):
        assert member.expires(fault) == now
        assert member.expire(fault, now)
        seen.append((member.status, member.live))
    assert seen == [(Status.SUSPECT, True), (Status.DEAD, False)]
    assert member.expires(fault) is None
    assert not member.expire(fault, 1000.0)


def test_who_has_left_does_not_expire() -> None:
    """GONE is final until the next join."""
    member = Member("w", 1, 1, last_seen=0.0, status=Status.GONE)
    assert member.expires(Fault()) is None
    assert not member.expire(Fault(), 1e9)
