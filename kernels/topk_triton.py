# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The sparse codec on a GPU: one program selects the k largest of a chunk, without sorting. Definition: `reference_topk`.

Values are coded by `stat_triton`. The indices are the definition's to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import on_device, words_aligned
from diloco.kernels.numbers_triton import all_read
from diloco.kernels.reference_topk import chunk_count, index_bytes, inner_groups
from diloco.kernels.settings import Settings
from diloco.kernels.stat_triton import accumulate_stat, encode_stat

_PAIRS = 256


@triton.jit(do_not_specialize=["n"])
def select_kernel(x, indices, kept, n, k, CHUNK: tl.constexpr):
    """Ascending indices (int32) and values of the k largest |x| of a chunk, ties to the lower index."""
    pid = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, CHUNK)
    v = tl.load(x + pid * CHUNK + i, mask=pid * CHUNK + i < n, other=0.0)
    magnitude = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # Bit by bit the largest bound that at least k values reach: the k-th largest value.
    bound = tl.zeros((1,), dtype=tl.int32)
    for j in tl.static_range(31):
        candidate = bound | (1 << (30 - j))
        reached = tl.sum((magnitude >= candidate).to(tl.int32), axis=0)
        bound = tl.where(reached >= k, candidate, bound)
    above = (magnitude > bound).to(tl.int32)
    equal = (magnitude == bound).to(tl.int32)
    room = k - tl.sum(above, axis=0)
    chosen = above | (equal & (tl.cumsum(equal, axis=0) <= room).to(tl.int32))
    at = pid * k + tl.cumsum(chosen, axis=0) - 1
    tl.store(indices + at, i, mask=chosen == 1)
    tl.store(kept + at, v, mask=chosen == 1)


@triton.jit
def pack_kernel(indices, packed, pairs, PAIRS: tl.constexpr):
    """Two indices of 12 bits in three bytes, low bits first."""
    p = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    mask = p < pairs
    a = tl.load(indices + 2 * p, mask=mask, other=0)
    b = tl.load(indices + 2 * p + 1, mask=mask, other=0)
    tl.store(packed + 3 * p, (a & 255).to(tl.uint8), mask=mask)
    tl.store(packed + 3 * p + 1, ((a >> 8) | ((b & 15) << 4)).to(tl.uint8), mask=mask)
    tl.store(packed + 3 * p + 2, (b >> 4).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["n"])
def scatter_kernel(packed, kept, out, norms, n, k, weight, CHUNK: tl.constexpr, K: tl.constexpr):
    """``out[index] += weight * value`` (`out` may be None) and the squared norm of each chunk's values, in fp64."""
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K)
    at = pid * k + j
    octet = packed + at // 2 * 3 + j % 2
    pair = tl.load(octet, mask=j < k, other=0).to(tl.int32)
    pair |= tl.load(octet + 1, mask=j < k, other=0).to(tl.int32) << 8
    index = pid * CHUNK + tl.where(j % 2 == 0, pair & 0xFFF, pair >> 4)
    inside = (j < k) & (index < n)
    v = tl.load(kept + at, mask=inside, other=0.0)
    if norms is not None:
        wide = v.to(tl.float64)
        tl.store(norms + pid, tl.sum(wide * wide, axis=0))
    if out is not None:
        old = tl.load(out + index, mask=inside, other=0.0)
        all_read()
        tl.store(out + index, old + v * weight, mask=inside)


def encode_topk(chosen: Settings, e: Tensor, residual: Tensor | None, payload: Tensor) -> Tensor:
    """Write the payload of fp32 `e` [n > 0]; fp64 [1], its squared norm. `residual`, if given, is `e` on entry."""
    n, k, chunk = e.numel(), chosen.k, chosen.block
    chunks = chunk_count(n, chunk)
    indices = torch.empty(chunks * k, dtype=torch.int32, device=e.device)
    kept = torch.empty(chunks * k, dtype=torch.float32, device=e.device)
    split = index_bytes(n, k, chunk)
    inner = torch.empty(payload.numel() - split, dtype=torch.uint8, device=e.device)
    with on_device(e):
        select_kernel[(chunks,)](e, indices, kept, n, k, CHUNK=chunk, num_warps=8)
        pairs = indices.numel() // 2
        pack_kernel[(triton.cdiv(pairs, _PAIRS),)](indices, payload, pairs, PAIRS=_PAIRS, num_warps=4)
    encode_stat(kept, inner_groups(n, k, chunk), chosen.bits, inner)
    payload[split:] = inner
    return _scatter(chosen, payload, inner, residual, n, -1.0, e.device, norm=True)


def accumulate_topk(chosen: Settings, payloads: list[Tensor], weights: list[float], out: Tensor) -> None:
    """The operator `decode_accumulate` for topk; one launch a payload, as they may meet in an element."""
    n = out.numel()
    if not n:
        return
    split = index_bytes(n, chosen.k, chosen.block)
    for payload, weight in zip(payloads, weights, strict=True):
        _scatter(chosen, payload, words_aligned(payload[split:]), out, n, weight, out.device, norm=False)


def _scatter(
    chosen: Settings, payload: Tensor, inner: Tensor, out: Tensor | None, n: int, weight: float, device: torch.device,
    *, norm: bool,
) -> Tensor:  # fmt: skip
    chunks = chunk_count(n, chosen.block)
    kept = torch.empty(chunks * chosen.k, dtype=torch.float32, device=device)
    accumulate_stat(Settings("stat", bits=chosen.bits), [inner], [1.0], kept, replace=True)
    norms = torch.empty(chunks, dtype=torch.float64, device=device) if norm else None
    with on_device(kept):
        scatter_kernel[(chunks,)](
            payload, kept, out, norms, n, chosen.k, weight, CHUNK=chosen.block, K=triton.next_power_of_2(chosen.k),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return (
        torch.zeros(1, dtype=torch.float64, device=device)
        if norms is None
        else norms.sum(dim=0, keepdim=True)
    )
