"""What the timing benchmarks share: the machine in words, interleaved timing, results as a table and a file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU, its matrix instructions, threads and versions."""
    model, flags = platform.processor(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines}
        model, flags = fields.get("model name", model), set(fields.get("flags", "").split())
    return {
        "cpu": model,
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16"}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 1),
    }


def interleaved(
    actions: Mapping[str, Callable[[], object]], runs: int, *, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each action in each of `runs` rounds; every round runs all of them once, in turn.

    With one thread it is the CPU time of this process, which other programs do not lengthen; else wall clock.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(warm + runs):
        for name, action in actions.items():
            start = clock()
            action()
            if i >= warm:
                taken[name].append(clock() - start)
    return taken


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median of a/b over rounds: what disturbs a round disturbs both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def save(out: Path, results: Mapping[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {out}")
