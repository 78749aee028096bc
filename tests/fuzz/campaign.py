"""One target and a range of inputs: what is fed, counted and held against it. Where processes are made is `__main__`."""

from __future__ import annotations

import resource
import time
import traceback
from random import Random
from typing import Any

import torch

from diloco.errors import DilocoError
from tests.fuzz import machines, wire, words

TARGETS = {
    "frames": wire.frames,
    "payloads": wire.payloads,
    "chunks": wire.chunks,
    "messages": words.messages,
    "following": words.following,
    "configurations": words.configurations,
    "coordinators": machines.coordinators,
    "standbys": machines.standbys,
    "journals": machines.journals,
}
SHARES = {  # of a hundred inputs: so that those who cost much do not take all the time
    "frames": 25,
    "payloads": 8,
    "chunks": 18,
    "messages": 25,
    "following": 10,
    "configurations": 5,
    "coordinators": 6,
    "standbys": 2,
    "journals": 1,
}
WARM = 400
HEADROOM = 256 << 20
KEPT = 5  # tracebacks


def campaign(name: str, first: int, count: int) -> dict[str, Any]:
    """Inputs `first` to `first + count` of a target; how many were refused, and what came out that may not."""
    torch.set_num_threads(1)
    attempt = TARGETS[name]()
    refused, slowest, began = 0, (0.0, 0), time.perf_counter()
    errors: list[str] = []
    limits, warm_rss = resource.getrlimit(resource.RLIMIT_AS), 0
    try:
        for number in range(first, first + count):
            if number == first + min(WARM, count - 1):
                warm_rss = _rss()
                resource.setrlimit(resource.RLIMIT_AS, (_virtual() + HEADROOM, limits[1]))
            start = time.perf_counter()
            try:
                attempt(Random(f"{name}:{number}"))
            except DilocoError:
                refused += 1
            except Exception:  # noqa: BLE001 - what else comes out is what is looked for
                errors.append(f"input {number} of {name}:\n{traceback.format_exc()}")
            slowest = max(slowest, (time.perf_counter() - start, number))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return {
        "target": name,
        "count": count,
        "refused": refused,
        "failed": len(errors),
        "seconds": round(time.perf_counter() - began, 1),
        "slowest": [round(slowest[0], 3), slowest[1]],
        "grown_mb": round((_rss() - warm_rss) / 2**20, 1),
        "errors": errors[:KEPT],
    }


def _virtual() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
