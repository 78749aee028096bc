"""Learning rates, momenta and betas as pure functions of the step index.

`multiplier` is the shape of a schedule; `settings_at` is what a training loop sets on every parameter group at one
step of a run; `scheduler` is the same shape for a loop that drives a torch scheduler. What the shapes promise in
theory is in `schedules_bound`. Steps are inner steps, counted from 0, and are never reset by outer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diloco.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from diloco.config import RunConfig

KINDS = ("constant", "linear", "wsd", "wsd-sqrt", "cosine", "invsqrt")
COOLING = ("wsd", "wsd-sqrt")  # the kinds that have a cooldown of their own
WARMUPS = ("linear", "exponential")


def multiplier(
    kind: str,
    step: int,
    total: int,
    warmup: int,
    *,
    final: float | None = None,
    cooldown: int | None = None,
    scale: float | None = None,
    warmup_kind: str = "linear",
    warmup_from: float = 0.01,
) -> float:
    """The factor f(s) on each group's peak learning rate, for s = `step`, T = `total`, W = `warmup` (steps).

        s < W      f = (s+1)/W                                (every kind; linear warm-up)
                   f = r^(1 - (s+1)/W)                        (exponential warm-up; r = `warmup_from`)
        constant   f = 1
        wsd        f = 1 until T-C, then m + (1-m)(T-s)/C       (C = `cooldown`, m = `final`)
        wsd-sqrt   f = 1 until T-C, then m + (1-m)(1 - sqrt((s-T+C)/C))
        linear     wsd with C = T-W
        cosine     f = m + (1-m)(1 + cos(pi (s-W)/(T-W)))/2
        invsqrt    f = sqrt(a/(s+a))                          (a = `scale`; horizon free)

    Defaults: `final` 0 (0.1 for cosine); `cooldown` a fifth of the run, at most T-W; `scale` W, or 1 % of the run
    without warm-up. A step at or past T holds the end value, because schedulers ask once more after the last step.
    Both warm-ups reach the peak at their last step; a slower start is most of what muP's lower rates do for a wide
    model (arXiv 2510.19093; this form is ours). Linear decay to zero: arXiv 2310.07831.

    Raises:
        ConfigError: unknown kind, negative count, W or W+C beyond T, `final` outside [0, 1], `scale` not positive,
            `warmup_from` outside (0, 1].
    """
    if step < 0:
        raise ConfigError(f"schedule.step is {step}: give a count of steps, 0 or more")
    shape = _Shape(kind, total, warmup, final, cooldown, scale, warmup_kind, warmup_from)
    problems = shape.problems()
    if problems:
        raise ConfigError("; ".join(problems))
    return shape.at(step)


def multipliers(kind: str, total: int, warmup: int = 0, **options: Any) -> list[float]:
    """`multiplier` at steps 0..T-1, with its options and errors."""
    shape = _Shape(kind, total, warmup, **options)
    problems = shape.problems()
    if problems:
        raise ConfigError("; ".join(problems))
    return [shape.at(step) for step in range(total)]


# ---- a run's groups ----


@dataclass(frozen=True, slots=True)
class Peak:
    """One parameter group's values as built, which the schedule scales: taken before the first step."""

    lr: float
    matrix: bool  # the group of hidden matrices, which may have a cooldown of its own
    momentum: float | None = None  # of a matrix group that has one
    betas: tuple[float, float] | None = None  # of a group without momentum, that is of Adam's kind


def peaks_of(param_groups: Sequence[Mapping[str, Any]]) -> tuple[Peak, ...]:
    """What `settings_at` needs to know of freshly built groups; a group named "matrix" is one of matrices."""
    found = []
    for group in param_groups:
        matrix = group.get("name") == "matrix"
        momentum = float(group["momentum"]) if matrix and "momentum" in group else None
        betas = group.get("betas") if "momentum" not in group else None
        found.append(
            Peak(float(group["lr"]), matrix, momentum, None if betas is None else (betas[0], betas[1]))
        )
    return tuple(found)


def settings_at(config: RunConfig, peaks: Sequence[Peak], step: int) -> list[dict[str, Any]]:
    """The values to put on each parameter group before inner step `step` (from 0): one dict per peak, in order.

    Always ``lr`` = peak lr * f(s), with `config.schedule.matrix_cooldown` instead of `.cooldown` for matrices.
    ``momentum``, if `schedule.momentum_warmup` or `.momentum_cooldown` is set and the matrix group has one: from
    `schedule.momentum_low` up to the group's own over the warm-up, and back over the last steps (`muon_momentum`).
    ``betas``, if `schedule.cooldown_beta2` is set and the group is of Adam's kind: its beta2 raised to that value from
    the first step of the group's cooldown (Dremov et al., TMLR 2025). Pure: the same arguments, the same values.

        peaks = peaks_of(optimizer.param_groups)            # once, before anything is loaded
        apply(optimizer.param_groups, settings_at(config, peaks, optimizer.inner_step))
    """
    s, total = config.schedule, config.run.inner_steps_total
    found = []
    for peak in peaks:
        cooldown = s.matrix_cooldown if peak.matrix and s.matrix_cooldown is not None else s.cooldown
        shape = _Shape(
            s.kind,
            total,
            s.warmup,
            final_fraction(s.kind, s.final, config.optim.kind),
            cooldown,
            s.scale,
            s.warmup_kind,
            s.warmup_from,
        )
        new: dict[str, Any] = {"lr": peak.lr * shape.at(step)}
        if peak.momentum is not None and (s.momentum_warmup or s.momentum_cooldown):
            new["momentum"] = muon_momentum(
                step,
                total,
                low=min(s.momentum_low, peak.momentum),
                high=peak.momentum,
                rise=s.momentum_warmup,
                fall=s.momentum_cooldown,
            )
        if peak.betas is not None and s.cooldown_beta2 is not None:
            cooling = step >= total - shape.cooling()
            new["betas"] = (peak.betas[0], s.cooldown_beta2 if cooling else peak.betas[1])
        found.append(new)
    return found


def apply(param_groups: Sequence[MutableMapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> None:
    """Put `settings_at`'s values on an optimizer's groups, which must be as many."""
    for group, new in zip(param_groups, settings, strict=True):
        group.update(new)


def scheduler(
    optimizer: torch.optim.Optimizer, kind: str, total: int, warmup: int = 0, **options: Any
) -> torch.optim.lr_scheduler.LambdaLR:
    """A torch scheduler with `multiplier`'s shape for a loop of your own: call its ``step()`` once per inner step.

    `options` are `multiplier`'s. The optimizer's current learning rates are the peaks.

    Raises:
        ConfigError: as `multiplier`, at once.
    """
    from torch.optim.lr_scheduler import LambdaLR

    multiplier(kind, 0, total, warmup, **options)
    return LambdaLR(optimizer, lambda step: multiplier(kind, step, total, warmup, **options))


def final_fraction(kind: str, final: float | None, optim: str = "adamw") -> float:
    """The fraction of the peak at which a run ends: `final`, or 0.1 for cosine and for the MD optimizer, else 0."""
    return final if final is not None else (0.1 if kind == "cosine" or optim in ("md", "md-adam") else 0.0)


def problems(
    kind: str,
    total: int,
    warmup: int,
    *,
    final: float | None = None,
    cooldown: int | None = None,
    scale: float | None = None,
    warmup_kind: str = "linear",
    warmup_from: float = 0.01,
) -> list[str]:
    """What is impossible about such a schedule, in words that name the key and its value; empty if nothing is."""
    return _Shape(kind, total, warmup, final, cooldown, scale, warmup_kind, warmup_from).problems()


# ---- other scalars ----


def muon_momentum(
    step: int,
    total: int,
    *,
    low: float = 0.85,
    high: float = 0.95,
    rise: int = 300,
    fall: int = 50,
) -> float:
    """Muon's optional momentum schedule: `low` to `high` over the first `rise` steps, back over the last `fall`."""
    up = min(step / rise, 1.0) if rise else 1.0
    down = min(max(total - step, 0) / fall, 1.0) if fall else 1.0
    return low + (high - low) * min(up, down)


def anytime_rate(step: int, half_life: float = 0.1) -> float:
    """Rate tau_t of the running average ``avg += tau_t (theta - avg)`` whose half-life is `half_life` * t.

    `step` is t, counted from 1; tau = 1 - 2^(-1/(h t)), and 1 while h t < 1 (arXiv 2602.03702).
    """
    if step < 1:
        raise ConfigError(f"step is {step}: averaging counts steps from 1")
    if not 0 < half_life <= 1:
        raise ConfigError(f"half_life is {half_life}: give a fraction of the elapsed time in (0, 1]")
    elapsed = half_life * step
    return 1.0 if elapsed < 1 else float(1 - 2 ** (-1 / elapsed))


# ---- the shapes ----


@dataclass(frozen=True, slots=True)
class _Shape:
    """`multiplier`'s arguments less the step, checked once and asked often."""

    kind: str
    total: int
    warmup: int
    final: float | None = None
    cooldown: int | None = None
    scale: float | None = None
    warmup_kind: str = "linear"
    warmup_from: float = 0.01

    def at(self, step: int) -> float:
        T, W = self.total, self.warmup
        if step < W:
            passed = (step + 1) / W
            return passed if self.warmup_kind == "linear" else self.warmup_from ** (1 - passed)
        if self.kind == "constant":
            return 1.0
        if self.kind == "invsqrt":
            a = self.scale if self.scale is not None else float(W) or max(0.01 * T, 1.0)
            return math.sqrt(a / (step + a))
        m = final_fraction(self.kind, self.final)
        s = min(step, T)
        if self.kind == "cosine":
            return m if s >= T else m + (1 - m) * (1 + math.cos(math.pi * (s - W) / (T - W))) / 2
        c = self.cooling()
        if s < T - c or c == 0:
            return 1.0
        fraction = (s - T + c) / c
        return m + (1 - m) * (1 - (math.sqrt(fraction) if self.kind == "wsd-sqrt" else fraction))

    def cooling(self) -> int:
        """Steps of cooldown: the last fifth of the run unless given; all after the warm-up for linear."""
        if self.kind == "linear":
            return self.total - self.warmup
        if self.kind not in COOLING:
            return 0
        return (
            self.cooldown
            if self.cooldown is not None
            else min(round(0.2 * self.total), self.total - self.warmup)
        )

    def problems(self) -> list[str]:
        found = []
        if self.kind not in KINDS:
            known = ", ".join(KINDS)
            found.append(f"schedule.kind is {self.kind!r}: known are {known}{nearest(self.kind, KINDS)}")
        if self.warmup_kind not in WARMUPS:
            known = " and ".join(WARMUPS)
            found.append(
                f"schedule.warmup_kind is {self.warmup_kind!r}: known are {known}{nearest(self.warmup_kind, WARMUPS)}"
            )
        for name, value in (("warmup", self.warmup), ("cooldown", self.cooldown or 0)):
            if value < 0:
                found.append(f"schedule.{name} is {value}: give a count of steps, 0 or more")
        if self.total < 1:
            found.append(f"schedule.total is {self.total}: give at least one step")
        elif self.warmup > self.total:
            found.append(
                f"schedule.warmup is {self.warmup}, longer than the run of {self.total} steps: shorten it"
            )
        elif self.kind in COOLING and self.warmup + (self.cooldown or 0) > self.total:
            found.append(
                f"schedule.cooldown is {self.cooldown}: with warmup {self.warmup} it does not fit in "
                f"{self.total} steps; shorten one"
            )
        if self.final is not None and not 0 <= self.final <= 1:
            found.append(f"schedule.final is {self.final}: give a fraction of the peak in [0, 1]")
        if self.scale is not None and self.scale <= 0:
            found.append(f"schedule.scale is {self.scale}: give a positive number of steps")
        if not 0 < self.warmup_from <= 1:
            found.append(f"schedule.warmup_from is {self.warmup_from}: give a fraction of the peak in (0, 1]")
        return found
