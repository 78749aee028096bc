"""The orthogonalising iteration: approximately U V^T of G = U S V^T from matrix products alone.

Coefficient sets are in `coefficients`; who stacks which matrices into one call is `matrices`. On CPUs where it is
faster the arithmetic is that of `diloco.kernels.orthogonal_cpu`; everywhere else it is torch's, below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
from diloco.kernels import orthogonal_cpu
from diloco.kernels.orthogonal import iterate, segments_of
from diloco.optim.coefficients import Coefficients, CoefficientSet, coefficient_set
from diloco.optim.sharded import is_sharded, spread_like, whole

Form = Literal["plain", "gram", "auto"]
Start = Literal["frobenius", "aol"]
FORMS = ("plain", "gram", "auto")
ITERATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# `auto` ends on the Gram matrix: where the matrix is this wide, and the smallest singular values have grown this much.
_WIDE, _GROWN, _LAST = 1.5, 32.0, 2


def orthogonalize(
    G: Tensor,
    coefficients: Coefficients | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    form: Form = "plain",
    start: Start = "frobenius",
) -> Tensor:
    """orth(G): X = G/(div ||G|| + eps), then per triple A = X X^T, X = a X + (b A + c A A) X.

    Args:
        G: ``[..., r, c]``, floating point; leading dimensions are a batch. Never modified. A DTensor is gathered, and
            the result has its placements.
        coefficients: a set's name or a list of (a, b, c), whose div is 1. Default you5 (turbo4 with the AOL start).
        dtype: of the iteration and the result. The norm is taken in float32 (float64 when `dtype` is float64).
        eps: added to the norm; the floor of the row sums in the AOL start.
        form: ``gram`` iterates on the small Gram matrix (for wide or tall matrices; square ones take ``plain``).
            ``auto`` is plain but for the last two iterations of matrices at least 1.5 times as long as they are wide,
            which it does on the Gram matrix: by then no singular value is too small for it, and the error stays that
            of ``plain``. It falls back to ``plain`` where the coefficients before amplify less than 32-fold.
        start: ``aol`` scales rows so that ||X||_2 <= 1 (arXiv 2512.04632); it converges to the polar factor of
            diag(s) X, a few per cent from that of X, and is not rotation-equivariant.

    Returns:
        A tensor of G's shape in `dtype`. Zero matrices give zero. On a CPU a batch equals its matrices one by one and
        the result does not depend on the number of threads, bit for bit.

    Raises:
        ConfigError: not a floating-point matrix, unknown name, form, start or dtype, or the Gram form with Polar
            coefficients in bfloat16, whose rounding errors that combination amplifies beyond use.
    """
    if coefficients is None:
        coefficients = "turbo4" if start == "aol" else "you5"
    chosen = coefficient_set(coefficients)
    check_options(chosen, dtype, eps, form, start)
    if G.ndim < 2 or not G.is_floating_point():
        raise ConfigError(
            f"G is a {G.dtype} tensor of shape {tuple(G.shape)}: give floating-point matrices [..., r, c]"
        )
    if is_sharded(G):
        full = orthogonalize(whole(G), coefficients, dtype=dtype, eps=eps, form=form, start=start)
        return spread_like(full, G)
    rows, columns = G.shape[-2:]
    if G.numel() == 0:
        return torch.zeros_like(G, dtype=dtype)
    X = G.reshape(-1, rows, columns)
    if compiled(X.device, chosen, dtype, start):
        alone = orthogonalize_each(X.unbind(), chosen, dtype, eps, form)
        return (torch.stack(alone) if len(alone) > 1 else alone[0]).reshape(G.shape)
    tall = rows > columns
    if tall:
        X = X.mT
    pieces = segments(chosen, form, start, rows, columns)
    # BLAS picks its order of summation by memory alignment: on a CPU only fresh copies of single matrices make a
    # result independent of its neighbours, and batching gains nothing there.
    parts = torch.split(X, 1) if X.device.type == "cpu" else (X,)
    results = [
        iterate(part, chosen.triples, pieces, chosen.div, dtype, eps, start == "aol") for part in parts
    ]
    X = results[0] if len(results) == 1 else torch.cat(results)
    return (X.mT if tall else X).reshape(G.shape)


def compiled(device: torch.device, chosen: CoefficientSet, dtype: torch.dtype, start: str) -> bool:
    """Whether the compiled CPU code does this iteration."""
    iterations = len(chosen.triples)
    return device.type == "cpu" and start == "frobenius" and orthogonal_cpu.supports(dtype, iterations)


def orthogonalize_each(
    matrices: Sequence[Tensor], chosen: CoefficientSet, dtype: torch.dtype, eps: float, form: str
) -> list[Tensor]:
    """`orthogonalize` of CPU matrices ``[r, c]`` of any shapes in one call, where `compiled` says so."""
    return orthogonal_cpu.orthogonalize(
        [m.to(torch.float32) for m in matrices],
        [segments(chosen, form, "frobenius", *m.shape) for m in matrices],
        orthogonal_cpu.Iteration(chosen.triples, dtype, chosen.div, eps),
    )


def segments(chosen: CoefficientSet, form: str, start: str, rows: int, columns: int) -> tuple[int, ...]:
    """How many iterations in turn are done on one Gram matrix before X is recomputed; all ones is the plain form."""
    n = len(chosen.triples)
    if form == "gram" and rows != columns:
        return segments_of(n, True)
    if form == "auto" and start == "frobenius" and max(rows, columns) >= _WIDE * min(rows, columns):
        growth = math.prod(a for a, _, _ in chosen.triples[:-_LAST])
        if n > _LAST and growth >= _GROWN:
            return (1,) * (n - _LAST) + (_LAST,)
    return (1,) * n


def check_options(chosen: CoefficientSet, dtype: torch.dtype, eps: float, form: str, start: str) -> None:
    """Refuse unknown or harmful combinations; optimizers call this when they are made, not at the first step."""
    if dtype not in ITERATION_DTYPES:
        raise ConfigError(f"iteration dtype is {dtype}: choose bfloat16, float16, float32 or float64")
    if eps < 0:
        raise ConfigError(f"eps is {eps}: give 0 or more")
    for name, value, known in (("form", form, FORMS), ("start", start, ("frobenius", "aol"))):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}: known are {', '.join(known)}{nearest(value, known)}")
    if form == "gram" and dtype == torch.bfloat16 and chosen.name.startswith("polar"):
        raise ConfigError(
            f"form 'gram' with coefficients {chosen.name!r} in bfloat16 loses the result to rounding: "
            "use float16, the forms 'auto' or 'plain', or another set such as 'you5'"
        )
