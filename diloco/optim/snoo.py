"""SNOO: an outer Nesterov step on one worker's own weights every k inner steps. No communication happens here."""

from __future__ import annotations

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.optim.state import Closure, EvalModeError, ParamGroup, StateDict, params_in_order, state_dtype
from diloco.optim.wrapping import add_entries, param_entries, take_entries


class SNOO(torch.optim.Optimizer):
    """DiLoCo with one worker around any optimizer (arXiv 2510.15830).

    After inner steps k, 2k, ... with theta the slow copy and p the parameters:

        D = theta - p ; b = momentum b + D ; theta = theta - lr (D + momentum b) ; p = theta

    `param_groups` and `state` are the inner optimizer's own objects, so learning-rate schedulers and clipping work
    unchanged and act on the inner optimizer. theta and b are float32 of p's shape; with `offload` they live in CPU
    memory and travel once every k steps. theta is taken from the parameters just before the first step.
    `outer_step()` closes a partial round at the end of training.

    Raises:
        ConfigError: k < 1, negative lr, momentum outside [0, 1), or an inner optimizer that itself averages.
        EvalModeError: a step in eval mode.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        k: int = 10,
        lr: float = 0.7,
        momentum: float = 0.9,
        offload: bool = False,
    ) -> None:
        if k < 1:
            raise ConfigError(f"SNOO: k is {k}: give the number of inner steps per outer step, 1 or more")
        if not lr >= 0:
            raise ConfigError(f"SNOO: lr is {lr}: give the outer learning rate, 0 or more (0.7 is usual)")
        if not 0 <= momentum < 1:
            raise ConfigError(f"SNOO: momentum is {momentum}: give a number in [0, 1)")
        if hasattr(optimizer, "eval"):
            raise ConfigError(
                f"SNOO cannot wrap {type(optimizer).__name__}, which averages its weights itself: wrap its inner optimizer"
            )
        self.optimizer = optimizer
        self.k, self.outer_lr, self.outer_momentum, self.offload = k, lr, momentum, offload
        self.inner_steps = 0
        self.slow: dict[Tensor, Tensor] = {}
        self.buffer: dict[Tensor, Tensor] = {}
        self.training = True
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group to the inner optimizer; its slow copy starts from the weights it has at the next step."""
        if self.__dict__.get("param_groups") is not self.optimizer.param_groups:
            super().add_param_group(param_group)  # while being made: adopts the inner groups themselves
        else:
            self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One inner step, and after every k-th an outer step; returns the closure's loss."""
        if not self.training:
            raise EvalModeError("SNOO.step() in eval mode: call train() first")
        self._copy_new()
        loss = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        self.inner_steps += 1
        if self.inner_steps % self.k == 0:
            self.outer_step()
        return loss

    @torch.no_grad()
    def outer_step(self) -> None:
        """Apply the outer update now: called by `step`, and by the user for a partial round at the end."""
        for p, theta in self.slow.items():
            b = self.buffer[p]
            D = theta - p.to(device=theta.device, dtype=theta.dtype)
            b.mul_(self.outer_momentum).add_(D)
            theta.sub_(D.add_(b, alpha=self.outer_momentum), alpha=self.outer_lr)
            p.copy_(theta)
        # Optimizers that keep weights on a sphere must take up weights that somebody else wrote.
        reanchor = getattr(self.optimizer, "reanchor", None)
        if reanchor is not None:
            reanchor()
            for p, theta in self.slow.items():
                theta.copy_(p)

    def _copy_new(self) -> None:
        for p in params_in_order(self.param_groups):
            if p.requires_grad and p not in self.slow:
                device = torch.device("cpu") if self.offload else p.device
                self.slow[p] = p.detach().to(device=device, dtype=state_dtype(p), copy=True)
                self.buffer[p] = torch.zeros_like(self.slow[p])

    def train(self) -> None:
        """Allow steps again."""
        self.training = True

    def eval(self) -> None:
        """Refuse steps until `train()`. The parameters stay as they are: evaluate right after an outer step."""
        self.training = False

    def state_dict(self) -> StateDict:
        """The inner state in torch's format, with `snoo_slow` and `snoo_buffer` per parameter."""
        tensors = {"snoo_slow": self.slow, "snoo_buffer": self.buffer}
        own = {"snoo_inner_steps": self.inner_steps, "snoo_training": self.training}
        return add_entries(self.optimizer, tensors, own)

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of a state made by `state_dict`; training continues bit for bit.

        Raises:
            ConfigError: the state is not of this wrapper.
        """
        inner, own = take_entries(state_dict, "snoo_", "SNOO")
        self.optimizer.load_state_dict(inner)
        self._share()
        self.inner_steps, self.training = own["snoo_inner_steps"], own["snoo_training"]
        device = torch.device("cpu") if self.offload else None
        self.slow = dict(param_entries(self.optimizer, state_dict, "snoo_slow", device))
        self.buffer = dict(param_entries(self.optimizer, state_dict, "snoo_buffer", device))
