"""The orthogonalising iteration: approximately U V^T of G = U S V^T from matrix products alone.

Coefficient sets are in `coefficients`; who stacks which matrices into one call is `matrices`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
from diloco.optim.coefficients import Coefficients, CoefficientSet, coefficient_set

Form = Literal["plain", "gram"]
Start = Literal["frobenius", "aol"]
ITERATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_RESTART = 2  # the iteration before which the Gram form recomputes X and R, to stop error growth


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
        G: ``[..., r, c]``, floating point; leading dimensions are a batch. Never modified.
        coefficients: a set's name or a list of (a, b, c), whose div is 1. Default you5 (turbo4 with the AOL start).
        dtype: of the iteration and the result. The norm is taken in float32 (float64 when `dtype` is float64).
        eps: added to the norm; the floor of the row sums in the AOL start.
        form: ``gram`` iterates on the small Gram matrix (for wide or tall matrices; square ones take ``plain``).
        start: ``aol`` scales rows so that ||X||_2 <= 1 (arXiv 2512.04632); it converges to the polar factor of
            diag(s) X, a few per cent from that of X, and is not rotation-equivariant.

    Returns:
        A tensor of G's shape in `dtype`. Zero matrices give zero.

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
    rows, columns = G.shape[-2:]
    if G.numel() == 0:
        return torch.zeros_like(G, dtype=dtype)
    X = G.reshape(-1, rows, columns)
    tall = rows > columns
    if tall:
        X = X.mT
    gram_form = form == "gram" and rows != columns
    # BLAS picks its order of summation by memory alignment: on a CPU only fresh copies of single matrices make a
    # result independent of its neighbours, and batching gains nothing there.
    parts = torch.split(X, 1) if X.device.type == "cpu" else (X,)
    results = [_orthogonalize_wide(part, chosen, dtype, eps, gram_form, start == "aol") for part in parts]
    X = results[0] if len(results) == 1 else torch.cat(results)
    return (X.mT if tall else X).reshape(G.shape)


def _orthogonalize_wide(
    X: Tensor, chosen: CoefficientSet, dtype: torch.dtype, eps: float, gram_form: bool, aol: bool
) -> Tensor:
    X = X.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    # Only eps = 0 needs the floor: it turns 0/0 into 0.
    X = X / (chosen.div * norm + eps).clamp_min(torch.finfo(X.dtype).tiny)
    X, gram = _aol(X, dtype, eps, chosen.div) if aol else (X.to(dtype), None)
    return _gram_form(X, gram, chosen) if gram_form else _plain_form(X, gram, chosen)


def check_options(chosen: CoefficientSet, dtype: torch.dtype, eps: float, form: str, start: str) -> None:
    """Refuse unknown or harmful combinations; optimizers call this when they are made, not at the first step."""
    if dtype not in ITERATION_DTYPES:
        raise ConfigError(f"iteration dtype is {dtype}: choose bfloat16, float16, float32 or float64")
    if eps < 0:
        raise ConfigError(f"eps is {eps}: give 0 or more")
    for name, value, known in (("form", form, ("plain", "gram")), ("start", start, ("frobenius", "aol"))):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}: known are {', '.join(known)}{nearest(value, known)}")
    if form == "gram" and dtype == torch.bfloat16 and chosen.name.startswith("polar"):
        raise ConfigError(
            f"form 'gram' with coefficients {chosen.name!r} in bfloat16 loses the result to rounding: "
            "use float16, the plain form, or another set such as 'you5'"
        )


def _plain_form(X: Tensor, gram: Tensor | None, chosen: CoefficientSet) -> Tensor:
    for i, (a, b, c) in enumerate(chosen.triples):
        A = gram if i == 0 and gram is not None else torch.bmm(X, X.mT)
        # One rounding per line: b A + c A A as separate operations doubles the error in 16 bits.
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def _gram_form(X: Tensor, gram: Tensor | None, chosen: CoefficientSet) -> Tensor:
    R = torch.bmm(X, X.mT) if gram is None else gram
    Q: Tensor | None = None
    last = len(chosen.triples) - 1
    for i, (a, b, c) in enumerate(chosen.triples):
        if i == _RESTART and Q is not None:
            X = torch.bmm(Q, X)
            R, Q = torch.bmm(X, X.mT), None
        Z = torch.baddbmm(R, R, R, beta=b, alpha=c)
        if Q is None:
            Q = Z.clone()
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = torch.baddbmm(Q, Q, Z, beta=a)
        if i != last and i + 1 != _RESTART:
            T = torch.baddbmm(R, R, Z, beta=a)
            R = torch.baddbmm(T, Z, T, beta=a)
    return X if Q is None else torch.bmm(Q, X)


def _aol(X: Tensor, dtype: torch.dtype, eps: float, div: float) -> tuple[Tensor, Tensor]:
    """Scale row i by (sum_j |X X^T|_ij)^(-1/2); the scaled Gram matrix comes for free."""
    A = torch.bmm(X, X.mT)
    floor = max(eps, torch.finfo(X.dtype).tiny)
    s = A.abs().sum(dim=-1, keepdim=True).clamp_min(floor).rsqrt() / div
    return (X * s).to(dtype), (A * s * s.mT).to(dtype)
