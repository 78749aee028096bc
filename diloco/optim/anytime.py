"""Anytime averaging: a running average of the weights beside any optimizer. Training is not affected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.optim.state import Closure, EvalModeError, ParamGroup, StateDict, evaluate
from diloco.optim.working import new_state, working_copies
from diloco.optim.wrapping import add_entries, own_state, param_entries, take_entries
from diloco.schedules import anytime_rate

# What a copy of the optimizer takes along, beside torch's own.
_OWN = ("optimizer", "half_life", "steps", "average", "theta", "training")


class AnytimeAverage(torch.optim.Optimizer):
    """Evaluate an average whose half-life grows with the run (arXiv 2602.03702); for constant or invsqrt lr.

        avg += tau_t (theta - avg) ;  tau_t = 1 - 2^(-1/(h t)), and 1 while h t < 1 ;  h = half_life

    after every step t of the wrapped optimizer. The parameters hold theta in train mode and avg in eval mode; going
    there and back restores theta bit for bit. avg is float32 of p's shape. A parameter has an average from its first
    gradient on: until then theta is its average. Eval mode holds one more copy of the weights.

    `param_groups` and `state` are the wrapped optimizer's own objects, so schedulers work unchanged.

    Raises:
        ConfigError: half_life outside (0, 1], or a wrapped optimizer that averages itself (Schedule-Free, GPA, SNOO).
        EvalModeError: a step in eval mode.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, half_life: float = 0.1) -> None:
        if not 0 < half_life <= 1:
            raise ConfigError(
                f"AnytimeAverage: half_life is {half_life}: give a fraction of the elapsed steps in (0, 1]"
            )
        if hasattr(optimizer, "eval"):
            raise ConfigError(
                f"AnytimeAverage cannot wrap {type(optimizer).__name__}, which averages its weights itself: "
                "use another optimizer"
            )
        self.optimizer = optimizer
        self.half_life = half_life
        self.steps = 0
        self.average: dict[Tensor, Tensor] = {}
        self.theta: dict[Tensor, Tensor] = {}
        self.training = True
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return own_state(super().__getstate__(), self, _OWN)

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group to the wrapped optimizer."""
        if self.__dict__.get("param_groups") is not self.optimizer.param_groups:
            super().add_param_group(param_group)  # while being made: adopts the wrapped groups themselves
        else:
            self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One step of the wrapped optimizer, then of the average; returns the closure's loss."""
        if not self.training:
            raise EvalModeError(
                "AnytimeAverage.step() in eval mode, where the parameters hold the average: call train() first"
            )
        loss = evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.average:
                    self.average[p] = new_state(p)
        self.optimizer.step()
        self.steps += 1
        if self.average:
            rate = anytime_rate(self.steps, self.half_life)
            torch._foreach_lerp_(list(self.average.values()), working_copies(self.average), rate)
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average in the parameters and keep theta aside. Does nothing in eval mode."""
        if self.training:
            for p, average in self.average.items():
                self.theta[p] = p.detach().clone()
                p.copy_(average)
        self.training = False

    @torch.no_grad()
    def train(self) -> None:
        """Put theta back, exactly. Does nothing in train mode."""
        for p, theta in self.theta.items():
            p.copy_(theta)
        self.theta.clear()
        self.training = True

    def state_dict(self) -> StateDict:
        """The wrapped state in torch's format, with `anytime_average` per parameter and, in eval mode, theta."""
        tensors = {"anytime_average": self.average, "anytime_theta": self.theta}
        return add_entries(
            self.optimizer, tensors, {"anytime_steps": self.steps, "anytime_training": self.training}
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of a state made by `state_dict`, mode included; the parameters are the caller's to load.

        Raises:
            ConfigError: the state is not of this wrapper.
        """
        inner, own = take_entries(state_dict, "anytime_", "AnytimeAverage")
        self.optimizer.load_state_dict(inner)
        self._share()
        self.steps, self.training = own["anytime_steps"], own["anytime_training"]
        self.average = dict(param_entries(self.optimizer, state_dict, "anytime_average"))
        self.theta = dict(param_entries(self.optimizer, state_dict, "anytime_theta"))
