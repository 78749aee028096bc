"""Scion: steps of fixed size in a norm chosen per group, optionally inside a ball. Schedules are in `schedules`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
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
    restore_exactly,
    zeros_like_state,
)

NORMS = ("spectral", "sign", "col", "row", "bias")


class Scion(torch.optim.Optimizer):
    """m = (1-a) m + a g; p = (1-lr) p - lr rho L(m) (arXiv 2502.07529); a is `momentum`, 0.1 as the authors count.

        spectral  sqrt(r/c) orth(m), with `spectral_max` at least 1      sign  sign(m)/c
        col       m/(||col||/sqrt(r) + 1e-8)                              row   m/(||row|| sqrt(c) + 1e-8)
        bias      m/(rms(m) + 1e-8), for any shape

    ``constrained=False`` drops the factor (1-lr). No other decay. Hidden matrices: spectral, rho 50; a tied head:
    sign, rho 3000. State: ``momentum`` float32.

    Raises:
        ConfigError: unknown norm or option, value out of range, a vector under a matrix norm.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2.0**-12,
        *,
        norm: Literal["spectral", "sign", "col", "row", "bias"] = "spectral",
        rho: float = 50.0,
        momentum: float = 0.1,
        constrained: bool = True,
        spectral_max: bool = False,
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
                "norm": norm,
                "rho": rho,
                "momentum": momentum,
                "constrained": constrained,
                "spectral_max": spectral_max,
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
        # The momentum is the new gradient's weight here, so that 1 (no memory) is allowed.
        check_group({k: v for k, v in group.items() if k != "momentum"}, self.defaults, "Scion")
        if not 0 < group["momentum"] <= 1:
            raise ConfigError(
                f"Scion: momentum is {group['momentum']}: give the new gradient's weight, in (0, 1]"
            )
        if group["norm"] not in NORMS:
            raise ConfigError(
                f"Scion: norm is {group['norm']!r}: known are {', '.join(NORMS)}{nearest(group['norm'], NORMS)}"
            )
        checked = group | ({"params": []} if group["norm"] == "bias" else {})
        check_matrix_group(checked)
        group["iteration_dtype"] = checked["iteration_dtype"]

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
            averages = [self._average(p, float(group["momentum"])) for p in params]
            whole = group["norm"] == "bias"
            targets = params if whole else [b for p in params for b in split(p, group)]
            moments = averages if whole else [b for m in averages for b in split(m, group)]
            lr = float(group["lr"])
            decay = lr if group["constrained"] else 0.0
            for target, update in zip(targets, steepest(moments, group), strict=True):
                apply_update(target, update, step=lr * group["rho"], decay=decay, cautious=False)
        return loss

    def _average(self, p: Tensor, weight: float) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = zeros_like_state(p)
        average: Tensor = state["momentum"].lerp_(gradient(p), weight)
        return average


def steepest(moments: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """L(m) of each moment in the group's norm."""
    match group["norm"]:
        case "spectral":
            out = []
            for m, O in zip(moments, orthogonalize_all(moments, group), strict=True):
                factor = shape_scale("spectral", *O.shape[-2:])
                out.append(O.to(m.dtype) * (max(1.0, factor) if group["spectral_max"] else factor))
            return out
        case "sign":
            return [m.sign() / m.shape[-1] for m in moments]
        case "col":
            return [m / (m.norm(dim=-2, keepdim=True) / math.sqrt(m.shape[-2]) + 1e-8) for m in moments]
        case "row":
            return [m / (m.norm(dim=-1, keepdim=True) * math.sqrt(m.shape[-1]) + 1e-8) for m in moments]
    return [m / (m.square().mean().sqrt() + 1e-8) for m in moments]
