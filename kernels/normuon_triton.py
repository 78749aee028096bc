# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""NorMuon's step after the orthogonalisation (arXiv 2510.05491), fused: two reads of O, one pass over the parameters.

The norm of the scaled O follows from the sums of squares of its lines alone, so that O is never written again.
`diloco.optim.normuon` has the definition and its options.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import on_device
from diloco.kernels.numbers_triton import all_read

_FACTOR_STEP = 1024


@triton.jit
def line_squares_kernel(
    o, out, lines, length, batch, line, step, LINES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """out[N, lines]: fp32 sum of squares of each line of `length` elements, `step` apart, lines `line` apart."""
    matrix = tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) * LINES + tl.arange(0, LINES)
    along = tl.arange(0, CHUNK)
    at = o + matrix * batch + which.to(tl.int64)[:, None] * line + along.to(tl.int64)[None, :] * step
    total = tl.zeros((LINES, CHUNK), dtype=tl.float32)
    for start in range(0, length, CHUNK):
        mask = (which < lines)[:, None] & (along < length - start)[None, :]
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total += v * v
        at += CHUNK * step
    tl.store(out + matrix * lines + which, tl.sum(total, axis=1), mask=which < lines)


@triton.jit
def _inverse_root(v, eps, FLOOR: tl.constexpr):
    """1/(sqrt(v) + eps), or 1/sqrt(max(v, eps)) if FLOOR."""
    root = tl.sqrt_rn(tl.maximum(v, eps)) if FLOOR else tl.sqrt_rn(v) + eps
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def line_factors_kernel(
    squares, v, factors, lines, length, keep, eps, target, FLOOR: tl.constexpr, EXACT: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Advance v[N, lines] by the mean squares; factors[N, lines] scale a line and restore the matrix's norm.

    That norm becomes `target` if EXACT, else `target` times the norm of O.
    """
    matrix = tl.program_id(0).to(tl.int64)
    before = tl.zeros((STEP,), dtype=tl.float32)
    after = tl.zeros((STEP,), dtype=tl.float32)
    for start in range(0, lines, STEP):
        at = start + tl.arange(0, STEP)
        mask = at < lines
        s = tl.load(squares + matrix * lines + at, mask=mask, other=0.0)
        old = tl.load(v + matrix * lines + at, mask=mask, other=1.0)
        f = _inverse_root(old + keep * (s / length - old), eps, FLOOR)
        before += s
        after += s * f * f
    goal = target if EXACT else target * tl.sqrt(tl.sum(before, axis=0))
    restore = goal / (tl.sqrt(tl.sum(after, axis=0)) + eps)
    for start in range(0, lines, STEP):
        at = start + tl.arange(0, STEP)
        mask = at < lines
        s = tl.load(squares + matrix * lines + at, mask=mask, other=0.0)
        old = tl.load(v + matrix * lines + at, mask=mask, other=1.0)
        new = old + keep * (s / length - old)
        tl.store(v + matrix * lines + at, new, mask=mask)
        tl.store(factors + matrix * lines + at, _inverse_root(new, eps, FLOOR) * restore, mask=mask)


@triton.jit
def apply_lines_kernel(
    p, o, factors, rows, columns, p_batch, p_row, o_batch, o_row, o_col, lr, decay,
    BY_COLUMN: tl.constexpr, CAUTIOUS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``p = p (1 - decay) - lr * factor * o`` in fp32; CAUTIOUS decays only where the update has p's sign."""
    matrix = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    wide = i.to(tl.int64)[:, None]
    u = tl.load(
        o + matrix * o_batch + wide * o_row + j.to(tl.int64)[None, :] * o_col, mask=mask, other=0.0
    ).to(tl.float32)
    if BY_COLUMN:
        u = u * tl.load(factors + matrix * columns + j, mask=j < columns, other=0.0)[None, :]
    else:
        u = u * tl.load(factors + matrix * rows + i, mask=i < rows, other=0.0)[:, None]
    at = p + matrix * p_batch + wide * p_row + j[None, :]
    old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if CAUTIOUS:
        old = tl.where(u * old >= 0.0, old * (1.0 - decay), old)
    else:
        old = old * (1.0 - decay)
    all_read()
    tl.store(at, (old - lr * u).to(p.dtype.element_ty), mask=mask)


def normuon_step(
    p: Tensor,
    o: Tensor,
    v: Tensor,
    *,
    lr: float,
    decay: float,
    beta2: float,
    eps: float,
    target: float,
    exact: bool = False,
    floor: bool = False,
    cautious: bool = False,
) -> None:
    """One update of `p` [N, r, c] (fp32, bf16 or fp16, rows contiguous) by the orthogonal `o` [N, r, c] (any strides).

        v = lerp(v, mean(o^2), 1-beta2);  o' = o/(sqrt(v) + eps);  o' *= target ||o||/(||o'|| + eps)
        p = p (1 - decay) - lr o'

    `v` (fp32, contiguous, advanced in place) is [N, r, 1], a mean over columns, or [N, 1, c], over rows. `target` is the
    shape factor; with `exact` it is the norm itself. `floor` divides by sqrt(max(v, eps)) instead. `decay` is the whole
    factor; `cautious` applies it only where ``o' * p >= 0``. Sums are fp32. Raises ValueError for other shapes.
    """
    count, rows, columns = p.shape
    by_column = tuple(v.shape) == (count, 1, columns) and rows != 1
    if o.shape != p.shape or (tuple(v.shape) != (count, rows, 1) and not by_column):
        raise ValueError(
            f"p {tuple(p.shape)}, o {tuple(o.shape)}, v {tuple(v.shape)}: want [N,r,c] twice, [N,r,1]/[N,1,c]"
        )
    if p.stride(2) != 1 or not v.is_contiguous() or v.dtype != torch.float32:
        raise ValueError("normuon_step wants contiguous rows of p and a contiguous float32 v")
    lines, length = (columns, rows) if by_column else (rows, columns)
    line, step = (o.stride(2), o.stride(1)) if by_column else (o.stride(1), o.stride(2))
    tall, chunk = (64, 64) if step != 1 else (4, 1024)
    squares = torch.empty(count, lines, dtype=torch.float32, device=p.device)
    factors = torch.empty_like(squares)
    with on_device(p):
        line_squares_kernel[(triton.cdiv(lines, tall), count)](
            o, squares, lines, length, o.stride(0), line, step, LINES=tall, CHUNK=chunk, num_warps=4
        )
        line_factors_kernel[(count,)](
            squares, v, factors, lines, length, 1.0 - beta2, eps, target,
            FLOOR=floor, EXACT=exact, STEP=_FACTOR_STEP, num_warps=4,
        )  # fmt: skip
        apply_lines_kernel[(triton.cdiv(rows, 32), triton.cdiv(columns, 128), count)](
            p, o, factors, rows, columns, p.stride(0), p.stride(1), *o.stride(), lr, decay,
            BY_COLUMN=by_column, CAUTIOUS=cautious, ROWS=32, COLUMNS=128, num_warps=4,
        )  # fmt: skip
