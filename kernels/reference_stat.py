"""Plain-torch definition of the statistical codec `stat` with 2, 4 or 8 bits (MuLoCo 2505.23725, INTELLECT-1 2412.01152).

Each group of values is centred on its mean; bins of width 6*std/2^bits get the mean of their members as value. Layout
of a payload: all shifts (fp32), all tables (2^bits fp32 each), then the codes, low bits first, each group starting on a
byte. Statistics are fp64, rounded to fp32 once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diloco.kernels.reference import SLICE

BITS = (2, 4, 8)


def stat_size(groups: Sequence[int], bits: int) -> int:
    """Payload bytes for groups of these many values: 4*(1 + 2^bits) + ceil(n*bits/8) for each."""
    return sum(4 * (1 + (1 << bits)) + (n * bits + 7) // 8 for n in groups)


def encode_stat(x: Tensor, groups: Sequence[int], bits: int) -> Tensor:
    """Encode fp32 `x` [sum(groups)]; uint8 [stat_size].

    shift = mean(x); c = x - shift; w = 6*std(c, unbiased)/2^bits; q = clamp(round(c/w + 2^(bits-1)), 0, 2^bits-1);
    table[k] = mean of c where q == k, or 0. A constant group, or one of a single value, has q = 2^(bits-1).
    A NaN or infinity in `x` makes the shift of its group non-finite.
    """
    size = 1 << bits
    out = torch.empty(stat_size(groups, bits), dtype=torch.uint8, device=x.device)
    shifts, tables, codes = _parts(out, len(groups), bits)
    start = at = 0
    for g, n in enumerate(groups):
        count = (n * bits + 7) // 8
        shift, table = _encode_group(x[start : start + n], bits, codes[at : at + count])
        shifts[g] = shift
        tables[g * size : (g + 1) * size] = table
        start, at = start + n, at + count
    return out


def stat_values(payload: Tensor, groups: Sequence[int], bits: int) -> Iterator[tuple[int, Tensor]]:
    """The values ``table[q] + shift`` (one fp32 addition each) of uint8 `payload` as fresh fp32 slices."""
    size = 1 << bits
    shifts, tables, codes = _parts(payload, len(groups), bits)
    start = at = 0
    for g, n in enumerate(groups):
        value = tables[g * size : (g + 1) * size] + shifts[g]
        for lo in range(0, n, SLICE):
            length = min(SLICE, n - lo)
            first = at + lo * bits // 8
            packed = codes[first : first + (length * bits + 7) // 8]
            yield start + lo, value.index_select(0, _unpack(packed, bits)[:length])
        start, at = start + n, at + (n * bits + 7) // 8


def constants_of(payload: Tensor, groups: int, bits: int) -> Tensor:
    """All shifts and tables (fp32), a view into `payload`."""
    return payload[: 4 * groups * (1 + (1 << bits))].view(torch.float32)


def _parts(payload: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    constants = constants_of(payload, groups, bits)
    return constants[:groups], constants[groups:], payload[4 * constants.numel() :]


def _encode_group(x: Tensor, bits: int, codes: Tensor) -> tuple[float, Tensor]:
    """Shift and table of one group; its codes are written to `codes`."""
    n, size = x.numel(), 1 << bits
    sums = torch.zeros(size, dtype=torch.float64, device=x.device)
    counts = torch.zeros(size, dtype=torch.int64, device=x.device)
    if n == 0:
        return 0.0, sums
    mean, width = statistics(x, size, ordered_sum)
    for lo in range(0, n, SLICE):
        c = x[lo : lo + SLICE].double().sub_(mean)
        q = (c / width).add_(size // 2).round_().clamp_(0, size - 1).nan_to_num_(0.0).to(torch.int64)
        sums += torch.bincount(q, weights=c, minlength=size)
        counts += torch.bincount(q, minlength=size)
        packed = _pack(q, bits)
        first = lo * bits // 8
        codes[first : first + packed.numel()] = packed
    return mean, sums / counts.clamp_(min=1)


def statistics(x: Tensor, size: int, total: Callable[[Tensor, float, bool], float]) -> tuple[float, float]:
    """Mean of `x` (n >= 1) and bin width, in fp64; `total` is `ordered_sum`, or does the same faster."""
    low, high = (float(v) for v in torch.aminmax(x))
    if low == high:
        # The fp64 mean of equal values can be off by one rounding, which would make a deviation out of nothing.
        return low, 1.0
    n = x.numel()
    mean = total(x, 0.0, False) / n
    if not math.isfinite(mean):
        return mean, 1.0
    squares = total(x, mean, True)
    return mean, (6.0 * math.sqrt(squares / (n - 1)) / size) or 1.0


def ordered_sum(x: Tensor, shift: float, square: bool) -> float:
    """fp64 sum of x - shift, or of its squares: eight lanes (value i in lane i%8) per SLICE, each summed in order.

    The lanes of a slice are folded by halving; the slices are added in order. A fixed order makes the bytes of a payload
    the same wherever it is made.
    """
    total = 0.0
    for lo in range(0, x.numel(), SLICE):
        c = x[lo : lo + SLICE].double().sub_(shift)
        if square:
            c.square_()
        if c.numel() % 8:
            c = torch.nn.functional.pad(c, (0, -c.numel() % 8))
        # Of all reductions only cumsum adds in order.
        lanes = c.view(-1, 8).cumsum(dim=0)[-1]
        lanes = lanes[:4] + lanes[4:]
        lanes = lanes[:2] + lanes[2:]
        total += float(lanes[0] + lanes[1])
    return total


def _pack(q: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    if q.numel() % per_byte:
        q = torch.nn.functional.pad(q, (0, -q.numel() % per_byte))
    lanes = q.view(-1, per_byte) << (bits * torch.arange(per_byte, device=q.device))
    return lanes.sum(dim=1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes (int32) of packed bytes, padding included."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
    return ((packed.to(torch.int32).unsqueeze(1) >> shifts) & ((1 << bits) - 1)).view(-1)
