"""What Freon and Kaon share: Muon's momentum with another map from a matrix to its update. The maps are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diloco.optim.matrices import apply_update, check_matrix_group, shape_scale, split
from diloco.optim.muon import momentum_updates
from diloco.optim.state import ParamGroup

# `check_matrix_group` also checks the options of the orthogonalising iteration, which is not used here.
_NO_ITERATION: dict[str, Any] = {
    "coefficients": "you5",
    "orth_eps": 1e-7,
    "form": "plain",
    "start": "frobenius",
}


def check_research_group(group: ParamGroup) -> None:
    """As `check_matrix_group`, for optimizers without an orthogonalising iteration."""
    shape_scale(group["scale"], 1, 1)
    checked = group | _NO_ITERATION
    check_matrix_group(checked)
    group["iteration_dtype"] = checked["iteration_dtype"]


def step_group(
    optimizer: torch.optim.Optimizer, group: ParamGroup, direction: Callable[[Tensor], Tensor]
) -> None:
    """One update of the group's parameters that have a gradient; `direction` maps a block's momentum ``[N, r, c]``."""
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    lr = float(group["lr"])
    for p, u in zip(params, momentum_updates(optimizer, params, group), strict=True):
        for block, momentum in zip(split(p, group), split(u, group), strict=True):
            apply_update(
                block,
                direction(momentum),
                step=lr * shape_scale(group["scale"], *block.shape[1:]),
                decay=lr * group["weight_decay"],
                cautious=group["cautious"],
            )
