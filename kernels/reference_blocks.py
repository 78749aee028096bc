"""Plain-torch definition of the block codecs: int8, e4m3, e5m2, e3m0, e2m1, nf4, int4.

Layout of a payload: ceil(n/block) fp32 scales, then the codes; 4-bit codes two to a byte, even index in the low
nibble. ``scale = fl32(absmax / divisor)`` and the quotient ``x / scale`` are correctly rounded fp32 divisions, never
a multiplication with a reciprocal, which would change codes at ties. A block whose scale is 0 has all codes 0.
e3m0 follows exmy (2405.13938); nf4 is the table of QLoRA (2305.14314); the block layout is this project's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from diloco.kernels.philox import uniform
from diloco.kernels.reference import SLICE

DIVISOR: dict[str, float] = {
    "int8": 127.0,
    "e4m3": 448.0,
    "e5m2": 57344.0,
    "e3m0": 1.0,
    "e2m1": 6.0,
    "nf4": 1.0,
    "int4": 7.0,
}
EIGHT_BIT = frozenset({"int8", "e4m3", "e5m2"})
FP8_DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

E3M0_LEVELS = (0.0, *(2.0 ** (level - 7) for level in range(1, 8)))
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def block_size(name: str, n: int, block: int) -> int:
    """Payload bytes: 4*ceil(n/block) + n, or + ceil(n/2) for the 4-bit codes."""
    return 4 * scale_count(n, block) + (n if name in EIGHT_BIT else (n + 1) // 2)


def scale_count(n: int, block: int) -> int:
    """Blocks, and so scales, of `n` values; the last block may be short."""
    return (n + block - 1) // block


def scales_of(payload: Tensor, n: int, block: int) -> Tensor:
    """The fp32 scales [ceil(n/block)], a view into `payload`."""
    return payload[: 4 * scale_count(n, block)].view(torch.float32)


def codes_of(payload: Tensor, n: int, block: int) -> Tensor:
    """The packed codes (uint8), a view into `payload`."""
    return payload[4 * scale_count(n, block) :]


def encode_blocks(name: str, x: Tensor, block: int, seed: int | None = None) -> Tensor:
    """Encode fp32 `x` [n]; uint8 [block_size]. A NaN or infinity in `x` makes the scale of its block non-finite.

    With a `seed` the codes are rounded stochastically (`diloco.kernels.philox`), otherwise to nearest.
    """
    n = x.numel()
    out = torch.empty(block_size(name, n, block), dtype=torch.uint8, device=x.device)
    scales, codes = scales_of(out, n, block), codes_of(out, n, block)
    # A tensor, not a number: on a GPU torch divides by a number through its reciprocal.
    divisor = torch.tensor(DIVISOR[name], dtype=torch.float32, device=x.device)
    step = max(SLICE, block)
    for lo in range(0, n, step):
        part = x[lo : lo + step]
        length = part.numel()
        if length % block:
            part = torch.nn.functional.pad(part, (0, -length % block))
        rows = part.view(-1, block)
        low, high = torch.aminmax(rows, dim=1)
        scale = (torch.maximum(low.neg_(), high) / divisor).abs_()
        # x/inf is 0, which gives the zero block without a NaN from 0/0.
        y = rows / torch.where(scale == 0, torch.inf, scale).unsqueeze(1)
        q = _quantise(name, y) if seed is None else _quantise_at_random(name, y, uniform(seed, lo, y.numel()))
        if name == "nf4":
            q.mul_((scale != 0).unsqueeze(1))
            q.view(-1)[length:] = 0  # its code of zero is not 0, but padding bits are
        scales[lo // block : lo // block + scale.numel()] = scale
        if name in EIGHT_BIT:
            codes[lo : lo + length] = q.view(-1)[:length]
        else:
            # A pair of codes read as one little-endian int16 is even + 256*odd; folding it gives even + 16*odd.
            pair = q.view(-1).view(torch.int16)
            packed = (pair | (pair >> 4)).to(torch.uint8)
            codes[lo // 2 : lo // 2 + (length + 1) // 2] = packed[: (length + 1) // 2]
    return out


def block_values(name: str, payload: Tensor, n: int, block: int) -> Iterator[tuple[int, Tensor]]:
    """The `n` values ``level(code) * scale`` (one fp32 product each) of uint8 `payload` as fresh fp32 slices."""
    scales, codes = scales_of(payload, n, block), codes_of(payload, n, block)
    step = max(SLICE, block)
    for lo in range(0, n, step):
        length = min(step, n - lo)
        rows = scale_count(length, block)
        full = torch.zeros(rows * block, dtype=torch.float32, device=payload.device)
        if name in EIGHT_BIT:
            part = codes[lo : lo + length]
            full[:length] = part.view(FP8_DTYPES.get(name, torch.int8))
        else:
            part = codes[lo // 2 : lo // 2 + (length + 1) // 2]
            pairs = _pair_table(name).to(payload.device)
            full.view(torch.int64)[: part.numel()] = pairs.index_select(0, part.to(torch.int32))
        full.view(rows, block).mul_(scales[lo // block : lo // block + rows].unsqueeze(1))
        yield lo, full[:length]


def _quantise(name: str, y: Tensor) -> Tensor:
    """Codes (uint8, one each) of quotients `y`, which is overwritten."""
    if name == "int8":
        return y.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    if name == "int4":
        return y.round_().clamp_(-7, 7).to(torch.int8).view(torch.uint8).bitwise_and_(15)
    if name in FP8_DTYPES:
        q = y.clamp_(-DIVISOR[name], DIVISOR[name]).to(FP8_DTYPES[name]).view(torch.uint8)
        return q.masked_fill_(q == 0x80, 0)
    if name == "e3m0":
        return _quantise_e3m0(y)
    if name == "e2m1":
        return _quantise_e2m1(y)
    return _quantise_nf4(y)


def _quantise_e3m0(y: Tensor) -> Tensor:
    """Nearest power of two, a tie at 1.5*2^k upward: one integer addition carries into the exponent."""
    sign = (y < 0).to(torch.uint8).mul_(8)
    y.abs_()
    nonzero = y > 2.0**-7
    level = y.view(torch.int32).add_(0x00400000).bitwise_right_shift_(23).sub_(120).clamp_(1, 7)
    return level.to(torch.uint8).bitwise_or_(sign).mul_(nonzero)


def _quantise_e2m1(y: Tensor) -> Tensor:
    """Nearest of 0 .5 1 1.5 2 3 4 6, a tie to the even code.

    With steps of .5, 1 and 2 the code is round(2y), round(y)+2 and round(y/2)+4: below 2, from 2 to 4 and above 4,
    which is where each is the least of the three. Halving and doubling are exact, so ties are those of y.
    """
    sign = (y < 0).to(torch.uint8).mul_(8)
    y.abs_()
    code = (
        torch.minimum((y * 2).round_(), y.round().add_(2)).minimum(y.mul_(0.5).round_().add_(4)).clamp_(max=7)
    )
    level = code.to(torch.uint8)
    return sign.mul_(level != 0).bitwise_or_(level)


def _quantise_nf4(y: Tensor) -> Tensor:
    """Index of the nearest entry: the number of edges below y."""
    q = torch.zeros_like(y, dtype=torch.uint8)
    above = torch.empty_like(y, dtype=torch.bool)
    for edge in nf4_edges():
        q.add_(torch.gt(y, edge, out=above).view(torch.uint8))
    return q


def _quantise_at_random(name: str, y: Tensor, u: Tensor) -> Tensor:
    """Codes whose expected level is y: from the level below, up if u < (y - below)/(above - below)."""
    u = u.view_as(y)
    if name in ("int8", "int4"):
        largest = DIVISOR[name]
        below = y.floor()
        q = below.add_((u < y - below).float()).clamp_(-largest, largest).to(torch.int8).view(torch.uint8)
        return q if name == "int8" else q.bitwise_and_(15)
    if name == "nf4":
        return _between(y, u, torch.tensor(NF4_LEVELS, dtype=torch.float32, device=y.device))
    table = torch.tensor(magnitudes(name), dtype=torch.float32, device=y.device)
    level = _between(y.abs().clamp_(max=float(table[-1])), u, table)
    sign = (y < 0).to(torch.uint8).mul_(0x80 if name in EIGHT_BIT else 8)
    return sign.mul_(level != 0).bitwise_or_(level)


def _between(y: Tensor, u: Tensor, table: Tensor) -> Tensor:
    """Index into the ascending `table` of the level below y, or of the one above it where u says so."""
    below = torch.searchsorted(table, y, right=True).sub_(1).clamp_(0, table.numel() - 2)
    share = (y - table[below]) / (table[below + 1] - table[below])
    return below.add_(u < share).to(torch.uint8)


def magnitudes(name: str) -> list[float]:
    """The ascending values of the codes without a sign of e3m0, e2m1, e4m3 and e5m2."""
    if name in FP8_DTYPES:
        finite = 0x7F if name == "e4m3" else 0x7C
        codes = torch.arange(finite, dtype=torch.uint8)
        return [float(level) for level in codes.view(FP8_DTYPES[name]).float()]
    return list(E3M0_LEVELS if name == "e3m0" else E2M1_LEVELS)


def levels(name: str) -> list[float]:
    """The value (before the scale) of each of the 16 codes of a 4-bit codec."""
    if name == "nf4":
        return list(NF4_LEVELS)
    if name == "int4":
        return [float(code if code < 8 else code - 16) for code in range(16)]
    positive = E3M0_LEVELS if name == "e3m0" else E2M1_LEVELS
    return [*positive, 0.0, *(-level for level in positive[1:])]


@cache
def _pair_table(name: str) -> Tensor:
    """int64 [256]: the bits of both fp32 levels of a byte, so that one gather decodes two values."""
    table = torch.tensor(levels(name), dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack((table[byte & 15], table[byte >> 4]), dim=1).contiguous().view(torch.int64).view(256)


@cache
def nf4_edges() -> tuple[float, ...]:
    """The largest fp32 that still belongs to the lower of two neighbours: the middle, which is a tie, included."""
    table = torch.tensor(NF4_LEVELS, dtype=torch.float32).double().tolist()
    return tuple(_round_down((a + b) / 2) for a, b in itertools.pairwise(table))


def _round_down(value: float) -> float:
    """The largest fp32 not above `value`."""
    rounded = float(torch.tensor(value, dtype=torch.float32))
    if rounded <= value:
        return rounded
    return float(torch.nextafter(torch.tensor(rounded, dtype=torch.float32), torch.tensor(-math.inf)))
