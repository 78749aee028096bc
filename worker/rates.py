"""The highest rates at which a worker's bytes crossed its link, over windows of a second. Pure.

The mean to compare them with is bytes over time. Bytes count when they are handed to the transport: on a link slower
than the first span of a transfer, its buffers make the peak look a little higher than the wire's.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 1.0


class Peaks:
    """Bit/s up and down: the highest mean between a sample and the newest one at least `WINDOW_S` before it."""

    def __init__(self) -> None:
        self._up_bps = self._down_bps = 0.0
        self._samples: deque[tuple[float, int, int]] = deque()

    def seen(self, now: float, up: int, down: int) -> dict[str, float]:
        """`up` and `down` bytes have crossed the link by `now`, in seconds; the peaks so far, as `Progress` names them."""
        self._samples.append((now, up, down))
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()
        then, up_then, down_then = self._samples[0]
        if (seconds := now - then) >= WINDOW_S:
            self._up_bps = max(self._up_bps, 8 * (up - up_then) / seconds)
            self._down_bps = max(self._down_bps, 8 * (down - down_then) / seconds)
        return {"peak_up_bps": self._up_bps, "peak_down_bps": self._down_bps}
