"""`diloco plan --schedule`: which schedule, at which peak learning rate, by the bound of convex theory.

The numbers compare schedules of one run with one another; they are no prediction of a loss. The bound itself is in
`schedules_bound`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from diloco.errors import ConfigError
from diloco.schedules import COOLING, multipliers, problems
from diloco.schedules_bound import best_factor, bound, bound_at, minimum

LONGEST = 1_000_000  # steps; about half a second for each schedule


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule of the comparison."""

    name: str
    kind: str
    cooldown: int | None  # steps, of wsd and wsd-sqrt
    bound: float  # at its own best peak, for distance 1 and gradient norm 1
    relative: float  # bound over the smallest of the table
    peak_relative: float  # its best peak learning rate over that of linear decay
    lr: float | None  # that peak, if the given learning rate is the best one for the given kind


@dataclass(frozen=True, slots=True)
class Extension:
    """What becomes of the peak learning rate when a run grows from `steps` to `to`."""

    kind: str
    steps: int
    to: int
    lr: float  # the best peak of the short run
    fresh_lr: float  # peak for the whole long run, started anew
    done: int | None = None  # constant steps already taken at `lr` that the long run keeps; wsd and wsd-sqrt
    rest_factor: float | None = None  # best factor on the learning rate of the steps after them
    rest_lr: float | None = None
    rest_excess: float | None = None  # bound over that of the fresh run, less 1
    same_lr_cooldown: int | None = (
        None  # or: best cooldown, in steps, that keeps `lr` to the end of the constant phase
    )
    same_lr_excess: float | None = None


def compare(steps: int, warmup: int = 0, *, kind: str = "linear", lr: float | None = None) -> list[Row]:
    """The usual schedules at `steps` steps; with `lr`, the best peak of `kind`, everyone's peak in those units.

    Raises:
        ConfigError: an unknown kind, or steps, warm-up and learning rate that cannot be.
    """
    _check(kind, steps, warmup, lr)
    shapes: list[tuple[str, str, int | None]] = [
        ("constant", "constant", None),
        ("linear", "linear", None),
        *((f"wsd {share} %", "wsd", _cooldown(steps, warmup, share / 100)) for share in (10, 20, 40)),
        ("wsd-sqrt 20 %", "wsd-sqrt", _cooldown(steps, warmup, 0.2)),
        ("cosine to 10 %", "cosine", None),
        ("invsqrt", "invsqrt", None),
    ]
    found = [(*shape, *bound(multipliers(shape[1], steps, warmup, cooldown=shape[2]))) for shape in shapes]
    least = min(row[3] for row in found)
    linear = next(row[4] for row in found if row[1] == "linear")
    default = {name: peak for name, _, _, _, peak in found}
    mine = default[
        {"wsd": "wsd 20 %", "wsd-sqrt": "wsd-sqrt 20 %", "cosine": "cosine to 10 %"}.get(kind, kind)
    ]
    return [
        Row(name, k, cooldown, value, value / least, peak / linear, None if lr is None else lr * peak / mine)
        for name, k, cooldown, value, peak in found
    ]


def extend(
    steps: int,
    to: int,
    lr: float,
    kind: str = "wsd",
    *,
    warmup: int = 0,
    cooldown: int | None = None,
    done: int | None = None,
) -> Extension:
    """Peak learning rates for `to` steps of `kind`, when `lr` is the best peak for `steps` steps.

    A fresh run takes `lr` times the ratio of the bound's best peaks. A run of wsd or wsd-sqrt can also go on from the
    checkpoint at `done` steps (by default the start of the short run's cooldown), either with a lower learning rate
    from there or with a longer cooldown. `cooldown` is the short run's, in steps; the long run has the same share.
    arXiv 2501.18965, section 5.1, which picks the factor for which `lr` would be the best peak; here it is the one
    with the least bound.

    Raises:
        ConfigError: an unknown kind, `to` not beyond `steps`, `done` outside the constant phase of the long run.
    """
    _check(kind, steps, warmup, lr, cooldown)
    if to <= steps:
        raise ConfigError(f"--extend-to {to} is not beyond --steps {steps}: give the longer run's steps")
    if to > LONGEST:
        raise ConfigError(f"--extend-to {to} is beyond the {LONGEST} steps that this can weigh")
    cools = kind in COOLING
    short_c = (cooldown if cooldown is not None else _cooldown(steps, warmup, 0.2)) if cools else None
    long_c = None if short_c is None else min(round(short_c * to / steps), to - warmup)
    gamma = bound(multipliers(kind, steps, warmup, cooldown=short_c))[1]
    long = np.asarray(multipliers(kind, to, warmup, cooldown=long_c))
    fresh_bound, fresh_gamma = bound(long)
    whole = Extension(kind, steps, to, lr, lr * fresh_gamma / gamma)
    if short_c is None or long_c is None:
        return whole
    done = steps - short_c if done is None else done
    if not warmup <= done < to - 1:
        raise ConfigError(f"--done {done} must lie between the warm-up of {warmup} and --extend-to {to}")
    # A run kept at the peak past the point where the long cooldown would begin cools down from where it is.
    cooling = min(long_c, to - done)
    shape = np.asarray(multipliers(kind, to, warmup, cooldown=cooling))
    factor, continued = best_factor(shape[:done], shape[done:], gamma)
    longest = to - done

    def cooled(share: float) -> float:
        return bound_at(multipliers(kind, to, warmup, cooldown=max(1, round(share * longest))), gamma)

    same = max(1, round(minimum(cooled, 0.0, 1.0, points=12) * longest))
    same_bound = bound_at(multipliers(kind, to, warmup, cooldown=same), gamma)
    return dataclasses.replace(
        whole,
        done=done,
        rest_factor=factor,
        rest_lr=factor * lr,
        rest_excess=continued / fresh_bound - 1,
        same_lr_cooldown=same,
        same_lr_excess=same_bound / fresh_bound - 1,
    )


def print_schedules(
    steps: int,
    *,
    warmup: int = 0,
    kind: str | None = None,
    lr: float | None = None,
    extend_to: int | None = None,
    cooldown: int | None = None,
    done: int | None = None,
    as_json: bool = False,
) -> None:
    """The comparison, or with `extend_to` the extension, on stdout as a table or as JSON."""
    if extend_to is not None:
        if lr is None:
            raise ConfigError("plan --schedule --extend-to: give --lr, the best peak of the shorter run")
        wider = extend(steps, extend_to, lr, kind or "wsd", warmup=warmup, cooldown=cooldown, done=done)
        if as_json:
            _dump({"extension": dataclasses.asdict(wider)})
        else:
            _print_extension(wider)
        return
    if cooldown is not None or done is not None:
        raise ConfigError("plan --schedule: --cooldown and --done go with --extend-to")
    rows = compare(steps, warmup, kind=kind or "linear", lr=lr)
    if as_json:
        _dump({"steps": steps, "warmup": warmup, "schedules": [dataclasses.asdict(row) for row in rows]})
        return
    table = Table("schedule", "bound / best", "peak lr / linear's", *(["peak lr"] if lr is not None else []))
    for row in rows:
        cells = [row.name, f"{row.relative:.3f}", f"{row.peak_relative:.3f}"]
        table.add_row(*cells, *([f"{row.lr:.3g}"] if row.lr is not None else []))
    console = Console()
    console.print(table)
    console.print(
        f"{steps} steps, {warmup} of warm-up; each schedule at its own best peak. The bound is that of convex theory "
        "(arXiv 2501.18965): it ranks schedules and scales their learning rates, and predicts no loss.",
        soft_wrap=True,
    )


def _print_extension(e: Extension) -> None:
    console = Console()
    say = [
        f"{e.kind}, {e.steps} -> {e.to} steps, best peak lr so far {e.lr:.3g}",
        f"whole run anew: peak lr {e.fresh_lr:.3g} ({e.fresh_lr / e.lr:.3f} of it)",
    ]
    if e.rest_factor is not None and e.rest_excess is not None and e.same_lr_excess is not None:
        say += [
            f"going on from step {e.done}, before any cooldown:",
            f"  lr {e.rest_lr:.3g} from there ({e.rest_factor:.3f} of it): bound {e.rest_excess:+.1%} against anew",
            f"  or lr {e.lr:.3g} kept and a cooldown of {e.same_lr_cooldown} steps: {e.same_lr_excess:+.1%}",
        ]
    for line in say:
        console.print(line, soft_wrap=True, highlight=False)


def _check(kind: str, steps: int, warmup: int, lr: float | None, cooldown: int | None = None) -> None:
    found = problems(kind, steps, warmup, cooldown=cooldown)
    if found:
        raise ConfigError("; ".join(found))
    if not 2 <= steps <= LONGEST:
        raise ConfigError(f"--steps {steps}: give a number of steps from 2 to {LONGEST}")
    if lr is not None and not lr > 0:
        raise ConfigError(f"--lr {lr}: give a positive learning rate")


def _cooldown(steps: int, warmup: int, share: float) -> int:
    return min(max(1, round(share * steps)), steps - warmup)


def _dump(value: object) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
