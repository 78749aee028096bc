"""What every optimizer of this package shares about its state: dtypes, exact loading, closures, modes.

No update rule lives here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from diloco.errors import ConfigError, DilocoError, nearest

Closure = Callable[[], float]
ParamGroup = dict[str, Any]
Params = Iterable[Tensor] | Iterable[ParamGroup] | Iterable[tuple[str, Tensor]]
StateDict = dict[str, Any]
_NOT_NEGATIVE = ("lr", "weight_decay", "eps", "gain_lr", "gamma", "delta", "wd_ratio", "rho")


class EvalModeError(DilocoError, RuntimeError):
    """A step was asked of an optimizer whose parameters hold the evaluation weights: call `train()` first."""


def evaluate(closure: Closure | None) -> float | None:
    """Run `closure` with gradients enabled and return its loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def state_dtype(p: Tensor) -> torch.dtype:
    """float32 for every parameter but float64 ones: moments in 16 bits change trajectories by several per cent."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def zeros_like_state(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.contiguous_format)


def gradient(p: Tensor) -> Tensor:
    """The gradient in the state's dtype; sparse gradients are refused. May alias `p.grad`: do not write to it."""
    assert p.grad is not None
    if p.grad.is_sparse:
        raise ConfigError(f"a parameter of shape {tuple(p.shape)} has a sparse gradient: use dense gradients")
    return p.grad.to(state_dtype(p))


def params_in_order(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """All parameters in the order in which `state_dict` numbers them."""
    return [p for group in groups for p in group["params"]]


def restore_exactly(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """After torch's `load_state_dict`, put back the saved tensors with their own dtypes, as copies.

    torch casts state to the parameter's dtype and otherwise shares the tensors with the saved dictionary; float32
    moments of a bfloat16 parameter would lose bits, and two optimizers loaded from one dictionary would interfere.
    """
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    for index, p in zip(indices, params_in_order(optimizer.param_groups), strict=True):
        for key, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                device = optimizer.state[p][key].device  # torch knows which entries stay on the CPU
                optimizer.state[p][key] = value.detach().to(device=device, copy=True)


def check_group(group: Mapping[str, Any], known: Iterable[str], owner: str) -> None:
    """Refuse unknown options, negative or infinite rates and factors, and momenta and betas outside [0, 1)."""
    names = {*known, "params", "param_names", "lr", "initial_lr", "name", "why", "normalized"}
    for key in group:
        if key not in names:
            raise ConfigError(f"{owner} has no option {key!r}{nearest(key, names)}")
    for key in _NOT_NEGATIVE:
        value = group.get(key)
        if value is not None and not 0 <= float(value) < math.inf:
            raise ConfigError(f"{owner}: {key} is {value}: give 0 or more, below infinity")
    for key in ("momentum", "beta2"):
        value = group.get(key)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{owner}: {key} is {value}: give a number in [0, 1)")
    betas = group.get("betas")
    if betas is not None and not (len(betas) == 2 and all(0 <= b < 1 for b in betas)):
        raise ConfigError(f"{owner}: betas is {betas}: give two numbers in [0, 1)")
