# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Batched matrix products of the orthogonalising iteration: symmetric ones by half their tiles, and the plain one.

``C = alpha*A*B + beta*D`` with fp32 accumulation and one rounding on store. Which products an iteration needs is in
`orthogonalize_triton`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import on_device


class Tile(NamedTuple):
    """Rows and columns of an output tile (square for symmetric products), step along k, warps, pipeline stages."""

    size: int
    k: int
    warps: int
    stages: int


LARGE = Tile(128, 64, 8, 3)
SMALL = Tile(64, 64, 4, 3)
# fp32 has no tensor instruction of full precision: fewer values in registers, and nothing to pipeline for.
FULL = Tile(64, 32, 8, 2)
TILES = {torch.bfloat16: (LARGE, SMALL), torch.float16: (LARGE, SMALL), torch.float32: (FULL,)}
# Below this many rows large tiles leave most of a GPU idle.
_LARGE_FROM = 1024


def tile_for(dtype: torch.dtype, rows: int) -> Tile:
    """The tile of a product with this many rows."""
    return TILES[dtype][0 if rows >= _LARGE_FROM else -1]


@triton.jit
def triangle(p):
    """Row i and column j <= i of place p in the lower triangle, counted row by row."""
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is approximate: one step either way mends it.
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit
def product_tile(
    a, b, k, rows, cols, n, m, a_row, b_row, b_col, FULL_PRECISION: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """fp32 [SIZE, SIZE]: rows `rows` < n of A times columns `cols` < m of B, whose element (i, j) is b + i*b_row + j*b_col."""
    ks = tl.arange(0, K)
    a_at = a + rows.to(tl.int64)[:, None] * a_row + ks[None, :]
    b_at = b + ks.to(tl.int64)[:, None] * b_row + cols.to(tl.int64)[None, :] * b_col
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for start in range(0, k, K):
        inside = ks < k - start
        left = tl.load(a_at, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        right = tl.load(b_at, mask=inside[:, None] & (cols < m)[None, :], other=0.0)
        if FULL_PRECISION:
            total = tl.dot(left, right, total, input_precision="ieee")
        else:
            total = tl.dot(left, right, total)
        a_at += K
        b_at += K * b_row
    return total


@triton.jit
def symmetric_product_kernel(
    a, b, d, c, n, k, a_batch, a_row, b_batch, b_row, d_batch, d_row, c_batch, c_row, alpha, beta,
    FULL_PRECISION: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``C = alpha*A*B^T + beta*D`` where C is known to be symmetric: upper tiles, each stored with its transpose.

    On the diagonal the upper half stands for both, so that C is symmetric to the bit whatever order sums run in.
    """
    column, row = triangle(tl.program_id(0))
    batch = tl.program_id(1).to(tl.int64)
    rows = row * SIZE + tl.arange(0, SIZE)
    cols = column * SIZE + tl.arange(0, SIZE)
    total = product_tile(
        a + batch * a_batch,
        b + batch * b_batch,
        k,
        rows,
        cols,
        n,
        n,
        a_row,
        1,
        b_row,
        FULL_PRECISION,
        SIZE,
        K,
    )
    total = total * alpha
    inside = (rows < n)[:, None] & (cols < n)[None, :]
    if d is not None:
        at = d + batch * d_batch + rows.to(tl.int64)[:, None] * d_row + cols[None, :]
        total = total + tl.load(at, mask=inside, other=0.0).to(tl.float32) * beta
    made = total.to(c.dtype.element_ty)
    upper = c + batch * c_batch + rows.to(tl.int64)[:, None] * c_row + cols[None, :]
    lower = c + batch * c_batch + cols.to(tl.int64)[:, None] * c_row + rows[None, :]
    if row == column:
        made = tl.where(rows[:, None] <= cols[None, :], made, tl.trans(made))
    tl.store(upper, made, mask=inside)
    if row != column:
        tl.store(lower, tl.trans(made), mask=(cols < n)[:, None] & (rows < n)[None, :])


@triton.jit
def plain_product_kernel(
    a, b, d, c, n, m, k, a_batch, a_row, b_batch, b_row, d_batch, d_row, c_batch, c_row, alpha, beta,
    FULL_PRECISION: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``C = alpha*A*B + beta*D``, [n, k] times [k, m]; tiles in groups of GROUP rows, which share columns of B in L2."""
    across = tl.cdiv(m, SIZE)
    down = tl.cdiv(n, SIZE)
    p = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    first = p // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    rows = (first + p % (GROUP * across) % height) * SIZE + tl.arange(0, SIZE)
    cols = (p % (GROUP * across) // height) * SIZE + tl.arange(0, SIZE)
    total = product_tile(
        a + batch * a_batch,
        b + batch * b_batch,
        k,
        rows,
        cols,
        n,
        m,
        a_row,
        b_row,
        1,
        FULL_PRECISION,
        SIZE,
        K,
    )
    total = total * alpha
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    if d is not None:
        at = d + batch * d_batch + rows.to(tl.int64)[:, None] * d_row + cols[None, :]
        total = total + tl.load(at, mask=inside, other=0.0).to(tl.float32) * beta
    at = c + batch * c_batch + rows.to(tl.int64)[:, None] * c_row + cols[None, :]
    tl.store(at, total.to(c.dtype.element_ty), mask=inside)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    c: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    tile: Tile | None = None,
) -> Tensor:
    """``c = alpha*a @ b.mT + beta*d`` for [N, n, k] operands whose product is symmetric; returns `c` [N, n, n].

    That is so for ``b is a``, and for symmetric `a` and `b` that commute (polynomials of one matrix). `c` must not
    share memory with an operand. All are row-major with a last stride of 1.
    """
    count, n, k = a.shape
    size, step, warps, stages = tile or tile_for(a.dtype, n)
    side = triton.cdiv(n, size)
    with on_device(a):
        symmetric_product_kernel[(side * (side + 1) // 2, count)](
            a, b, d, c, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1), *_strides(d), c.stride(0), c.stride(1),
            alpha, beta, FULL_PRECISION=a.dtype == torch.float32, SIZE=size, K=step, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return c


def plain_product(
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    c: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    tile: Tile | None = None,
) -> Tensor:
    """``c = alpha*a @ b + beta*d`` for [N, n, k] and [N, k, m]; returns `c`, which must not share memory with `b`."""
    count, n, k = a.shape
    m = b.shape[2]
    size, step, warps, stages = tile or tile_for(a.dtype, n)
    with on_device(a):
        plain_product_kernel[(triton.cdiv(n, size) * triton.cdiv(m, size), count)](
            a, b, d, c, n, m, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1), *_strides(d), c.stride(0),
            c.stride(1), alpha, beta, FULL_PRECISION=a.dtype == torch.float32, SIZE=size, K=step, GROUP=8,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return c


def _strides(d: Tensor | None) -> tuple[int, int]:
    return (0, 0) if d is None else (d.stride(0), d.stride(1))
