"""The orthogonalising iteration as an operator: coefficients as a flat list, no names, no optimizer.

Two matrix products a step go through `baddbmm`, whose sum needs no temporary and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RESTART = 2  # the iteration before which the Gram form recomputes X and R, to stop error growth


def orthogonalize(
    G: Tensor,
    coefficients: Sequence[float],
    div: float,
    dtype: torch.dtype,
    eps: float,
    gram: bool,
    aol: bool,
) -> Tensor:
    """X = G/(div ||G|| + eps), then per (a, b, c): A = X X^T, X = a X + (b A + c A A) X.

    Args:
        G: ``[..., r, c]``, floating point; leading dimensions are a batch. Never modified.
        coefficients: a, b, c of the first iteration, then of the second, ...
        div: divides the Frobenius-normalised input.
        dtype: of the iteration and the result; the norm is taken in fp32 (fp64 for float64).
        eps: added to the norm.
        gram: iterate on the small Gram matrix where the matrix is not square.
        aol: scale rows by (sum_j |X X^T|_ij)^(-1/2) first (2512.04632).

    Returns a new contiguous tensor of G's shape in `dtype`.
    """
    if len(coefficients) % 3 or not coefficients:
        raise ValueError(f"{len(coefficients)} coefficients: give a, b, c for each iteration")
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(f"G is a {G.dtype} tensor of shape {tuple(G.shape)}: give matrices [..., r, c]")
    rows, columns = G.shape[-2:]
    if G.numel() == 0:
        return torch.zeros_like(G, dtype=dtype, memory_format=torch.contiguous_format)
    triples = [tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3)]
    X = G.reshape(-1, rows, columns)
    tall = rows > columns
    if tall:
        X = X.mT
    # BLAS picks its order of summation by memory alignment: on a CPU only fresh copies of single matrices make a
    # result independent of its neighbours, and batching gains nothing there.
    parts = torch.split(X, 1) if X.device.type == "cpu" else (X,)
    segments = segments_of(len(triples), gram and rows != columns)
    made = [iterate(part, triples, segments, div, dtype, eps, aol) for part in parts]
    X = made[0] if len(made) == 1 else torch.cat(made)
    return (X.mT if tall else X).reshape(G.shape).contiguous()


def segments_of(iterations: int, gram: bool) -> tuple[int, ...]:
    """How many iterations in turn are done on one Gram matrix before X is recomputed; all ones is the plain form."""
    if not gram:
        return (1,) * iterations
    return (iterations,) if iterations <= _RESTART else (_RESTART, iterations - _RESTART)


def iterate(
    X: Tensor,
    triples: Sequence[Sequence[float]],
    segments: Sequence[int],
    div: float,
    dtype: torch.dtype,
    eps: float,
    aol: bool,
) -> Tensor:
    """Normalise wide matrices ``[N, n, m]`` (n <= m) and run `triples` on them, in `segments`; in `dtype`."""
    X = X.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    # Only eps = 0 needs the floor: it turns 0/0 into 0.
    X = X / (div * norm + eps).clamp_min(torch.finfo(X.dtype).tiny)
    X, gram = _aol(X, dtype, eps, div) if aol else (X.to(dtype), None)
    done = 0
    for length in segments:
        R = torch.bmm(X, X.mT) if gram is None else gram
        part = triples[done : done + length]
        if length == 1:
            a, b, c = part[0]
            # One rounding per line: b A + c A A as separate operations doubles the error in 16 bits.
            X = torch.baddbmm(X, torch.baddbmm(R, R, R, beta=b, alpha=c), X, beta=a)
        else:
            X = torch.bmm(_polynomial(R, part), X)
        gram, done = None, done + length
    return X


def _polynomial(R: Tensor, triples: Sequence[Sequence[float]]) -> Tensor:
    """Q of X <- Q X for several iterations, from R = X X^T alone."""
    Q: Tensor | None = None
    for i, (a, b, c) in enumerate(triples):
        Z = torch.baddbmm(R, R, R, beta=b, alpha=c)
        if Q is None:
            Q = Z.clone()
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = torch.baddbmm(Q, Q, Z, beta=a)
        if i + 1 != len(triples):
            T = torch.baddbmm(R, R, Z, beta=a)
            R = torch.baddbmm(T, Z, T, beta=a)
    assert Q is not None
    return Q


def _aol(X: Tensor, dtype: torch.dtype, eps: float, div: float) -> tuple[Tensor, Tensor]:
    """Scale row i by (sum_j |X X^T|_ij)^(-1/2); the scaled Gram matrix comes for free."""
    A = torch.bmm(X, X.mT)
    floor = max(eps, torch.finfo(X.dtype).tiny)
    s = A.abs().sum(dim=-1, keepdim=True).clamp_min(floor).rsqrt() / div
    return (X * s).to(dtype), (A * s * s.mT).to(dtype)
