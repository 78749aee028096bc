"""Adam's direction with bias correction, shared by the optimizers that use it inside. No parameter is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def adam_direction(
    state: dict[str, Any], g: Tensor, betas: Sequence[float], eps: float, prefix: str = ""
) -> Tensor:
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; returns (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps), fresh.

    State under `prefix`: ``exp_avg`` and ``exp_avg_sq`` like `g`, and the int ``step``.
    """
    b1, b2 = betas
    if f"{prefix}step" not in state:
        state[f"{prefix}step"] = 0
        state[f"{prefix}exp_avg"] = torch.zeros_like(g)
        state[f"{prefix}exp_avg_sq"] = torch.zeros_like(g)
    state[f"{prefix}step"] += 1
    t = state[f"{prefix}step"]
    m: Tensor = state[f"{prefix}exp_avg"].lerp_(g, 1 - b1)
    v: Tensor = state[f"{prefix}exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
    direction: Tensor = m / (1 - b1**t) / (v / (1 - b2**t)).sqrt_().add_(eps)
    return direction
