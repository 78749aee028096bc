"""Training bfloat16 parameters in float32: a master copy, or the 16 bits that the parameter itself lacks.

The update rules are those of the optimizer inside, which sees float32 tensors and knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError, nearest
from diloco.optim.sharded import is_sharded
from diloco.optim.state import Closure, ParamGroup, StateDict, evaluate
from diloco.optim.wrapping import add_entries, param_entries, take_entries

Mode = Literal["remainder", "master"]
_MODES = ("remainder", "master")
# What the optimizer inside may offer to loops, beside `step`: done on the float32 weights.
_PASSED_ON = ("reanchor", "train", "eval", "outer_step")


class Master(torch.optim.Optimizer):
    """Any optimizer over bfloat16 parameters, computing in float32.

        optimizer = Master(lambda groups: Muon(groups, lr=1e-3), model.parameters())
        optimizer = Master(lambda groups: SNOO(Muon(groups), k=10), model.parameters())

    Every bfloat16 parameter has a float32 weight w; the parameter is its upper 16 bits, that is w rounded towards
    zero. `mode` "remainder" keeps the lower 16 bits (int16, ``master_low``), so that the two together are the bit
    pattern of w: 2 bytes per element, and 4 more during a step, when w is put together. "master" keeps w itself
    (float32, ``master_weight``), 4 bytes throughout. Both give the same bits: those of training in float32 with
    the rounded weights in the forward pass. Gradients are cast to float32 for the step. Parameters of other dtypes
    go to the optimizer inside as they are.

    SNOO, GPA and averages belong inside, where they see w: around it they would round w to bfloat16. An outside
    write to a parameter (loading weights, a merge) replaces the upper 16 bits and leaves the lower ones, in both
    modes: below the resolution of what was written.

    `param_groups` hold the model's parameters and share their options with the groups inside, so schedulers and
    clipping work; a change of a group's options reaches the optimizer inside at the next step. `train()`, `eval()`,
    `reanchor()` and `outer_step()` exist when the optimizer inside has them. `working()` makes the float32 weights
    available for anything else.

    Args:
        make: from groups in torch's form, with float32 tensors in place of bfloat16 ones, to the optimizer inside.
        params: parameters, or groups with options, as torch takes them.

    Raises:
        ConfigError: unknown mode, a float16 parameter (whose upper half float32 does not have), a sharded one, no
            parameters.
    """

    # Present only when the optimizer inside has them.
    reanchor: Callable[[], None]
    train: Callable[[], None]
    eval: Callable[[], None]
    outer_step: Callable[[], None]

    def __init__(
        self,
        make: Callable[[list[ParamGroup]], torch.optim.Optimizer],
        params: Iterable[Tensor] | Iterable[ParamGroup],
        mode: Mode = "remainder",
    ) -> None:
        if mode not in _MODES:
            raise ConfigError(
                f"Master: mode is {mode!r}: known are {', '.join(_MODES)}{nearest(mode, _MODES)}"
            )
        self.mode = mode
        groups = _groups(params)
        self.kept: dict[Tensor, Tensor] = {}  # by w: its lower 16 bits, or itself
        self._wide = {p: self._widen(p) for group in groups for p in group["params"]}
        self._narrow = {w: p for p, w in self._wide.items()}
        self.optimizer = make([{**g, "params": [self._wide[p] for p in g["params"]]} for g in groups])
        own = [{**g, "params": [self._narrow[w] for w in g["params"]]} for g in self.optimizer.param_groups]
        super().__init__(own, self.optimizer.defaults)
        self.needs_loss = bool(getattr(self.optimizer, "needs_loss", False))
        self.state = self.optimizer.state
        self._close()
        for name in _PASSED_ON:
            if hasattr(self.optimizer, name):
                setattr(self, name, lambda name=name: self._inside(name))

    def _widen(self, p: Tensor) -> Tensor:
        if p.dtype == torch.float16:
            raise ConfigError(
                f"Master: a parameter of shape {tuple(p.shape)} is float16: use bfloat16, the upper half of float32"
            )
        if p.dtype != torch.bfloat16:
            return p
        if is_sharded(p):
            raise ConfigError(
                f"Master: a parameter of shape {tuple(p.shape)} is sharded: give FSDP float32 parameters and its mixed "
                "precision policy instead, which computes in bfloat16"
            )
        w = Parameter(p.detach().to(torch.float32, copy=True), requires_grad=p.requires_grad)
        self.kept[w] = _low(w) if self.mode == "remainder" else w
        return w

    # ---- between the two representations ----

    @contextmanager
    def working(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizer inside, with its float32 weights and gradients in place; written back at the end."""
        self._copy_options(self.param_groups, self.optimizer.param_groups)
        for w, kept in self.kept.items():
            p = self._narrow[w]
            if self.mode == "remainder":
                w.untyped_storage().resize_(w.numel() * w.element_size())
            _join(p, kept if self.mode == "remainder" else _low(w), w)
            w.grad = None if p.grad is None else p.grad.to(torch.float32)
        try:
            yield self.optimizer
        finally:
            self._close()

    @torch.no_grad()
    def _close(self) -> None:
        """Round w into p, keep what is lost, and let the memory of w and its gradient go."""
        for w, kept in self.kept.items():
            self._narrow[w].copy_(_high(w))
            w.grad = None
            if self.mode == "remainder":
                kept.copy_(_low(w))
                w.untyped_storage().resize_(0)
        self._copy_options(self.optimizer.param_groups, self.param_groups)

    @staticmethod
    def _copy_options(source: list[ParamGroup], target: list[ParamGroup]) -> None:
        for a, b in zip(source, target, strict=True):
            b.update({k: v for k, v in a.items() if k != "params"})

    def _inside(self, name: str) -> None:
        with torch.no_grad(), self.working() as inner:
            getattr(inner, name)()

    # ---- torch's interface ----

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, loss: Any = None) -> float | None:  # type: ignore[override]
        """One step of the optimizer inside; returns the closure's loss, which is evaluated at the rounded weights."""
        found = evaluate(closure)
        with self.working() as inner:
            if self.needs_loss:
                inner.step(loss=found if loss is None else loss)  # type: ignore[call-overload]
            else:
                inner.step()
        return found

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Refused once made: which float32 tensors the optimizer inside holds is settled then."""
        if "needs_loss" in self.__dict__:
            raise ConfigError("Master takes no further groups: give them all when it is made")
        super().add_param_group(param_group)

    def state_dict(self) -> StateDict:
        """The state inside in torch's format, with `master_low` or `master_weight` per bfloat16 parameter."""
        self._copy_options(self.param_groups, self.optimizer.param_groups)
        name = "master_low" if self.mode == "remainder" else "master_weight"
        return add_entries(self.optimizer, {name: self.kept}, {"master_mode": self.mode})

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of a state made by `state_dict`, of either mode; the parameters are the caller's to load.

        Raises:
            ConfigError: the state is not of this wrapper.
        """
        inner, _ = take_entries(state_dict, "master_", "Master")
        with self.working():
            self.optimizer.load_state_dict(inner)
        self.state = self.optimizer.state
        for name in ("master_low", "master_weight"):
            for w, value in param_entries(self.optimizer, state_dict, name):
                if self.mode == "master":
                    w.copy_(value if name == "master_weight" else _join(self._narrow[w], value, w))
                else:
                    self.kept[w].copy_(value if name == "master_low" else _low(value))


def _groups(params: Iterable[Tensor] | Iterable[ParamGroup]) -> list[ParamGroup]:
    items: list[Any] = list(params)
    if not items:
        raise ConfigError("Master got no parameters: give some")
    if not isinstance(items[0], Mapping):
        return [{"params": items}]
    return [
        {**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])}
        for g in items
    ]


def _bits(w: Tensor) -> Tensor:
    return w.detach().view(torch.int32)


def _high(w: Tensor) -> Tensor:
    """The bfloat16 that is the upper half of float32 w."""
    return (_bits(w) >> 16).to(torch.int16).view(torch.bfloat16)


def _low(w: Tensor) -> Tensor:
    """The lower half of float32 w, int16."""
    return _bits(w).to(torch.int16)


def _join(p: Tensor, low: Tensor, out: Tensor) -> Tensor:
    """The float32 whose halves are bfloat16 `p` and int16 `low`, written to `out`."""
    upper = p.detach().view(torch.int16).to(torch.int32) << 16
    _bits(out).copy_(upper | (low.to(torch.int32) & 0xFFFF))
    return out
