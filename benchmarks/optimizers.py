"""How many steps does each inner x outer combination need to reach AdamW's loss? One command, one table.

Every method trains the same model on the same text with the same batches, precision (bfloat16 autocast) and clipping;
only the optimizer and its learning rate differ. The learning rate of each is searched on a grid of factors of two, which
grows until its best value lies inside, with seed 0; the best is then run with the other seeds. The target is the median
final held-out loss of AdamW alone at the same size. Every single run is kept in `optimizers_runs.jsonl` beside the
result, so that the command can be stopped and goes on where it was.

    python benchmarks/optimizers.py                  everything (hours on two cores)
    python benchmarks/optimizers.py --only main-tiny one experiment of: main-tiny, main-small, gpa, width, mars, moe
    python benchmarks/optimizers.py --report         only the table and the plot, from the runs there are
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from optimizers_report import write

from diloco.optim import GPA, SNOO, build_optimizer
from diloco.schedules import multiplier
from diloco.worker.data import load_corpus
from diloco.worker.evaluate import evaluate
from diloco.worker.model import Transformer, build_model, next_token_loss, preset_config
from diloco.worker.sampler import Sampler, take

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
SNOO_SETTINGS = {"k": 28, "lr": 0.68, "momentum": 0.37}  # arXiv 2510.15830, the setting published for Muon
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """One training run, everything that decides its result."""

    experiment: str
    method: str
    outer: str = "none"
    lr: float = 1e-3
    seed: int = 0
    preset: str = "tiny"
    width: int | None = None  # another d_model for the preset
    steps: int = 600
    batch: int = 4
    warmup: int = 30
    options: dict[str, Any] = field(default_factory=dict)  # further [optim] keys
    mu_x: float = 0.9967  # what the experiment "gpa" finds best

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


# method: the [optim] section it stands for, and the learning rates where its search begins.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "adamw": ({"kind": "adamw"}, (1e-3, 2e-3, 4e-3)),
    "muon": ({"kind": "muon"}, (2e-3, 4e-3, 8e-3)),
    "normuon": ({"kind": "normuon"}, (2e-3, 4e-3, 8e-3)),
    "md-muon": ({"kind": "md"}, (1e-3, 2e-3, 4e-3)),
    "md-adam": ({"kind": "md-adam"}, (1e-3, 2e-3, 4e-3)),
    "schedule-free": ({"kind": "schedule-free"}, (4e-3, 8e-3, 16e-3)),
    "schedule-free-plus": ({"kind": "schedule-free-plus"}, (0.5, 1.0, 2.0)),
    "mars": ({"kind": "mars"}, (1e-3, 2e-3, 4e-3)),
}
CONSTANT = ("schedule-free", "schedule-free-plus")  # warm-up, and no decay
NO_WARMUP = ("md-muon", "md-adam")
MAIN = [
    *((m, o) for m in ("adamw", "muon", "normuon") for o in ("none", "snoo", "gpa")),
    *((m, o) for m in ("md-muon", "md-adam") for o in ("none", "snoo")),
    *((m, "none") for m in CONSTANT),
]


def train(task: Task) -> dict[str, Any]:
    """Run `task` and return its held-out losses in nats/byte, at every 5 % of the steps and at the end."""
    torch.set_num_threads(1)
    corpus = load_corpus("stdlib", "auto", "bytes")
    length = 128
    if task.width is None:
        model = build_model(task.preset, length, task.seed)
    else:
        sizes = preset_config(task.preset, length)
        model = Transformer(
            replace(
                sizes,
                d_model=task.width,
                n_heads=task.width // sizes.head_dim,
                n_kv_heads=task.width // sizes.head_dim,
                d_ff=sizes.d_ff * task.width // sizes.d_model,
            )
        )
        model.reset_parameters(torch.Generator().manual_seed(task.seed))
    section, _ = METHODS[task.method]
    inner = build_optimizer(model, {**section, **task.options, "lr": task.lr})
    optimizer: torch.optim.Optimizer = inner
    if task.outer == "snoo":
        optimizer = SNOO(inner, **SNOO_SETTINGS)
    elif task.outer == "gpa":
        optimizer = GPA(inner, mu_x=task.mu_x)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    sampler = Sampler.for_worker(len(corpus.train), length, task.seed, 0, 1)
    warmup = 0 if task.method in NO_WARMUP else task.warmup
    curve: list[tuple[int, float]] = []
    started = time.process_time()

    def held_out(batches: int) -> float:
        getattr(optimizer, "eval", lambda: None)()
        with torch.autocast("cpu", torch.bfloat16):
            loss = evaluate(
                model, corpus, sequence_length=length, batch_size=8, max_batches=batches, device="cpu"
            )
        getattr(optimizer, "train", lambda: None)()
        return loss

    for step in range(task.steps):
        if step % max(1, task.steps // 20) == 0 and step:
            curve.append((step, held_out(8)))
        kind = "constant" if task.method in CONSTANT else "linear"
        factor = multiplier(kind, step, task.steps, warmup)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        tokens = torch.from_numpy(take(corpus.train, sampler.batch(step * task.batch, task.batch)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, tokens)
        value = loss.item()
        if not math.isfinite(value):
            return {**asdict(task), "key": task.key, "final": None, "curve": curve, "seconds": 0.0}
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if getattr(inner, "needs_loss", False):
            optimizer.step(loss=value)  # type: ignore[call-arg]
        else:
            optimizer.step()
        optimizer.zero_grad()
    if isinstance(optimizer, SNOO):
        optimizer.outer_step()  # the partial round at the end counts too
    final_short = held_out(8)
    curve.append((task.steps, final_short))
    return {
        **asdict(task),
        "key": task.key,
        "final": held_out(32),
        "curve": curve,
        "seconds": round(time.process_time() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


class Runs:
    """All runs so far, by key; appended to a file as they finish."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.done[row["key"]] = row

    def run(self, task: Task) -> dict[str, Any]:
        if task.key not in self.done:
            row = train(task)
            with self.path.open("a") as out:
                out.write(json.dumps(row) + "\n")
            self.done[task.key] = row
            print(
                f"{task.experiment:11s} {task.method:18s} {task.outer:5s} lr {task.lr:<9.4g} seed {task.seed} "
                f"{'diverged' if row['final'] is None else format(row['final'], '.4f')}  {row['seconds']} s",
                flush=True,
            )
        return self.done[task.key]


def loss_of(row: dict[str, Any]) -> float:
    return math.inf if row["final"] is None else float(row["final"])


def search(path: Path, task: Task, rates: tuple[float, ...], seeds: tuple[int, ...]) -> None:
    """Find the best learning rate with the first seed, growing the grid until it is inside, then run all seeds."""
    runs = Runs(path)
    tried = {rate: loss_of(runs.run(replace(task, lr=rate, seed=seeds[0]))) for rate in rates}
    for _ in range(6):
        best = min(tried, key=lambda r: tried[r])
        if best == min(tried):
            rate = best / 2
        elif best == max(tried):
            rate = best * 2
        else:
            break
        tried[rate] = loss_of(runs.run(replace(task, lr=rate, seed=seeds[0])))
    for seed in seeds[1:]:
        runs.run(replace(task, lr=min(tried, key=lambda r: tried[r]), seed=seed))


def best_rate(path: Path, experiment: str, method: str, outer: str) -> float | None:
    rows = [
        r
        for r in Runs(path).done.values()
        if (r["experiment"], r["method"], r["outer"], r["seed"]) == (experiment, method, outer, 0)
    ]
    return float(min(rows, key=loss_of)["lr"]) if rows else None


def plan(only: list[str], path: Path) -> Iterator[tuple[Task, tuple[float, ...], tuple[int, ...]]]:
    """Every search: its task, first learning rates and seeds. Later experiments start from what earlier ones found."""
    for experiment in only:
        if experiment == "gpa":  # how long an average suits so short a run; the others use the best
            for mu_x in (0.9, 0.974, 0.9869, 0.9934, 0.9967):
                yield Task("gpa", "adamw", "gpa", mu_x=mu_x), METHODS["adamw"][1], SEEDS[:1]
        elif experiment == "main-tiny":
            for method, outer in MAIN:
                yield Task(experiment, method, outer), METHODS[method][1], SEEDS
        elif experiment == "main-small":
            for method, outer in MAIN:
                found = best_rate(path, "main-tiny", method, outer)
                rates = METHODS[method][1] if found is None else (found / 2, found, found * 2)
                yield Task(experiment, method, outer, preset="small", steps=300, warmup=15), rates, SEEDS
        elif experiment == "width":
            for method in ("adamw", "md-muon", "md-adam"):
                for width in (64, 128, 256):
                    yield (
                        Task(experiment, method, width=width, steps=300, warmup=15),
                        METHODS[method][1],
                        SEEDS[:1],
                    )
        elif experiment == "mars":
            for method in ("adamw", "mars"):
                for batch, steps in ((2, 600), (32, 150)):
                    yield (
                        Task(experiment, method, batch=batch, steps=steps, warmup=steps // 20),
                        METHODS[method][1],
                        SEEDS,
                    )
        elif experiment == "moe":
            for method in ("adamw", "muon", "normuon", "md-muon"):
                yield (
                    Task(experiment, method, preset="moe-tiny", steps=400, warmup=20),
                    METHODS[method][1],
                    SEEDS[:1],
                )


EXPERIMENTS = ("gpa", "main-tiny", "main-small", "width", "mars", "moe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=list(EXPERIMENTS), choices=EXPERIMENTS)
    parser.add_argument("--methods", nargs="*", help="restrict to these inner optimizers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    parser.add_argument("--runs", type=Path, default=RESULTS / "optimizers_runs.jsonl")
    arguments = parser.parse_args()
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        for experiment in arguments.only:
            with ProcessPoolExecutor(arguments.jobs) as pool:
                chosen = [
                    t
                    for t in plan([experiment], arguments.runs)
                    if not arguments.methods or t[0].method in arguments.methods
                ]
                for future in [pool.submit(search, arguments.runs, *item) for item in chosen]:
                    future.result()

    write(list(Runs(arguments.runs).done.values()), RESULTS / "optimizers.json", DOCS)


if __name__ == "__main__":
    main()
