"""Tensors that a batched update may write in place of the parameters: same storage, or float32 for 16-bit ones.

Also the sorting of parameters by how far each one has come. No update rule lives here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diloco.optim.state import gradient, state_dtype


def working_copies(params: Iterable[Tensor]) -> list[Tensor]:
    """Each parameter without its autograd history: an alias, or a float32 copy where it is narrower."""
    return [p.detach().to(state_dtype(p)) for p in params]


def write_back(params: Iterable[Tensor], work: Iterable[Tensor]) -> None:
    """Round the copies that `working_copies` made into their parameters; aliases are there already."""
    for p, w in zip(params, work, strict=True):
        if w.dtype != p.dtype:
            p.copy_(w)


def gradient_copies(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients in the state's dtype, to be overwritten freely: never `p.grad` itself."""
    grads = [(p, gradient(p)) for p in params]
    return [g.clone() if g is p.grad else g for p, g in grads]


def new_state(p: Tensor) -> Tensor:
    """A copy of `p` in the state's dtype."""
    return p.detach().to(dtype=state_dtype(p), copy=True)


def cohorts(
    state: Mapping[Tensor, Mapping[str, Any]], params: Iterable[Tensor], keys: Sequence[str]
) -> list[tuple[tuple[Any, ...], list[Tensor]]]:
    """Parameters with equal state entries `keys`, together with these entries.

    One cohort unless some parameter had no gradient in some step: it then has fewer steps than the others.
    """
    found: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in params:
        found[tuple(state[p][k] for k in keys)].append(p)
    return list(found.items())


def with_gradient(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group that take part in this step."""
    return [p for p in group["params"] if p.grad is not None]


def move(params: Iterable[Tensor], state: Mapping[Tensor, Mapping[str, Tensor]], weight: float) -> None:
    """``p = lerp(p, z, weight)`` for every parameter that has a z; computed in z's dtype, rounded once."""
    for p in params:
        if p in state and "z" in state[p]:
            z = state[p]["z"]
            p.copy_(torch.lerp(p.to(z.dtype), z, weight))
