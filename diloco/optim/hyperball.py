"""Hyperball: matrices of constant norm; the learning rate is the relative step. The directions come from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
from diloco.optim.adam import adam_direction
from diloco.optim.coefficients import Coefficients
from diloco.optim.matrices import check_matrix_group, orthogonalize_all, split
from diloco.optim.muon import momentum_updates
from diloco.optim.normuon import divide_by_rms
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

_BASES: dict[str, dict[str, Any]] = {
    "muon": {"momentum": 0.95, "beta2": 0.95, "eps": 1e-10},
    "normuon": {"momentum": 0.95, "beta2": 0.95, "eps": 1e-10},
    "adam": {"momentum": 0.9, "beta2": 0.95, "eps": 1e-8},
}
_TINY = 1e-10


class Hyperball(torch.optim.Optimizer):
    """q = p - lr R u/max(||u||, 1e-10); p = R q/max(||q||, 1e-10) with R the initial norm (arXiv 2606.16899).

    u is Muon's orthogonal update, NorMuon's row-scaled one, or Adam's direction (`momentum` and `beta2` are its
    betas); its scale does not matter and u = 0 leaves p alone. No weight decay. R is kept per matrix or block as
    ``radius`` (``radius{k}``), ``[N, 1, 1]``, from the weights at the first step. `reanchor()` puts weights that
    somebody else wrote back on their spheres.

    Raises:
        ConfigError: unknown base or option, value out of range, weights of norm zero.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.018,
        *,
        base: Literal["muon", "normuon", "adam"] = "muon",
        momentum: float | None = None,
        nesterov: bool = True,
        beta2: float | None = None,
        eps: float | None = None,
        coefficients: Coefficients = "you5",
        iteration_dtype: torch.dtype | str = torch.bfloat16,
        orth_eps: float = 1e-7,
        form: Form = "plain",
        start: Start = "frobenius",
        stacked: bool | None = None,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        if base not in _BASES:
            raise ConfigError(
                f"Hyperball: base is {base!r}: known are {', '.join(_BASES)}{nearest(base, _BASES)}"
            )
        given = {"momentum": momentum, "beta2": beta2, "eps": eps}
        super().__init__(
            params,
            {
                "lr": lr,
                **_BASES[base],
                **{k: v for k, v in given.items() if v is not None},
                "base": base,
                "variant": "rows",
                "nesterov": nesterov,
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
        check_group(group, self.defaults, "Hyperball")
        if group["base"] not in _BASES:
            raise ConfigError(f"Hyperball: base is {group['base']!r}: known are {', '.join(_BASES)}")
        check_matrix_group(group)
        for p in group["params"]:
            for block in split(p.detach(), group):
                _radius(block)

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
            for p, directions in zip(params, self._directions(params, group), strict=True):
                for k, (block, u) in enumerate(zip(split(p, group), directions, strict=True)):
                    radius = self._kept_radius(p, k, block)
                    norm = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
                    wide = block.to(u.dtype)
                    q = wide - u * (float(group["lr"]) * radius / norm.clamp_min(_TINY))
                    block.copy_(torch.where(norm > 0, _project(q, radius), wide))
        return loss

    def _directions(self, params: list[Tensor], group: ParamGroup) -> list[list[Tensor]]:
        if group["base"] == "adam":
            betas = (group["momentum"], group["beta2"])
            return [
                split(adam_direction(self.state[p], gradient(p), betas, group["eps"]), group) for p in params
            ]
        updates = [split(u, group) for u in momentum_updates(self, params, group)]
        flat = iter(orthogonalize_all([m for blocks in updates for m in blocks], group))
        out = []
        for p, blocks in zip(params, updates, strict=True):
            directions = [next(flat).to(state_dtype(p)) for _ in blocks]
            if group["base"] == "normuon":
                directions = [
                    divide_by_rms(O, self.state[p], f"v{k}", group) for k, O in enumerate(directions)
                ]
            out.append(directions)
        return out

    def _kept_radius(self, p: Tensor, k: int, block: Tensor) -> Tensor:
        state = self.state[p]
        if f"radius{k}" not in state:
            state[f"radius{k}"] = _radius(block)
        kept: Tensor = state[f"radius{k}"]
        return kept

    @torch.no_grad()
    def reanchor(self) -> None:
        """Project every matrix that has been stepped back to its radius, after an outside write."""
        for group in self.param_groups:
            for p in group["params"]:
                for k, block in enumerate(split(p, group)):
                    radius = self.state[p].get(f"radius{k}") if p in self.state else None
                    if radius is not None:
                        block.copy_(_project(block.to(radius.dtype), radius))


def _radius(block: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(block.to(state_dtype(block)), dim=(-2, -1), keepdim=True)
    if bool((norm == 0).any()):
        raise ConfigError(
            f"Hyperball: a matrix of shape {tuple(block.shape[-2:])} has norm 0: initialise it, its norm stays for ever"
        )
    return norm


def _project(q: Tensor, radius: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True)
    return q * (radius / norm.clamp_min(_TINY))
