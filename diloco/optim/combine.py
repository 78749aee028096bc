"""Several optimizers over disjoint parameters as one: Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diloco.errors import ConfigError
from diloco.optim.state import Closure, ParamGroup, StateDict, evaluate, restore_exactly
from diloco.optim.wrapping import own_state

# What wrappers and loops look for: present here only when a member has it, and then done to every such member.
_PASSED_ON = ("reanchor", "train", "eval")


class Combined(torch.optim.Optimizer):
    """Steps its `optimizers` in the given order; groups and state are theirs, numbered in that order.

    The state dictionary has torch's format, so it is saved, loaded and scheduled as a single optimizer. `reanchor()`,
    `train()` and `eval()` exist when a member has them. Members with a true `needs_loss` are given the step's loss.

    Raises:
        ConfigError: no optimizers, or a group added afterwards, since it is not clear whose it would be.
        ValueError: a parameter that two of them own (from torch).
    """

    # Present only when a member has them.
    reanchor: Callable[[], None]
    train: Callable[[], None]
    eval: Callable[[], None]

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        if not optimizers:
            raise ConfigError("Combined got no optimizers: give at least one")
        self.optimizers = optimizers
        self.needs_loss = any(getattr(o, "needs_loss", False) for o in optimizers)
        self._complete = False
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        for o in optimizers:
            self.state.update(o.state)
        self._share()
        self._complete = True
        self._pass_on()

    def _pass_on(self) -> None:
        for name in _PASSED_ON:
            if any(hasattr(o, name) for o in self.optimizers):
                setattr(self, name, lambda name=name: self._each(name))

    def __getstate__(self) -> dict[str, Any]:
        return own_state(super().__getstate__(), self, ("optimizers", "needs_loss", "_complete"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pass_on()

    def _share(self) -> None:
        start = 0
        for o in self.optimizers:
            end = start + len(o.param_groups)
            o.param_groups, o.state = self.param_groups[start:end], self.state
            start = end

    def _each(self, name: str) -> None:
        for o in self.optimizers:
            if hasattr(o, name):
                getattr(o, name)()

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Refused once complete."""
        if self._complete:
            raise ConfigError(
                "Combined takes no further groups: add them to one of its optimizers before combining"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, loss: Any = None) -> float | None:  # type: ignore[override]
        """One step of each optimizer, in order; returns the closure's loss.

        `loss`, or the closure's, goes to the members that need it.
        """
        found = evaluate(closure)
        given = found if loss is None else loss
        for o in self.optimizers:
            if getattr(o, "needs_loss", False):
                o.step(loss=given)  # type: ignore[call-overload]
            else:
                o.step()
        return found
