"""Muown: a row is a gain times a direction; Muon turns the directions, whose norm grows, and Adam sets the gains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.optim.adam import adam_direction
from diloco.optim.coefficients import Coefficients
from diloco.optim.matrices import check_matrix_group, orthogonalize_all, shape_scale, split
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
)

_TINY = 1e-20  # a gain never comes closer to zero: its row would lose its direction for ever


class Muown(torch.optim.Optimizer):
    """W_i = g_i V_i/||V_i|| per row i, with ||V_i|| = n_i set by a schedule (arXiv 2605.10797).

        U = W/g ; V = n U ; dg = sum over columns(G U) ; dV = (g/n) (G - U dg)
        M = momentum M + dV ; V = V - lr 0.2 sqrt(max(r, c)) orth(dV + momentum M)
        g = g - lr adam(dg) ; W = g V/||V_i||
        n = n0 + smoothstep((t-1)/(T-1)) (n_target - n0)    after step t = 1, 2, ..., T = `total_steps`

    n0 = ||W_i|| at the first step. A longer V turns less per step, so growing n acts as a falling learning rate. A gain
    may change sign. No weight decay. The model only holds W. Every keyword is also a group option; `stacked` and
    `blocks` are as in `Muon`, and fused blocks are orthogonalised each on their own.

    State, float32, with N matrices per parameter: `gain` and `start_norm` ``[N, r, 1]``, `momentum` ``[N, r, c]``, and
    Adam's moments of the gains. `reanchor()` takes up weights that somebody else wrote.

    Raises:
        ConfigError: unknown option, value out of range, a row of norm zero, shapes as in `Muon`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 3.5e-3,
        *,
        total_steps: int,
        n_target: float = 2.688,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        coefficients: Coefficients = "polar12",
        iteration_dtype: torch.dtype | str = torch.bfloat16,
        orth_eps: float = 1e-7,
        form: Form = "plain",
        start: Start = "frobenius",
        stacked: bool | None = None,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "total_steps": total_steps,
                "n_target": n_target,
                "momentum": momentum,
                "betas": betas,
                "eps": eps,
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
        """Add a group, as torch does; its options and weights are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "Muown")
        if group["total_steps"] < 1:
            raise ConfigError(
                f"Muown: total_steps is {group['total_steps']}: give the length of the run, 1 or more"
            )
        if not group["n_target"] > 0:
            raise ConfigError(f"Muown: n_target is {group['n_target']}: give a norm above 0 (2.688 is usual)")
        check_matrix_group(group)
        for p in group["params"]:
            _row_norms(p.detach(), group)

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
            params = [p for p in group["params"] if p.grad is not None]
            split_gradients = [self._backward(p, group) for p in params]
            updates = [block for _, _, u in split_gradients for block in _blocks(u, group)]
            orthogonal = iter(orthogonalize_all(updates, group))
            for p, (V, dg, _) in zip(params, split_gradients, strict=True):
                state = self.state[p]
                for block in _blocks(V, group):
                    scale = shape_scale("match_rms", *block.shape[1:])
                    block.sub_(next(orthogonal).to(V.dtype), alpha=lr * scale)
                gain: Tensor = state["gain"]
                gain.sub_(adam_direction(state, dg, group["betas"], group["eps"], "gain_"), alpha=lr)
                gain.copy_(_away_from_zero(gain))
                _whole(p, group).copy_(gain * V / V.norm(dim=-1, keepdim=True).clamp_min(_TINY))
        return loss

    def _backward(self, p: Tensor, group: ParamGroup) -> tuple[Tensor, Tensor, Tensor]:
        """V at its present norm, the gains' gradient, and the Nesterov momentum of V's gradient."""
        state = self.state[p]
        W, G = _whole(p, group).to(state_dtype(p)), _whole(gradient(p), group)
        if "gain" not in state:
            state["start_norm"] = _row_norms(p, group)
            state["gain"] = state["start_norm"].clone()
            state["momentum"] = torch.zeros_like(W, memory_format=torch.contiguous_format)
        gain, n = state["gain"], _direction_norm(state["start_norm"], state.get("gain_step", 0), group)
        U = W / gain
        dg = (G * U).sum(dim=-1, keepdim=True)
        dV = (gain / n) * (G - U * dg)
        M: Tensor = state["momentum"].mul_(group["momentum"]).add_(dV)
        return U * n, dg, dV.add(M, alpha=group["momentum"])

    @torch.no_grad()
    def reanchor(self) -> None:
        """After an outside write, set g_i to ||W_i|| with the sign it had; W, n and the momentum are kept."""
        for group in self.param_groups:
            for p in group["params"]:
                if state := self.state.get(p):
                    norm = _whole(p, group).to(state_dtype(p)).norm(dim=-1, keepdim=True)
                    state["gain"].copy_(_away_from_zero(torch.copysign(norm, state["gain"])))


def _whole(tensor: Tensor, group: ParamGroup) -> Tensor:
    return split(tensor, {**group, "blocks": 1})[0]


def _blocks(tensor: Tensor, group: ParamGroup) -> list[Tensor]:
    """The fused blocks of a tensor that is already ``[N, r, c]``."""
    return split(tensor, {**group, "stacked": True})


def _row_norms(p: Tensor, group: ParamGroup) -> Tensor:
    norms: Tensor = _whole(p, group).to(state_dtype(p)).norm(dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        raise ConfigError(
            f"Muown: weights of shape {tuple(p.shape)} have a row of norm 0, which has no direction: initialise it"
        )
    return norms


def _direction_norm(start: Tensor, done: int, group: ParamGroup) -> Tensor:
    """n after `done` steps."""
    x = min(max(done - 1, 0) / max(group["total_steps"] - 1, 1), 1.0)
    return start.lerp(torch.full_like(start, group["n_target"]), x * x * (3 - 2 * x))


def _away_from_zero(gain: Tensor) -> Tensor:
    return torch.copysign(gain.abs().clamp_min(_TINY), gain)
