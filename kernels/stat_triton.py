# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The statistical codec on a GPU: three passes to encode, one to decode. Definition: `reference_stat`.

Groups are cut into chunks; a table says where each chunk lies. Statistics are fp64 and summed in a fixed order, which is
not the definition's: tables and shifts may differ in the last bit, and a code where a value lies on the edge of a bin.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diloco.kernels.launch_triton import addresses, numbers, on_device, words_aligned
from diloco.kernels.numbers_triton import all_read
from diloco.kernels.settings import Settings

CHUNK = 4096
# fp64 sums of this many equal fp32 values are exact: 24 + 29 bits.
MOST = 1 << 29
_WARPS = 8
_REDUCED = 8192  # values of partial sums that a program of `segment_kernel` holds


class Cut(NamedTuple):
    """Chunks of all groups: `group` (int32), `start` (value), `length` and `code` (byte among the codes), int64 [chunks].

    `first` [groups + 1] is each group's first chunk, `sizes` fp64 [groups] their values.
    """

    group: Tensor
    start: Tensor
    length: Tensor
    code: Tensor
    first: Tensor
    sizes: Tensor


@lru_cache(maxsize=64)
def cut(groups: tuple[int, ...], bits: int, device: torch.device) -> Cut:
    """Chunks of at most CHUNK values, none across groups."""
    sizes = torch.tensor(groups, dtype=torch.int64)
    chunks = (sizes + CHUNK - 1) // CHUNK
    first = torch.tensor([0, *itertools.accumulate(chunks.tolist())])
    value = torch.tensor([0, *itertools.accumulate(groups)])
    octet = torch.tensor([0, *itertools.accumulate(((sizes * bits + 7) // 8).tolist())])
    group = torch.repeat_interleave(torch.arange(len(groups)), chunks)
    within = torch.arange(int(first[-1])) - first[group]
    start = value[group] + within * CHUNK
    count = torch.minimum(torch.full_like(start, CHUNK), value[group + 1] - start)
    code = octet[group] + within * (CHUNK * bits // 8)
    made = (group.int(), start, count, code, first, sizes.double().clamp(min=1))
    return Cut(*(t.to(device) for t in made))


@triton.jit
def moments_kernel(x, start, length, group, shifts, sums, CHUNK: tl.constexpr):
    """The fp64 sum of each chunk or, given the groups' `shifts`, of the squares about its group's shift."""
    pid = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    inside = i < tl.load(length + pid)
    c = tl.load(x + tl.load(start + pid) + i, mask=inside, other=0.0).to(tl.float64)
    if shifts is not None:
        c = tl.where(inside, c - tl.load(shifts + tl.load(group + pid)), 0.0)
        c = c * c
    tl.store(sums + pid, tl.sum(c, axis=0))


@triton.jit
def segment_kernel(parts, first, out, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """out[group, SIZE]: the sum of the chunks' parts [chunks, SIZE] of each group, in a fixed order."""
    g = tl.program_id(0)
    end = tl.load(first + g + 1)
    row = tl.load(first + g) + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    total = tl.zeros((ROWS, SIZE), parts.dtype.element_ty)
    for _ in range(tl.cdiv(end - tl.load(first + g), ROWS)):
        total += tl.load(parts + row[:, None] * SIZE + column[None, :], mask=(row < end)[:, None], other=0.0)
        row += ROWS
    tl.store(out + g * SIZE + column, tl.sum(total, axis=0))


@triton.jit
def codes_kernel(
    x, start, length, group, code, shifts, widths, codes, sums, counts, BITS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Codes of each chunk, packed, and for each bin the fp64 sum of its centred values and their number."""
    SIZE: tl.constexpr = 1 << BITS
    PER: tl.constexpr = 8 // BITS
    pid = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    n = tl.load(length + pid)
    inside = i < n
    g = tl.load(group + pid)
    v = tl.load(x + tl.load(start + pid) + i, mask=inside, other=0.0).to(tl.float64)
    c = v - tl.load(shifts + g)
    place = c / tl.load(widths + g) + SIZE // 2
    # Rounds to nearest even, as 2^52 + 2^51 has a last place of 1.
    place = (place + 6755399441055744.0) - 6755399441055744.0
    q = tl.minimum(tl.maximum(place, 0.0), SIZE - 1.0).to(tl.int32)
    q = tl.where(inside, q, 0)
    lanes = tl.arange(0, PER) * BITS
    packed = tl.sum(tl.reshape(q, [CHUNK // PER, PER]) << lanes[None, :], axis=1).to(tl.uint8)
    octet = tl.arange(0, CHUNK // PER)
    tl.store(codes + tl.load(code + pid) + octet, packed, mask=octet < (n + PER - 1) // PER)
    for k in range(SIZE):
        here = inside & (q == k)
        tl.store(sums + pid.to(tl.int64) * SIZE + k, tl.sum(tl.where(here, c, 0.0), axis=0))
        tl.store(counts + pid.to(tl.int64) * SIZE + k, tl.sum(here.to(tl.float64), axis=0))


@triton.jit
def stat_value(payload, groups, g, code_at, i, mask, BITS: tl.constexpr):
    """fp32 ``table[q] + shift`` of values `i` of a run of codes of group `g` that starts at byte `code_at`."""
    SIZE: tl.constexpr = 1 << BITS
    constants = payload.to(tl.pointer_type(tl.float32))
    codes = payload + 4 * groups.to(tl.int64) * (1 + SIZE)
    octet = tl.load(codes + code_at + i * BITS // 8, mask=mask, other=0).to(tl.int32)
    q = (octet >> (i * BITS % 8).to(tl.int32)) & (SIZE - 1)
    table = tl.load(constants + groups + g.to(tl.int64) * SIZE + q, mask=mask, other=0.0)
    return table + tl.load(constants + g)


@triton.jit(do_not_specialize=["groups", "workers"])
def stat_accumulate_kernel(
    payloads, weights, out, start, length, group, code, groups, workers, REPLACE: tl.constexpr, BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """``out += w * dec(p)`` for each payload in the order of the table of addresses; REPLACE starts from 0."""
    pid = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    inside = i < tl.load(length + pid)
    at = out + tl.load(start + pid) + i
    g = tl.load(group + pid)
    if REPLACE:
        total = tl.zeros((CHUNK,), dtype=tl.float32)
    else:
        total = tl.load(at, mask=inside, other=0.0)
    for w in range(workers):
        payload = tl.load(payloads + w).to(tl.pointer_type(tl.uint8))
        v = stat_value(payload, tl.to_tensor(groups), g, tl.load(code + pid), i, inside, BITS)
        total = total + v * tl.load(weights + w)
    all_read()
    tl.store(at, total, mask=inside)


def encode_stat(x: Tensor, groups: tuple[int, ...], bits: int, payload: Tensor) -> Tensor:
    """Write the payload of fp32 `x` [n > 0], aligned to 4 bytes; fp64 [1], its squared norm, not finite if x is not.

    No group may have more than MOST values.
    """
    size, device = 1 << bits, x.device
    parts = cut(groups, bits, device)
    chunks, count = parts.group.numel(), len(groups)
    where = (x, parts.start, parts.length, parts.group)
    with on_device(x):
        sums = torch.empty(chunks, dtype=torch.float64, device=device)
        moments_kernel[(chunks,)](*where, None, sums, CHUNK=CHUNK, num_warps=_WARPS)
        mean = _segments(sums, parts.first, 1) / parts.sizes
        moments_kernel[(chunks,)](*where, mean, sums, CHUNK=CHUNK, num_warps=_WARPS)
        # Sums of up to MOST equal values are exact, so that a constant group has a width of exactly 0 here.
        width = 6.0 * (_segments(sums, parts.first, 1) / (parts.sizes - 1)).sqrt() / size
        width = torch.where((width == 0) | ~torch.isfinite(width), 1.0, width)
        constants = payload[: 4 * count * (1 + size)].view(torch.float32)
        bins = torch.empty(2, chunks, size, dtype=torch.float64, device=device)
        codes_kernel[(chunks,)](
            *where, parts.code, mean, width, payload[4 * constants.numel() :], bins[0], bins[1],
            BITS=bits, CHUNK=CHUNK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        total, number = (_segments(part, parts.first, size) for part in bins)
    constants[:count] = mean
    constants[count:] = (total / number.clamp(min=1)).view(-1)
    decoded = (constants[count:].view(count, size) + constants[:count, None]).double()
    return (number * decoded.square()).sum().view(1) + 0.0 * mean.sum()


def accumulate_stat(
    chosen: Settings, payloads: list[Tensor], weights: list[float], out: Tensor, *, replace: bool = False
) -> None:
    """The operator `decode_accumulate` for stat; with `replace` `out` is written, not added to."""
    groups = chosen.spans(out.numel())
    if not groups or not payloads:
        return
    parts = cut(groups, chosen.bits, out.device)
    aligned = [words_aligned(p) for p in payloads]
    with on_device(out):
        stat_accumulate_kernel[(parts.group.numel(),)](
            addresses(aligned, out.device), numbers(weights, out.device), out, parts.start, parts.length, parts.group,
            parts.code, len(groups), len(aligned), REPLACE=replace, BITS=chosen.bits, CHUNK=CHUNK, num_warps=_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def _segments(values: Tensor, first: Tensor, size: int) -> Tensor:
    count = first.numel() - 1
    made = torch.empty((count, size) if size > 1 else count, dtype=values.dtype, device=values.device)
    segment_kernel[(count,)](values, first, made, SIZE=size, ROWS=_REDUCED // size, num_warps=_WARPS)
    return made
