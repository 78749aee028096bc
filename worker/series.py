"""The heartbeats that a coordinator recorded, as one track per worker. No drawing, no writing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from diloco.readout import number
from diloco.worker.timeline import Timeline, Total, load

POINTS = 400  # per curve in a chart: more cannot be seen
SPAN = 16  # smoothing looks at most this many points, and this part of the curve, to either side

Point = tuple[float, float]


@dataclass(slots=True)
class Track:
    """One worker's heartbeats in order of time."""

    worker: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    raw: list[Point] = field(default_factory=list)  # (tokens, loss in nats per byte)
    smoothed: list[Point] = field(default_factory=list)

    def sum(self, key: str) -> float | None:
        """The counter `key` over all lives of the worker: it starts anew when the process does."""
        values = [v for row in self.rows if (v := number(row.get(key))) is not None]
        if not values:
            return None
        ended = [a for a, b in pairwise(values) if b < a]
        return sum(ended) + values[-1]


def tracks(series: Iterable[Mapping[str, Any]]) -> dict[str, Track]:
    """Heartbeats by worker, with curves of loss against tokens, thinned to at most `POINTS` points."""
    found: dict[str, Track] = {}
    for row in series:
        name = str(row.get("worker"))
        found.setdefault(name, Track(name)).rows.append(row)
    for track in found.values():
        points: list[Point] = []
        for row in track.rows:
            x, y = number(row.get("tokens")), number(row.get("loss"))
            if x is None or y is None:
                continue
            # A heartbeat between two steps repeats the step before; a new life repeats ground covered.
            if not points or x > points[-1][0]:
                points.append((x, y))
        track.raw = thin(points)
        track.smoothed = smooth(track.raw)
    return found


def timelines(series: Iterable[Mapping[str, Any]]) -> dict[str, Timeline]:
    """The record of rounds that each worker left with its goodbye: of its last life, with the totals of all."""
    found: dict[str, Timeline] = {}
    for row in series:
        text = row.get("timeline")
        later = load(text) if isinstance(text, str) else None
        if later is None:
            continue
        earlier = found.get(str(row.get("worker")))
        for fragment, total in earlier.totals.items() if earlier is not None else ():
            later.totals.setdefault(fragment, Total()).add(total)
        found[str(row.get("worker"))] = later
    return found


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """`points` as at most `most` means of equally many neighbours each."""
    count = min(most, len(points))
    bounds = [i * len(points) // count for i in range(count + 1)] if count else []
    groups = [points[a:b] for a, b in pairwise(bounds)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each point moved onto the straight line fitted to its neighbours.

    Unlike a running mean this neither lags behind a falling curve nor bends at its ends.
    """
    reach = min(len(points) // SPAN, SPAN)
    out = []
    for i, (x, y) in enumerate(points):
        near = points[max(0, i - reach) : i + reach + 1]
        middle_x, middle_y = (sum(p[axis] for p in near) / len(near) for axis in (0, 1))
        spread = sum((px - middle_x) ** 2 for px, _ in near)
        slope = sum((px - middle_x) * py for px, py in near) / spread if spread else 0.0
        out.append((x, middle_y + slope * (x - middle_x) if reach else y))
    return out


def read_series(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a progress.jsonl; a line cut short by a crash is left out. No file: no heartbeats."""
    file = Path(path)
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
