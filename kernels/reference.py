"""Plain-torch definition of the codecs that only change the width of a number: fp32, fp16 and bf16.

The other families stand beside this file: `reference_blocks` (int8 .. int4), `reference_stat`, `reference_topk`.
Together they define every byte that crosses the wire; faster kernels are held against them. Here is arithmetic
only: whether received bytes may be trusted is for `diloco.comms.codec` to decide.

Every family has the same two functions: `encode(...) -> uint8 tensor` and `values(...)`, which yields the decoded
fp32 values slice by slice as ``(start, values)`` so that no caller needs a second tensor of full size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Small enough for the working set of one slice to stay in the L2 cache, large enough to hide the cost of a torch call.
SLICE = 1 << 17

CAST_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parts(x: Tensor) -> Iterator[Tensor]:
    """Flat `x` in views of SLICE values."""
    for lo in range(0, x.numel(), SLICE):
        yield x[lo : lo + SLICE]


def cast_size(name: str, n: int) -> int:
    """Payload bytes of `n` values: 4n, 2n or 2n."""
    return CAST_DTYPES[name].itemsize * n


def encode_cast(name: str, x: Tensor) -> Tensor:
    """Round fp32 `x` [n] to nearest even, saturating at the largest finite value; uint8 [cast_size].

    For fp32 the result is a view of `x`, not a copy.
    """
    if name == "fp32":
        return x.view(torch.uint8)
    dtype = CAST_DTYPES[name]
    largest = torch.finfo(dtype).max
    out = torch.empty(x.numel(), dtype=dtype, device=x.device)
    for lo in range(0, x.numel(), SLICE):
        out[lo : lo + SLICE] = x[lo : lo + SLICE].clamp(-largest, largest).to(dtype)
    return out.view(torch.uint8)


def cast_values(name: str, payload: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """The `n` values of uint8 `payload` as fresh fp32 slices."""
    stored = payload.view(CAST_DTYPES[name])
    for lo in range(0, n, SLICE):
        yield lo, stored[lo : lo + SLICE].to(torch.float32, copy=True)
