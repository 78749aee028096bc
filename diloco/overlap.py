"""The arithmetic of updates that come late: eager and delayed rounds, asynchronous momentum, uneven speeds.

Pure functions and outer optimizers on flat fp32 tensors. When they are used is decided by the worker's replica and
by the coordinator; which mode a run uses is in the configuration's [stream] section.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco import outer
from diloco.config import RunConfig
from diloco.outer import OuterOptimizer, OuterShard, State, _Steps
from diloco.outer_clip import Clipped


def eager_update(
    mean: Tensor | None, count: int, fresh: Tensor | None, before: Tensor | None, *, absent: bool
) -> Tensor:
    """A worker's own update at a boundary (eager, 2502.12996), fp32 [n].

    ``E = mean + (fresh - before) / count``: `mean` is what the last round gave, over `count` contributors, with
    this worker's `before` in it; `fresh` is its new pseudo-gradient, whose round has only begun. `absent` from the
    last round it subtracts nothing and adds ``fresh / (count + 1)``. None stands for zero.

    Summed in this order, one worker alone (count 1, `mean` equal to `before`) gets `fresh` bit for bit.
    """
    known = fresh if fresh is not None else before if before is not None else mean
    assert known is not None, "an update of nothing"
    update = torch.zeros_like(known) if mean is None else mean.clone()
    if before is not None and not absent:
        update.sub_(before / count)
    if fresh is not None:
        update.add_(fresh / (count + 1 if absent else count))
    return update


@dataclass(frozen=True, slots=True)
class EagerAverage(_Steps):
    """What the workers' own values of an eager run are on average: an outer step with the average of their updates.

    ``mean_m E_m(n) = (1 - 1/M) Dbar(n-1) + Dbar(n) / M``, M the contributors of round n-1. With a linear outer
    optimizer and an unchanging membership its value after commit n is the mean of the values that workers took at
    boundary n, up to rounding and to what the codec lost of the newest round. State: that of `inner`, ``previous``
    (Dbar of the newest round, [n]) and ``count`` (its contributors, [1]; 0 before the first), see `advance`.
    """

    inner: OuterOptimizer

    def init(self, params: Tensor) -> State:
        return {**self.inner.init(params), "count": torch.zeros(1), "previous": torch.zeros_like(params)}

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        share = 1.0 / float(state["count"].item())
        average = state["previous"].mul(1.0 - share).add_(mean * share)
        state["previous"].copy_(mean)
        return self.inner.update(params, average, state)


def advance(shard: OuterShard, mean: Tensor, contributors: int, *, final: bool = False) -> None:
    """One commit with the mean pseudo-gradient [n] of `contributors`; the version goes up by one.

    `final`: the round that ends an eager run. Every contribution then is the distance from `shard` to a worker's
    parameters, and the new value is the plain average of these.
    """
    if "previous" not in shard.state:  # not an eager run
        shard.apply(mean)
        return
    count = shard.state["count"]
    if final:
        shard.subtract(mean)
        shard.state["previous"].zero_()
        return
    if not count.item():
        count.fill_(contributors)
    shard.apply(mean)
    count.fill_(contributors)


@dataclass(frozen=True, slots=True)
class DelayedNesterov(_Steps):
    """Nesterov for single arrivals (2401.09135): each moves the value, every N-th refreshes the momentum.

        acc += g
        every N-th arrival:  b <- mu b + acc/N;  G -= lr ((1 - cN + c) mu b + g/N);  acc = 0
        any other:                               G -= lr (c mu b + g/N)

    N=1, c=0 is `Nesterov`, bit for bit. c lies in [0, 1/N]: how much of the old momentum the arrivals between feel.
    """

    lr: float
    momentum: float
    every: int = 1
    c: float = 0.0

    def init(self, params: Tensor) -> State:
        return {
            "acc": torch.zeros_like(params),
            "arrivals": torch.zeros(1),
            "momentum": torch.zeros_like(params),
        }

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        acc, b, arrivals = state["acc"].add_(mean), state["momentum"], state["arrivals"].add_(1)
        share = self.c
        if arrivals.item() >= self.every:
            b.mul_(self.momentum).add_(acc / self.every)
            share = 1.0 - self.c * self.every + self.c
            acc.zero_()
            arrivals.zero_()
        return b.mul(share * self.momentum).add_(mean / self.every).mul_(self.lr)


def compensate(delta: Tensor, strength: float, now: Tensor, base: Tensor) -> Tensor:
    """``D + strength * D * D * (now - base)``, elementwise, fp32 [n]: CoCoDC's Taylor correction (2504.17672).

    `delta` was measured from `base` and is applied to `now`. Strength 0 gives `delta` itself.
    """
    return delta + (now - base).mul_(delta.square()).mul_(strength) if strength else delta


@dataclass(slots=True)
class Bases:
    """The values that contributions in flight were measured from, so that stale ones can be compensated.

    `kept` holds the newest `depth` + 1 versions of one fragment: (depth + 1) * 4n bytes.
    """

    strength: float
    depth: int
    kept: dict[int, Tensor]

    def corrected(self, part: Tensor, weight: float, base: int, now: Tensor) -> Tensor:
        """`part` is weight * D, D measured from version `base`: weight * `compensate`(D), fp32 [n]."""
        if base not in self.kept:
            return part
        return compensate(part, self.strength / weight, now, self.kept[base])

    def add(self, version: int, value: Tensor) -> None:
        self.kept[version] = value.clone()
        self.kept = {v: kept for v, kept in self.kept.items() if v >= version - self.depth}


def bases_for(config: RunConfig, value: Tensor) -> Bases | None:
    """For a fragment that starts with `value` [n]; None where no base needs to be kept."""
    s = config.stream
    if s.overlap != "async" or not s.compensate:
        return None
    return Bases(s.compensate, config.fault.s_max, {0: value.clone()})


def local_steps(H: int, speeds: Sequence[float]) -> list[int]:
    """DyLU (2401.09135): ``max(1, floor(H * speed / max speed))`` inner steps a round for each worker.

    An unknown speed (0, negative or not finite) counts as the fastest.
    """
    known = [s for s in speeds if math.isfinite(s) and s > 0]
    top = max(known, default=1.0)
    # The small term keeps a quotient such as 50 * .6 whole.
    return [
        max(1, min(H, math.floor(H * s / top + 1e-9))) if math.isfinite(s) and s > 0 else H for s in speeds
    ]


def next_step(step: int, H: int, pace: int) -> int:
    """The run's step after one more inner step of a worker that makes `pace` of them in every H.

    Its j-th inner step of a cycle ends at ``floor(j H / pace)``, so that all workers meet at the multiples of H.
    """
    done = -(-(step % H) * pace // H)
    return step - step % H + (done + 1) * H // pace


def outer_optimizer(config: RunConfig) -> OuterOptimizer:
    """What moves the value that all nodes share, as the configuration's [outer], [stream] and [weights] say."""
    o, w = config.outer, config.weights
    if config.stream.overlap == "async" and o.kind == "nesterov":
        plain: OuterOptimizer = DelayedNesterov(o.lr, o.momentum, w.dn_N, w.dn_c)
    else:
        plain = outer.make(
            o.kind, lr=o.lr, momentum=o.momentum, gpa_lr=o.gpa_lr, gpa_mu_x=o.gpa_mu_x, gpa_mu_y=o.gpa_mu_y
        )
    if config.stream.overlap == "eager":  # never clipped: an average of steps must stay a step of the average
        return EagerAverage(plain)
    return plain if o.gradient_clip is None else Clipped(plain, o.gradient_clip)
