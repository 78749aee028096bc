"""NorMuon: Muon with a second moment per output neuron. The orthogonalisation itself is in `orthogonalize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
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
from diloco.optim.muon import fused_options, momentum_updates
from diloco.optim.orthogonalize import Form, Start
from diloco.optim.state import (
    Closure,
    ParamGroup,
    Params,
    StateDict,
    check_group,
    evaluate,
    restore_exactly,
    state_dtype,
)

Variant = Literal["rows", "speedrun"]
_VARIANTS: dict[str, dict[str, Any]] = {
    "rows": {"lr": 1e-3, "weight_decay": 0.1, "beta2": 0.95, "scale": "match_rms", "cautious": False},
    "speedrun": {"lr": 0.023, "weight_decay": 1.2, "beta2": 0.9, "scale": "original", "cautious": True},
}


class NorMuon(torch.optim.Optimizer):
    """Muon, then O is divided by the root of a running mean of O^2 and brought back to its norm (arXiv 2510.05491).

        v = lerp(v, mean(O^2 over columns), 1-beta2) ; O' = O/(sqrt(v) + eps) ; O' = O' ||O||/(||O'|| + eps)
        p = p (1 - lr wd) - lr scale(r, c) O'

    `variant` "rows" as above, defaults lr 1e-3, decay 0.1, beta2 0.95, `match_rms` (the authors: lr 0.02,
    ``scale="original"``). "speedrun" averages over the longer side's direction (columns if r >= c, else rows),
    divides by sqrt(max(v, eps)), and decays cautiously by lr^2 wd; defaults lr 0.023, decay 1.2, beta2 0.9,
    "original". ``scale="rms_exact"`` gives every matrix an update of RMS exactly 0.2 lr instead.

    State: `momentum` (p's shape) and per block k a `v` ``[N, r, 1]`` or ``[N, 1, c]`` (key ``v`` or ``v{k}``),
    float32, no bias correction. Otherwise as `Muon`, whose keywords it shares; every keyword is a group option.

    Raises:
        ConfigError: as `Muon`, and for an unknown variant.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        *,
        variant: Variant = "rows",
        momentum: float = 0.95,
        nesterov: bool = True,
        beta2: float | None = None,
        eps: float = 1e-10,
        weight_decay: float | None = None,
        scale: str | None = None,
        cautious: bool | None = None,
        coefficients: Coefficients = "you5",
        iteration_dtype: torch.dtype | str = torch.bfloat16,
        orth_eps: float = 1e-7,
        form: Form = "auto",
        start: Start = "frobenius",
        stacked: bool | None = None,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        if variant not in _VARIANTS:
            raise ConfigError(
                f"NorMuon: variant is {variant!r}: known are {', '.join(_VARIANTS)}{nearest(variant, _VARIANTS)}"
            )
        given = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta2": beta2,
            "scale": scale,
            "cautious": cautious,
        }
        super().__init__(
            params,
            {
                **_VARIANTS[variant],
                **{k: v for k, v in given.items() if v is not None},
                "variant": variant,
                "momentum": momentum,
                "nesterov": nesterov,
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
        """Add a group, as torch does; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "NorMuon")
        if group["variant"] not in _VARIANTS:
            raise ConfigError(f"NorMuon: variant is {group['variant']!r}: known are {', '.join(_VARIANTS)}")
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
            decay = lr * group["weight_decay"] * (lr if group["variant"] == "speedrun" else 1.0)
            if group["variant"] == "rows":
                params = self._compiled(params, group, lr, decay)
            if not params:
                continue
            updates = momentum_updates(self, params, group)
            matrices = [m for u in updates for m in split(u, group)]
            directions = iter(orthogonalize_all(matrices, group))
            for p in params:
                blocks = split(p, group)
                for k, block in enumerate(blocks):
                    key = "v" if len(blocks) == 1 else f"v{k}"
                    O = next(directions).to(state_dtype(p))
                    update = _restored(O, divide_by_rms(O, self.state[p], key, group), group)
                    apply_update(block, update, step=lr, decay=decay, cautious=group["cautious"])
        return loss

    def _compiled(self, params: list[Tensor], group: ParamGroup, lr: float, decay: float) -> list[Tensor]:
        exact = group["scale"] == EXACT
        how = fused_options(
            group,
            decay=decay,
            advance=1 - float(group["beta2"]),
            norm_eps=float(group["eps"]),
            restore_rms=exact,
        )

        def step(rows: int, columns: int) -> float:
            return lr if exact else lr * shape_scale(group["scale"], rows, columns)

        return compiled_update(self, params, group, how, step, rows=True)


def divide_by_rms(O: Tensor, state: dict[str, Any], key: str, group: Mapping[str, Any]) -> Tensor:
    """Advance the second moment ``state[key]`` with O ``[N, r, c]`` and divide O by its root; the norm changes."""
    eps = float(group["eps"])
    rows, columns = O.shape[-2:]
    speedrun = group["variant"] == "speedrun"
    reduced = -2 if speedrun and rows < columns else -1
    mean = O.square().mean(dim=reduced, keepdim=True)
    if key not in state:
        state[key] = torch.zeros_like(mean)
    v: Tensor = state[key].lerp_(mean, 1 - float(group["beta2"]))
    return O * v.clamp_min(eps).rsqrt() if speedrun else O / (v.sqrt() + eps)


def _restored(O: Tensor, scaled: Tensor, group: Mapping[str, Any]) -> Tensor:
    """`scaled` with the norm of O times the shape factor, or with RMS 0.2."""
    eps = float(group["eps"])
    if group["scale"] == EXACT:
        return with_exact_rms(scaled, eps)
    rows, columns = O.shape[-2:]
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True) + eps
    target: Tensor = torch.linalg.vector_norm(O, dim=(-2, -1), keepdim=True)
    return scaled * (target * shape_scale(group["scale"], rows, columns) / norm)
