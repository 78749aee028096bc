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
    made = [_wide(part, triples, div, dtype, eps, gram and rows != columns, aol) for part in parts]
    X = made[0] if len(made) == 1 else torch.cat(made)
    return (X.mT if tall else X).reshape(G.shape).contiguous()


def _wide(
    X: Tensor,
    triples: Sequence[Sequence[float]],
    div: float,
    dtype: torch.dtype,
    eps: float,
    gram: bool,
    aol: bool,
) -> Tensor:
    X = X.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    # Only eps = 0 needs the floor: it turns 0/0 into 0.
    X = X / (div * norm + eps).clamp_min(torch.finfo(X.dtype).tiny)
    R = None
    if aol:
        A = torch.bmm(X, X.mT)
        floor = max(eps, torch.finfo(X.dtype).tiny)
        scale = A.abs().sum(dim=-1, keepdim=True).clamp_min(floor).rsqrt() / div
        X, R = X * scale, (A * scale * scale.mT).to(dtype)
    X = X.to(dtype)
    return _gram_form(X, R, triples) if gram else _plain_form(X, R, triples)


def _plain_form(X: Tensor, A: Tensor | None, triples: Sequence[Sequence[float]]) -> Tensor:
    for i, (a, b, c) in enumerate(triples):
        if i or A is None:
            A = torch.bmm(X, X.mT)
        # One rounding per line: b A + c A A as separate operations doubles the error in 16 bits.
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def _gram_form(X: Tensor, R: Tensor | None, triples: Sequence[Sequence[float]]) -> Tensor:
    R = torch.bmm(X, X.mT) if R is None else R
    Q: Tensor | None = None
    for i, (a, b, c) in enumerate(triples):
        if i == _RESTART and Q is not None:
            X = torch.bmm(Q, X)
            R, Q = torch.bmm(X, X.mT), None
        Z = torch.baddbmm(R, R, R, beta=b, alpha=c)
        if Q is None:
            Q = Z.clone()
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = torch.baddbmm(Q, Q, Z, beta=a)
        if i != len(triples) - 1 and i + 1 != _RESTART:
            T = torch.baddbmm(R, R, Z, beta=a)
            R = torch.baddbmm(T, Z, T, beta=a)
    return X if Q is None else torch.bmm(Q, X)
