"""Norms and inner products that come out alike on every machine, bit for bit.

A library's reduction depends on vector width and thread count. Where every worker repeats an aggregation, a norm
decides bits of the result, so sums here are halvings: elementwise additions in fp64, in one fixed order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SLICE = 1 << 16  # part of the definition: another size is another order of addition


def dot(a: Tensor, b: Tensor) -> float:
    """``sum a_i b_i`` of two fp32 [n] in fp64: products are exact, additions in a fixed order."""
    return sum(
        (_halved(a[i : i + _SLICE].double() * b[i : i + _SLICE]) for i in range(0, a.numel(), _SLICE)), 0.0
    )


def norm(x: Tensor) -> float:
    """L2 norm of fp32 [n] in fp64, the same on every machine."""
    return math.sqrt(dot(x, x))


def _halved(x: Tensor) -> float:
    """The sum of fp64 [n]: the upper half is added onto the lower one until one value is left. Overwrites `x`."""
    while (n := x.numel()) > 1:
        half = (n + 1) // 2
        x[: n - half].add_(x[half:])
        x = x[:half]
    return float(x[0]) if n else 0.0


def weighted_sum(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """``sum w_i D_i`` in the order given, fp32 [n], two roundings a term."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta.mul(weight))
    return total
