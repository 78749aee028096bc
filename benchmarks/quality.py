"""How much of data parallel's quality does each way of talking less keep? One command: tables, a plot, a document.

Every method trains the same model on the same text with equal tokens and the same inner schedule; the free settings of
each are searched on a small grid with the first seed (`quality_plan.py`), and the best is run with three seeds.

    gap closed = (no communication - x) / (no communication - data parallel), on held-out nats/byte

Every finished run is kept in `quality_runs.jsonl` beside the result, under its full settings, so that the command can be
stopped and goes on where it was.

    python benchmarks/quality.py               everything that is missing (hours on two cores)
    python benchmarks/quality.py --only c- d-  entries whose names begin so, and what they need must be there
    python benchmarks/quality.py --report      only the tables and the plot, from the runs there are
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from quality_plan import Plan, Settings, full, key_of, smallest
from quality_report import write
from quality_train import train

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"


class Runs:
    """All runs so far, by key; appended to a file as they finish."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.done[row["key"]] = row

    def add(self, settings: Settings, result: dict[str, Any]) -> None:
        row = {"key": key_of(settings), **result, "settings": settings}
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        self.done[row["key"]] = row


def run_all(plan: Plan, runs: Runs, jobs: int, minutes: float, only: list[str] | None) -> None:
    """Whatever is missing, the most important first; after `minutes` nothing new is begun."""
    limit = time.monotonic() + 60 * minutes
    flying: dict[Future[dict[str, Any]], tuple[str, Settings]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        while True:
            if time.monotonic() < limit:
                begun = {key_of(settings) for _, settings in flying.values()}
                for name, settings in plan.wanted(runs.done, only):
                    if len(flying) >= jobs:
                        break
                    if key_of(settings) not in begun:
                        begun.add(key_of(settings))
                        flying[pool.submit(train, settings)] = (name, settings)
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                name, settings = flying.pop(future)
                result = future.result()
                runs.add(settings, result)
                loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
                free = {k: settings[k] for k in ("optim.lr", "outer.lr", "outer.momentum") if k in settings}
                print(
                    f"{name:18s} seed {settings['run.seed']} {loss} {result['seconds']:6.1f} s  {free}",
                    flush=True,
                )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", help="beginnings of entries' names, see quality_plan.py")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with a thread per worker")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this")
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    parser.add_argument(
        "--smallest", action="store_true", help="a few steps of a tiny plan: does it still work?"
    )
    parser.add_argument("--runs", type=Path, default=RESULTS / "quality_runs.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where quality.md and quality.svg are")
    arguments = parser.parse_args(argv)
    for folder in (arguments.runs.parent, arguments.out.parent, arguments.docs):
        folder.mkdir(parents=True, exist_ok=True)
    plan, runs = smallest() if arguments.smallest else full(), Runs(arguments.runs)
    if not arguments.report:
        run_all(plan, runs, arguments.jobs, arguments.minutes, arguments.only)
    write(plan, runs.done, arguments.out, arguments.docs)


if __name__ == "__main__":
    main()
