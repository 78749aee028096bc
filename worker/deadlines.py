"""When each fragment in flight is wanted, on the clock: from inner steps still to go and how long steps take. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

# The shortest of these counts: a long step (an evaluation, a busy machine) must not make a deadline look far away.
RECENT = 8


class Deadlines:
    """A fragment due at inner step s is wanted at: end of the newest step + steps still to go * shortest recent step."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._at: float | None = None

    def stepped(self, now: float, seconds: float | None) -> None:
        """An inner step ended at `now` after `seconds` of computing; None when that is not known."""
        self._at = now
        if seconds is not None:
            self._recent.append(seconds)

    def of(self, due: Iterable[tuple[int, int]], step: int, stride: float) -> dict[int, float]:
        """By fragment, for (fragment, inner step at which it is due) at inner step `step`, in seconds.

        `stride` is how far one step of this worker moves the run's step. Empty until a step has been timed.
        """
        if self._at is None or not self._recent:
            return {}
        step_s = min(self._recent) / stride
        return {fragment: self._at + max(0, at - step) * step_s for fragment, at in due}
