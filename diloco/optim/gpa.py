"""GPA: generalised primal averaging around any optimizer. The base optimizer's own rule is untouched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.optim.sharded import locals_of
from diloco.optim.state import Closure, EvalModeError, ParamGroup, StateDict, evaluate, state_dtype
from diloco.optim.wrapping import (
    add_entries,
    batches,
    own_state,
    param_entries,
    swap_lerp,
    take_entries,
)

# What a copy of the optimizer takes along, beside torch's own.
_OWN = ("optimizer", "mu_x", "mu_y", "z", "training")


class GPA(torch.optim.Optimizer):
    """Gradients at y, steps on z, evaluation at the average x (arXiv 2512.17131).

        y = mu_y x + (1-mu_y) z ;  z' = base step on z with the gradient at y ;  x' = mu_x x + (1-mu_x) z'

    The parameters hold y in train mode and x in eval mode; one more tensor per parameter holds z, and x while the base
    steps. As ``y' = x + (1 - mu_x mu_y)(z' - x)``, mu_x = 0 is exactly the base optimizer. Before and after the base's
    step one pass reads and writes both tensors. Weight decay acts on z. From an outer momentum mu with H inner steps:
    ``mu_x = mu^(1/H)``. Needs a learning-rate schedule.

    `param_groups` and `state` are the base optimizer's own objects, so schedulers work unchanged. A closure is
    evaluated at y. Start is x = y = z; a parameter without a gradient is left alone.

    Raises:
        ConfigError: mu_x outside [0, 1], mu_y outside (0, 1], or a base that averages itself (Schedule-Free, SNOO) or
            keeps its weights on a sphere (Hyperball, MD), which averages leave.
        EvalModeError: a step in eval mode.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mu_x: float = 0.9967, mu_y: float = 0.7) -> None:
        if not 0 <= mu_x <= 1:
            raise ConfigError(f"GPA: mu_x is {mu_x}: give the weight of the old average, in [0, 1]")
        if not 0 < mu_y <= 1:
            raise ConfigError(f"GPA: mu_y is {mu_y}: give the weight of the average in y, in (0, 1]")
        for method, reason in (
            ("eval", "averages its weights itself"),
            ("reanchor", "keeps weights on a sphere"),
        ):
            if hasattr(optimizer, method):
                raise ConfigError(
                    f"GPA cannot wrap {type(optimizer).__name__}, which {reason}: use another base"
                )
        self.optimizer = optimizer
        self.mu_x, self.mu_y = mu_x, mu_y
        self.z: dict[Tensor, Tensor] = {}
        self.training = True
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return own_state(super().__getstate__(), self, _OWN)

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group to the base optimizer."""
        if self.__dict__.get("param_groups") is not self.optimizer.param_groups:
            super().add_param_group(param_group)  # while being made: adopts the base's groups themselves
        else:
            self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One base step on z with the gradients at y; returns the closure's loss."""
        if not self.training:
            raise EvalModeError(
                "GPA.step() in eval mode, where the parameters hold the average: call train() first"
            )
        loss = evaluate(closure)
        active = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not active:
            return loss
        pairs = [(p, self._z(p)) for p in active]
        swap_lerp(pairs, 1 - 1 / self.mu_y)  # parameters y -> z, own tensors z -> x
        try:
            self.optimizer.step()
        finally:  # a base that refuses to step leaves an average behind, not x and z in each other's place
            swap_lerp([(z, p) for p, z in pairs], 1 - self.mu_x * self.mu_y)  # z', x -> y', z'
        return loss

    def _z(self, p: Tensor) -> Tensor:
        if p not in self.z:
            self.z[p] = p.detach().to(dtype=state_dtype(p), copy=True)
        return self.z[p]

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average in the parameters: x = y + (1 - 1/mu_y)(z - y). Does nothing in eval mode."""
        if self.training:
            self._move(1 - 1 / self.mu_y)
        self.training = False

    @torch.no_grad()
    def train(self) -> None:
        """Put y back, up to rounding: y = x + (1 - mu_y)(z - x). Does nothing in train mode."""
        if not self.training:
            self._move(1 - self.mu_y)
        self.training = True

    def _move(self, weight: float) -> None:
        for ps in batches(self.z):
            zs = locals_of([self.z[p] for p in ps])
            ps = locals_of(ps)
            torch._foreach_copy_(ps, torch._foreach_lerp(_as_state(ps, zs), zs, weight))

    def state_dict(self) -> StateDict:
        """The base's state in torch's format, with `gpa_z` per parameter and the mode per group."""
        return add_entries(self.optimizer, {"gpa_z": self.z}, {"gpa_training": self.training})

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of a state made by `state_dict`, mode included; the parameters are the caller's to load.

        Raises:
            ConfigError: the state is not of this wrapper.
        """
        inner, own = take_entries(state_dict, "gpa_", "GPA")
        self.optimizer.load_state_dict(inner)
        self._share()
        self.training = own["gpa_training"]
        self.z = dict(param_entries(self.optimizer, state_dict, "gpa_z"))


def _as_state(ps: list[Tensor], zs: list[Tensor]) -> list[Tensor]:
    """`ps`, or copies of them, in the dtype of `zs`."""
    return ps if ps[0].dtype == zs[0].dtype else [p.to(z.dtype) for p, z in zip(ps, zs, strict=True)]
