"""Published link requirements: the 150 cells that the planner's simulator must reproduce. Data only.

Each cell is the bandwidth between two sites, in Gbit/s, at which training reaches a compute utilisation. The papers
print points of a fixed grid; `math.inf` stands for "more than 1000".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TARGETS = (50, 80, 90, 95, 99)  # compute utilisation, percent


@dataclass(frozen=True, slots=True)
class Site:
    """A model as the tables train it: parameters, transformer layers, seconds per inner step at 60 % MFU."""

    name: str
    params: float
    layers: int
    step_time_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: `gbit_per_s[i]` reaches `TARGETS[i]` percent with `schedule` every `H` steps."""

    site: Site
    method: str  # the row's name: dp, diloco, streaming, overlap, fp4, or h<H>
    schedule: str  # how the simulator sends: dp, diloco or streaming
    H: int
    tau: int
    bits: int  # per parameter on the wire
    gbit_per_s: tuple[float, float, float, float, float]


# Streaming DiLoCo, arXiv 2501.18512, table 4: M = 2, H = 100, fragments of 3 layers.
_STREAMING = {
    Site("1B", 1e9, 24, 0.1): (
        (86.8, 152.6, 184.2, 222.3, 569.0),
        (1.4, 6.2, 13.3, 23.3, 86.8),
        (1.4, 5.2, 9.1, 16.0, 28.1),
        (1.4, 4.3, 6.2, 9.1, 11.0),
        (0.4, 0.9, 1.7, 2.0, 3.0),
    ),
    Site("10B", 10e9, 48, 0.8): (
        (104.8, 222.3, 222.3, 268.3, 471.5),
        (1.7, 7.5, 16.0, 33.9, 104.8),
        (1.7, 5.2, 9.1, 13.3, 19.3),
        (1.7, 3.6, 5.2, 6.2, 7.5),
        (0.4, 0.9, 1.4, 1.4, 1.7),
    ),
    Site("100B", 100e9, 108, 4.9): (
        (184.2, 323.8, 390.7, 390.7, 471.5),
        (3.0, 11.0, 23.3, 49.4, 184.2),
        (2.4, 6.2, 9.1, 11.0, 19.3),
        (1.7, 3.6, 4.3, 5.2, 5.2),
        (0.5, 0.9, 1.1, 1.1, 1.4),
    ),
}
_METHODS = (  # method, schedule, H, tau, bits: the order of the rows above
    ("dp", "dp", 1, 0, 16),
    ("diloco", "diloco", 100, 0, 16),
    ("streaming", "streaming", 100, 0, 16),
    ("overlap", "streaming", 100, 1, 16),
    ("fp4", "streaming", 100, 1, 4),
)

# Scaling laws for DiLoCo, arXiv 2503.09799, table 6: M = 2, no streaming; H = 1 is data parallel.
_SCALING_H = (1, 10, 50, 100, 300)
_SCALING = {
    Site("10B", 10e9, 48, 0.8): (
        (104.8, 184.2, 222.3, 222.3, 390.7),
        (16.0, 49.4, 86.8, 152.6, 222.3),
        (3.0, 11.0, 23.3, 41.0, 126.5),
        (1.4, 6.2, 13.3, 23.3, 86.8),
        (0.5, 2.0, 4.3, 9.1, 41.0),
    ),
    Site("405B", 405e9, 126, 26.0): (
        (126.5, 222.3, 268.3, 323.8, 323.8),
        (19.3, 72.0, 126.5, 184.2, 268.3),
        (3.6, 13.3, 28.1, 59.6, 184.2),
        (2.0, 7.5, 16.0, 33.9, 126.5),
        (0.7, 3.0, 6.2, 13.3, 59.6),
    ),
    Site("671B", 671e9, 61, 20.0): (
        (323.8, 569.0, 686.6, 686.6, math.inf),
        (49.4, 152.6, 268.3, 390.7, 686.6),
        (7.5, 33.9, 72.0, 126.5, 390.7),
        (4.3, 16.0, 41.0, 72.0, 268.3),
        (1.7, 6.2, 13.3, 28.1, 126.5),
    ),
}

ROWS: tuple[Row, ...] = tuple(
    Row(site, method, schedule, H, tau, bits, cells)
    for site, table in _STREAMING.items()
    for (method, schedule, H, tau, bits), cells in zip(_METHODS, table, strict=True)
) + tuple(
    Row(site, f"h{H}", "dp" if H == 1 else "diloco", H, 0, 16, cells)
    for site, table in _SCALING.items()
    for H, cells in zip(_SCALING_H, table, strict=True)
)
