"""The table and the plot of `optimizers.py`, from the runs there are. Nothing is trained here."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
STYLES = {"none": "-", "snoo": "--", "gpa": ":"}
ORDER = ["adamw", "muon", "normuon", "md-muon", "md-adam", "schedule-free", "schedule-free-plus"]


def final(row: Row) -> float:
    return math.inf if row["final"] is None else float(row["final"])


def steps_to(curve: list[tuple[int, float]], target: float) -> float | None:
    """The step at which the held-out loss first is at `target`, between two evaluations by interpolation."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] <= target:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def best(rows: list[Row]) -> tuple[float, list[Row], dict[float, float]]:
    """The best learning rate with the first seed, all its seeds, and the whole grid."""
    grid = {row["lr"]: final(row) for row in rows if row["seed"] == 0}
    rate = min(grid, key=lambda r: grid[r])
    return rate, [row for row in rows if row["lr"] == rate], dict(sorted(grid.items()))


def interior(rate: float, grid: dict[float, float]) -> bool:
    return min(grid) < rate < max(grid)


def grid_text(rate: float, grid: dict[float, float]) -> str:
    cells = []
    for r, loss in grid.items():
        text = "diverged" if math.isinf(loss) else f"{loss:.3f}"
        cells.append(f"**{r:g}: {text}**" if r == rate else f"{r:g}: {text}")
    return ", ".join(cells)


def main_table(rows: list[Row], name: str) -> tuple[list[str], list[Row]]:
    chosen = [r for r in rows if r["experiment"] == name]
    if not chosen:
        return [], []
    chosen.sort(key=lambda r: (ORDER.index(r["method"]), list(STYLES).index(r["outer"])))
    methods = grouped(chosen, lambda r: (r["method"], r["outer"]))
    _, reference, _ = best(methods["adamw", "none"])
    # The same short evaluation as along the curves, so that AdamW itself needs exactly all its steps.
    target = statistics.median(r["curve"][-1][1] for r in reference)
    base = statistics.median(map(final, reference))
    steps, batch, parameters = chosen[0]["steps"], chosen[0]["batch"], reference[0]["parameters"]
    lines = [
        f"### {parameters / 1e6:.2f}M parameters, {steps} steps of {batch * 128} tokens",
        "",
        f"Target: the median final loss of AdamW alone, {base:.4f} nats/byte.",
        "",
        "| inner | outer | held-out nats/byte, median (min to max of 3 seeds) | against AdamW | steps to target | of AdamW's | lr grid, seed 0: loss |",
        "|---|---|---|---|---|---|---|",
    ]
    facts = []
    for (method, outer), runs in methods.items():
        rate, seeds, grid = best(runs)
        losses = [final(r) for r in seeds]
        median = statistics.median(losses)
        reached = [steps_to(r["curve"], target) for r in seeds]
        known = [s for s in reached if s is not None]
        needed = statistics.median(known) if len(known) * 2 > len(reached) else None
        share = f"{needed / steps:.0%}" if needed else "-"
        mark = "" if interior(rate, grid) else " (edge)"
        lines.append(
            f"| {method} | {outer} | {median:.4f} ({min(losses):.4f} to {max(losses):.4f}) | {median / base - 1:+.1%} "
            f"| {f'{needed:.0f}' if needed else 'not reached'} | {share} | {grid_text(rate, grid)}{mark} |"
        )
        facts.append(
            {
                "experiment": name,
                "method": method,
                "outer": outer,
                "lr": rate,
                "losses": losses,
                "median": median,
                "steps_to_target": needed,
                "grid": grid,
                "interior": interior(rate, grid),
            }
        )
    return [*lines, ""], facts


def simple_table(rows: list[Row], name: str, title: str, columns: tuple[str, ...]) -> list[str]:
    chosen = [r for r in rows if r["experiment"] == name]
    if not chosen:
        return []
    lines = [
        f"### {title}",
        "",
        "| " + " | ".join(columns) + " | best lr | held-out nats/byte | lr grid, seed 0: loss |",
        "|" + "---|" * (len(columns) + 3),
    ]
    for key, runs in grouped(chosen, lambda r: tuple(r[c] for c in columns)).items():
        rate, seeds, grid = best(runs)
        losses = [final(r) for r in seeds]
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
        lines.append(
            "| " + " | ".join(str(k) for k in key) + f" | {rate:g} | {statistics.median(losses):.4f}{spread} "
            f"| {grid_text(rate, grid)}{'' if interior(rate, grid) else ' (edge)'} |"
        )
    return [*lines, ""]


def plot(rows: list[Row], path: Path) -> None:
    """Final loss against learning rate, a panel for each size; the searches' own runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in ("main-tiny", "main-small") if any(r["experiment"] == n for r in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 4.6), squeeze=False)
    for panel, name in zip(axes[0], names, strict=True):
        shown = [final(r) for r in rows if r["experiment"] == name and math.isfinite(final(r))]
        top = min(shown) + 0.6
        methods = grouped((r for r in rows if r["experiment"] == name), lambda r: (r["method"], r["outer"]))
        for method, outer in sorted(methods, key=lambda k: (ORDER.index(k[0]), list(STYLES).index(k[1]))):
            _, _, grid = best(methods[method, outer])
            points = [(r, loss) for r, loss in grid.items() if math.isfinite(loss)]
            if min(loss for _, loss in points) > top:
                continue  # the table has it
            panel.plot(
                *zip(*points, strict=True),
                STYLES[outer],
                marker="o",
                markersize=3,
                linewidth=1.3,
                color=f"C{ORDER.index(method)}",
                label=method if outer == "none" else f"{method} + {outer}",
            )
        panel.set_xscale("log")
        panel.set_xlim(3e-4, 0.1)
        panel.set_xlabel("learning rate")
        panel.set_ylabel("final held-out loss, nats/byte")
        panel.set_ylim(min(shown) - 0.02, top)
        first = next(r for r in rows if r["experiment"] == name and r.get("parameters"))
        panel.set_title(f"{first['parameters'] / 1e6:.2f}M parameters, {first['steps']} steps", fontsize=10)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write(rows: list[Row], out: Path, folder: Path) -> None:
    """`out`: the JSON. `folder`: optimizers.md's tables go between its two marks, and the plot beside it."""
    tables: list[str] = []
    facts: list[Row] = []
    for name in ("main-tiny", "main-small"):
        lines, found = main_table(rows, name)
        tables += lines
        facts += found
    tables += simple_table(
        rows, "gpa", "How long GPA averages in so short a run", ("method", "outer", "mu_x")
    )
    tables += simple_table(
        rows, "width", "Does the best learning rate move with the width?", ("method", "width")
    )
    tables += simple_table(rows, "mars", "MARS at a small and a larger batch", ("method", "batch", "steps"))
    tables += simple_table(rows, "moe", "A mixture of experts (moe-tiny)", ("method", "outer"))
    print("\n".join(tables))
    seconds = sum(r["seconds"] for r in rows)
    machine = f"{platform.machine()}, torch {torch.__version__}, one thread per run"
    out.write_text(
        json.dumps({"machine": machine, "cpu_seconds": seconds, "methods": facts, "runs": rows}, indent=1)
    )
    folder.mkdir(exist_ok=True)
    page = folder / "optimizers.md"
    before, after = "<!-- tables -->", "<!-- /tables -->"
    text = page.read_text() if page.exists() else f"# Optimizers, measured\n\n{before}\n{after}\n"
    head, _, rest = text.partition(before)
    page.write_text(head + before + "\n" + "\n".join(tables) + after + rest.partition(after)[2])
    plot(rows, folder / "optimizers.svg")
