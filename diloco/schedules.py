"""Learning-rate multipliers and related scalar schedules: pure functions of the step index.

Nothing here touches an optimizer; hand `functools.partial(multiplier, ...)` to `torch.optim.lr_scheduler.LambdaLR`.
Steps are inner steps, counted from 0, and are never reset by outer steps.
"""

from __future__ import annotations

import math

from diloco.errors import ConfigError, nearest

KINDS = ("constant", "linear", "wsd", "wsd-sqrt", "cosine", "invsqrt")


def multiplier(
    kind: str,
    step: int,
    total: int,
    warmup: int,
    *,
    final: float | None = None,
    cooldown: int | None = None,
    scale: float | None = None,
) -> float:
    """The factor f(s) on each group's peak learning rate, for s = `step`, T = `total`, W = `warmup` (steps).

        s < W      f = (s+1)/W                                (every kind)
        constant   f = 1
        wsd        f = 1 until T-C, then m + (1-m)(T-s)/C       (C = `cooldown`, m = `final`)
        wsd-sqrt   f = 1 until T-C, then m + (1-m)(1 - sqrt((s-T+C)/C))
        linear     wsd with C = T-W
        cosine     f = m + (1-m)(1 + cos(pi (s-W)/(T-W)))/2
        invsqrt    f = sqrt(a/(s+a))                          (a = `scale`; horizon free)

    Defaults: `final` 0 (0.1 for cosine); `cooldown` a fifth of the run, at most T-W; `scale` W, or 1 % of the run
    without warm-up. A step at or past T holds the end value, because schedulers ask once more after the last step.
    Linear decay to zero: arXiv 2310.07831.

    Raises:
        ConfigError: unknown kind, negative count, W or W+C beyond T, `final` outside [0, 1], `scale` not positive.
    """
    _check(kind, step, total, warmup, final, cooldown, scale)
    if step < warmup:
        return (step + 1) / warmup
    m = final if final is not None else (0.1 if kind == "cosine" else 0.0)
    s = min(step, total)
    if kind == "constant":
        return 1.0
    if kind == "invsqrt":
        a = scale if scale is not None else float(warmup) or max(0.01 * total, 1.0)
        return math.sqrt(a / (step + a))
    if kind == "cosine":
        return (
            m if s >= total else m + (1 - m) * (1 + math.cos(math.pi * (s - warmup) / (total - warmup))) / 2
        )
    if kind == "linear":
        c = total - warmup
    else:
        c = cooldown if cooldown is not None else min(round(0.2 * total), total - warmup)
    if s < total - c or c == 0:
        return 1.0
    fraction = math.sqrt((s - total + c) / c) if kind == "wsd-sqrt" else (s - total + c) / c
    return m + (1 - m) * (1 - fraction)


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


def _check(
    kind: str,
    step: int,
    total: int,
    warmup: int,
    final: float | None,
    cooldown: int | None,
    scale: float | None,
) -> None:
    if kind not in KINDS:
        raise ConfigError(f"schedule.kind is {kind!r}: known are {', '.join(KINDS)}{nearest(kind, KINDS)}")
    for name, value in (("step", step), ("warmup", warmup), ("cooldown", cooldown or 0)):
        if value < 0:
            raise ConfigError(f"schedule.{name} is {value}: give a count of steps, 0 or more")
    if total < 1:
        raise ConfigError(f"schedule.total is {total}: give at least one step")
    if warmup > total:
        raise ConfigError(f"schedule.warmup is {warmup}, longer than the run of {total} steps: shorten it")
    if kind in ("wsd", "wsd-sqrt") and warmup + (cooldown or 0) > total:
        raise ConfigError(
            f"schedule.cooldown is {cooldown}: with warmup {warmup} it does not fit in {total} steps; shorten one"
        )
    if final is not None and not 0 <= final <= 1:
        raise ConfigError(f"schedule.final is {final}: give a fraction of the peak in [0, 1]")
    if scale is not None and scale <= 0:
        raise ConfigError(f"schedule.scale is {scale}: give a positive number of steps")
