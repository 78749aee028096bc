"""What every launch of a Triton kernel needs on the host: device, alignment, constant tables, sums of partial results."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from diloco.kernels.reference_blocks import NF4_LEVELS

# A block is held in the registers of one program, and a program has at most 32 warps.
MAX_BLOCK = 4096
# Values and warps of a program of an elementwise kernel: at 8 values a thread nothing spills on any target.
SPAN = 2048
WARPS = 8


def span_for(block: int) -> tuple[int, int]:
    """Values of a program that holds whole blocks (0: no blocks), and its warps."""
    span = max(SPAN, block)
    return span, WARPS * span // SPAN


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current, as Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def words_aligned(payload: Tensor) -> Tensor:
    """`payload` (uint8), or a copy of it where its start is not aligned to the 32-bit words that kernels read."""
    return payload if payload.data_ptr() % 4 == 0 else payload.clone()


def table_of(codec: str, device: torch.device) -> Tensor | None:
    """What a kernel must look the levels of `codec` up in, if anything."""
    return _nf4_table(device) if codec == "nf4" else None


@cache
def _nf4_table(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def addresses(tensors: list[Tensor], device: torch.device) -> Tensor:
    """int64 [W]: where each tensor starts. The tensors must outlive the launch."""
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=device)


def numbers(values: list[float], device: torch.device) -> Tensor:
    """fp32 [W]."""
    return torch.tensor(values, dtype=torch.float32, device=device)
