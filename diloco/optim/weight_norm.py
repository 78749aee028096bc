"""Rows of unit norm around any optimizer. Spheres that an update rule itself respects are in `hyperball` and `md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
from diloco.optim.matrices import split
from diloco.optim.state import Closure, ParamGroup, StateDict, params_in_order, restore_exactly, state_dtype
from diloco.optim.wrapping import own_state


class RowNorm(torch.optim.Optimizer):
    """After each step of `optimizer`: W_i = W_i/||W_i|| for every row i of the chosen matrices (arXiv 2511.18890).

    `params`: the matrices, as tensors or as names from the groups' `param_names`. By default all parameters of two or
    more dimensions in groups named "matrix" or with the option ``normalize=True`` (for optimizers that take unknown
    options, such as torch's). A stack ``[E, r, c]`` has E r rows; convolutions are flattened to ``[d0, prod(rest)]``.

    The rows are also projected once when this is made: make it before the first forward. Rows whose norm is 1 up to
    rounding are left alone bit for bit. `param_groups` and `state` are the inner optimizer's own objects and the state
    dictionary is the inner one's; wrap it as an inner optimizer is wrapped, ``SNOO(RowNorm(AdamW(...)))``. `reanchor()`
    projects after an outside write. Use no weight decay on these matrices: the projection undoes it.

    Raises:
        ConfigError: nothing to normalise, an unknown name, a parameter that is not the optimizer's or has fewer than two
            dimensions, a row of norm zero, or an optimizer that averages or already keeps weights on a sphere.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Iterable[Tensor | str] | None = None
    ) -> None:
        for method, reason in (("eval", "averages its weights"), ("reanchor", "keeps weights on a sphere")):
            if hasattr(optimizer, method):
                raise ConfigError(
                    f"RowNorm cannot wrap {type(optimizer).__name__}, which {reason} itself: wrap the optimizer of the "
                    "parameters to normalise, and combine or wrap the result"
                )
        self.optimizer = optimizer
        self._chosen = None if params is None else _find(params, optimizer.param_groups)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        rows = self._rows()
        if not rows:
            raise ConfigError(
                "RowNorm: no group is named 'matrix' or has normalize=True: give params, the matrices to normalise"
            )
        for view in rows:
            if bool((view == 0).all(dim=-1).any()):
                raise ConfigError(
                    f"RowNorm: weights of shape {tuple(view.shape[-2:])} have a row of norm 0: initialise them first"
                )
            _project(view)

    def __getstate__(self) -> dict[str, Any]:
        return own_state(super().__getstate__(), self, ("optimizer", "_chosen"))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group to the inner optimizer; its matrices are normalised if it is named or marked so."""
        if self.__dict__.get("param_groups") is not self.optimizer.param_groups:
            super().add_param_group(param_group)  # while being made: adopts the inner groups themselves
        else:
            self.optimizer.add_param_group(param_group)
            self.reanchor()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One inner step, then the projection; returns the closure's loss."""
        self._share()
        loss = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        self.reanchor()
        return loss

    @torch.no_grad()
    def reanchor(self) -> None:
        """Project every row to norm 1, after an outside write."""
        for view in self._rows():
            _project(view)

    def state_dict(self) -> StateDict:
        """The inner optimizer's state: nothing is kept here."""
        self._share()
        saved: StateDict = self.optimizer.state_dict()
        return saved

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a copy of the inner optimizer's state."""
        self._share()
        self.optimizer.load_state_dict(state_dict)
        restore_exactly(self.optimizer, state_dict)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def _share(self) -> None:
        """Hand on the groups and state that an optimizer around this one may have replaced."""
        if self.optimizer.param_groups is not self.param_groups or self.optimizer.state is not self.state:
            self.optimizer.param_groups, self.optimizer.state = self.param_groups, self.state

    def _rows(self) -> list[Tensor]:
        out = []
        for group in self.param_groups:
            layout = {"stacked": group.get("stacked"), "blocks": 1}
            for p in group["params"]:
                wanted = _by_default(p, group) if self._chosen is None else p in self._chosen
                if wanted:
                    out.append(split(p.detach(), layout)[0])
        return out


def _by_default(p: Tensor, group: Mapping[str, Any]) -> bool:
    return p.ndim > 1 and bool(group.get("name") == "matrix" or group.get("normalize"))


def _find(params: Iterable[Tensor | str], groups: list[ParamGroup]) -> set[Tensor]:
    names = {n: p for g in groups for n, p in zip(g.get("param_names", ()), g["params"], strict=False)}
    owned = set(params_in_order(groups))
    found = set()
    for wanted in params:
        if isinstance(wanted, str) and wanted not in names:
            raise ConfigError(
                f"RowNorm: no parameter is named {wanted!r}{nearest(wanted, names)}: names are those of "
                "model.named_parameters(), given to the optimizer"
            )
        p = names[wanted] if isinstance(wanted, str) else wanted
        if p not in owned or p.ndim < 2:
            raise ConfigError(
                f"RowNorm: a tensor of shape {tuple(p.shape)} is no matrix of the optimizer: give its own parameters"
            )
        found.add(p)
    return found


def _project(view: Tensor) -> None:
    """Scale the rows of ``[N, r, c]`` to norm 1 in place; rows at 1 up to rounding, or at 0, keep their bits."""
    wide = state_dtype(view)
    norm = torch.linalg.vector_norm(view, dim=-1, keepdim=True, dtype=torch.float64)
    # What one rounding of each entry, and of the two operations below, can leave.
    tolerance = torch.finfo(view.dtype).eps + 4 * torch.finfo(wide).eps
    off = ((norm - 1).abs() > tolerance) & (norm > 0)
    view.copy_(view.to(wide) * torch.where(off, 1 / norm, 1).to(wide))
