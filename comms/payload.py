"""Payload bytes as tensors and back, without copies where none is needed; and what a codec asks of a tensor."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from diloco.errors import CorruptDataError, NonFiniteError
from diloco.kernels.reference import parts

Payload = bytes | bytearray | memoryview


def flat(tensor: Tensor) -> Tensor:
    """The tensor without its gradient history; TypeError unless it has the shape and type that a codec needs."""
    if (
        tensor.dtype != torch.float32
        or tensor.dim() != 1
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
    ):
        raise TypeError(
            f"a codec needs a 1-D contiguous float32 CPU tensor, got {tensor.dtype} {tuple(tensor.shape)} "
            f"on {tensor.device}; use tensor.detach().float().cpu().reshape(-1)"
        )
    return tensor.detach()


def all_finite(values: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in parts(values))


def require_finite(tensor: Tensor) -> None:
    """NonFiniteError with the number of NaN and infinite values, if there are any."""
    count = sum(int((~torch.isfinite(part)).sum()) for part in parts(tensor))
    if count:
        raise NonFiniteError(f"cannot encode NaN or infinity: {count} of {tensor.numel()} values")


def to_bytes(data: Tensor) -> bytes:
    return data.numpy().tobytes()


def sized(name: str, payload: Payload, want: int, n: int) -> Tensor:
    """The payload as a uint8 tensor on the same memory, which it keeps alive; CorruptDataError for another size."""
    size = memoryview(payload).nbytes
    if size != want:
        raise CorruptDataError(f"{name} payload of {size} bytes, want {want} for n={n}")
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    # torch warns of tensors on memory that it may not write to; nothing here writes to a payload.
    array = np.frombuffer(payload, dtype=np.uint8)
    window = (ctypes.c_uint8 * size).from_address(array.ctypes.data)
    window.owner = array  # type: ignore[attr-defined]
    return torch.frombuffer(window, dtype=torch.uint8)
