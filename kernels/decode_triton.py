# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Decode kernels of the block and cast codecs: weighted sum of W payloads, and squared norms.

One pass over the sum however many payloads there are: their addresses are a table in device memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import (
    MAX_BLOCK,
    addresses,
    numbers,
    on_device,
    span_for,
    table_of,
    words_aligned,
)
from diloco.kernels.numbers_triton import all_read, level_of, load_span, load_words, store_span
from diloco.kernels.settings import Settings


@triton.jit
def decode_span(payload, table, pid, n, full, CODEC: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """fp32 [SPAN]: the span `pid` of the `n` values of `payload` (uint8 pointer), 0 beyond n."""
    if CODEC == "fp32" or CODEC == "fp16" or CODEC == "bf16":
        TYPE: tl.constexpr = (
            tl.float32 if CODEC == "fp32" else (tl.float16 if CODEC == "fp16" else tl.bfloat16)
        )
        at = pid.to(tl.int64) * SPAN + tl.arange(0, SPAN)
        values = load_span(payload.to(tl.pointer_type(TYPE)), at, n, full)
    else:
        ROWS: tl.constexpr = SPAN // BLOCK
        PER: tl.constexpr = 4 if CODEC == "int8" or CODEC == "e4m3" or CODEC == "e5m2" else 8
        BITS: tl.constexpr = 32 // PER
        blocks = tl.cdiv(n, BLOCK)
        rows = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        scale = tl.load(payload.to(tl.pointer_type(tl.float32)) + rows, mask=rows < blocks, other=0.0)
        codes = (payload + 4 * blocks).to(tl.pointer_type(tl.int32))
        at = pid.to(tl.int64) * (SPAN // PER) + tl.arange(0, SPAN // PER)
        size = n if PER == 4 else (n + 1) // 2
        words = load_words(codes, at, size, full)
        shifts = tl.arange(0, PER) * BITS
        code = tl.reshape((words[:, None] >> shifts[None, :]) & ((1 << BITS) - 1), [ROWS, BLOCK])
        values = tl.reshape(level_of(code, table, CODEC) * scale[:, None], [SPAN])
    return values


@triton.jit(do_not_specialize=["n", "workers"])
def decode_accumulate_kernel(
    payloads, weights, out, table, n, workers, CODEC: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """``out += w * dec(p)`` for each payload in the order of the table of addresses."""
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * SPAN
    at = start + tl.arange(0, SPAN)
    full = start + SPAN <= n
    total = load_span(out, at, n, full)
    for w in range(workers):
        payload = tl.load(payloads + w).to(tl.pointer_type(tl.uint8))
        total = total + decode_span(payload, table, pid, n, full, CODEC, BLOCK, SPAN) * tl.load(weights + w)
    all_read()
    store_span(out, at, total, n, full)


@triton.jit(do_not_specialize=["n"])
def squared_norm_kernel(
    payloads, center, norms, table, n, CODEC: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """norms[w, pid]: the part of a span in ``sum (dec(p_w) - center)^2``, in fp64."""
    pid = tl.program_id(0)
    w = tl.program_id(1)
    start = pid.to(tl.int64) * SPAN
    at = start + tl.arange(0, SPAN)
    full = start + SPAN <= n
    payload = tl.load(payloads + w).to(tl.pointer_type(tl.uint8))
    values = decode_span(payload, table, pid, n, full, CODEC, BLOCK, SPAN)
    if center is not None:
        values = values - load_span(center, at, n, full)
    wide = tl.where(at < n, values, 0.0).to(tl.float64)
    tl.store(norms + w * tl.num_programs(0) + pid, tl.sum(wide * wide, axis=0))


def fits(chosen: Settings) -> bool:
    """Whether one program can hold a block."""
    return chosen.family == "cast" or (chosen.family == "block" and chosen.block <= MAX_BLOCK)


def decode_accumulate(chosen: Settings, payloads: list[Tensor], weights: list[float], out: Tensor) -> None:
    """The operator `decode_accumulate` for settings that fit."""
    if not payloads or not out.numel():
        return
    aligned = [words_aligned(p) for p in payloads]
    span, warps = span_for(chosen.block)
    with on_device(out):
        decode_accumulate_kernel[(triton.cdiv(out.numel(), span),)](
            addresses(aligned, out.device), numbers(weights, out.device), out, table_of(chosen.codec, out.device),
            out.numel(), len(aligned), CODEC=chosen.codec, BLOCK=chosen.block or span, SPAN=span,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def squared_norms(
    chosen: Settings, payloads: list[Tensor], n: int, center: Tensor | None, out: Tensor
) -> None:
    """The operator `squared_norms` for settings that fit."""
    if not payloads or not n:
        out.zero_()
        return
    aligned = [words_aligned(p) for p in payloads]
    span, warps = span_for(chosen.block)
    spans = triton.cdiv(n, span)
    norms = torch.empty(len(aligned), spans, dtype=torch.float64, device=out.device)
    with on_device(out):
        squared_norm_kernel[(spans, len(aligned))](
            addresses(aligned, out.device), center, norms, table_of(chosen.codec, out.device), n,
            CODEC=chosen.codec, BLOCK=chosen.block or span, SPAN=span, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    torch.sum(norms, dim=1, out=out)
