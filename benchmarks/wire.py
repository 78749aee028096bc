"""How slow may the link be? Compute utilisation and bytes of data parallel, DiLoCo, streaming, overlap and 4 bit.

One coordinator and 2 or 4 workers as real processes on this machine, each worker behind an emulated link of its own with
a round trip of 50 ms; data parallel is torch's DDP over gloo with the same link between every two ranks. The relays that
emulate the links stand in this process and count every byte that enters them, whatever it is for.

A worker's step is real but small, and lasts a set time: what is left of it is slept (`wire_model.py`). So four workers
on two cores do not slow one another down, and what is measured is the network, not this machine. `step ms` is what a
step without waiting took; where it is much longer than set, the machine was busy and the cell is worth nothing.

    utilisation   time of the steps without a network / time that they took, between the end of the first round and the
                  last step: without the start, in which the starting values travel, and without the final flush
    whole         the same with both, as the run's own report counts it
    predicted     by the planner's model of the link, from the settings, the link and the step time
    bytes         per worker and inner step, sent and received, in the same span
    fewer         data parallel's bytes over these; `whole`: of a whole run, starting values and final flush included
    peak/mean     highest rate over one second by the mean rate, towards the coordinator and back, worst of all workers

Cells are kept in `wire_runs.jsonl` beside the result, so that the command can be stopped and goes on where it was. On
slow links a cell makes fewer rounds (`steps`), and its final loss says nothing; bits do not depend on the link.

    python benchmarks/wire.py                                  everything that is missing
    python benchmarks/wire.py --runs 1 --workers 2 --links 4Mbit --methods "+ 4 bit both ways"
    python benchmarks/wire.py --list                           what would run, and about how long
    python benchmarks/wire.py --report                         only the tables, from the cells there are
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import RESULTS, machine, save
from wire_cells import CellError, run_diloco, run_parallel
from wire_plan import (
    DILOCO,
    LINKS,
    METHODS,
    OURS,
    PARALLEL,
    STEP_S,
    STEPS,
    WORKERS,
    Cell,
    H,
    cells,
    key_of,
    parameters,
    predicted,
    seconds_for,
    steps_for,
)

Row = dict[str, Any]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children are ended
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="the tables show medians")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--links", nargs="+", default=list(LINKS), help="rates, slowest first")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "wire.json")
    a = parser.parse_args()
    wanted = [(cell, run) for run in range(a.runs) for cell in cells(a.workers, a.links, a.methods)]
    kept = a.out.with_name(f"{a.out.stem}_runs.jsonl")
    done = read(kept)
    missing = [(cell, run) for cell, run in wanted if key_of(cell, run) not in done]
    left_s = sum(seconds_for(cell) for cell, _ in missing)
    if a.list:
        for cell, run in missing:
            print(f"{seconds_for(cell):5.0f} s  {cell.name}, run {run}, {steps_for(cell)} steps")
    print(f"{len(missing)} of {len(wanted)} cells missing, about {left_s / 60:.0f} minutes")
    if a.list:
        return
    failed: list[str] = []
    if not a.report:
        for cell, run in missing:
            begun = time.monotonic()
            try:
                row = measure(cell) | {"load": machine()["load_before"]}
            except CellError as error:
                failed.append(f"{cell.name}, run {run}")
                print(f"{cell.name} FAILED: {error}", flush=True)
                continue
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key_of(cell, run), **row}) + "\n")
            done = read(kept)
            print(
                f"{cell.name}: {row['utilisation']:.1%}, predicted {row['predicted']:.1%}, step "
                f"{1e3 * row['step_s']:.0f} ms ({time.monotonic() - begun:.0f} s)",
                flush=True,
            )
    rows = table([cell for cell, run in wanted if run == 0], done, a.runs)
    goals = {str(M): headline(M, rows) for M in a.workers}
    show(rows, goals)
    settings = {"step_s": STEP_S, "steps": STEPS, "H": H, "parameters": parameters(), "runs": a.runs}
    save(a.out, {"machine": machine(), "settings": settings, "headline": goals, "rows": rows})
    if failed:
        raise SystemExit(f"not measured: {'; '.join(failed)}")


def measure(cell: Cell) -> Row:
    steps, limit_s = steps_for(cell), 180.0 + 4 * seconds_for(cell)
    if cell.method == PARALLEL:
        row = run_parallel(cell.workers, cell.link, steps, limit_s)
    else:
        row = run_diloco(cell.method, cell.workers, cell.link, steps, limit_s)
    expected = predicted(cell, steps, row["step_s"]) if cell.link else 1.0
    return {"method": cell.method, "workers": cell.workers, "link": cell.link, "predicted": expected, **row}


def read(path: Path) -> dict[str, Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def table(wanted: Sequence[Cell], done: dict[str, Row], runs: int) -> list[Row]:
    """One row per cell that has been measured: the median of each number over its runs."""
    rows: list[Row] = []
    for cell in wanted:
        found = [done[key] for run in range(runs) if (key := key_of(cell, run)) in done]
        if found:
            row = {name: _median([one[name] for one in found]) for name in found[0] if name != "key"}
            rows.append({**row, "runs": len(found), "spread": _spread([one["utilisation"] for one in found])})
    for row in rows:
        base = cell_of(rows, PARALLEL, row["workers"], row["link"]) or next(
            (r for r in rows if r["method"] == PARALLEL and r["workers"] == row["workers"] and r["link"]),
            None,
        )
        if base is not None and row["link"]:
            row["fewer"] = base["bytes_per_worker_step"] / row["bytes_per_worker_step"]
            if row["steps"] == STEPS and "bytes_per_worker_step_whole" in row:
                row["fewer_whole"] = base["bytes_per_worker_step"] / row["bytes_per_worker_step_whole"]
    return rows


def _median(values: Sequence[Any]) -> Any:
    if any(value is None for value in values):
        return None
    if isinstance(values[0], list):
        return [statistics.median(column) for column in zip(*values, strict=True)]
    if isinstance(values[0], str):
        return values[0] if len(set(values)) == 1 else sorted(set(values))
    return statistics.median(values)


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def cell_of(rows: Sequence[Row], method: str, workers: int, link: str) -> Row | None:
    same = (r for r in rows if (r["method"], r["workers"], r["link"]) == (method, workers, link))
    return next(same, None)


def losses(rows: Sequence[Row], method: str, workers: int) -> set[float]:
    """Final losses of the whole runs of a method: one value, for bits do not depend on the link."""
    of = [r for r in rows if r["method"] == method and r["workers"] == workers and r["steps"] == STEPS]
    return {r["loss"] for r in of if r["loss"] is not None}


def headline(workers: int, rows: Sequence[Row]) -> Row | None:
    """The fastest link on which data parallel computes for 10 % of the time or less, and what ours does there."""
    for link in reversed(LINKS):
        base, ours = cell_of(rows, PARALLEL, workers, link), cell_of(rows, OURS, workers, link)
        if base is None or ours is None or base["utilisation"] > 0.10:
            continue
        found: Row = {
            "link": link,
            "data_parallel": base["utilisation"],
            "ours": ours["utilisation"],
            "ours_whole": ours["utilisation_whole"],
            "fewer_bytes": ours.get("fewer_whole"),
            "peak_over_mean": ours["peak_over_mean"],
        }
        ends = {m: losses(rows, m, workers) for m in (PARALLEL, DILOCO, OURS)}
        if all(len(values) == 1 for values in ends.values()):
            loss = {m: next(iter(values)) for m, values in ends.items()}
            found |= {
                "loss": loss[OURS],
                "loss_over_diloco": loss[OURS] / loss[DILOCO] - 1,
                "loss_over_data_parallel": loss[OURS] / loss[PARALLEL] - 1,
            }
        met = {
            "utilisation of 95 % or more": found["ours"] >= 0.95,
            "100 times fewer bytes": (found["fewer_bytes"] or 0.0) >= 100,
            "loss within 0.5 % of DiLoCo in fp32": found.get("loss_over_diloco", 1.0) <= 0.005,
            "peak at most 1.5 times the mean": max(found["peak_over_mean"]) <= 1.5,
        }
        return found | {"met": met}
    return None


def show(rows: Sequence[Row], goals: dict[str, Row | None]) -> None:
    for workers in sorted({r["workers"] for r in rows}):
        print(f"\n{workers} workers, step {1e3 * STEP_S:.0f} ms, H = {H}, {parameters():,} parameters")
        print(
            f"{'link':>9s} {'method':18s} {'utilisation':>11s} {'predicted':>9s} {'whole':>6s} {'bytes':>9s} {'fewer':>6s} "
            f"{'whole':>6s} {'peak/mean':>9s} {'step ms':>7s} {'steps':>5s} {'loss':>6s} {'runs':>4s}"
        )
        for r in (r for r in rows if r["workers"] == workers):
            peaks = "/".join(f"{p:.1f}" for p in r.get("peak_over_mean", ()))
            whole = f"{r['utilisation_whole']:.1%}" if "utilisation_whole" in r else ""
            fewer, fewer_whole = (f"{r[k]:.0f}x" if k in r else "" for k in ("fewer", "fewer_whole"))
            loss = f"{r['loss']:.4f}" if r["loss"] is not None and r["steps"] == STEPS else ""
            print(
                f"{r['link'] or 'none':>9s} {r['method']:18s} {r['utilisation']:11.1%} {r['predicted']:9.1%} {whole:>6s} "
                f"{r['bytes_per_worker_step']:9,.0f} {fewer:>6s} {fewer_whole:>6s} {peaks:>9s} {1e3 * r['step_s']:7.1f} "
                f"{r['steps']:5.0f} {loss:>6s} {r['runs']:4d}"
            )
        off = [abs(r["utilisation"] - r["predicted"]) for r in rows if r["workers"] == workers and r["link"]]
        print(
            f"predicted within {max(off, default=0.0):.1%} everywhere, {statistics.median(off or [0.0]):.1%} typically"
        )
    for workers_text, goal in goals.items():
        if goal is not None:
            met = ", ".join(f"{name}: {'yes' if yes else 'NO'}" for name, yes in goal["met"].items())
            print(
                f"\n{workers_text} workers at {goal['link']}: {json.dumps({k: v for k, v in goal.items() if k != 'met'})}"
            )
            print(met)


if __name__ == "__main__":
    main()
