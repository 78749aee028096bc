"""Checks and times every Triton kernel on the GPU at hand, beside plain torch and the floor of bytes and flops.

    python benchmarks/gpu.py                       # about five minutes on a large GPU, ten at most
    python benchmarks/gpu.py --json results.json
    python benchmarks/gpu.py --dry --targets sm_90 # no GPU: compiles everything, runs nothing

The floor is the bytes a job must move at the measured copy bandwidth, or its flops at the measured speed of a large
matrix product, whichever is longer. Exit status 1 if a result is not what plain torch gives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diloco.kernels.cases_triton import Case, cases
from diloco.kernels.offline_triton import TARGETS
from diloco.kernels.products_triton import symmetric_product
from diloco.kernels.report import complaints, rows, table

VALUES = 1 << 26
SIDE = 4096
# Matrices and their side: equal shapes in one launch fill a GPU that one small matrix leaves idle.
PRODUCTS = ((1, 1024), (8, 1024), (1, 2048), (8, 2048), (1, 4096), (1, 8192))
# Past these many seconds results are still checked, but no longer timed.
TIMING_SECONDS = 420.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One line of the result; seconds are medians, None if not timed."""

    op: str
    config: str
    difference: float
    limit: float
    triton: float | None
    torch: float | None
    floor: float

    @property
    def right(self) -> bool:
        # Not "<= limit": a NaN is wrong too.
        return not self.difference > self.limit and self.difference == self.difference

    def line(self) -> str:
        def micro(seconds: float | None) -> str:
            return "-" if seconds is None else f"{seconds * 1e6:.1f}"

        of_floor = "-" if self.triton is None else f"{self.floor / self.triton:.0%}"
        verdict = "ok" if self.right else "WRONG"
        found = f"{self.difference:.2g} of {self.limit:.2g} {verdict}"
        cells = (
            self.op,
            self.config,
            found,
            micro(self.triton),
            micro(self.torch),
            micro(self.floor),
            of_floor,
        )
        return "| " + " | ".join(cells) + " |"


def seconds(call: Callable[[], object], flush: torch.Tensor, least: int = 5, budget: float = 0.3) -> float:
    """Median time of a call with a cold L2 cache, of at least `least` runs or as many as fit in `budget` seconds."""
    call()
    took: list[float] = []
    begin = time.monotonic()
    while len(took) < least or (time.monotonic() - begin < budget and len(took) < 50):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1e3)
    return statistics.median(took)


def machine_speed(flush: torch.Tensor) -> tuple[float, float]:
    """Bytes per second of a copy, read and write, and flops per second of a bf16 product of side 8192."""
    a = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    bandwidth = 2 * 4 * a.numel() / seconds(lambda: b.copy_(a), flush)
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return bandwidth, 2 * 8192**3 / seconds(lambda: m @ m, flush)


def measure(case: Case, bandwidth: float, speed: float, flush: torch.Tensor, timed: bool) -> Timed:
    case.run()
    case.torch()
    difference = case.difference()
    ours = seconds(case.run, flush) if timed else None
    theirs = seconds(case.torch, flush, least=2) if timed else None
    floor = max(case.bytes / bandwidth, case.flops / speed)
    return Timed(case.op, case.config, difference, case.limit, ours, theirs, floor)


def product(count: int, side: int, speed: float, flush: torch.Tensor) -> Timed:
    """X X^T of `count` matrices against torch's bmm (cuBLAS); the difference is that of the errors against float64."""
    x = torch.randn(count, side, side, device="cuda", dtype=torch.bfloat16)
    c = torch.empty_like(x)

    def ours() -> object:
        return symmetric_product(x, x, None, c)

    def theirs() -> torch.Tensor:
        return torch.bmm(x, x.mT)

    ours()
    exact = x[0].double() @ x[0].double().mT
    ratio = float((c[0].double() - exact).norm()) / float((theirs()[0].double() - exact).norm())
    took = seconds(ours, flush), seconds(theirs, flush)
    return Timed("x x^t", f"{count} x {side}", ratio, 1.05, *took, count * side**3 / speed)


def dry(targets: Sequence[str], op: str | None) -> int:
    found = list(rows(targets, op))
    print(table(found))
    bad = [f"{r.made.kernel} {r.case.config} {r.made.target}: {c}" for r in found for c in complaints(r)]
    print(f"{len(found)} kernels compiled, {len(bad)} complaints; nothing was run or timed", *bad, sep="\n")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--targets", default=",".join(TARGETS), help="what --dry compiles for")
    parser.add_argument("--op", help="this operator only")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    chosen = parser.parse_args(arguments)
    if chosen.dry:
        return dry(chosen.targets.split(","), chosen.op)
    if not torch.cuda.is_available():
        parser.error("no GPU here; --dry compiles without one")
    begin = time.monotonic()
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    bandwidth, speed = machine_speed(flush)
    name = torch.cuda.get_device_name()
    print(
        f"{name}, torch {torch.__version__}: {bandwidth / 1e12:.2f} TB/s copied, {speed / 1e12:.0f} Tflop/s in bf16"
    )
    print(f"{VALUES} values, matrices of side {SIDE}; microseconds, medians, cold L2\n")
    print(
        "| op | config | difference | triton | torch | floor | of floor |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    results = []
    for case in cases("cuda", VALUES, SIDE):
        if chosen.op is None or case.op == chosen.op:
            timed = time.monotonic() - begin < TIMING_SECONDS
            results.append(measure(case, bandwidth, speed, flush, timed))
            print(results[-1].line(), flush=True)
    if chosen.op is None:
        for count, side in PRODUCTS:
            results.append(product(count, side, speed, flush))
            print(results[-1].line(), flush=True)
    wrong = [f"{r.op} {r.config}" for r in results if not r.right]
    print(
        f"\n{len(results)} checked in {time.monotonic() - begin:.0f} s; wrong: {', '.join(wrong) or 'none'}"
    )
    if chosen.json:
        lines = [{field: getattr(r, field) for field in Timed.__slots__} for r in results]
        machine = {"device": name, "torch": torch.__version__, "bandwidth": bandwidth, "speed": speed}
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({**machine, "values": VALUES, "side": SIDE, "results": lines}, file, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
