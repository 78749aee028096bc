"""The [schedule] section: its keys, their defaults, and what is impossible about a combination.

Nothing here needs torch. What the values mean at a step is in `schedules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diloco import schedules

# The inner optimizers whose matrix momentum weighs the past, as Muon's does; Scion's weighs the new gradient.
_MOMENTUM = ("muon", "normuon", "hyperball", "md", "mars-m", "muown", "freon", "kaon")


class Schedule(BaseModel):
    """Learning rates, and optionally momentum and beta2, over the run's inner steps; every count is in those."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: str = "cosine"  # constant, linear, wsd, wsd-sqrt, cosine, invsqrt
    warmup: int = Field(0, ge=0)
    warmup_kind: Literal["linear", "exponential"] = "linear"
    warmup_from: float = Field(
        0.01, gt=0, le=1
    )  # where an exponential warm-up starts, as a fraction of the peak
    final: float | None = Field(None, ge=0, le=1)  # None: 0, or 0.1 for cosine and for optim.kind = "md"
    cooldown: int | None = Field(None, ge=0)  # of wsd and wsd-sqrt; None: the last fifth of the run
    matrix_cooldown: int | None = Field(None, ge=0)  # of the hidden matrices; None: as the others
    scale: float | None = Field(None, gt=0)  # of invsqrt; None: the warm-up, or 1 % of the run
    cooldown_beta2: float | None = Field(None, ge=0, lt=1)  # AdamW's beta2 during the cooldown; None: as ever
    momentum_warmup: int = Field(0, ge=0)  # steps in which Muon's momentum rises; 300 is usual, 0 is none
    momentum_cooldown: int = Field(0, ge=0)  # last steps, in which it falls again; 50 is usual, 0 is none
    momentum_low: float = Field(0.85, ge=0, lt=1)  # where it starts and ends; between, it is optim.momentum


def schedule_problems(
    s: Schedule, total: int, optim_kind: str = "adamw", momentum: float | None = None
) -> list[str]:
    """What cannot work in this section for a run of `total` inner steps; each names the key, the value and the fix."""
    found = schedules.problems(
        s.kind,
        total,
        s.warmup,
        final=s.final,
        cooldown=s.cooldown,
        scale=s.scale,
        warmup_kind=s.warmup_kind,
        warmup_from=s.warmup_from,
    )
    if s.kind in schedules.KINDS:
        found += _cooling(s, total)
    if (s.momentum_warmup or s.momentum_cooldown) and optim_kind not in _MOMENTUM:
        found.append(
            f"schedule.momentum_warmup and momentum_cooldown are for the momentum of matrices, which optim.kind = "
            f"{optim_kind!r} does not have: leave them at 0, or use one of {', '.join(_MOMENTUM)}"
        )
    elif (s.momentum_warmup or s.momentum_cooldown) and momentum is not None and s.momentum_low > momentum:
        found.append(
            f"schedule.momentum_low is {s.momentum_low}, above optim.momentum = {momentum}, to which it should rise"
        )
    return found


def _cooling(s: Schedule, total: int) -> Iterator[str]:
    if s.kind not in schedules.COOLING:
        for key in ("matrix_cooldown", "cooldown_beta2"):
            if getattr(s, key) is not None:
                yield (
                    f"schedule.{key} is {getattr(s, key)}, but schedule.kind = {s.kind!r} has no cooldown of its own: "
                    "use 'wsd' or 'wsd-sqrt', or leave it out"
                )
    elif s.warmup <= total < s.warmup + (s.matrix_cooldown or 0):
        yield (
            f"schedule.matrix_cooldown is {s.matrix_cooldown}: with warmup {s.warmup} it does not fit in {total} "
            "steps; shorten one"
        )


def schedule_warnings(s: Schedule) -> list[str]:
    """Keys that are given although the kind does not use them."""
    unused = {
        "cooldown": s.kind not in schedules.COOLING and s.cooldown is not None,
        "final": s.kind in ("constant", "invsqrt") and s.final is not None,
        "scale": s.kind != "invsqrt" and s.scale is not None,
    }
    return [
        f"schedule.{key} = {getattr(s, key)} has no effect with schedule.kind = {s.kind!r}; leave it out"
        for key, is_unused in unused.items()
        if is_unused
    ]
