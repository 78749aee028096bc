"""MARS: gradients corrected by their change since the last step, then AdamW or Muon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
from diloco.optim.adam import adam_direction
from diloco.optim.coefficients import Coefficients
from diloco.optim.matrices import apply_update, check_matrix_group, orthogonalize_all, shape_scale, split
from diloco.optim.orthogonalize import Form, Start
from diloco.optim.state import (
    Closure,
    ParamGroup,
    Params,
    StateDict,
    check_group,
    evaluate,
    gradient,
    params_in_order,
    restore_exactly,
    zeros_like_state,
)

_BASES = ("adamw", "muon")


class MARS(torch.optim.Optimizer):
    """c = g + gamma b1/(1-b1) (g - g_prev); c /= max(1, ||c||); then AdamW or Muon on c (arXiv 2411.10438).

    ``base="muon"`` (MARS-M): M = lerp(M, c, 1-momentum), orth(M) without Nesterov, times 0.2 sqrt(max(r, c)); b1 is
    `momentum`, and ||c|| that of each matrix. Decay is decoupled. g_prev is the last step's gradient, 0 before the first. Tensors of fewer than two
    dimensions take plain AdamW on g. State, float32: ``previous``, and ``exp_avg``, ``exp_avg_sq``, ``step`` or
    ``momentum``.

    With `exact`, g_prev is the gradient of the current batch at the previous weights, for twice the work: `step` needs
    a closure that computes loss and gradients of one batch, and calls it first at the previous weights, then at the
    present ones, with the same random numbers. The gradients it leaves, and the loss returned, are those of the
    present weights. State then also has ``weights``, the previous ones in p's dtype, for every parameter.

    Raises:
        ConfigError: unknown base or option, a value out of range, or an exact step without a closure.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        *,
        base: Literal["adamw", "muon"] = "adamw",
        gamma: float = 0.025,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        coefficients: Coefficients = "you5",
        iteration_dtype: torch.dtype | str = torch.bfloat16,
        orth_eps: float = 1e-7,
        form: Form = "plain",
        start: Start = "frobenius",
        stacked: bool | None = None,
        blocks: int | Sequence[int] = 1,
        exact: bool = False,
    ) -> None:
        self.exact = exact
        super().__init__(
            params,
            {
                "lr": lr,
                "base": base,
                "gamma": gamma,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
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
        check_group(group, self.defaults, "MARS")
        if group["base"] not in _BASES:
            raise ConfigError(
                f"MARS: base is {group['base']!r}: known are {', '.join(_BASES)}{nearest(group['base'], _BASES)}"
            )
        matrices = [p for p in group["params"] if p.ndim > 1] if group["base"] == "muon" else []
        checked = group | {"params": matrices}
        check_matrix_group(checked)
        group["iteration_dtype"] = checked["iteration_dtype"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "exact": self.exact}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = self._evaluate_twice(closure) if self.exact else evaluate(closure)
        for group in self.param_groups:
            lr = float(group["lr"])
            decay = lr * group["weight_decay"]
            muon = group["base"] == "muon"
            beta = group["momentum"] if muon else group["betas"][0]
            targets: list[Tensor] = []
            moments: list[Tensor] = []
            for p in (p for p in group["params"] if p.grad is not None):
                g = gradient(p)
                c = g if p.ndim < 2 else self._corrected(p, g, group, beta)
                if muon and p.ndim > 1:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = zeros_like_state(p)
                    targets += split(p, group)
                    moments += split(state["momentum"].lerp_(c, 1 - beta), group)
                else:
                    u = adam_direction(self.state[p], c, group["betas"], group["eps"])
                    apply_update(p, u, step=lr, decay=decay, cautious=False)
            for target, O in zip(targets, orthogonalize_all(moments, group), strict=True):
                scale = shape_scale("match_rms", *O.shape[-2:])
                apply_update(target, O, step=lr * scale, decay=decay, cautious=False)
        return loss

    def _evaluate_twice(self, closure: Closure | None) -> float | None:
        """Put the closure's gradients at the previous weights into ``previous``, those at the present into `p.grad`."""
        if closure is None:
            raise ConfigError(
                "MARS: exact=True needs the gradient at the previous weights too: call step(closure) with a function "
                "that computes loss and gradients of the batch"
            )
        params = params_in_order(self.param_groups)
        moved = [p for p in params if "weights" in self.state.get(p, {})]
        present = [p.detach().clone() for p in params]
        if moved:
            _forget_gradients(params)
            try:
                for p in moved:
                    p.copy_(self.state[p]["weights"])
                with torch.random.fork_rng(devices=list({p.device for p in params if p.is_cuda})):
                    evaluate(closure)
            finally:
                for p, weights in zip(params, present, strict=True):
                    p.copy_(weights)
            for p in moved:
                if p.grad is not None and p.ndim > 1:
                    self.state[p]["previous"].copy_(gradient(p))
        _forget_gradients(params)
        loss = evaluate(closure)
        for p, weights in zip(params, present, strict=True):
            if p.grad is not None:
                self.state[p]["weights"] = weights
        return loss

    def _corrected(self, p: Tensor, g: Tensor, group: ParamGroup, beta: float) -> Tensor:
        state = self.state[p]
        if "previous" not in state:
            state["previous"] = zeros_like_state(p)
        previous: Tensor = state["previous"]
        c: Tensor = (g + group["gamma"] * beta / (1 - beta) * (g - previous)).contiguous()
        previous.copy_(g)  # a reference to p.grad would be zeroed with it
        # Fused and stacked matrices are what they would be as parameters of their own.
        for part in split(c, group) if group["base"] == "muon" else [c[None]]:
            part.div_(
                torch.linalg.vector_norm(part, dim=tuple(range(1, part.ndim)), keepdim=True).clamp_min(1.0)
            )
        return c


def _forget_gradients(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None  # whether or not the closure clears them, gradients of two points must not add up
