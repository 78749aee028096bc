"""Freon: updates whose singular values are powers of the momentum's. For research: it needs an eigendecomposition."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
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

Method = Literal["gram", "svd"]
_METHODS = ("gram", "svd")
_DTYPES = (torch.float32, torch.float64)


class Freon(torch.optim.Optimizer):
    """M = lerp(M, g, 1-momentum); p = p (1 - lr wd) - lr scale(r, c) (G G^T)^(-e) G, e = 1 - q/2 (arXiv 2605.11181).

    G is M (or its Nesterov blend) divided by its Schatten-q norm. q = 2 is normalised SGD, q = 1 the polar factor (exact
    Muon), q < 1 the quasi-norm regime, which the authors find best on GPT-2. The size of the update depends on q (its
    Schatten-q/(q-1) norm is 1 for q > 1), so lr must be tuned for each q.

    For research only: every step decomposes every matrix exactly, which is slow, above all on GPUs. `method` "gram" takes
    the eigenvalues of the smaller Gram matrix; "svd" the singular values, the reference. Both run in `iteration_dtype`
    (float64 or float32); directions whose singular value is lost in its rounding are dropped. State and the other
    options as in `Muon`; every keyword is a group option.

    Raises:
        ConfigError: as `Muon`; q outside (0, 2]; unknown method; an iteration dtype of 16 bits.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        q: float = 0.5,
        momentum: float = 0.95,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        scale: str = "match_rms",
        cautious: bool = False,
        method: Method = "gram",
        iteration_dtype: torch.dtype | str = torch.float64,
        stacked: bool | None = None,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "q": q,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "scale": scale,
                "cautious": cautious,
                "method": method,
                "iteration_dtype": iteration_dtype,
                "stacked": stacked,
                "blocks": blocks,
            },
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "Freon")
        check_research_group(group)
        check_power(group["q"], group["method"], iteration_dtype(group["iteration_dtype"]))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = evaluate(closure)
        for group in self.param_groups:
            options = {"method": group["method"], "dtype": iteration_dtype(group["iteration_dtype"])}
            step_group(self, group, functools.partial(spectral_power, q=group["q"], **options))
        return loss


def spectral_power(
    G: Tensor, q: float, *, method: Method = "gram", dtype: torch.dtype = torch.float64
) -> Tensor:
    """(G G^T)^(-e) G with e = 1 - q/2 for each matrix of G ``[..., r, c]`` over its Schatten-q norm; in `dtype`.

    With G = U S V^T and S divided by (sum S^q)^(1/q) this is U S^(q-1) V^T. Directions with S <= max(r, c) eps max(S)
    ("svd") or S^2 <= max(r, c) eps max(S)^2 ("gram") count as zero. Zero matrices give zero.

    Raises:
        ConfigError: q outside (0, 2], unknown method, a dtype of 16 bits.
    """
    check_power(q, method, dtype)
    # Single fresh copies make a result independent of its neighbours in a stack.
    parts = [_power(m.to(dtype, copy=True), q, method) for m in whole(G).reshape(-1, *G.shape[-2:])]
    return spread_like(torch.stack(parts).reshape(G.shape), G)


def check_power(q: float, method: str, dtype: torch.dtype) -> None:
    """Refuse what `spectral_power` cannot compute."""
    if not 0 < q <= 2:
        raise ConfigError(f"q is {q}: give a Schatten exponent in (0, 2]; 1 is Muon's, 2 normalised SGD's")
    if method not in _METHODS:
        raise ConfigError(f"method is {method!r}: known are {', '.join(_METHODS)}{nearest(method, _METHODS)}")
    if dtype not in _DTYPES:
        raise ConfigError(f"iteration_dtype is {dtype}: matrices are decomposed in float32 or float64")


def _power(X: Tensor, q: float, method: str) -> Tensor:
    tall = X.shape[0] > X.shape[1]
    X = X.mT.contiguous() if tall else X
    X = X / X.abs().max().clamp_min(torch.finfo(X.dtype).tiny)  # squares below neither overflow nor vanish
    cut = X.shape[1] * torch.finfo(X.dtype).eps
    if method == "svd":
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        live = cut * S.max() < S
        out = (U * _powers(S, live, q)) @ Vh
    else:
        squares, U = torch.linalg.eigh(X @ X.mT)
        live = cut * squares.max() < squares
        S = squares.clamp_min(0).sqrt()
        # U S^(q-1) V^T = U S^(q-2) U^T (U S V^T)
        out = (U * (_powers(S, live, q) / torch.where(live, S, 1))) @ (U.mT @ X)
    result: Tensor = out.mT if tall else out
    return result


def _powers(S: Tensor, live: Tensor, q: float) -> Tensor:
    """(S/||S||_q)^(q-1) where `live`, else 0."""
    S = torch.where(live, S, 0)
    norm = S.pow(q).sum().pow(1 / q)
    return torch.where(live, S / norm, 1).pow(q - 1) * live
