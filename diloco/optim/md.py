"""MD decoupling: a matrix is row gains times a direction of fixed norm times column gains. Averages are not its job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diloco.errors import ConfigError, nearest
from diloco.optim.adam import adam_direction
from diloco.optim.coefficients import Coefficients
from diloco.optim.matrices import check_matrix_group, orthogonalize_all, split
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

_CHOICES = {"base": ("muon", "adam"), "sphere": ("matrix", "row")}
_TINY = 1e-8


class MD(torch.optim.Optimizer):
    """W = diag(g_row) D diag(g_col) with ||D|| = R fixed and g = softplus(raw) > 0 (arXiv 2606.25971, Algorithm 2).

        Gd = g_row G g_col ; D = D - lr base(Gd) ; D = R D/||D|| ; raw = raw - gain_lr adam(dL/draw) ; W fused again

    The model only holds W, which is scaled to norm R when its group is added: make the optimizer before the first
    forward, and load a checkpoint's weights after making it. `base` "muon" steps by R/sqrt(max(r, c)) shape_up
    orth(u), whose norm is R, so that lr is the relative step; "adam" by Adam's direction. `radius`: "shape" is
    sqrt(max(r, c)), "init" is sqrt(r c/`d_model`), or a number. No weight decay, no warm-up.

    `shrink` multiplies R and the update, leaving the relative step as it is: 1/sqrt(2 L) is meant for the matrices that
    write to the residual stream of L layers.

    Group options: ``sphere="row"`` keeps every row at norm 1 (embeddings, head, router) and has shape factor 1;
    ``gains=False`` fixes the gains at 1; `base` and the keywords here. `gain_lr` defaults to lr/10; given, it is the
    value at the group's first lr and follows its schedule. Fused `blocks` have a sphere each and share the matrix's gains. State, float32: ``raw_row``
    ``[N, r, 1]``, ``raw_col`` ``[N, 1, c]``, Adam moments of both, and the base's.

    Raises:
        ConfigError: unknown option or choice, value out of range, "init" without d_model, weights of norm zero.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        *,
        base: Literal["muon", "adam"] = "muon",
        gain_lr: float | None = None,
        radius: Literal["init", "shape"] | float = "shape",
        d_model: int | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        eps: float = 1e-8,
        sphere: Literal["matrix", "row"] = "matrix",
        gains: bool = True,
        shrink: float = 1.0,
        coefficients: Coefficients = "you5",
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
                "base": base,
                "gain_lr": gain_lr,
                "radius": radius,
                "d_model": d_model,
                "betas": betas,
                "momentum": momentum,
                "eps": eps,
                "sphere": sphere,
                "gains": gains,
                "shrink": shrink,
                "coefficients": coefficients,
                "iteration_dtype": iteration_dtype,
                "orth_eps": orth_eps,
                "form": form,
                "start": start,
                "stacked": stacked,
                "blocks": blocks,
            },
        )

    @torch.no_grad()
    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does; its options are checked first, then its weights are put on their spheres."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, (*self.defaults, "peak_lr"), "MD")
        group.setdefault("peak_lr", float(group["lr"]))
        for key, known in _CHOICES.items():
            if group[key] not in known:
                raise ConfigError(
                    f"MD: {key} is {group[key]!r}: known are {', '.join(known)}{nearest(str(group[key]), known)}"
                )
        if not group["shrink"] > 0:
            raise ConfigError(f"MD: shrink is {group['shrink']}: give a factor above 0, such as 1/sqrt(2 L)")
        check_matrix_group(group)
        for p in group["params"]:
            for block in split(p, group):
                norm = _norm(block.to(state_dtype(p)), group)
                if bool((norm == 0).any()):
                    raise ConfigError(
                        f"MD: weights of shape {tuple(p.shape)} have norm 0: initialise them first"
                    )
                block.copy_(block * (_radius(block, group) / norm))

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
            fused = [self._backward(p, group) for p in params]
            updates = [b for p, (_, Gd) in zip(params, fused, strict=True) for b in self._base(p, Gd, group)]
            if group["base"] == "muon":
                updates = orthogonalize_all(updates, group)
            steps = iter(updates)
            for p, (D, _) in zip(params, fused, strict=True):
                blocks = _blocks(D, group)
                for block in blocks:
                    direction = next(steps).to(D.dtype) * _factor(block, group)
                    block.sub_(direction, alpha=float(group["lr"]))
                    block.mul_(_radius(block, group) / _norm(block, group).clamp_min(_TINY))
                self._write(p, D, group)
        return loss

    def _backward(self, p: Tensor, group: ParamGroup) -> tuple[Tensor, Tensor]:
        """Unfuse W into D with the gains that fused it, split the gradient, and step the gains."""
        W, G = _whole(p, group), _whole(gradient(p), group)
        if not group["gains"]:
            return W.to(G.dtype, copy=True), G.clone()
        state = self.state[p]
        if "raw_row" not in state:
            n, r, c = W.shape
            state["raw_row"] = G.new_full((n, r, 1), math.log(math.e - 1))
            state["raw_col"] = G.new_full((n, 1, c), math.log(math.e - 1))
        raw_row, raw_col = state["raw_row"], state["raw_col"]
        row, col = softplus(raw_row), softplus(raw_col)
        D = W.to(G.dtype) / row / col
        d_row = (D * G * col).sum(dim=-1, keepdim=True) * raw_row.sigmoid()
        d_col = (D * G * row).sum(dim=-2, keepdim=True) * raw_col.sigmoid()
        rate = _gain_rate(group)
        for name, raw, d in (("row_", raw_row, d_row), ("col_", raw_col, d_col)):
            raw.sub_(adam_direction(state, d, group["betas"], group["eps"], name), alpha=rate)
        return D, row * G * col

    def _base(self, p: Tensor, Gd: Tensor, group: ParamGroup) -> list[Tensor]:
        state = self.state[p]
        if group["base"] == "adam":
            return _blocks(adam_direction(state, Gd, group["betas"], group["eps"]), group)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(Gd)
        M = state["momentum"].lerp_(Gd, 1 - group["momentum"])
        return _blocks(Gd.lerp(M, group["momentum"]), group)

    def _write(self, p: Tensor, D: Tensor, group: ParamGroup) -> None:
        if group["gains"]:
            D = softplus(self.state[p]["raw_row"]) * D * softplus(self.state[p]["raw_col"])
        _whole(p, group).copy_(D)

    @torch.no_grad()
    def reanchor(self) -> None:
        """After an outside write, move the change of ||D|| into the row gains; W is kept and the sphere restored.

        Without gains there is nowhere to put it, and W is projected.
        """
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not state:
                    continue
                if not group["gains"]:
                    for block in split(p, group):
                        block.copy_(block * (_radius(block, group) / _norm(block, group).clamp_min(_TINY)))
                    continue
                row, col = softplus(state["raw_row"]), softplus(state["raw_col"])
                D = _whole(p, group).to(row.dtype) / row / col
                raws = _blocks(state["raw_row"], group)
                for block, raw in zip(_blocks(D, group), raws, strict=True):
                    raw.copy_(_softplus_inverse(softplus(raw) * _norm(block, group) / _radius(block, group)))


def _whole(tensor: Tensor, group: ParamGroup) -> Tensor:
    return split(tensor, {**group, "blocks": 1})[0]


def _blocks(tensor: Tensor, group: ParamGroup) -> list[Tensor]:
    """The fused blocks of a tensor that is already ``[N, r, c]``."""
    return split(tensor, {**group, "stacked": True})


def _norm(block: Tensor, group: ParamGroup) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(
        block, dim=-1 if group["sphere"] == "row" else (-2, -1), keepdim=True
    )
    return norm


def _radius(block: Tensor, group: ParamGroup) -> float:
    return float(group["shrink"]) * _full_radius(block, group)


def _full_radius(block: Tensor, group: ParamGroup) -> float:
    if group["sphere"] == "row":
        return 1.0
    rows, columns = block.shape[-2:]
    radius = group["radius"]
    if radius == "shape":
        return math.sqrt(max(rows, columns))
    if radius == "init":
        if not group["d_model"]:
            raise ConfigError("MD: radius 'init' is sqrt(r c/d_model): give d_model, or use radius 'shape'")
        return math.sqrt(rows * columns / group["d_model"])
    if isinstance(radius, str) or not radius > 0:
        raise ConfigError(f"MD: radius is {radius!r}: give 'init', 'shape' or a positive number")
    return float(radius)


def _factor(block: Tensor, group: ParamGroup) -> float:
    """Makes the Muon update's norm R: shape_up R/sqrt(max(r, c)) = R/sqrt(min(r, c))."""
    if group["base"] == "adam" or group["sphere"] == "row":
        return float(group["shrink"])
    return _radius(block, group) / math.sqrt(min(block.shape[-2:]))


def _gain_rate(group: ParamGroup) -> float:
    lr = float(group["lr"])
    if group["gain_lr"] is None:
        return lr / 10
    peak = float(group["peak_lr"])
    return float(group["gain_lr"]) * (lr / peak if peak > 0 else 1.0)


def _softplus_inverse(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
