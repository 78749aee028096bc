"""The plot of `scale.py`: how CPU, memory and the time of a round grow with the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

PANELS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("coordinator's CPU per round, ms", lambda r: r["ms_per_contribution"] * r["workers"]),
    ("coordinator's CPU per contribution, ms", lambda r: r["ms_per_contribution"]),
    ("coordinator's peak memory, MB", lambda r: r["mb_peak"]),
    ("wall time of a round, ms", lambda r: r["round_ms"]),
)


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "scale"  # the same numbers give the same file
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6))
    ways = list(dict.fromkeys(r["way"] for r in rows))
    for panel, (title, value) in zip(axes.flat, PANELS, strict=True):
        for way in ways:
            found = [r for r in rows if r["way"] == way]
            panel.plot(
                [r["workers"] for r in found], [value(r) for r in found], "o-", markersize=4, label=way
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("workers")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
