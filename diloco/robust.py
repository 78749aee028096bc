"""Aggregation that holds out against bad contributions: pure functions on lists of fp32 [n], ascending worker index.

Two kinds of rules. Some decide who counts (`moving`, `inliers`, `agreeing`): the coordinator does, and tells everybody by the
weights. The others say how those who count are combined (`combine`): where workers repeat the aggregation they
repeat this, so it uses nothing whose bits depend on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from diloco.aggregate import rda
from diloco.config import RunConfig
from diloco.sums import dot, norm, weighted_sum

OUTLIER_FACTOR = 4.0  # a norm may be this many times the median norm, or this part of it
MIN_COSINE = -0.2  # honest updates have small but positive cosines to the mean of the others
ENOUGH = 3  # below this many contributions nobody can tell who is wrong: clip_median
COORDINATEWISE = frozenset({"trimmed", "coord_median"})
DENSE = COORDINATEWISE | {"centered_clip"}
_COLUMNS = 1 << 18


@dataclass(frozen=True, slots=True)
class Rule:
    """How contributions are combined: the [robust] section and the parts of [weights] that go with it."""

    kind: str = "mean"
    trim: int = 1
    rho: float | None = None  # None: the median distance
    iters: int = 3
    by_steps: bool = False
    by_direction: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the weighted mean and nothing else."""
        return self.kind == "mean" and not self.by_steps and not self.by_direction

    def clips(self, count: int) -> bool:
        """Whether `count` contributions are first cut to their median norm."""
        return self.kind in ("clip_median", "cos_gate") or (self.kind != "mean" and count < ENOUGH)

    def dense(self, count: int) -> bool:
        """Whether `count` contributions must all be in memory at once, decoded."""
        return self.by_direction or (self.kind in DENSE and count >= ENOUGH)

    def state(self, numel: int) -> dict[str, Tensor]:
        """What a fragment of `numel` values carries from round to round: zeros at the start, {} for most rules."""
        return {"center": torch.zeros(numel)} if self.kind == "centered_clip" else {}


MEAN = Rule()


def rule_of(config: RunConfig) -> Rule:
    """The rule that the configuration names."""
    r, w = config.robust, config.weights
    rho = None if r.rho == "auto" else r.rho
    return Rule(r.kind, r.trim, rho, r.iters, w.normalize == "steps", w.merge == "rda")


# ---- who counts ----


def inliers(norms: Sequence[float], factor: float = OUTLIER_FACTOR) -> list[int]:
    """Positions whose norm lies within `factor` of the median norm, both ways. All, when they are fewer than 3.

    Never empty: with an even count the upper of the two middle ones always stays.
    """
    if len(norms) < ENOUGH:
        return list(range(len(norms)))
    middle = median(norms)
    return [i for i, n in enumerate(norms) if middle / factor <= n <= middle * factor]


def moving(norms: Sequence[float]) -> list[int]:
    """Positions of updates that are not zero. All, when they are fewer than 3 or none is.

    A zero says nothing of where to go, and would only make the step of the others smaller.
    """
    found = [i for i, n in enumerate(norms) if n > 0.0]
    return found if found and len(norms) >= ENOUGH else list(range(len(norms)))


def agreeing(deltas: Sequence[Tensor], least: float = MIN_COSINE) -> list[int]:
    """Positions left when those are dropped whose cosine to the mean of the others is below `least`.

    Norms are first cut to the median norm, or one large update would be the mean of the others; the worst is
    dropped first and the others are judged anew without it, and never half of them or more, so that a minority
    cannot have the majority dropped. A zero update has cosine 0. All, when they are fewer than 3.
    """
    kept = list(range(len(deltas)))
    if len(deltas) < ENOUGH:
        return kept
    norms = [norm(delta) for delta in deltas]
    cut = clip_scales(norms)
    gram = [[0.0] * len(deltas) for _ in deltas]
    for i, a in enumerate(deltas):
        for j in range(i + 1):
            square = norms[i] ** 2 if i == j else dot(a, deltas[j])
            gram[i][j] = gram[j][i] = square * cut[i] * cut[j]

    def cosine(i: int) -> float:
        others = [j for j in kept if j != i]
        inner = sum(gram[i][j] for j in others)
        size = gram[i][i] * sum(gram[j][k] for j in others for k in others)
        return inner / math.sqrt(size) if size > 0.0 else 0.0

    for _ in range((len(deltas) - 1) // 2):
        worst = min(kept, key=cosine)
        if cosine(worst) >= least:
            break
        kept = [i for i in kept if i != worst]
    return kept


# ---- how they are combined ----


def clip_scales(norms: Sequence[float]) -> list[float]:
    """``min(1, median_j(N_j) / N_i)``: nobody pulls harder than the median (used live by SparseLoCo, 2508.15706).

    Exactly 1 for a norm at or below the median.
    """
    middle = median(norms)
    return [1.0 if n <= middle else middle / n for n in norms]


def trimmed_mean(deltas: Sequence[Tensor], trim: int) -> Tensor:
    """Per coordinate the mean, unweighted, without the `trim` largest and the `trim` smallest; fp32 [n].

    Where that would leave nothing, as many as possible are dropped, which is the median.
    """
    count = len(deltas)
    drop = min(trim, (count - 1) // 2)
    out = torch.empty_like(deltas[0])
    for start in range(0, out.numel(), _COLUMNS):
        # Adding +0.0 makes every zero a positive one: which of two equal values sorts first must not show.
        stacked = torch.stack([d[start : start + _COLUMNS] for d in deltas]).add_(0.0)
        rows = stacked.sort(dim=0).values[drop : count - drop]
        total = rows[0].clone()
        for row in rows[1:]:
            total.add_(row)
        out[start : start + _COLUMNS] = total.mul_(1.0 / len(rows))
    return out


def coord_median(deltas: Sequence[Tensor]) -> Tensor:
    """Per coordinate the median, unweighted; of an even count the mean of the middle two; fp32 [n]."""
    return trimmed_mean(deltas, len(deltas))


def centered_clip(
    deltas: Sequence[Tensor], shares: Sequence[float], center: Tensor, rho: float | None, iters: int
) -> Tensor:
    """``v <- v + sum w_i (D_i - v) min(1, rho / ||D_i - v||)``, `iters` times from `center` (2012.10333); fp32 [n].

    `rho` None takes, in each iteration, the median of the distances ``||D_i - v||``. `shares` sum to 1.
    """
    v = center.clone()
    for _ in range(iters):
        distances = [norm(delta - v) for delta in deltas]
        radius = median(distances) if rho is None else rho
        cut = [1.0 if d <= radius else radius / d for d in distances]
        step = torch.zeros_like(v)
        for delta, share, factor in zip(deltas, shares, cut, strict=True):
            step.add_((delta - v).mul_(share * factor))
        v.add_(step)
    return v


def combine(
    rule: Rule,
    deltas: Sequence[Tensor],
    shares: Sequence[float],
    center: Tensor | None = None,
    pieces: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """One update, fp32 [n], from those that count, which are already scaled and clipped as the rule says.

    `center` is where ``centered_clip`` starts (None: zero); `pieces` are the ranges that merge by direction.
    """
    if rule.kind in DENSE and len(deltas) >= ENOUGH:
        if rule.kind == "trimmed":
            return trimmed_mean(deltas, rule.trim)
        if rule.kind == "coord_median":
            return coord_median(deltas)
        start = torch.zeros_like(deltas[0]) if center is None else center
        return centered_clip(deltas, shares, start, rule.rho, rule.iters)
    if rule.by_direction:
        return rda(deltas, shares, pieces)
    return weighted_sum(list(deltas), list(shares))
