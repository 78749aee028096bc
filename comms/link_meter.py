"""What a link gave: the rate that transfers reached in each direction, and the shortest round trip. No I/O.

Written on the transport's loop, read from any thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

LEAST_BYTES = 32 << 10  # shorter busy periods say more about the round trip than about the rate
NEWEST = 256  # busy periods that count


@dataclass(frozen=True, slots=True)
class LinkRates:
    """bit/s towards the coordinator and back, seconds there and back; NaN where nothing was measured."""

    up_bps: float = float("nan")
    down_bps: float = float("nan")
    rtt_s: float = float("nan")


@dataclass(slots=True)
class _Direction:
    active: int = 0
    since: float = 0.0
    at: int = 0  # bytes when the period began
    periods: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=NEWEST))


class LinkMeter:
    """A direction is busy while at least one transfer is under way in it.

    Its rate is the best mean over one busy period of at least `LEAST_BYTES`, a round trip taken off: with pacing, or
    with a slow sender, less than the link could do. `clock` is in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._up, self._down = _Direction(), _Direction()
        self._trips: deque[float] = deque(maxlen=NEWEST)

    @contextlib.contextmanager
    def up(self, counted: Callable[[], int]) -> Iterator[None]:
        """A transfer towards the coordinator; `counted()` is the bytes sent so far, of all transfers together."""
        with self._busy(self._up, counted):
            yield

    @contextlib.contextmanager
    def down(self, counted: Callable[[], int]) -> Iterator[None]:
        with self._busy(self._down, counted):
            yield

    @contextlib.contextmanager
    def round_trip(self) -> Iterator[None]:
        """A call with a small request and a small answer; one that fails does not count."""
        begun = self._clock()
        yield
        self._trips.append(self._clock() - begun)

    def read(self) -> LinkRates:
        rtt = min(tuple(self._trips), default=float("nan"))
        return LinkRates(_best(self._up, rtt), _best(self._down, rtt), rtt)

    @contextlib.contextmanager
    def _busy(self, way: _Direction, counted: Callable[[], int]) -> Iterator[None]:
        if way.active == 0:
            way.since, way.at = self._clock(), counted()
        way.active += 1
        try:
            yield
        finally:
            way.active -= 1
            size, seconds = counted() - way.at, self._clock() - way.since
            if way.active == 0 and size >= LEAST_BYTES and seconds > 0:
                way.periods.append((size, seconds))


def _best(way: _Direction, rtt_s: float) -> float:
    """The round trip is taken off, but never more than half of a period: it may have been measured on a busy link."""
    wait = rtt_s if rtt_s > 0 else 0.0
    rates = [8 * size / max(seconds - wait, seconds / 2) for size, seconds in tuple(way.periods)]
    return max(rates, default=float("nan"))
