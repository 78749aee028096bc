# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Encode kernels of the block codecs (int8 .. int4) and of the cast codecs, one pass over memory each.

Pseudo-gradient, error feedback, scale, quantise, pack, residual and squared norm are one kernel. Decoding is in
`decode_triton`, the arithmetic of single numbers in `numbers_triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import MAX_BLOCK, on_device, span_for, table_of
from diloco.kernels.numbers_triton import (
    all_read,
    level_of,
    load_span,
    quantise,
    quantise_stochastic,
    quotients,
    store_span,
    store_words,
)
from diloco.kernels.reference import CAST_DTYPES
from diloco.kernels.settings import Settings


@triton.jit
def random_words(seed, first, SPAN: tl.constexpr):
    """uint32 [SPAN]: word i%4 of Philox4x32-10 with key `seed` and counter i//4, for i = first, first + 1, ..."""
    a, b, c, d = tl.randint4x(seed, first // 4 + tl.arange(0, SPAN // 4))
    # join appends an axis, so that b varies faster than c: the order is a, b, c, d.
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [SPAN])


@triton.jit
def gather_input(x, local, error, beta, at, n, full):
    """``beta*error + (x - local)``, each operation rounded by itself; `local` and `error` may be None."""
    v = load_span(x, at, n, full)
    if local is not None:
        v = v - load_span(local, at, n, full)
    if error is not None:
        v = load_span(error, at, n, full) * beta + v
    return v


@triton.jit
def encode_span(
    v, payload, table, seed, pid, n, full, CODEC: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr
):
    """Write scales and codes of `v` [SPAN], the span `pid` of `n` values; decoded values [SPAN], squared norm fp64."""
    ROWS: tl.constexpr = SPAN // BLOCK
    PER: tl.constexpr = 4 if CODEC == "int8" or CODEC == "e4m3" or CODEC == "e5m2" else 8
    BITS: tl.constexpr = 32 // PER
    blocks = tl.cdiv(n, BLOCK)
    start = pid.to(tl.int64) * SPAN
    scale, y = quotients(tl.reshape(v, [ROWS, BLOCK]), CODEC)
    if seed is not None:
        r = tl.reshape(random_words(seed, start, SPAN), [ROWS, BLOCK])
        code = quantise_stochastic(y, r, CODEC)
    else:
        code = quantise(y, CODEC)
    if CODEC == "nf4":
        # Only here is the code of 0 not 0.
        inside = tl.reshape(start + tl.arange(0, SPAN) < n, [ROWS, BLOCK])
        code = tl.where(inside & (scale != 0.0)[:, None], code, 0)
    rows = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(payload.to(tl.pointer_type(tl.float32)) + rows, scale, mask=rows < blocks)
    shifts = tl.arange(0, PER) * BITS
    words = tl.sum(tl.reshape(code, [SPAN // PER, PER]) << shifts[None, :], axis=1)
    codes = (payload + 4 * blocks).to(tl.pointer_type(tl.int32))
    at = pid.to(tl.int64) * (SPAN // PER) + tl.arange(0, SPAN // PER)
    size = n if PER == 4 else (n + 1) // 2
    store_words(codes, at, words.to(tl.int32), size, full)
    level = level_of(code, table, CODEC)
    decoded = tl.reshape(level * scale[:, None], [SPAN])
    if CODEC == "nf4":
        level = tl.where(inside, level, 0.0)
    squares = tl.sum(level * level, axis=1).to(tl.float64) * (scale.to(tl.float64) * scale.to(tl.float64))
    return decoded, tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["n", "seed"])
def encode_block_kernel(
    x, local, error, residual, payload, norms, table, n, beta, seed,
    CODEC: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One span per program. norms[pid] is its part of the squared norm, NaN if a value is not finite."""
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * SPAN
    at = start + tl.arange(0, SPAN)
    full = start + SPAN <= n
    v = gather_input(x, local, error, beta, at, n, full)
    decoded, square = encode_span(v, payload, table, seed, pid, n, full, CODEC, BLOCK, SPAN)
    # An infinite scale times a code of 0 is NaN, and infinity times anything is not finite: 0*that is NaN.
    tl.store(norms + pid, square + 0.0 * square)
    if residual is not None:
        all_read()
        store_span(residual, at, v - decoded, n, full)


@triton.jit(do_not_specialize=["n"])
def encode_cast_kernel(
    x, local, error, residual, payload, norms, n, beta, LARGEST: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """fp32, fp16 or bf16 (the type of `payload`), saturating at LARGEST."""
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * SPAN
    at = start + tl.arange(0, SPAN)
    full = start + SPAN <= n
    v = gather_input(x, local, error, beta, at, n, full)
    stored = tl.minimum(tl.maximum(v, -LARGEST), LARGEST).to(payload.dtype.element_ty)
    store_span(payload, at, stored, n, full)
    decoded = stored.to(tl.float32)
    # v - v is 0, or NaN where v is not finite.
    wide = decoded.to(tl.float64) + (v - v).to(tl.float64)
    tl.store(norms + pid, tl.sum(wide * wide, axis=0))
    if residual is not None:
        all_read()
        store_span(residual, at, v - decoded, n, full)


@triton.jit(do_not_specialize=["n"])
def gather_kernel(x, local, error, out, n, beta, SPAN: tl.constexpr):
    """``out = beta*error + (x - local)``: the input of codecs that must look at it more than once."""
    start = tl.program_id(0).to(tl.int64) * SPAN
    at = start + tl.arange(0, SPAN)
    full = start + SPAN <= n
    v = gather_input(x, local, error, beta, at, n, full)
    all_read()
    store_span(out, at, v, n, full)


def encode(
    chosen: Settings, x: Tensor, local: Tensor | None, error: Tensor | None, residual: Tensor | None, payload: Tensor,
    squared_norm: Tensor, beta: float, seed: int | None,
) -> bool:  # fmt: skip
    """The operator `encode` for block and cast codecs; False where a block is too large for one program."""
    n = x.numel()
    cast = chosen.family == "cast"
    if payload.data_ptr() % 4 or (not cast and chosen.block > MAX_BLOCK):
        return False
    if not n:
        squared_norm.zero_()
        return True
    span, warps = span_for(chosen.block)
    programs = triton.cdiv(n, span)
    norms = torch.empty(programs, dtype=torch.float64, device=x.device)
    with on_device(x):
        if cast:
            dtype = CAST_DTYPES[chosen.codec]
            encode_cast_kernel[(programs,)](
                x, local, error, residual, payload.view(dtype), norms, n, beta,
                LARGEST=torch.finfo(dtype).max, SPAN=span, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            encode_block_kernel[(programs,)](
                x, local, error, residual, payload, norms, table_of(chosen.codec, x.device), n, beta, seed,
                CODEC=chosen.codec, BLOCK=chosen.block, SPAN=span, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    torch.sum(norms, dim=0, keepdim=True, out=squared_norm)
    return True


def gather(x: Tensor, local: Tensor | None, error: Tensor | None, beta: float, out: Tensor) -> None:
    """``out = beta*error + (x - local)``, fp32 [n]; `out` may be one of the inputs."""
    span, warps = span_for(0)
    with on_device(x):
        gather_kernel[(triton.cdiv(x.numel(), span),)](
            x, local, error, out, x.numel(), beta, SPAN=span, num_warps=warps, enable_fp_fusion=False
        )
