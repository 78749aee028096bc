"""Speed of the compiled CPU kernels beside memcpy of the same bytes and beside eager torch, all in one run.

A row is the median over `--runs` of alternating measurements: the kernel, then memcpy with as many threads. `--round`
instead runs a coordinator's work for one round of `--params` values from eight workers and says what share of the
CPU time is spent in the kernels. On a machine that others use too, `--clock cpu` leaves out the time in which this
process did not run (one thread only); shared caches and memory are felt all the same.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diloco import outer
from diloco.comms import codec as codecs
from diloco.comms import downlink, frame
from diloco.kernels import cpu, native
from diloco.kernels import reference_fused as reference
from diloco.kernels.settings import settings

WORKERS = 8
WEIGHTS = [1 / WORKERS] * WORKERS
Row = dict[str, Any]


def copy(to: Tensor, source: Tensor, count: int, threads: int) -> None:
    """memcpy of `count` bytes in equal shares; again and again over the same memory if it has fewer."""
    times = -(-count // (4 * min(to.numel(), source.numel())))
    once = count // times
    share = -(-once // threads)

    def part(at: int) -> None:
        for _ in range(times):
            ctypes.memmove(to.data_ptr() + at, source.data_ptr() + at, min(share, once - at))

    others = [threading.Thread(target=part, args=(share * t,)) for t in range(1, threads)]
    for other in others:
        other.start()
    part(0)
    for other in others:
        other.join()


class Bench:
    """Buffers and clocks for one size and thread count."""

    def __init__(self, n: int, threads: int, runs: int, clock: Callable[[], float], eager: bool) -> None:
        self.n, self.threads, self.runs, self.clock, self.eager = n, threads, runs, clock, eager
        self.rows: list[Row] = []
        generator = torch.Generator().manual_seed(0)
        self.x, self.local, self.error = (torch.randn(n, generator=generator) for _ in range(3))
        self.residual, self.out = torch.ones(n), torch.ones(n)
        self.source, self.target = (torch.ones(4 * n, dtype=torch.float32) for _ in range(2))

    def timed(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    def row(
        self, job: str, moved: float, work: Callable[[], Any], define: Callable[[], Any], **target: float
    ) -> None:
        """`moved` is the number of bytes that memcpy has to read and write together for comparison."""
        ours, theirs = [], []
        work()
        for _ in range(self.runs):
            ours.append(self.timed(work))
            theirs.append(self.timed(lambda: copy(self.target, self.source, int(moved / 2), self.threads)))
        ratio = statistics.median(theirs) / statistics.median(ours)
        torch.set_num_threads(self.threads)
        eager = self.timed(define) if self.eager else None
        row: Row = {
            "job": job,
            "values": self.n,
            "threads": self.threads,
            "milliseconds": 1e3 * statistics.median(ours),
            "memcpy_milliseconds": 1e3 * statistics.median(theirs),
            "speed_over_memcpy": ratio,
            "eager_milliseconds": None if eager is None else 1e3 * eager,
            "speed_over_eager": None if eager is None else eager / statistics.median(ours),
            **target,
        }
        row["met"] = ratio >= row["want"] if "want" in row else None
        self.rows.append(row)
        times = "" if eager is None else f"{row['speed_over_eager']:7.1f}x"
        verdict = (
            "" if row["met"] is None else (f"want {row['want']:.2f}: " + ("yes" if row["met"] else "NO"))
        )
        print(
            f"{job:34} {self.n >> 20:4}M {self.threads} thr {row['milliseconds']:9.2f} ms  memcpy"
            f" {row['memcpy_milliseconds']:8.2f} ms  {ratio:5.2f}x  eager {times:9} {verdict}",
            flush=True,
        )

    def all(self) -> None:
        n, x, squared = self.n, self.x, torch.zeros(1, dtype=torch.float64)
        for name in ("int8", "int4", "e3m0", "e2m1", "nf4", "e4m3", "e5m2", "bf16", "fp16"):
            s = settings(name)
            payload = torch.zeros(s.size(n), dtype=torch.uint8)
            arguments = (s, x, None, None, None, payload, squared, 1.0, None)
            self.row(
                f"encode {name} (+ norm)",
                8 * n,
                lambda a=arguments: cpu.encode(*a),
                lambda a=arguments: reference.encode(*a),
                **({"want": 0.8} if name in ("int8", "int4", "e3m0") else {}),
            )
        for name in ("e3m0", "int4", "int8"):
            s = settings(name)
            payload = torch.zeros(s.size(n), dtype=torch.uint8)
            fused = (s, x, self.local, self.error, self.residual, payload, squared, 0.95, None)
            self.row(
                f"pseudo-gradient + EF + {name}",
                16 * n + s.size(n),
                lambda a=fused: cpu.encode(*a),
                lambda a=fused: reference.encode(*a),
                **({"want": 1 / 1.5} if name == "e3m0" else {}),
            )
        for name in ("e3m0", "int8", "bf16"):
            s = settings(name)
            first = torch.zeros(s.size(n), dtype=torch.uint8)
            cpu.encode(s, x, None, None, None, first, squared, 1.0, None)
            payloads = [first.clone() for _ in range(WORKERS)]
            self.row(
                f"decode + sum of {WORKERS} {name}",
                8 * n * WORKERS,
                lambda s=s, p=payloads: cpu.decode_accumulate(s, p, WEIGHTS, self.out),
                lambda s=s, p=payloads: reference.decode_accumulate(s, p, WEIGHTS, self.out),
                want=2.0,
            )
        rates = (0.7, 0.9, 0.9, None)
        plain = (settings("fp32"), "nesterov", x, self.local, self.residual, None, None, None, None, *rates)
        self.row(
            "Nesterov",
            20 * n,
            lambda: cpu.outer_step(*plain),
            lambda: reference.outer_step(*plain),
            want=1 / 1.3,
        )
        s = settings("e3m0")
        payload = torch.zeros(s.size(n), dtype=torch.uint8)
        sends = (s, "nesterov", x, self.local, self.residual, None, self.error, payload, squared, *rates)
        self.row(
            "Nesterov + requantised e3m0",
            28 * n + s.size(n),
            lambda: cpu.outer_step(*sends),
            lambda: reference.outer_step(*sends),
            want=1 / 1.3,
        )
        half = x.bfloat16()
        merged = (settings("fp32"), half, self.local.view(torch.uint8), 0.5)
        self.row("merge into bf16", 8 * n, lambda: cpu.merge(*merged), lambda: reference.merge(*merged))


def a_round(n: int, mode: str, up: str) -> Row:
    """CPU seconds of a coordinator's round and of the kernels in it; one thread."""
    torch.set_num_threads(1)
    codec = codecs.get(up)
    label = {
        "fragment": 0,
        "round": 1,
        "base_version": 0,
        "run_id": 1,
        "incarnation": 1,
        "steps": 1,
        "tokens": 1,
    }
    generator = torch.Generator().manual_seed(0)
    frames = [
        frame.encode_frame(codec, torch.randn(n, generator=generator), worker=w, **label)
        for w in range(WORKERS)
    ]
    optimizer = outer.Nesterov()
    ledger = downlink.Ledger.start(outer.OuterShard.start(optimizer, torch.zeros(n)), mode, codec)
    inside = [0.0]
    run = cpu.run

    def counted(op: native.Op, job: native.Job) -> bool:
        start = time.thread_time()
        try:
            return run(op, job)
        finally:
            inside[0] += time.thread_time() - start

    def close() -> None:
        parts = [downlink.Part(w, 1 / WORKERS, one) for w, one in enumerate(frames)]
        downlink.close(mode, ledger, parts, codec, fragment=0, run_id=1)

    def receive() -> None:
        for one in frames:
            header, payload = frame.unpack(one, codec=codec)
            assert abs(codec.norm(payload, n) - header.l2norm) <= 1e-3 * header.l2norm

    cpu.run = counted
    row: Row = {"params": n, "workers": WORKERS, "mode": mode, "codec": up, "stages": {}}
    try:
        close()  # the second round is like all others: buffers exist
        inside[0], start = 0.0, time.process_time()
        for name, stage in (
            ("receive: CRC, checks, norms", receive),
            ("close: sum, outer step, reply", close),
            ("SHA-256 for the journal", lambda: frame.digest(ledger.shard.params)),
        ):
            before, kernels = time.process_time(), inside[0]
            stage()
            row["stages"][name] = {
                "seconds": time.process_time() - before,
                "kernel_seconds": inside[0] - kernels,
            }
        total = time.process_time() - start
    finally:
        cpu.run = run
    row |= {"seconds": total, "kernel_seconds": inside[0], "share": inside[0] / total}
    arithmetic = total - row["stages"]["SHA-256 for the journal"]["seconds"]
    row["share_without_digest"] = inside[0] / arithmetic
    for name, stage_row in row["stages"].items():
        print(f"  {name:32} {stage_row['seconds']:7.3f} s, {stage_row['kernel_seconds']:7.3f} s in kernels")
    print(
        f"  {mode}, {up}: {total:.3f} s of CPU, {row['share']:.0%} in kernels, {row['share_without_digest']:.0%} less SHA-256"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 64], help="millions (2^20) of values")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--no-eager", action="store_true", help="leave the slow reference out")
    parser.add_argument("--round", action="store_true", help="a coordinator's round instead")
    parser.add_argument("--params", type=int, default=100_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    if native.library() is None:
        parser.error("no compiled kernels: install with a C++ compiler at hand (`pip install -e .`)")
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    known["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "level": native.level(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "clock": options.clock,
    }
    if options.round:
        modes = (("q4_ef", "e3m0"), ("mean_q", "e3m0"), ("g_fp32", "e3m0"))
        known["round"] = [a_round(options.params, mode, up) for mode, up in modes]
    else:
        clock = time.perf_counter if options.clock == "wall" else time.thread_time
        rows: list[Row] = []
        for millions in options.sizes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                bench = Bench(millions << 20, threads, options.runs, clock, not options.no_eager)
                bench.all()
                rows += bench.rows
        known["rows"] = rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
