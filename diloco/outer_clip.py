"""Clipping of the averaged pseudo-gradient before an outer step, on every node alike. One wrapper, no policy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diloco.outer import OuterOptimizer, State
from diloco.sums import norm


def clipped(mean: Tensor, limit: float) -> Tensor:
    """``D * min(1, limit / ||D||)``, fp32 [n]; within the limit `mean` itself, otherwise a new tensor.

    The norm is summed in one fixed order and the factor is one fp32 number, so all nodes get the same bits.
    """
    length = norm(mean)
    return mean if length <= limit else mean * (limit / length)


@dataclass(frozen=True, slots=True)
class Clipped:
    """`inner`, with the mean pseudo-gradient of a fragment cut to the L2 norm `limit` first. State: that of `inner`."""

    inner: OuterOptimizer
    limit: float

    def init(self, params: Tensor) -> State:
        return self.inner.init(params)

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        return self.inner.update(params, clipped(mean, self.limit), state)

    def step(self, params: Tensor, mean: Tensor, state: State) -> None:
        self.inner.step(params, clipped(mean, self.limit), state)
