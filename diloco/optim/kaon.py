"""Kaon: updates whose singular values are chaotic. For research: it asks how much the spectrum of an update matters."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.optim.matrices import iteration_dtype
from diloco.optim.research import check_research_group, step_group
from diloco.optim.sharded import spread_like, whole
from diloco.optim.state import (
    Closure,
    ParamGroup,
    Params,
    StateDict,
    check_group,
    evaluate,
    restore_exactly,
)

# 4.1 s (1 - s^2)^2 is largest at s = 1/sqrt(5), just below 1.175, and maps [0, 1.175] into itself without settling.
GAIN, BOUND = 4.1, 1.175


class Kaon(torch.optim.Optimizer):
    """M = lerp(M, g, 1-momentum); p = p (1 - lr wd) - lr scale(r, c) kaon(M) (arXiv 2605.11181).

    kaon(M): X = M/||M||, `iterations` times X = 4.1 (I - X X^T)^2 X, then X/1.175. The singular vectors are M's, the
    singular values end anywhere in [0, 1]. For research only: that it trains about as well as Muon shows how little the
    spectrum matters. `iteration_dtype` is float32 by default; dtypes disagree, as chaos must. State and the other
    options as in `Muon`; every keyword is a group option.

    Raises:
        ConfigError: as `Muon`; fewer than one iteration.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        *,
        iterations: int = 5,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        scale: str = "match_rms",
        cautious: bool = False,
        iteration_dtype: torch.dtype | str = torch.float32,
        stacked: bool | None = None,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "iterations": iterations,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "scale": scale,
                "cautious": cautious,
                "iteration_dtype": iteration_dtype,
                "stacked": stacked,
                "blocks": blocks,
            },
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "Kaon")
        if group["iterations"] < 1:
            raise ConfigError(f"Kaon: iterations is {group['iterations']}: give 1 or more (5 is usual)")
        check_research_group(group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = evaluate(closure)
        for group in self.param_groups:
            options = {"iterations": group["iterations"], "dtype": iteration_dtype(group["iteration_dtype"])}
            step_group(self, group, functools.partial(scramble, **options))
        return loss


def scramble(M: Tensor, iterations: int = 5, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """X = M/||M||, `iterations` times X = 4.1 (I - X X^T)^2 X, then X/1.175, per matrix of M ``[..., r, c]``; in `dtype`.

    The norm is taken in float32 at least. Zero matrices give zero.
    """
    # Single fresh copies make a result independent of its neighbours in a stack.
    parts = [_scrambled(m, iterations, dtype) for m in whole(M).reshape(-1, *M.shape[-2:])]
    return spread_like(torch.stack(parts).reshape(M.shape), M)


def _scrambled(M: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    X = M.to(wide, copy=True)
    tall = X.shape[0] > X.shape[1]
    X = X.mT.contiguous() if tall else X
    X = (X / X.norm().clamp_min(torch.finfo(wide).tiny)).to(dtype)
    eye = torch.eye(X.shape[0], dtype=dtype, device=X.device)
    for _ in range(iterations):
        B = eye - X @ X.mT
        X = GAIN * (B @ (B @ X))
    X = X / BOUND
    result: Tensor = X.mT if tall else X
    return result
