"""The plot of `quality.py`: what is measured, a panel for each question. Facts come from `quality_report`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_plan import OUTER_RULES, ROUNDS

Facts = Mapping[str, Mapping[str, Any]]  # rows by the entry's name


def plot(rows: Facts, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same numbers give the same file
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.4))
    _by_length(axes[0][0], rows)
    _by_rule(axes[1][0], rows)
    names = [n for n in rows if n.startswith("c-")]
    _differences(axes[0][1], rows, names, "codecs: against fp32, per cent")
    names = [n for n in rows if n.startswith(("d-", "b-"))]
    _differences(axes[1][1], rows, names, "overlap: against waiting for every round, per cent")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _points(
    panel: Any, x: Sequence[float], values: Sequence[Sequence[float]], label: str, color: str
) -> None:
    """Means, and a bar from the lowest to the highest seed."""
    means = [statistics.fmean(v) for v in values]
    low = [m - min(v) for m, v in zip(means, values, strict=True)]
    high = [max(v) - m for m, v in zip(means, values, strict=True)]
    panel.errorbar(x, means, [low, high], marker="o", markersize=4, capsize=3, label=label, color=color)


def _by_length(panel: Any, rows: Facts) -> None:
    lines = (
        ("a-short-h", "2 workers, 1000 steps", "C0"),
        ("a-h", "2 workers, 3000 steps", "C2"),
        ("a-four-h", "4 workers, 3000 steps", "C1"),
    )
    for start, label, color in lines:
        found = sorted((int(n.removeprefix(start)), n) for n in rows if n.startswith(start))
        if start == "a-short-h" and "h10" in rows:
            found = sorted([*found, (10, "h10")])
        found = [(h, n) for h, n in found if rows[n].get("gap_closed")]
        if found:
            closed = [[100 * g for g in rows[n]["gap_closed"]] for _, n in found]
            _points(panel, [h for h, _ in found], closed, label, color)
    panel.axhline(100, color="grey", linewidth=0.8)
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xlabel("inner steps per round, H")
    panel.set_title("gap between no communication (0) and data parallel (100) closed, per cent", fontsize=10)
    panel.grid(alpha=0.25)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)


def _differences(panel: Any, rows: Facts, names: list[str], title: str) -> None:
    names = [n for n in names if rows[n].get("against")]
    names.sort(key=lambda n: statistics.fmean(rows[n]["against"]), reverse=True)
    for y, name in enumerate(names):
        values = [100 * v for v in rows[name]["against"]]
        panel.plot(values, [y] * len(values), "o", markersize=4, color="C0", alpha=0.5)
        panel.plot([statistics.fmean(values)], [y], "|", markersize=14, color="C3")
    panel.axvline(0, color="grey", linewidth=0.8)
    panel.set_yticks(range(len(names)), [rows[n]["label"] for n in names], fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.25, axis="x")


def _by_rule(panel: Any, rows: Facts) -> None:
    """Each rule's loss over that of the demo's setting with as many rounds."""
    for i, (name, label, _) in enumerate(OUTER_RULES):
        found = [
            (rounds, rows[f"f-{name}-h{h}"])
            for h, rounds in sorted(ROUNDS.items(), key=lambda at: at[1])
            if f"f-{name}-h{h}" in rows
        ]
        found = [(rounds, row) for rounds, row in found if row.get("against")]
        if found:
            values = [[100 * v for v in row["against"]] for _, row in found]
            _points(panel, [rounds for rounds, _ in found], values, label, f"C{i}")
    panel.set_xscale("log")
    panel.set_xlabel("outer rounds (1000 inner steps in all)")
    panel.set_title("outer settings: loss against lr 0.8, momentum 0.4, per cent", fontsize=10)
    panel.grid(alpha=0.25)
    if panel.get_legend_handles_labels()[0]:
        panel.set_ylim(top=2.1 * panel.get_ylim()[1])  # room for the legend above the lines
        panel.legend(fontsize=8, loc="upper left")
