"""Where a worker's time goes: computing, waiting for communication, and communication hidden behind computing."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Clock:
    """Where a worker's time goes, in seconds. Communication is hidden where computing went on meanwhile."""

    exposed: float = 0.0
    compute: float = 0.0
    in_flight: float = 0.0
    flying_since: float | None = None
    step_s: float = 0.0  # recent mean of the computing time of a step

    def computed(self, seconds: float) -> None:
        self.compute += seconds
        self.step_s = 0.9 * self.step_s + 0.1 * seconds if self.step_s else seconds

    def flying(self, now: float, any_in_flight: bool) -> None:
        if any_in_flight and self.flying_since is None:
            self.flying_since = now
        elif not any_in_flight and self.flying_since is not None:
            self.in_flight += now - self.flying_since
            self.flying_since = None

    def figures(self, now: float, tokens: int) -> dict[str, float]:
        """The fields of `Progress` that follow from the clock, for `tokens` trained on so far."""
        elapsed = self.compute + self.exposed
        flying = self.in_flight + (now - self.flying_since if self.flying_since is not None else 0.0)
        return {
            "tokens_per_s": tokens / elapsed if elapsed else 0.0,
            "steps_per_s": 1.0 / self.step_s if self.step_s else 0.0,
            "compute_s": self.compute,
            "exposed_s": self.exposed,
            "hidden_s": max(0.0, flying - self.exposed),
        }
