"""Muon: orthogonalised momentum for matrices. Vectors, embeddings and heads belong to AdamW (see `groups`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diloco.kernels.orthogonal_cpu import Update
from diloco.optim.coefficients import Coefficients
from diloco.optim.compiled import compiled_update
from diloco.optim.matrices import (
    EXACT,
    apply_update,
    check_matrix_group,
    check_scale,
    orthogonalize_all,
    shape_scale,
    split,
    with_exact_rms,
)
from diloco.optim.orthogonalize import Form, Start
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
    zeros_like_state,
)


class Muon(torch.optim.Optimizer):
    """M = lerp(M, g, 1-beta); u = lerp(g, M, beta) if nesterov else M; p = p (1 - lr wd) - lr scale(r, c) orth(u).

    State: `momentum`, float32, of p's shape. The project's default is `match_rms` with you5, which shares one
    lr and weight decay with AdamW (arXiv 2502.16982); the original is ``scale="original", coefficients="quintic5",
    lr=0.02``; ``scale="rms_exact"`` gives every matrix an update of RMS exactly 0.2 lr. Parameters whose gradient is None are skipped; `p.grad` is never written.

    Every keyword is also a group option. `stacked` and `blocks` say which matrices a parameter holds (see
    `matrices`); fused blocks are updated exactly as separate parameters would be. `cautious` decays only entries
    whose update agrees in sign (arXiv 2510.12402). `form` is that of `orthogonalize`; its default here, "auto", is the
    plain iteration with fewer operations for long matrices.

    Raises:
        ConfigError: unknown option, value out of range, a parameter without a matrix, blocks that do not fit.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        scale: str = "match_rms",
        coefficients: Coefficients = "you5",
        iteration_dtype: torch.dtype | str = torch.bfloat16,
        *,
        cautious: bool = False,
        orth_eps: float = 1e-7,
        form: Form = "auto",
        start: Start = "frobenius",
        stacked: bool | None = None,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "scale": scale,
                "cautious": cautious,
                "coefficients": coefficients,
                "iteration_dtype": iteration_dtype,
                "orth_eps": orth_eps,
                "form": form,
                "start": start,
                "stacked": stacked,
                "blocks": blocks,
            },
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "Muon")
        check_scale(group["scale"])
        check_matrix_group(group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            lr = float(group["lr"])
            exact = group["scale"] == EXACT
            if not exact:
                params = self._compiled(params, group, lr)
            if not params:
                continue
            updates = momentum_updates(self, params, group)
            pieces = [split(p, group) for p in params]
            matrices = [m for u in updates for m in split(u, group)]
            for p, o in zip(
                (b for blocks in pieces for b in blocks), orthogonalize_all(matrices, group), strict=True
            ):
                apply_update(
                    p,
                    with_exact_rms(o.to(state_dtype(p))) if exact else o,
                    step=lr if exact else lr * shape_scale(group["scale"], *p.shape[1:]),
                    decay=lr * group["weight_decay"],
                    cautious=group["cautious"],
                )
        return loss

    def _compiled(self, params: list[Tensor], group: ParamGroup, lr: float) -> list[Tensor]:
        def step(rows: int, columns: int) -> float:
            return lr * shape_scale(group["scale"], rows, columns)

        return compiled_update(
            self, params, group, fused_options(group, decay=lr * group["weight_decay"]), step
        )


def fused_options(group: Mapping[str, Any], *, decay: float, **more: Any) -> Update:
    """What the compiled step needs to know of a group; `decay` is the fraction by which weights shrink."""
    return Update(
        weight=1 - float(group["momentum"]),
        keep=1 - decay,
        nesterov=group["nesterov"],
        cautious=group["cautious"],
        **more,
    )


def momentum_updates(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], group: Mapping[str, Any]
) -> list[Tensor]:
    """Advance the EMA `momentum` of each parameter and return the (Nesterov) update, never aliasing the gradient."""
    beta = float(group["momentum"])
    grads = [gradient(p) for p in params]
    buffers = []
    for p in params:
        state = optimizer.state[p]
        if "momentum" not in state:
            state["momentum"] = zeros_like_state(p)
        buffers.append(state["momentum"])
    torch._foreach_lerp_(buffers, grads, 1 - beta)
    return list(torch._foreach_lerp(grads, buffers, beta)) if group["nesterov"] else buffers
