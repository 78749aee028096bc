"""What a link gave: rates of busy periods, and the shortest round trip."""

from __future__ import annotations

import contextlib
import math

import pytest

from diloco.comms.link_meter import LEAST_BYTES, NEWEST, LinkMeter
from diloco.comms.local import LocalConnection


class World:
    """A clock and a counter that stand until they are moved."""

    def __init__(self) -> None:
        self.now, self.bytes = 0.0, 0
        self.meter = LinkMeter(lambda: self.now)

    def move(self, seconds: float, size: int = 0) -> None:
        self.now += seconds
        self.bytes += size

    def upload(self, seconds: float, size: int) -> None:
        with self.meter.up(lambda: self.bytes):
            self.move(seconds, size)

    def trip(self, seconds: float) -> None:
        with self.meter.round_trip():
            self.move(seconds)


def test_the_rate_is_bits_over_time_less_a_round_trip() -> None:
    """1 MB in 1.1 s on a way of 0.1 s: 8 Mbit/s. Directions are apart."""
    world = World()
    world.trip(0.3)
    world.trip(0.1)
    world.upload(1.1, 1_000_000)
    found = world.meter.read()
    assert found.up_bps == pytest.approx(8e6) and found.rtt_s == pytest.approx(0.1)
    assert math.isnan(found.down_bps)
    with world.meter.down(lambda: world.bytes):
        world.move(2.1, 1_000_000)
    assert world.meter.read().down_bps == pytest.approx(4e6)


def test_transfers_at_the_same_time_share_one_period() -> None:
    """Two of them side by side use the link together: their bytes count over the time that either took."""
    world = World()
    with world.meter.up(lambda: world.bytes):
        world.move(1.0, 500_000)
        with world.meter.up(lambda: world.bytes):
            world.move(1.0, 1_000_000)
        world.move(1.0, 500_000)
    assert world.meter.read().up_bps == pytest.approx(8 * 2_000_000 / 3)


def test_the_best_period_counts_and_short_ones_say_nothing() -> None:
    """A sender that dawdles tells of itself; a few bytes tell of the round trip."""
    world = World()
    world.upload(0.001, LEAST_BYTES - 1)
    assert math.isnan(world.meter.read().up_bps)
    world.upload(1.0, 1_000_000)
    world.upload(10.0, 1_000_000)
    assert world.meter.read().up_bps == pytest.approx(8e6)


def test_old_periods_are_forgotten() -> None:
    """A link may get worse."""
    world = World()
    world.upload(0.1, 1_000_000)
    for _ in range(NEWEST):
        world.upload(1.0, 1_000_000)
    assert world.meter.read().up_bps == pytest.approx(8e6)


def test_a_round_trip_on_a_busy_link_takes_off_half_at_most() -> None:
    """It may have been longer than a transfer was."""
    world = World()
    world.trip(5.0)
    world.upload(1.0, 1_000_000)
    assert world.meter.read().up_bps == pytest.approx(16e6)


def test_failed_calls_and_transfers_leave_no_trace_that_lies() -> None:
    """A call that failed is no round trip; a transfer that broke ends its period."""
    world = World()
    with contextlib.suppress(OSError), world.meter.round_trip():
        raise OSError
    assert math.isnan(world.meter.read().rtt_s)
    with contextlib.suppress(OSError), world.meter.up(lambda: world.bytes):
        world.move(1.0, 1_000_000)
        raise OSError
    world.move(100.0)
    world.upload(1.0, 1_000_000)
    assert world.meter.read().up_bps == pytest.approx(8e6)


def test_a_connection_without_a_link_has_nothing_to_say() -> None:
    """In one process nothing is measured."""
    rates = LocalConnection.rates(object.__new__(LocalConnection))
    assert math.isnan(rates.up_bps) and math.isnan(rates.down_bps) and math.isnan(rates.rtt_s)
