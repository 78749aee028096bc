# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The orthogonalising iteration on a GPU: normalise into padded buffers, then the products of `products_triton`.

The definition is `orthogonal.orthogonalize`. Sides are padded with zeros to multiples of 16: a row stride that is not
one forbids 16-byte loads and with them the pipeline. Zero rows and columns stay zero in every product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import on_device
from diloco.kernels.products_triton import TILES, plain_product, symmetric_product

_RESTART = 2  # the iteration before which the Gram form recomputes X and R, to stop error growth
_SPAN = 4096
_SIDE = 64
_MOST_MATRICES = 65535  # the last dimension of a grid


@triton.jit
def sum_of_squares_kernel(g, out, count, SPAN: tl.constexpr):
    """out[matrix, part]: fp64 sum of squares of a span of a contiguous matrix of `count` values."""
    start = tl.program_id(0).to(tl.int64) * SPAN
    matrix = tl.program_id(1).to(tl.int64)
    at = start + tl.arange(0, SPAN)
    v = tl.load(g + matrix * count + at, mask=at < count, other=0.0).to(tl.float32).to(tl.float64)
    tl.store(out + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(v * v, axis=0))


@triton.jit
def normalise_kernel(
    g, divisor, x, n, m, padded_n, padded_m, g_batch, g_row, g_col, SIDE: tl.constexpr
):  # fmt: skip
    """x[N, padded_n, padded_m] = g/divisor[N] in x's type, 0 in the padding; g is read with any strides."""
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    cols = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    at = g + batch * g_batch + rows.to(tl.int64)[:, None] * g_row + cols.to(tl.int64)[None, :] * g_col
    v = tl.load(at, mask=(rows < n)[:, None] & (cols < m)[None, :], other=0.0).to(tl.float32)
    v = tl.div_rn(v, tl.broadcast_to(tl.load(divisor + batch), v.shape))
    at = x + (batch * padded_n + rows.to(tl.int64)[:, None]) * padded_m + cols[None, :]
    tl.store(at, v.to(x.dtype.element_ty), mask=(rows < padded_n)[:, None] & (cols < padded_m)[None, :])


def orthogonalize(
    G: Tensor,
    coefficients: Sequence[float],
    div: float,
    dtype: torch.dtype,
    eps: float,
    gram: bool,
    aol: bool,
) -> Tensor | None:
    """As `orthogonal.orthogonalize`; None for what is left to it: float64, no or too many matrices, wrong arguments."""
    if dtype not in TILES or G.ndim < 2 or not G.numel() or not coefficients or len(coefficients) % 3:
        return None
    if G.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    triples = [tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3)]
    rows, columns = G.shape[-2:]
    stack = G.reshape(-1, rows, columns)
    if stack.shape[0] > _MOST_MATRICES:
        return None
    X = normalised(stack, div, torch.float32 if aol else dtype, eps)
    R = None
    if aol:
        A = _square(X, torch.float32)
        symmetric_product(X, X, None, A)
        floor = max(eps, torch.finfo(torch.float32).tiny)
        scale = A.abs().sum(dim=-1, keepdim=True).clamp_min(floor).rsqrt() / div
        X, R = (X * scale).to(dtype), (A * scale * scale.mT).to(dtype)
    X = gram_form(X, R, triples) if gram and rows != columns else plain_form(X, R, triples)
    X = X[:, : min(rows, columns), : max(rows, columns)]
    return (X.mT if rows > columns else X).reshape(G.shape).contiguous()


def normalised(stack: Tensor, div: float, dtype: torch.dtype, eps: float) -> Tensor:
    """``G/(div ||G|| + eps)`` of each matrix of [N, r, c], lying, in `dtype`, zero-padded to multiples of 16."""
    stack = stack.contiguous()
    count, rows, columns = stack.shape
    spans = triton.cdiv(rows * columns, _SPAN)
    squares = torch.empty(count, spans, dtype=torch.float64, device=stack.device)
    n, m = min(rows, columns), max(rows, columns)
    X = torch.empty(count, _padded(n), _padded(m), dtype=dtype, device=stack.device)
    wide = stack if rows <= columns else stack.mT
    with on_device(stack):
        sum_of_squares_kernel[(spans, count)](stack, squares, rows * columns, SPAN=_SPAN, num_warps=4)
        norm = squares.sum(dim=1).sqrt().float()
        # Only eps = 0 needs the floor: it turns 0/0 into 0.
        divisor = (div * norm + eps).clamp_min(torch.finfo(torch.float32).tiny)
        normalise_kernel[(triton.cdiv(X.shape[1], _SIDE), triton.cdiv(X.shape[2], _SIDE), count)](
            wide, divisor, X, n, m, X.shape[1], X.shape[2], *wide.stride(), SIDE=_SIDE, num_warps=4
        )
    return X


def plain_form(X: Tensor, A: Tensor | None, triples: Sequence[Sequence[float]]) -> Tensor:
    """``A = X X^T; B = b A + c A A; X = a X + B X`` for each (a, b, c). `A` is the first Gram matrix, if known."""
    gram, B, spare = _square(X, X.dtype), _square(X, X.dtype), torch.empty_like(X)
    for i, (a, b, c) in enumerate(triples):
        if i or A is None:
            A = symmetric_product(X, X, None, gram)
        symmetric_product(A, A, A, B, c, b)
        X, spare = plain_product(B, X, X, spare, 1.0, a), X
    return X


def gram_form(X: Tensor, R: Tensor | None, triples: Sequence[Sequence[float]]) -> Tensor:
    """The same polynomial with every product but two or three on the small Gram matrix R.

    All factors are polynomials of R, so that they commute and every product among them is symmetric.
    """
    squares = [_square(X, X.dtype) for _ in range(5)]
    spare = torch.empty_like(X)
    R = symmetric_product(X, X, None, squares.pop()) if R is None else R
    Q: Tensor | None = None
    for i, (a, b, c) in enumerate(triples):
        if i == _RESTART and Q is not None:
            X, spare = plain_product(Q, X, None, spare), X
            squares.append(Q)
            symmetric_product(X, X, None, R)
            Q = None
        Z = symmetric_product(R, R, R, squares.pop(), c, b)
        if Q is None:
            Q = squares.pop().copy_(Z)
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            old, Q = Q, symmetric_product(Q, Z, Q, squares.pop(), 1.0, a)
            squares.append(old)
        if i != len(triples) - 1 and i + 1 != _RESTART:
            T = symmetric_product(R, Z, R, squares.pop(), 1.0, a)
            symmetric_product(Z, T, T, R, 1.0, a)
            squares.append(T)
        squares.append(Z)
    return X if Q is None else plain_product(Q, X, None, spare)


def _square(X: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(X.shape[0], X.shape[1], X.shape[1], dtype=dtype, device=X.device)


def _padded(side: int) -> int:
    return (side + 15) // 16 * 16
