"""Compiling every launch of a host function for a GPU that is not there, and reading what came out.

`compiled_for` puts a stand-in driver in Triton's place: host wrappers run unchanged on CPU tensors, each launch is
specialised and compiled for the target as a real one would be, and none is executed. Nothing here knows times.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler as triton_compiler
from triton.runtime.driver import driver as active

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes a block may have.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}

# name in the assembly -> kind of matrix instruction
_MMA = {"mma.sync": "mma.sync", "wgmma.mma_async": "wgmma", "tcgen05.mma.": "tcgen05", "v_mfma_": "mfma"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as one launch specialised it.

    `signature` is ``name=type`` with ``:16`` where the value is divisible by 16; `constants` holds the rest. `registers`
    are per thread, `spill_bytes` per thread too, `mma` counts static matrix instructions by kind, and `mma_flops` are
    theirs over the whole block (None where the text does not tell, or a fused loop is unrolled in part). `loads` counts
    static global loads by bytes per thread.
    """

    kernel: str
    target: str
    signature: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    options: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: dict[str, int]
    mma_flops: int | None
    loads: dict[int, int]
    text: str = field(repr=False)
    ir: str = field(repr=False)


class _StandIn:
    """What Triton asks of a driver. It is its own `utils`."""

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]
        self.name = target
        self.sources: list[Any] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.sources.append((source, metadata))
        return lambda *_, **__: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # A name of its own for each target keeps their caches of compiled kernels apart.
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        # A block that does not fit raises OutOfResources here as on the device.
        return {"max_shared_mem": SHARED_LIMIT[self.name], "multiprocessor_count": 132}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: str
    ) -> tuple[object, None, int, int, int]:
        # A module of None would be loaded again at every launch.
        return object(), None, 0, 0, 1024


@contextmanager
def compiled_for(target: str) -> Iterator[list[Any]]:
    """Inside, launches are compiled for `target` only. The list fills with their (source, metadata) on first use."""
    before = active._active
    stand_in = _StandIn(target)
    active.set_active(stand_in)
    triton_compiler.max_shared_mem.cache_clear()
    try:
        yield stand_in.sources
    finally:
        active._active = before
        triton_compiler.max_shared_mem.cache_clear()


def forget(*kernels: Any) -> None:
    """Drop compiled kernels from memory (not from disk), so that their next launch is seen again."""
    for kernel in kernels:
        kernel.device_caches.clear()


def compile_host(call: Callable[[], object], target: str) -> list[Compiled]:
    """Run `call` with every launch compiled for `target`; one entry for each kernel not launched before."""
    with compiled_for(target) as sources:
        call()
        return [_examine(source, metadata, target) for source, metadata in sources]


def _examine(source: Any, metadata: Any, target: str) -> Compiled:
    made = triton.compile(source, target=TARGETS[target], options=_options(metadata))
    text = made.asm["amdgcn" if target == "gfx942" else "ptx"]
    registers, spill = _amd_usage(text) if target == "gfx942" else _nvidia_usage(made.asm["cubin"])
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    divisible = {path[0] for path, attrs in source.attrs.items() if ["tt.divisibility", 16] in attrs}
    signature = ", ".join(
        f"{name}={source.signature[name]}{':16' if i in divisible else ''}"
        for i, name in enumerate(names)
        if name not in constants
    )
    mma = {kind: text.count(mark) for mark, kind in _MMA.items() if mark in text}
    return Compiled(
        kernel=f"{source.fn.fn.__module__}:{source.fn.fn.__name__}",
        target=target,
        signature=signature,
        constants=constants,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        options={"enable_fp_fusion": metadata.enable_fp_fusion},
        registers=registers,
        spill_bytes=spill,
        shared_bytes=metadata.shared,
        mma=mma,
        mma_flops=_mma_flops(text, metadata.num_warps),
        loads=_loads(text),
        text=text,
        ir=made.asm["ttir"],
    )


def _options(metadata: Any) -> dict[str, Any]:
    known = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")
    return {name: getattr(metadata, name) for name in known if hasattr(metadata, name)}


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread. Triton has no local arrays: a stack is what registers spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        told = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resource usage: {told!r}")
    return int(found[1]), int(found[2])


def _amd_usage(text: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    if registers is None or spilled is None or scratch is None:
        raise RuntimeError(
            "the AMD assembly lacks .vgpr_count, .vgpr_spill_count or .private_segment_fixed_size"
        )
    return int(registers[1]), max(4 * int(spilled[1]), int(scratch[1]))


def _mma_flops(text: str, warps: int) -> int | None:
    """Flops of all static matrix instructions of a block; each warp (or group of four) issues its own."""
    total = 0
    for m, n, k in re.findall(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", text):
        total += 2 * int(m) * int(n) * int(k) * warps
    for m, n, k in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", text):
        total += 2 * int(m) * int(n) * int(k) * warps // 4
    for m, n, k in re.findall(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", text):
        total += 2 * int(m) * int(n) * int(k) * warps
    return total or None


def _loads(text: str) -> dict[int, int]:
    """Static loads from global memory by width, cp.async included."""
    widths: dict[int, int] = {}
    for vector, bits in re.findall(r"ld\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[bfus](\d+)", text):
        width = int(vector or 1) * int(bits) // 8
        widths[width] = widths.get(width, 0) + 1
    for width in re.findall(
        r"cp\.async\.c[ag]\.shared\.global(?:\.[A-Za-z0-9_:]+)* \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)",
        text,
    ):
        size = int(width, 0)
        widths[size] = widths.get(size, 0) + 1
    dwords = {
        "dword": 4,
        "dwordx2": 8,
        "dwordx3": 12,
        "dwordx4": 16,
        "ubyte": 1,
        "ushort": 2,
        "sbyte": 1,
        "sshort": 2,
    }
    for name in re.findall(r"(?:global|buffer)_load_(dwordx?\d?|[us]byte|[us]short)", text):
        widths[dwords[name]] = widths.get(dwords[name], 0) + 1
    return dict(sorted(widths.items()))
