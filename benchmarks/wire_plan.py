"""What `wire.py` compares: the methods as configurations, how long a cell runs, and what the planner expects of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from diloco.comms.link import Link
from diloco.config import RunConfig
from diloco.fragments import FragmentPlan, build_plan
from diloco.linkmodel import CALIBRATION, utilization
from diloco.worker.model import Transformer, preset_config
from diloco.worker.prediction import predict

PRESET, LENGTH, BATCH = "nano", 64, 4
STEP_S = 0.08
H, TAU = 50, 12  # five fragments have their turns ten steps apart, so that mostly two are in flight
PACE = 0.42  # up takes not quite half of the time until the merge, so that the way back has as much
STEPS = 500
RTT = "50ms"
LINKS = ("0.25Mbit", "1Mbit", "4Mbit", "16Mbit", "64Mbit")
WORKERS = (2, 4)
PARALLEL, DILOCO, STREAMING, OVERLAP, OURS = (
    "data parallel",
    "diloco",
    "streaming",
    "+ overlap",
    "+ 4 bit both ways",
)
METHODS = (PARALLEL, DILOCO, STREAMING, OVERLAP, OURS)
LONGEST_S = 75.0  # a cell that would train for longer makes fewer rounds, but at least LEAST_ROUNDS
LEAST_ROUNDS = 2
PARALLEL_S = 25.0
GRADIENT_BITS = 16

FP32 = {"up": "fp32", "down": "g_fp32"}
WAITING = {"overlap": "none", "tau": 0, "alpha": 0.0}
OVERLAPPING = {"tau": TAU, "alpha": 0.5}
FRAGMENTS = {"layout": "balanced", "frag_layers": 1}


@dataclass(frozen=True, slots=True)
class Cell:
    method: str
    workers: int
    link: str  # the rate alone; the round trip is always RTT

    @property
    def text(self) -> str:
        return f"{self.link},{RTT}"

    @property
    def name(self) -> str:
        return f"{self.method}, {self.workers} workers, {self.link or 'no link'}"


def raw_config(method: str, workers: int, steps: int) -> dict[str, dict[str, Any]]:
    """The run's configuration. All methods share model, data, inner optimizer, outer optimizer and H.

    A run cut short has no use for its final parameters, so nothing is sent once more at its end.
    """
    four_bit = {"up": "e3m0", "down": "relay" if workers <= 2 else "q4_ef"}
    stream: dict[str, Any] = {"H": H, "final_flush": steps == STEPS}
    if method == DILOCO:
        stream |= {"layout": "single", **WAITING}
    elif method == STREAMING:
        stream |= FRAGMENTS | WAITING
    elif method == OVERLAP:
        stream |= FRAGMENTS | OVERLAPPING
    elif method == OURS:
        stream |= FRAGMENTS | OVERLAPPING | {"pace": PACE}
    return {
        "run": {"run_id": "wire", "inner_steps_total": steps},
        "model": {"factory": "wire_model:make", "sequence_length": LENGTH},
        "data": {"source": "stdlib"},
        "train": {"batch_size": BATCH, "threads": 1},
        "optim": {"lr": 0.003},
        "schedule": {"kind": "cosine", "warmup": STEPS // 20},
        "outer": {"kind": "nesterov", "lr": 0.8, "momentum": 0.4},
        "stream": stream,
        "codec": four_bit if method == OURS else FP32,
        "topology": {"workers": workers},
        # On the slowest links a round takes minutes, and nobody is to be given up for that.
        "fault": {"suspect_s": 120.0, "dead_s": 600.0, "fixed_grace_s": 3600.0, "round_timeout_s": 3600.0},
    }


def as_toml(raw: dict[str, dict[str, Any]]) -> str:
    lines: list[str] = []
    for section, values in raw.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


@cache
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Transformer(preset_config(PRESET, LENGTH))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def parameters() -> int:
    return sum(math.prod(shape) for shape in shapes().values())


def plan_of(c: RunConfig) -> FragmentPlan:
    s = c.stream
    return build_plan(shapes(), s.H, layout=s.layout, frag_layers=s.frag_layers, first_round=s.first_round)


def predicted(cell: Cell, steps: int, step_s: float) -> float:
    """Compute utilisation in the middle of a run: from the settings, the link, and a step's seconds without a network."""
    link = Link.parse(cell.text)
    if cell.method == PARALLEL:
        return utilization(
            link.up_bps / 1e9,
            preset_config(PRESET, LENGTH).n_layers,
            step_s / CALIBRATION,
            GRADIENT_BITS * parameters() / 1e9,
            "dp",
            H=1,
            steps=20,
            M=cell.workers,
            # 2 (M - 1) hops around the ring; at each, gloo's sender first hears that the receiver is ready. Measured
            # with small tensors on links without a rate and 50 ms: 105 ms for two ranks, 320 ms for four.
            latency=2 * (cell.workers - 1) * link.rtt_s,
        )
    raw = raw_config(cell.method, cell.workers, steps)
    raw["stream"]["final_flush"] = False
    c = RunConfig.from_dict(raw)
    facts = {
        "step": steps,
        "compute_s": steps * step_s,
        "exposed_s": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "link_up_bps": link.up_bps,
        "link_down_bps": link.down_bps,
        "rtt_s": link.rtt_s,
    }
    found = predict(c, plan_of(c), [facts] * cell.workers, workers=cell.workers)
    assert found is not None
    return float(found["compute_utilisation"])


def steps_for(cell: Cell) -> int:
    """How many inner steps the cell makes: all of the run's if its network lets it, fewer if that took too long."""
    if cell.method == PARALLEL and not cell.link:
        return STEPS
    if cell.method == PARALLEL:
        step = STEP_S / predicted(cell, 1, STEP_S)
        return max(3, min(100, math.ceil(PARALLEL_S / step)))
    round_s = H * STEP_S / predicted(cell, STEPS, STEP_S)
    return H * max(LEAST_ROUNDS, min(STEPS // H, math.floor(LONGEST_S / round_s)))


def seconds_for(cell: Cell) -> float:
    """About how long the cell takes, with its processes' start and the way of the starting values."""
    steps = steps_for(cell)
    if cell.method == PARALLEL:
        return 15 + (steps * STEP_S / predicted(cell, steps, STEP_S) if cell.link else 25)
    start = 15 + 3 * 32 * parameters() / Link.parse(cell.text).up_bps
    return start + steps * STEP_S / predicted(cell, steps, STEP_S)


def cells(workers: Sequence[int], links: Sequence[str], methods: Sequence[str]) -> list[Cell]:
    """All measurements, the quickest links first; data parallel's final loss is one more, without a link."""
    found: list[Cell] = []
    for M in workers:
        if PARALLEL in methods:
            found.append(Cell(PARALLEL, M, ""))
        found += [Cell(method, M, link) for link in reversed(links) for method in methods]
    return found


def key_of(cell: Cell, run: int) -> str:
    """Names a measurement and everything that was set for it."""
    steps = steps_for(cell)
    settings = [raw_config(cell.method, cell.workers, steps), steps, STEP_S, PRESET, RTT, GRADIENT_BITS]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return f"{cell.name}, run {run}, {digest}"
