"""Peak rates of a worker's link, from its byte counts."""

from __future__ import annotations

from diloco.worker.rates import Peaks


def test_the_peak_is_the_highest_mean_over_a_second() -> None:
    """A quiet start, 3000 bytes within one second, quiet again: 24 kbit/s, and it is remembered."""
    peaks = Peaks()
    found = {}
    for tenths in range(60):
        sent = 300 * min(max(tenths - 20, 0), 10)
        found = peaks.seen(tenths / 10, sent, 2 * tenths)
    assert found["peak_up_bps"] == 24_000.0
    assert abs(found["peak_down_bps"] - 160.0) < 1e-6


def test_a_burst_is_spread_over_the_second_in_which_it_falls() -> None:
    """One sample later everything is there: it is no more than its bytes per second."""
    peaks = Peaks()
    for now in (0.0, 0.5, 1.0, 1.001, 1.5):
        found = peaks.seen(now, 8000 if now > 1 else 0, 0)
    assert 60_000 < found["peak_up_bps"] <= 64_000


def test_less_than_a_second_has_no_peak_yet() -> None:
    peaks = Peaks()
    peaks.seen(5.0, 0, 0)
    assert peaks.seen(5.9, 10**9, 0) == {"peak_up_bps": 0.0, "peak_down_bps": 0.0}
