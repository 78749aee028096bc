"""Feeds damaged inputs to one target after the other: `python -m tests.fuzz --count 100000 --jobs 2`.

Each input follows from its target's name and its number, so `--targets NAME --first N --count 1` repeats one (a machine's:
its whole block). Only the project's own errors may come out, and a process may not take more than `HEADROOM` bytes above
what it had when the first inputs were through, so that a length that is believed ends in a MemoryError and not in a slow
machine. Prints one JSON line per target; ends with 1 and the first tracebacks if anything else came out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from tests.fuzz.campaign import KEPT, SHARES, TARGETS, campaign
from tests.fuzz.machines import BLOCK


def shares(names: list[str], count: int) -> dict[str, int]:
    """`count` inputs among targets, at least one block each."""
    total = sum(SHARES[name] for name in names)
    return {name: max(BLOCK, count * SHARES[name] // total) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--count", type=int, default=20_000, help="inputs, all targets together")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    pieces: list[tuple[str, int, int]] = []
    size = 20 * BLOCK
    for name, count in shares(options.targets, options.count).items():
        if options.count == 1:
            count = 1
        ends = range(options.first, options.first + count, max(size, count // 20 // size * size))
        pieces += [(name, at, min(ends.step, options.first + count - at)) for at in ends]
    began = time.perf_counter()
    if options.jobs == 1:
        results = [campaign(*piece) for piece in pieces]
    else:
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            results = list(pool.map(campaign, *zip(*pieces, strict=True)))
    totals: dict[str, dict[str, Any]] = {}
    for result in results:
        so_far = totals.setdefault(
            result["target"], {**result, "count": 0, "refused": 0, "failed": 0, "seconds": 0.0}
        )
        for key in ("count", "refused", "failed", "seconds"):
            so_far[key] = round(so_far[key] + result[key], 1)
        so_far["slowest"] = max(so_far["slowest"], result["slowest"])
        so_far["grown_mb"] = max(so_far["grown_mb"], result["grown_mb"])
    for total in totals.values():
        print(json.dumps({key: value for key, value in total.items() if key != "errors"}))
    count, failed = sum(t["count"] for t in totals.values()), sum(t["failed"] for t in totals.values())
    seconds = time.perf_counter() - began
    print(
        json.dumps({"target": "all", "count": count, "failed": failed, "per_second": round(count / seconds)})
    )
    for error in [error for result in results for error in result["errors"]][: 3 * KEPT]:
        print(error, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
