"""Outer optimizers: what turns the mean pseudo-gradient of a fragment into its next global value.

Everything is fp32 and elementwise in separate multiplications and additions: every node that repeats a step on
the same bytes gets the same bits (a fused multiply-add would round differently on another machine).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.kernels import ops

State = dict[str, Tensor]


class OuterOptimizer(Protocol):
    def init(self, params: Tensor) -> State:
        """Fresh state for a fragment of `params` [n]: tensors by name."""
        ...

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        """Advance `state` in place and return what is to be subtracted from `params` [n]."""
        ...

    def step(self, params: Tensor, mean: Tensor, state: State) -> None:
        """``params -= update(params, mean, state)``, in place."""
        ...


class _Steps:
    def step(self, params: Tensor, mean: Tensor, state: State) -> None:
        params.sub_(self.update(params, mean, state))

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        raise AssertionError("every outer optimizer defines update")


def _flat(*tensors: Tensor) -> bool:
    """Whether the fused kernels take these tensors; they compute the same bits as `update`, in one pass."""
    return all(t.dtype == torch.float32 and t.dim() == 1 and t.is_contiguous() for t in tensors)


@dataclass(frozen=True, slots=True)
class Sgd(_Steps):
    """``G -= lr * D``. lr 1 is plain parameter averaging (FedAvg, 1602.05629)."""

    lr: float = 1.0

    def init(self, params: Tensor) -> State:
        return {}

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        return mean * self.lr

    def step(self, params: Tensor, mean: Tensor, state: State) -> None:
        if _flat(params, mean):
            ops.outer_step("sgd", params, mean, lr=self.lr)
        else:
            params.sub_(self.update(params, mean, state))


@dataclass(frozen=True, slots=True)
class SgdM(_Steps):
    """``b <- mu b + D; G -= lr b``."""

    lr: float = 0.7
    momentum: float = 0.9

    def init(self, params: Tensor) -> State:
        return {"momentum": torch.zeros_like(params)}

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        return state["momentum"].mul_(self.momentum).add_(mean) * self.lr

    def step(self, params: Tensor, mean: Tensor, state: State) -> None:
        buffer = state["momentum"]
        if _flat(params, mean, buffer):
            ops.outer_step("sgdm", params, mean, [buffer], lr=self.lr, momentum=self.momentum)
        else:
            params.sub_(self.update(params, mean, state))


@dataclass(frozen=True, slots=True)
class Nesterov(_Steps):
    """``b <- mu b + D; G -= lr (D + mu b)`` (2311.08105): torch's SGD(nesterov=True, dampening=0)."""

    lr: float = 0.7
    momentum: float = 0.9

    def init(self, params: Tensor) -> State:
        return {"momentum": torch.zeros_like(params)}

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        buffer = state["momentum"].mul_(self.momentum).add_(mean)
        return buffer.mul(self.momentum).add_(mean).mul_(self.lr)

    def step(self, params: Tensor, mean: Tensor, state: State) -> None:
        buffer = state["momentum"]
        if _flat(params, mean, buffer):
            ops.outer_step("nesterov", params, mean, [buffer], lr=self.lr, momentum=self.momentum)
        else:
            params.sub_(self.update(params, mean, state))


@dataclass(frozen=True, slots=True)
class Adam(_Steps):
    """FedOpt's Adam (2003.00295) with its large eps; an ablation, worse than Nesterov here."""

    lr: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 0.1

    def init(self, params: Tensor) -> State:
        zero = torch.zeros_like(params)
        return {"m": zero, "step": torch.zeros(1), "v": zero.clone()}

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        b1, b2 = self.betas
        t = int(state["step"].add_(1).item())
        m = state["m"].mul_(b1).add_(mean * (1 - b1))
        v = state["v"].mul_(b2).add_(mean.square().mul_(1 - b2))
        return (m / (1 - b1**t)).div_((v / (1 - b2**t)).sqrt_().add_(self.eps)).mul_(self.lr)


@dataclass(frozen=True, slots=True)
class Gpa(_Steps):
    """Generalised primal averaging (2512.17131) as outer optimizer: params are y, the start point of workers.

    ``z -= lr D; x <- mu_x x + (1-mu_x) z; y <- mu_y x + (1-mu_y) z``. With mu_x = mu_y = mu and
    lr = eta / (1-mu), y follows Nesterov(eta, mu) exactly. Evaluate `state["x"]`.
    """

    lr: float = 4.0
    mu_x: float = 0.9
    mu_y: float = 0.9

    def init(self, params: Tensor) -> State:
        return {"x": params.clone(), "z": params.clone()}

    def update(self, params: Tensor, mean: Tensor, state: State) -> Tensor:
        z = state["z"].sub_(mean * self.lr)
        x = state["x"].mul_(self.mu_x).add_(z * (1 - self.mu_x))
        return params - (x * self.mu_y).add_(z * (1 - self.mu_y))

    def step(self, params: Tensor, mean: Tensor, state: State) -> None:
        x, z = state["x"], state["z"]
        if _flat(params, mean, x, z):
            ops.outer_step("gpa", params, mean, [x, z], lr=self.lr, momentum=self.mu_x, mu_y=self.mu_y)
        else:
            params.sub_(self.update(params, mean, state))


@dataclass(slots=True)
class OuterShard:
    """One fragment's global copy: its value, the outer optimizer's state, how many commits made it.

    `params` is fp32 [n] and owned by the shard; `version` counts commits since the start.
    """

    optimizer: OuterOptimizer
    params: Tensor
    version: int = 0
    state: State = field(default_factory=dict)

    @classmethod
    def start(cls, optimizer: OuterOptimizer, params: Tensor) -> OuterShard:
        owned = params.detach().clone()
        return cls(optimizer, owned, 0, optimizer.init(owned))

    def apply(self, mean: Tensor) -> None:
        """One outer step with the mean pseudo-gradient [n]; the version goes up by one."""
        self.optimizer.step(self.params, mean, self.state)
        self.version += 1

    def subtract(self, update: Tensor) -> None:
        """Take an update that was computed elsewhere."""
        self.params.sub_(update)
        self.version += 1

    def replace(self, params: Tensor) -> None:
        """Take a value that was computed elsewhere."""
        self.params.copy_(params)
        self.version += 1

    def load(self, params: Tensor, state: Mapping[str, Tensor], version: int) -> None:
        self.params.copy_(params)
        for name, tensor in state.items():
            self.state[name].copy_(tensor)
        self.version = version


def make(
    kind: str, *, lr: float, momentum: float, gpa_lr: float, gpa_mu_x: float, gpa_mu_y: float
) -> OuterOptimizer:
    """The outer optimizer that the configuration's [outer] section names."""
    match kind:
        case "sgd":
            return Sgd(lr)
        case "sgdm":
            return SgdM(lr, momentum)
        case "nesterov":
            return Nesterov(lr, momentum)
        case "adam":
            return Adam(lr)
        case "gpa":
            return Gpa(gpa_lr, gpa_mu_x, gpa_mu_y)
    raise ConfigError(f"outer.kind = {kind!r} is unknown; use nesterov, sgd, sgdm, adam or gpa")
