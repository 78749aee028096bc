# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Outer step, alone or with its requantised downlink, and the merge into local parameters: one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.codec_triton import encode_span
from diloco.kernels.decode_triton import decode_span
from diloco.kernels.launch_triton import MAX_BLOCK, on_device, span_for, table_of, words_aligned
from diloco.kernels.numbers_triton import all_read, load_span, store_span
from diloco.kernels.settings import Settings


# The parameters are `theta` here: Triton's generated launcher has a `params` of its own.
@triton.jit(do_not_specialize=["n", "seed"])
def outer_step_kernel(
    theta, mean, first, second, residual, payload, norms, table, n, lr, mu, mu_rest, mu_y, mu_y_rest, seed,
    RULE: tl.constexpr, CODEC: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """State and parameters of a span one step on; with CODEC, the update as it is sent instead of the update."""
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * SPAN
    at = start + tl.arange(0, SPAN)
    full = start + SPAN <= n
    value = load_span(theta, at, n, full)
    delta = load_span(mean, at, n, full)
    if CODEC != "":
        kept = load_span(residual, at, n, full)
    if RULE == "sgd":
        update = delta * lr
    elif RULE == "gpa":
        z = load_span(second, at, n, full) - delta * lr
        x = load_span(first, at, n, full) * mu + z * mu_rest
        update = value - (x * mu_y + z * mu_y_rest)
        all_read()
        store_span(second, at, z, n, full)
        store_span(first, at, x, n, full)
    else:
        buffer = load_span(first, at, n, full) * mu + delta
        if RULE == "nesterov":
            update = (buffer * mu + delta) * lr
        else:
            tl.static_assert(RULE == "sgdm")
            update = buffer * lr
        all_read()
        store_span(first, at, buffer, n, full)
    if CODEC != "":
        sent = kept + update
        update, square = encode_span(sent, payload, table, seed, pid, n, full, CODEC, BLOCK, SPAN)
        tl.store(norms + pid, square + 0.0 * square)
        all_read()
        store_span(residual, at, sent - update, n, full)
    elif RULE == "sgd":
        all_read()
    store_span(theta, at, value - update, n, full)


@triton.jit(do_not_specialize=["n"])
def merge_kernel(
    theta, payload, table, n, alpha, rest, ALL: tl.constexpr, CODEC: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """``alpha*theta + rest*dec(payload)``, or the decoded values themselves if ALL."""
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * SPAN
    at = start + tl.arange(0, SPAN)
    full = start + SPAN <= n
    new = decode_span(payload, table, pid, n, full, CODEC, BLOCK, SPAN)
    if not ALL:
        new = load_span(theta, at, n, full) * alpha + new * rest
    all_read()
    store_span(theta, at, new, n, full)


def outer_step(
    chosen: Settings, rule: str, params: Tensor, mean: Tensor, first: Tensor | None, second: Tensor | None,
    residual: Tensor | None, payload: Tensor | None, squared_norm: Tensor | None, lr: float, momentum: float,
    mu_y: float, seed: int | None,
) -> bool:  # fmt: skip
    """The operator `outer_step`; False where the downlink's codec is not a block codec that fits."""
    n = params.numel()
    codec = "" if payload is None else chosen.codec
    if payload is not None and (
        chosen.family != "block" or chosen.block > MAX_BLOCK or payload.data_ptr() % 4
    ):
        return False
    span, warps = span_for(chosen.block if codec else 0)
    spans = triton.cdiv(n, span)
    norms = None if payload is None else torch.empty(spans, dtype=torch.float64, device=params.device)
    if spans:
        with on_device(params):
            outer_step_kernel[(spans,)](
                params, mean, first, second, residual, payload, norms, table_of(codec, params.device), n,
                lr, momentum, 1 - momentum, mu_y, 1 - mu_y, seed,
                RULE=rule, CODEC=codec, BLOCK=chosen.block or span, SPAN=span, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    if norms is not None and squared_norm is not None:
        torch.sum(norms, dim=0, keepdim=True, out=squared_norm)
    return True


def merge(chosen: Settings, params: Tensor, payload: Tensor, alpha: float) -> None:
    """The operator `merge` for settings that fit."""
    n = params.numel()
    if alpha == 1.0 or not n:
        return
    span, warps = span_for(chosen.block)
    with on_device(params):
        merge_kernel[(triton.cdiv(n, span),)](
            params, words_aligned(payload), table_of(chosen.codec, params.device), n, alpha, 1.0 - alpha,
            ALL=alpha == 0.0, CODEC=chosen.codec, BLOCK=chosen.block or span, SPAN=span,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
