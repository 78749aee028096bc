"""SNOO: an outer Nesterov step on one worker's own weights every k inner steps. No communication happens here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.optim.sharded import locals_of
from diloco.optim.state import Closure, EvalModeError, ParamGroup, StateDict, params_in_order, state_dtype
from diloco.optim.wrapping import (
    add_entries,
    batches,
    own_state,
    param_entries,
    take_entries,
)

# What a copy of the optimizer takes along, beside torch's own.
_OWN = (
    "optimizer",
    "k",
    "outer_lr",
    "outer_momentum",
    "offload",
    "inner_steps",
    "slow",
    "buffer",
    "fast",
    "_seen",
    "training",
)


class SNOO(torch.optim.Optimizer):
    """DiLoCo with one worker around any optimizer (arXiv 2510.15830).

    After inner steps k, 2k, ... with theta the slow copy and p the parameters:

        D = theta - p ; b = momentum b + D ; theta = theta - lr (D + momentum b) ; p = theta

    `param_groups` and `state` are the inner optimizer's own objects, so learning-rate schedulers and clipping work
    unchanged and act on the inner optimizer. theta and b are float32 of p's shape; with `offload` they live in CPU
    memory (pinned when p is on a GPU) and travel once every k steps. theta is taken from the parameters just before
    the first step; a parameter that becomes trainable later joins at the start of the next round.
    `outer_step()` closes a partial round at the end of training. The weights to evaluate are theta: `eval()` puts
    them into the parameters, `train()` puts p back.

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
        if k < 1 or k != int(k):
            raise ConfigError(
                f"SNOO: k is {k}: give the number of inner steps per outer step, a whole number of 1 or more"
            )
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
        self.fast: dict[Tensor, Tensor] = {}  # p, in eval mode only
        self._seen = 0
        self.training = True
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return own_state(super().__getstate__(), self, _OWN)

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
        if not self.training:
            raise EvalModeError("SNOO.outer_step() in eval mode: call train() first")
        for ps in batches(self.slow):
            thetas, buffers = (locals_of([kept[p] for p in ps]) for kept in (self.slow, self.buffer))
            ps = locals_of(ps)
            D = torch._foreach_sub(thetas, _beside(ps, thetas))
            torch._foreach_mul_(buffers, self.outer_momentum)
            torch._foreach_add_(buffers, D)
            torch._foreach_add_(D, buffers, alpha=self.outer_momentum)
            torch._foreach_add_(thetas, D, alpha=-self.outer_lr)
            # Pinned copies go up while the CPU works on the next batch; `_beside` waits for them next time.
            torch._foreach_copy_(ps, thetas, non_blocking=True)
        # Optimizers that keep weights on a sphere must take up weights that somebody else wrote.
        reanchor = getattr(self.optimizer, "reanchor", None)
        if reanchor is not None:
            reanchor()
            for p, theta in self.slow.items():
                theta.copy_(p)

    def _copy_new(self) -> None:
        """Slow copies for parameters that have none. Looking costs a walk over all: not within a round, unless more came."""
        count = sum(len(group["params"]) for group in self.param_groups)
        if self._seen == count and self.inner_steps % self.k:
            return
        self._seen = count
        for p in params_in_order(self.param_groups):
            if p.requires_grad and p not in self.slow:
                self.slow[p] = self._home(p, p)
                self.buffer[p] = torch.zeros_like(self.slow[p])

    def _home(self, value: Tensor, p: Tensor) -> Tensor:
        """A copy of `value` where p's slow tensors live."""
        device = torch.device("cpu") if self.offload else p.device
        pinned = self.offload and p.is_cuda
        home = torch.empty_like(
            p, dtype=state_dtype(p), device=device, pin_memory=pinned, requires_grad=False
        )
        return home.copy_(value.detach())

    @torch.no_grad()
    def eval(self) -> None:
        """Put theta into the parameters and keep p aside. Does nothing in eval mode."""
        if self.training:
            for p, theta in self.slow.items():
                self.fast[p] = p.detach().to(device=theta.device, copy=True)
                p.copy_(theta)
        self.training = False

    @torch.no_grad()
    def train(self) -> None:
        """Put p back, bit for bit. Does nothing in train mode."""
        for p, fast in self.fast.items():
            p.copy_(fast)
        self.fast = {}
        self.training = True

    def state_dict(self) -> StateDict:
        """The inner state in torch's format, with `snoo_slow` and `snoo_buffer` per parameter, and the mode per group.

        In eval mode, when the parameters hold theta, also `snoo_fast`: p.
        """
        tensors = {"snoo_slow": self.slow, "snoo_buffer": self.buffer, "snoo_fast": self.fast}
        own = {"snoo_inner_steps": self.inner_steps, "snoo_training": self.training}
        return add_entries(self.optimizer, tensors, own)

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of a state made by `state_dict`, mode included; the parameters are the caller's to load.

        Training continues bit for bit.

        Raises:
            ConfigError: the state is not of this wrapper.
        """
        inner, own = take_entries(state_dict, "snoo_", "SNOO")
        self.optimizer.load_state_dict(inner)
        self._share()
        self.inner_steps, self.training = own["snoo_inner_steps"], own["snoo_training"]

        def entries(name: str) -> Iterator[tuple[Tensor, Tensor]]:
            device = torch.device("cpu") if self.offload else None
            return param_entries(self.optimizer, state_dict, name, device)

        self.slow = {p: self._home(value, p) for p, value in entries("snoo_slow")}
        self.buffer = {p: self._home(value, p) for p, value in entries("snoo_buffer")}
        self.fast = {p: value.to(p.dtype) for p, value in entries("snoo_fast")}
        self._seen = 0


def _beside(ps: list[Tensor], thetas: list[Tensor]) -> list[Tensor]:
    """`ps` as tensors that can be computed with `thetas`: themselves, or copies of the same device and dtype."""
    if ps[0].device == thetas[0].device:
        return (
            ps if ps[0].dtype == thetas[0].dtype else [p.to(t.dtype) for p, t in zip(ps, thetas, strict=True)]
        )
    landed = [torch.empty_like(t, pin_memory=t.is_pinned()) for t in thetas]
    torch._foreach_copy_(landed, [p.detach() for p in ps], non_blocking=True)
    if ps[0].is_cuda:
        torch.cuda.current_stream(ps[0].device).synchronize()
    return landed
