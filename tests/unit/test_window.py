"""How much is under way before an answer is waited for, on links of several speeds, in virtual time."""

from __future__ import annotations

import pytest

from diloco.comms.pacing import AIM_S, FIRST_SPAN, FLOORS, MAX_SPAN, MIN_SLICE, MIN_SPAN, Window


def settle(window: Window, link: float, rtt: float, spans: int = 40) -> float:
    """Two spans at a time over `link` bytes/s and `rtt`; the last one's time from its beginning to its answer."""
    free_at = 0.0
    begun = [0.0, 0.0]
    seconds = 0.0
    for number in range(spans):
        way = number % 2
        size = window.size
        free_at = max(free_at, begun[way]) + size / link
        seconds = free_at + rtt - begun[way]
        window.answered(size, seconds, size, 2 * size)
        begun[way] = free_at + rtt
    return seconds


@pytest.mark.parametrize("link", [60e3, 250e3, 1.25e6, 12.5e6])
@pytest.mark.parametrize("rtt", [0.001, 0.05, 0.6])
def test_what_is_under_way_fills_the_link_and_no_more(link: float, rtt: float) -> None:
    """Two spans cover at least a round trip, so that the link is never idle, and pass within about a second."""
    window = Window()
    seconds = settle(window, link, rtt)
    assert seconds - rtt < 2.5 * AIM_S
    assert 2 * window.size >= min(0.5 * link * (rtt + AIM_S / 2), 2 * MAX_SPAN)


def test_a_fast_link_gets_long_spans() -> None:
    window = Window()
    settle(window, 5e9, 0.0001)
    assert window.size == MAX_SPAN


def test_a_link_that_becomes_slow_gets_short_ones_at_once() -> None:
    """One late answer is enough: what waits in buffers must not grow."""
    window = Window()
    settle(window, 125e6, 0.02)
    large = window.size
    window.answered(large, 60.0, large, large)
    assert window.size < large / 50
    window.answered(window.size, 600.0, window.size, window.size)
    assert window.size == MIN_SPAN


def test_a_short_span_says_nothing_about_longer_ones() -> None:
    """The end of an object, or a paced slice, is answered quickly on a slow link too."""
    window = Window()
    for _ in range(20):
        window.answered(FIRST_SPAN // 4, 0.05, FIRST_SPAN, FIRST_SPAN // 4)
    assert window.size == FIRST_SPAN


def test_a_short_span_that_is_late_says_that_others_are_too_long_only_with_others_under_way() -> None:
    """The tail of an object behind full spans waited for these; alone it waited for something that no span length cures."""
    window = Window()
    settle(window, 1.25e6, 0.05)
    before = window.size
    for _ in range(3):
        window.answered(20, 0.05 + 2 * AIM_S, before, 20)
    assert window.size == before
    window.answered(20, 0.05 + 2 * AIM_S, before, 2 * before)
    assert before / 4 < window.size < before


def test_the_floor_is_the_shortest_time_of_late() -> None:
    """Zero before anything was measured: nothing is then held to be a round trip away."""
    window = Window()
    assert window.floor == 0.0
    for seconds in (0.3, 0.2, 0.4):
        window.answered(FIRST_SPAN, seconds, FIRST_SPAN, FIRST_SPAN)
    assert window.floor == 0.2
    settle(window, 1e9, 0.7, spans=2 * FLOORS)
    assert window.floor == pytest.approx(0.7, rel=0.1)


@pytest.mark.parametrize("link", [60e3, 1.25e6, 12.5e6])
def test_what_keeps_the_way_busy_is_about_a_round_trip_of_the_link(link: float) -> None:
    """Enough that it is not idle until the next span, far less than a span."""
    window = Window()
    settle(window, link, 0.05)
    assert max(MIN_SLICE, 0.5 * link * 0.05) <= window.fill <= max(MIN_SLICE, window.size / 4)


def test_before_the_first_answer_little_is_sent_beside_something_urgent() -> None:
    assert Window().fill == MIN_SLICE
