# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""MD decoupling (arXiv 2606.25971): the gradient of W = diag(row) D diag(col) split into its three parts in one pass.

Optionally the momentum of the direction's gradient advances in the same pass. `diloco.optim.md` has the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import on_device
from diloco.kernels.numbers_triton import all_read

_ROWS, _COLUMNS = 32, 128


class Split(NamedTuple):
    """`direction`: D. `update`: the gradient of D, or its Nesterov momentum. `row` [N, r, 1], `col` [N, 1, c]: of gains."""

    direction: Tensor
    update: Tensor
    row: Tensor
    col: Tensor


@triton.jit
def split_kernel(
    w, g, row, col, momentum, direction, update, row_parts, col_parts, n, rows, columns, w_batch, w_row, g_batch,
    g_row, mu, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of D and of its gradient, and the tile's part of the sums over columns and over rows."""
    matrix = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    wide = i.to(tl.int64)[:, None]
    gain_row = tl.load(row + matrix * rows + i, mask=i < rows, other=1.0)[:, None]
    gain_col = tl.load(col + matrix * columns + j, mask=j < columns, other=1.0)[None, :]
    weight = tl.load(w + matrix * w_batch + wide * w_row + j[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(g + matrix * g_batch + wide * g_row + j[None, :], mask=mask, other=0.0).to(tl.float32)
    d = weight / gain_row / gain_col
    at = (matrix * rows + wide) * columns + j[None, :]
    tl.store(direction + at, d, mask=mask)
    # parts[block, matrix, line]: a sum over the first axis ends them, in a fixed order.
    by_row = tl.sum(d * grad * gain_col, axis=1)
    tl.store(row_parts + (tl.program_id(1) * n + matrix) * rows + i, by_row, mask=i < rows)
    by_col = tl.sum(d * grad * gain_row, axis=0)
    tl.store(col_parts + (tl.program_id(0) * n + matrix) * columns + j, by_col, mask=j < columns)
    u = gain_row * grad * gain_col
    if momentum is not None:
        old = tl.load(momentum + at, mask=mask, other=0.0)
        new = old + (1.0 - mu) * (u - old)
        all_read()
        tl.store(momentum + at, new, mask=mask)
        u = u + mu * (new - u)
    tl.store(update + at, u, mask=mask)


def md_split(
    w: Tensor, g: Tensor, row: Tensor, col: Tensor, *, momentum: Tensor | None = None, mu: float = 0.0
) -> Split:
    """``D = w/row/col``; its gradient ``row g col``; ``sum_cols(D g col)`` and ``sum_rows(D g row)``, all fp32.

    `w`, `g` [N, r, c], fp32, bf16 or fp16 with contiguous rows; `row` [N, r, 1], `col` [N, 1, c], fp32, the gains (the
    derivative of softplus is the caller's to multiply). With `momentum` (fp32 [N, r, c], advanced in place)
    ``m = lerp(m, Gd, 1-mu)`` and `update` is ``lerp(Gd, m, mu)``. Raises ValueError for other shapes.
    """
    count, rows, columns = w.shape
    if g.shape != w.shape or tuple(row.shape) != (count, rows, 1) or tuple(col.shape) != (count, 1, columns):
        raise ValueError(
            f"w {tuple(w.shape)}, g {tuple(g.shape)}, row {tuple(row.shape)}, col {tuple(col.shape)} differ"
        )
    if w.stride(2) != 1 or g.stride(2) != 1:
        raise ValueError("md_split wants contiguous rows of w and g")
    down, across = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    direction, update = (torch.empty(w.shape, dtype=torch.float32, device=w.device) for _ in range(2))
    row_parts = torch.empty(across, count, rows, 1, dtype=torch.float32, device=w.device)
    col_parts = torch.empty(down, count, 1, columns, dtype=torch.float32, device=w.device)
    with on_device(w):
        split_kernel[(down, across, count)](
            w, g, row.contiguous(), col.contiguous(), momentum, direction, update, row_parts, col_parts, count, rows,
            columns, w.stride(0), w.stride(1), g.stride(0), g.stride(1), mu, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return Split(direction, update, row_parts.sum(dim=0), col_parts.sum(dim=0))
