"""Repairs to Triton's interpreter, and a stricter way to run it. Needs TRITON_INTERPRET=1 before triton is imported.

Interpreter 3.7 multiplies the bit patterns of bf16 in `tl.dot`, and truncates fp32 to bf16 where a GPU rounds to
nearest even. `install` mends both with torch's own conversions; `tests/unit/triton_interpreted.py` notices when an
upgrade has made that unnecessary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_TORCH = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}
_BITS = {16: (torch.int16, np.int16, np.uint16), 32: (torch.int32, np.int32, np.uint32)}


_ORIGINAL = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


@contextmanager
def unrepaired() -> Iterator[None]:
    """Inside, the interpreter is as it came, also within `installed`."""
    here = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = _ORIGINAL
    try:
        yield
    finally:
        interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = here


@contextmanager
def installed() -> Iterator[None]:
    """Inside, bf16 products and conversions to bf16 are as on a GPU."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source not in _TORCH or target not in _TORCH or mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(values, source, target, mode)
        width = {16: np.int16, 32: np.float32}[source.primitive_bitwidth]
        there = torch.from_numpy(np.ascontiguousarray(values).view(width).copy()).view(_TORCH[source])
        as_int, _, unsigned = _BITS[target.primitive_bitwidth]
        return there.to(_TORCH[target]).view(as_int).numpy().view(unsigned).reshape(np.shape(values))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return rounding(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)

    def product(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        made = np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(made, d.dtype.scalar)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = rounding, product
    try:
        yield
    finally:
        interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert, dot


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Inside, the programs of a grid run in an order drawn from `seed`: what reads another program's output shows."""
    original = interpreter.InterpreterBuilder.set_grid_idx
    orders: dict[tuple[int, ...], list[int]] = {}

    def drawn(self: Any, x: int, y: int, z: int) -> None:
        nx, ny, nz = self.grid_dim
        total = nx * ny * nz
        if (nx, ny, nz) not in orders:
            orders[nx, ny, nz] = random.Random(seed).sample(range(total), total)
        flat = orders[nx, ny, nz][(x * ny + y) * nz + z]
        original(self, flat // (ny * nz), flat // nz % ny, flat % nz)

    interpreter.InterpreterBuilder.set_grid_idx = drawn
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.set_grid_idx = original


class Guarded:
    """Tensors with a band of sentinel bytes on both sides, which `intact` finds changed or not."""

    BAND, BYTE = 256, 0xA5

    def __init__(self) -> None:
        self._stores: list[Tensor] = []

    def empty(self, n: int, dtype: torch.dtype) -> Tensor:
        """Filled with the sentinel, so that an element nobody writes shows too."""
        size = n * dtype.itemsize
        store = torch.full((2 * self.BAND + size,), self.BYTE, dtype=torch.uint8)
        self._stores.append(store)
        return store[self.BAND : self.BAND + size].view(dtype)

    def copy(self, values: Tensor) -> Tensor:
        made = self.empty(values.numel(), values.dtype)
        made.copy_(values.reshape(-1))
        return made

    def intact(self) -> bool:
        """Nothing was written outside any of the tensors."""
        return all(
            bool((s[: self.BAND] == self.BYTE).all() and (s[-self.BAND :] == self.BYTE).all())
            for s in self._stores
        )
