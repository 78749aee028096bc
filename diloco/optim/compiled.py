"""Whole Muon and NorMuon steps in one compiled call, for the parameters whose momentum, weights and gradient allow it.

Reading each tensor once saves a tenth of a step over separate passes. What it computes is defined in `muon` and
`normuon`, which do the rest themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diloco.kernels import orthogonal_cpu
from diloco.optim.coefficients import coefficient_set
from diloco.optim.matrices import iteration_dtype, split
from diloco.optim.orthogonalize import compiled, segments
from diloco.optim.state import zeros_like_state

_CPU = torch.device("cpu")


def compiled_update(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    group: Mapping[str, Any],
    how: orthogonal_cpu.Update,
    step: Callable[[int, int], float],
    *,
    rows: bool = False,
) -> list[Tensor]:
    """Step every parameter that can be, and return the others, untouched.

    `step` gives the step size for a matrix of r rows and c columns; `rows` keeps NorMuon's second moments.
    """
    chosen = coefficient_set(group["coefficients"])
    dtype = iteration_dtype(group["iteration_dtype"])
    if not compiled(_CPU, chosen, dtype, group["start"]):
        return list(params)
    done, rest, targets = [], [], []
    for p in params:
        state = optimizer.state[p]
        grad = p.grad
        if grad is None or not all(_plain(t) for t in (p, grad, *state.values())):
            rest.append(p)
            continue
        done.append(p)
        if "momentum" not in state:
            state["momentum"] = zeros_like_state(p)
        weights, gradients, momenta = (split(t, group) for t in (p.detach(), grad, state["momentum"]))
        for k, (w, g, m) in enumerate(zip(weights, gradients, momenta, strict=True)):
            r, c = w.shape[1:]
            second = None
            if rows:
                key = "v" if len(weights) == 1 else f"v{k}"
                if key not in state:
                    state[key] = m.new_zeros(w.shape[0], r, 1)  # whatever torch's default dtype and device
                second = state[key]
            pieces, size = segments(chosen, group["form"], group["start"], r, c), step(r, c)
            for i in range(w.shape[0]):
                v = None if second is None else second[i]
                targets.append(orthogonal_cpu.Target(w[i], g[i], m[i], v, pieces, size))
    if targets:
        iteration = orthogonal_cpu.Iteration(chosen.triples, dtype, chosen.div, group["orth_eps"])
        orthogonal_cpu.update(targets, iteration, how)
        torch.autograd.graph.increment_version(done)
    return rest


def _plain(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and (t.dtype, t.device.type, t.layout) == (torch.float32, "cpu", torch.strided)
        and t.is_contiguous()
    )
