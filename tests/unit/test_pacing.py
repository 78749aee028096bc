"""The pacer in virtual time: even rates, kept deadlines, the most urgent fragment first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.comms.pacing import MIN_SLICE, Claim, Pacer

KIB = 1 << 10
Log = list[tuple[float, int, int]]  # when the bytes were through, fragment, how many


def drive(
    pacer: Pacer,
    claims: list[Claim],
    *,
    most: int = 1 << 20,
    link: float = math.inf,
    news: Mapping[float, tuple[Mapping[int, float], float]] | None = None,
) -> Log:
    """Each claim enters at its `since` and feeds one stream; a stream's bytes take `link` bytes/s, one after another.

    `news`: at these times the pacer is told these deadlines and this share.
    """
    events: list[tuple[float, int, int]] = []
    entering = {id(c): c for c in claims}
    for number, claim in enumerate(claims):
        heapq.heappush(events, (claim.since, number, 0))
    told = sorted((news or {}).items())
    waiting: set[int] = set()
    log: Log = []
    free_at = -math.inf
    for _ in range(200_000):
        if not events:
            break
        now, number, size = heapq.heappop(events)
        while told and told[0][0] <= now:
            at, (deadlines, share) = told.pop(0)
            pacer.expect(deadlines, share, at)
        claim = claims[number]
        if entering.pop(id(claim), None) is not None:
            pacer.enter(claim, now)
        if size:
            pacer.answered(claim, size)
            log.append((now, claim.fragment, size))
            if not claim.left:
                pacer.leave(claim, now)
        waiting.add(number)
        for other in sorted(waiting):
            mine = claims[other]
            if mine not in pacer or not mine.left:
                waiting.discard(other)
                continue
            wait = pacer.wait(mine, now)
            if wait == 0:
                start, end = pacer.take(mine, most, now)
                free_at = max(free_at, now) + (end - start) / link
                waiting.discard(other)
                heapq.heappush(events, (free_at, other, end - start))
            elif wait is not None:
                waiting.discard(other)
                heapq.heappush(events, (now + wait, other, 0))
    assert not events, "the pacer does not come to an end"
    return log


def peak(log: Log, window: float = 1.0) -> float:
    """Most bytes in any window, per second."""
    return max(sum(n for at, _, n in log if start <= at < start + window) / window for start, _, _ in log)


def spread(pacer: Pacer, deadlines: Mapping[int, float], share: float) -> Pacer:
    pacer.expect(deadlines, share, 0.0)
    return pacer


def test_an_upload_fills_its_window_at_its_mean_rate() -> None:
    """10 MB in half of 20 s: 1 MB/s from beginning to end, where without pacing all of it leaves at once."""
    size = 10_000_000
    log = drive(spread(Pacer(), {0: 20.0}, 0.5), [Claim(0, 0.0, 0, size)])
    assert sum(n for _, _, n in log) == size
    assert 9.5 < log[-1][0] <= 10.0
    assert peak(log) <= 1.15 * size / 10
    unpaced = drive(spread(Pacer(), {0: 20.0}, 0.0), [Claim(0, 0.0, 0, size)])
    assert unpaced[-1][0] == 0.0 and peak(unpaced) == size


def test_a_small_fragment_over_a_long_window_leaves_in_small_slices() -> None:
    """100 KiB in 100 s are not one burst of a whole chunk."""
    log = drive(spread(Pacer(), {0: 200.0}, 0.5), [Claim(0, 0.0, 0, 100 * KIB)])
    assert max(n for _, _, n in log) == MIN_SLICE
    assert log[-1][0] <= 100.0


def test_what_is_urgent_goes_in_the_order_in_which_it_was_asked_for() -> None:
    """Starting values that are asked for again, because the link is slow, do not starve those still to come."""
    again, missing = Claim(0, 7.0, 0, 100 * KIB, urgent=True), Claim(4, 1.0, 0, 100 * KIB, urgent=True)
    log = drive(Pacer(), [again, missing], link=10 * KIB, most=MIN_SLICE)
    assert log[-1][0] > again.since > log[0][0]
    assert [fragment for _, fragment, _ in log] == sorted((f for _, f, _ in log), reverse=True)


def test_what_is_urgent_goes_at_once_and_what_nobody_waits_for_goes_last() -> None:
    """Starting values and snapshots; then what has a deadline; then, for example, a contribution to a round that is over."""
    sizes = {0: 5 << 20, 1: 1_000_000, 2: 1_000_000}
    claims = [Claim(1, 0.0, 0, sizes[1]), Claim(2, 0.1, 0, sizes[2]), Claim(0, 3.0, 0, sizes[0], urgent=True)]
    log = drive(spread(Pacer(), {1: 20.0}, 0.5), claims)
    ends = {f: max(at for at, g, _ in log if g == f) for f in sizes}
    assert ends[0] == 3.0
    assert 9.0 < ends[1] <= ends[2] <= 10.0


def test_without_any_deadline_nothing_is_held_back() -> None:
    """Before the first step has been timed."""
    log = drive(spread(Pacer(), {}, 0.5), [Claim(0, 0.0, 0, 5 << 20), Claim(1, 0.0, 0, 5 << 20)])
    assert log[-1][0] == 0.0


def test_a_passed_deadline_opens_the_link() -> None:
    """The rest goes at full speed, debts of earlier slices forgotten."""
    pacer = spread(Pacer(), {0: 20.0}, 0.5)
    claim = Claim(0, 0.0, 0, 10_000_000)
    pacer.enter(claim, 0.0)
    _, end = pacer.take(claim, 1 << 20, 0.0)
    assert pacer.wait(claim, 0.01) not in (0.0, None)
    assert pacer.wait(claim, 10.0) == 0.0 and math.isinf(pacer.rate(10.0))
    assert pacer.take(claim, 1 << 20, 10.0) == (end, end + (1 << 20))


def test_a_deadline_that_comes_nearer_raises_the_rate_from_then_on() -> None:
    """Steps turn out shorter: at 4 s the merge is expected at 12 s rather than at 20 s."""
    size = 10_000_000
    news = {4.0: ({0: 12.0}, 0.5)}
    log = drive(spread(Pacer(), {0: 20.0}, 0.5), [Claim(0, 0.0, 0, size)], news=news)
    before = sum(n for at, _, n in log if at < 4)
    assert before == pytest.approx(0.4 * size, rel=0.05)
    assert log[-1][0] <= 6.0


def test_the_fragment_that_is_merged_first_gets_the_link() -> None:
    """Whatever the order in which they were sent, and also when the urgent one comes last."""
    claims = [Claim(0, 0.0, 0, 1 << 20), Claim(1, 0.0, 0, 1 << 20), Claim(2, 1.0, 0, 1 << 20)]
    log = drive(spread(Pacer(), {0: 30.0, 1: 20.0, 2: 10.0}, 0.0), claims, most=64 * KIB, link=500_000)
    ends = {f: max(at for at, g, _ in log if g == f) for f in (0, 1, 2)}
    assert ends[2] < ends[1] < ends[0]
    assert ends[2] < 1.0 + (1 << 20) / 500_000 + 0.2  # the newcomer waits for the chunk under way alone


def test_of_one_fragment_what_was_asked_for_first_is_through_first() -> None:
    """Two versions of a value on their way: the older one is needed for the newer one, and is not held up by it."""
    pacer = spread(Pacer(), {0: 60.0}, 0.5)
    newer, older = Claim(0, 1.0, 0, 100_000), Claim(0, 0.0, 0, 100_000)
    pacer.enter(newer, 1.0)
    pacer.enter(older, 1.0)
    assert pacer.wait(newer, 1.0) is None and pacer.wait(older, 1.0) == 0.0
    while older.left:
        pacer.take(older, 1 << 20, 1.0)
    assert pacer.wait(newer, 1.0) is not None


def test_frames_that_are_asked_for_at_once_go_side_by_side() -> None:
    """A relayed commit is several objects that are wanted at the same time."""
    pacer = spread(Pacer(), {0: 10.0, 1: 20.0}, 0.0)
    first, second, other = Claim(0, 0.0, 0, 100), Claim(0, 0.0, 0, 100), Claim(1, 0.0, 0, 100)
    for claim in (first, second, other):
        pacer.enter(claim, 0.0)
    assert pacer.wait(first, 0.0) == pacer.wait(second, 0.0) == 0.0
    assert pacer.wait(other, 0.0) is None
    for claim in (first, second):
        pacer.take(claim, 100, 0.0)
    assert pacer.wait(other, 0.0) == 0.0


def test_beside_the_last_bytes_of_what_is_waited_for_only_as_much_leaves_as_keeps_the_way_busy() -> None:
    """On a slow link a whole span of the next fragment would hold them up for as long as it takes itself."""
    pacer = spread(Pacer(), {0: 10.0, 1: 20.0}, 0.0)
    first, other = Claim(0, 0.0, 0, 100 * KIB), Claim(1, 0.0, 0, 100 * KIB)
    for claim in (first, other):
        pacer.enter(claim, 0.0)
    for _ in range(2):
        pacer.take(first, 50 * KIB, 0.0, 6 * KIB)
    assert pacer.wait(other, 0.0) == 0.0
    assert pacer.take(other, 50 * KIB, 0.0, 6 * KIB) == (0, 6 * KIB)
    assert pacer.wait(other, 0.0) is None  # one such piece at a time
    pacer.answered(other, 6 * KIB)
    assert pacer.wait(other, 0.0) == 0.0
    for _ in range(2):
        pacer.answered(first, 50 * KIB)
    assert pacer.take(other, 50 * KIB, 0.0, 6 * KIB) == (6 * KIB, 56 * KIB)
    assert pacer.wait(other, 0.0) == 0.0


def test_an_attempt_that_failed_makes_room_and_its_transfer_keeps_its_window() -> None:
    """The second attempt is measured from when the transfer was first wanted."""
    pacer = spread(Pacer(), {0: 20.0, 1: 30.0}, 0.5)
    lost, other = Claim(0, 0.0, 0, 10_000_000), Claim(1, 0.0, 0, 100)
    pacer.enter(lost, 0.0)
    pacer.enter(other, 0.0)
    assert pacer.wait(other, 1.0) is None
    pacer.leave(lost, 1.0)
    pacer.leave(lost, 1.0)
    assert lost not in pacer and pacer.wait(other, 1.0) == 0.0
    pacer.leave(other, 1.0)
    pacer.enter(lost, 6.0)
    assert pacer.rate(6.0) == pytest.approx(10_000_000 / 4)


def test_an_urgent_newcomer_does_not_wait_for_the_debt_of_a_slow_one() -> None:
    """16 KiB at 160 B/s are a debt of 100 s; what is wanted in 2 s starts within a fraction of that."""
    pacer = spread(Pacer(), {0: 2000.0, 1: 2.0}, 0.5)
    slow, urgent = Claim(0, 0.0, 0, 160_000), Claim(1, 0.0, 0, 1_000_000)
    pacer.enter(slow, 0.0)
    pacer.take(slow, 1 << 20, 0.0)
    pacer.enter(urgent, 0.0)
    wait = pacer.wait(urgent, 0.0)
    assert wait is not None and wait < 0.02


objects = st.lists(
    st.tuples(
        st.integers(1, 4_000_000),  # bytes
        st.floats(0, 10),  # sent at
        st.floats(0.5, 30),  # until the merge
    ),
    min_size=1,
    max_size=5,
)


@given(objects=objects, share=st.floats(0.1, 0.9))
def test_every_transfer_is_through_within_its_share_of_the_time(
    objects: list[tuple[int, float, float]], share: float
) -> None:
    """However many overlap, as long as the link itself is fast enough."""
    deadlines = {i: since + window for i, (_, since, window) in enumerate(objects)}
    claims = [Claim(i, since, 0, size) for i, (size, since, _) in enumerate(objects)]
    log = drive(spread(Pacer(), deadlines, share), claims)
    for i, (size, since, window) in enumerate(objects):
        mine = [(at, n) for at, f, n in log if f == i]
        assert sum(n for _, n in mine) == size
        assert mine[-1][0] <= since + share * window + 1e-6


@given(objects=objects, link=st.floats(50_000, 2_000_000))
def test_pacing_never_ends_later_than_its_window_or_than_without_it(
    objects: list[tuple[int, float, float]], link: float
) -> None:
    """On a link of any speed: one at a time, the last byte is at D or, when the link is the limit, where it always was."""
    size, since, window = objects[0]
    paced = drive(
        spread(Pacer(), {0: since + window}, 0.5), [Claim(0, since, 0, size)], most=64 * KIB, link=link
    )
    free = since + size / link
    slice_s = max(MIN_SLICE, 64 * KIB) / link
    assert paced[-1][0] <= max(since + window / 2, free) + slice_s + 1e-6
