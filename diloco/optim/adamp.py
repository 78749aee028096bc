"""AdamP: AdamW whose step drops its radial part on scale-invariant weights."""

from __future__ import annotations

import math

import torch

from diloco.optim.adam import adam_direction
from diloco.optim.matrices import apply_update
from diloco.optim.state import (
    Closure,
    ParamGroup,
    Params,
    StateDict,
    check_group,
    evaluate,
    gradient,
    restore_exactly,
    state_dtype,
)


class AdamP(torch.optim.Optimizer):
    """AdamW; where |cos(g, p)| < delta/sqrt(dim), u -= (u.p/||p||^2) p and decay is times `wd_ratio`.

    cos and the projection take the whole tensor as one vector of `dim` entries (arXiv 2006.08217). Tensors of fewer
    than two dimensions, and zero ones, take plain AdamW steps. State: ``exp_avg``, ``exp_avg_sq`` float32, ``step``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "delta": delta,
                "wd_ratio": wd_ratio,
            },
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does; its options are checked first."""
        super().add_param_group(param_group)
        check_group(self.param_groups[-1], self.defaults, "AdamP")

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = evaluate(closure)
        for group in self.param_groups:
            lr = float(group["lr"])
            for p in (p for p in group["params"] if p.grad is not None):
                g = gradient(p)
                u = adam_direction(self.state[p], g, group["betas"], group["eps"])
                decay = lr * group["weight_decay"]
                if p.ndim > 1:
                    w = p.to(state_dtype(p))
                    square = w.square().sum()
                    cosine = (g * w).sum().abs() / (g.norm() * square.sqrt()).clamp_min(1e-30)
                    if bool(square > 0) and float(cosine) < group["delta"] / math.sqrt(p.numel()):
                        u = u - w * ((u * w).sum() / square)
                        decay *= group["wd_ratio"]
                apply_update(p, u, step=lr, decay=decay, cautious=False)
        return loss
