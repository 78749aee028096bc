"""Which settings keep a run computing on a given link, and the published tables that the link model must reproduce.

Arithmetic only; the model itself is `diloco.linkmodel`, the published numbers are data in `diloco.published`, and
printing a plan belongs to the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diloco.errors import ConfigError
from diloco.linkmodel import CALIBRATION, TRIPS_BACK, TRIPS_UP, utilization, zero_stall_bits_per_s
from diloco.loss_costs import Cost, loss_costs
from diloco.published import ROWS, TARGETS, Row

__all__ = [
    "GRID",
    "Plan",
    "payload_bytes",
    "printed",
    "published_table",
    "recommend",
    "table_cells",
    "utilization",
]

GRID = tuple(10 ** (-1 + 4 * i / 49) for i in range(50))  # Gbit/s: the points that the papers search


def published_table() -> list[dict[str, Any]]:
    """All 150 published cells beside ours: ``model, method, target, published, ours, grid_steps``.

    `target` is percent, `published` and `ours` Gbit/s as the papers print them, None above the grid's 1000;
    `grid_steps` is ours minus theirs in points of the 50-point grid.
    """
    return [cell for row in ROWS for cell in table_cells(row)]


def table_cells(row: Row) -> list[dict[str, Any]]:
    """The five cells of one row, each by bisection over the grid: utilisation never falls with bandwidth."""
    known: dict[int, float] = {}

    def reached(index: int) -> float:
        if index not in known:
            gbits = row.bits * row.site.params / 1e9
            site = row.site
            known[index] = utilization(
                GRID[index], site.layers, site.step_time_s, gbits, row.schedule, row.H, row.tau
            )
        return known[index]

    cells = []
    for target, published in zip(TARGETS, row.gbit_per_s, strict=True):
        low, high = 0, len(GRID)
        while low < high:
            middle = (low + high) // 2
            if reached(middle) >= target / 100:
                high = middle
            else:
                low = middle + 1
        cells.append(
            {
                "model": row.site.name,
                "method": row.method,
                "target": target,
                "published": published if published < math.inf else None,
                "ours": printed(GRID[low]) if low < len(GRID) else None,
                "grid_steps": min((low - i for i in _grid_indices(published)), key=abs),
            }
        )
    return cells


def printed(gbit_per_s: float) -> float:
    """A bandwidth as the papers print it: rounded to two decimals, then to one."""
    return round(round(gbit_per_s, 2), 1)


def _grid_indices(published: float) -> list[int]:
    """The grid points that print as `published`; at the low end two may."""
    if published == math.inf:
        return [len(GRID)]
    return [i for i, value in enumerate(GRID) if printed(value) == published]


# What to choose for a given link.

# Cheapest in learning first: 4 bits cost nothing measurable and neither do smaller fragments, a few steps of overlap
# next to nothing, sparse payloads need error feedback and another outer optimizer, a long H costs loss.
_DENSE, _SPARSE = ("bf16", "int8", "e3m0"), ("topk",)
_ORDER = (
    (_DENSE, (30, 50, 100)),
    (_SPARSE, (30, 50, 100)),
    (_DENSE, (200, 300, 500)),
    (_SPARSE, (200, 300, 500)),
)
_TAU = (1, 2, 5, 10)
_FRAG_LAYERS = (3, 1)
_BLOCK = 256
_CHUNK, _KEPT = 4096, 64
_HEADER_BYTES = 80  # of every frame
_TRIPS = TRIPS_UP + TRIPS_BACK  # round trips of one exchange
_DATA_PARALLEL_BYTES = 2  # per parameter: gradients in bf16


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: a model, a step time, and a star of `workers` on links of their own to one coordinator.

    `coordinator_bits_per_s` is the coordinator's own link, which carries all of them: None means one like the
    workers', infinity one that is no limit. `rtt_s` is there and back. See `recommend`.
    """

    params: float
    step_time_s: float
    link_bits_per_s: float
    workers: int
    rtt_s: float = 0.0
    coordinator_bits_per_s: float | None = None
    layers: int | None = None
    target: float = 0.95

    @property
    def cut(self) -> int:
        """Layers of the model, given or estimated."""
        return self.layers if self.layers is not None else max(1, round(24 * (self.params / 1e9) ** (1 / 3)))


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings for one run and what they should cost. Bytes are whole-model and per round of H inner steps.

    `utilisation` assumes the star. The slower of two ways decides: a worker's own link with that worker's traffic, or
    the coordinator's with everybody's; either carries one direction after the other. `ring_utilisation` is what the
    same settings would reach if the workers reduced among themselves. Peaks are means over one second, of both
    directions together and without pacing.
    """

    H: int
    tau: int
    frag_layers: int
    codec: str
    down: str
    layers: int
    fragments: int
    utilisation: float
    ring_utilisation: float
    reaches_target: bool
    needed_bits_per_s: float  # link on which these settings hide all traffic in the star
    worker_bytes_up: int
    worker_bytes_down: int
    coordinator_bytes: int  # in and out together
    coordinator_bits_per_s: float  # the same, averaged over the time a round takes
    coordinator_peak_bits_per_s: float
    worker_bits_per_s: float  # both ways, averaged over the time a round takes
    worker_peak_bits_per_s: float
    data_parallel_bytes: int  # one worker, both ways: a bf16 ring all-reduce at each of the H steps
    times_less: float  # data_parallel_bytes over one worker's bytes both ways
    loss: tuple[Cost, ...]  # what is known of the loss that these settings cost

    def settings(self) -> dict[str, Any]:
        """The choice as configuration keys, ``{"stream.H": 30, ...}``."""
        chosen: dict[str, Any] = {
            "stream.H": self.H,
            "stream.tau": self.tau,
            "stream.frag_layers": self.frag_layers,
            "codec.up": self.codec,
            "codec.down": self.down,
        }
        if self.codec in _SPARSE:  # error feedback takes the place of outer momentum, arXiv 2508.15706
            chosen |= {"codec.ef": "on", "outer.kind": "sgd", "outer.lr": 1.0}
        return chosen


def recommend(
    params: float,
    step_time_s: float,
    link_bits_per_s: float,
    workers: int,
    *,
    layers: int | None = None,
    target: float = 0.95,
    rtt_s: float = 0.0,
    coordinator_bits_per_s: float | None = None,
) -> Plan:
    """The mildest settings that keep utilisation at `target` on a star: workers on links of `link_bits_per_s` each.

    The coordinator's own link, `coordinator_bits_per_s`, is shared by all and by default like one worker's.

    Tries, innermost first: codec (bf16, int8, e3m0), fragments of 3 layers or 1, overlap tau (1 to 10), H (30 to
    100); then the same with top-k payloads; then H up to 500. If nothing reaches the target, the best of all is
    returned with `reaches_target` False. `layers` defaults to the cube-root rule of the published models (24 at 1e9
    parameters); it only decides how finely the model is cut. Embeddings count as part of the layers.

    Raises:
        ConfigError: a value out of range.
    """
    request = Request(
        params, step_time_s, link_bits_per_s, workers, rtt_s, coordinator_bits_per_s, layers, target
    )
    _check_request(request)
    best: Plan | None = None
    for H, tau, frag_layers, codec in _candidates(request.cut):
        plan = _price(request, H, tau, frag_layers, codec)
        if plan.reaches_target:
            return plan
        if best is None or plan.utilisation > best.utilisation:
            best = plan
    assert best is not None
    return best


def payload_bytes(codec: str, n: int) -> int:
    """Bytes of `n` values as one payload, without its frame: the codecs' formulas with their default options."""
    scales = 4 * math.ceil(n / _BLOCK)
    match codec:
        case "bf16":
            return 2 * n
        case "int8":
            return scales + n
        case "e3m0":
            return scales + math.ceil(n / 2)
        case "topk":
            kept = _KEPT * math.ceil(n / _CHUNK)
            return kept * 3 // 2 + 20 + math.ceil(kept / 4)  # 12-bit indices, one table, 2-bit values
    raise ConfigError(f"codec = {codec!r} is not one the planner prices: use {', '.join(_DENSE + _SPARSE)}")


def _candidates(L: int) -> list[tuple[int, int, int, str]]:
    found = []
    for codecs, lengths in _ORDER:
        for H in lengths:
            # No more fragments than steps to send them in, one turn being the embedding's.
            cuts = dict.fromkeys(max(layers, math.ceil(L / (H - 1))) for layers in _FRAG_LAYERS)
            found += [(H, tau, cut, codec) for tau in _TAU for cut in cuts for codec in codecs]
    return found


def _price(r: Request, H: int, tau: int, frag_layers: int, codec: str) -> Plan:
    L, params, T = r.cut, round(r.params), r.step_time_s
    fragments = math.ceil(L / frag_layers) + 1
    up = payload_bytes(codec, params) + fragments * _HEADER_BYTES
    # Two workers swap payloads. More would each receive all the others', which only sparse ones are small enough
    # for; the mean of dense ones is requantised once instead.
    relay = r.workers <= 2 or codec in _SPARSE
    down = (r.workers - 1) * up if relay else up
    # Payloads through each way, the coordinator's counted as if its link were a worker's.
    hub = r.link_bits_per_s if r.coordinator_bits_per_s is None else r.coordinator_bits_per_s
    star = (up + down) / up * max(1.0, r.workers * r.link_bits_per_s / hub)
    latency = _TRIPS * r.rtt_s

    def simulate(traffic: float) -> float:
        return utilization(
            r.link_bits_per_s / 1e9,
            L,
            T / CALIBRATION,  # a measured step takes as long as it takes
            8 * up / 1e9,
            "streaming",
            H,
            tau,
            frag_layers,
            steps=max(600, 6 * H),  # long enough for a backlog to show
            traffic=traffic,
            latency=latency,
        )

    ring = 2 * (1 - 1 / r.workers)
    reached = simulate(star)
    coordinator = r.workers * (up + down)
    data_parallel = round(2 * ring * _DATA_PARALLEL_BYTES * params * H)
    share = min(frag_layers, L) / L
    seconds = H * T / reached
    # Fragments that fall into one second, each as fast as the link lets it.
    together = min(fragments, math.floor(fragments / (H * T)) + 1)
    busiest = 8 * (up + down) * min(1.0, share * together)
    return Plan(
        H=H,
        tau=tau,
        frag_layers=frag_layers,
        codec=codec,
        down="relay" if relay else "mean_q",
        layers=L,
        fragments=fragments,
        utilisation=reached,
        ring_utilisation=simulate(ring),
        reaches_target=reached >= r.target,
        needed_bits_per_s=zero_stall_bits_per_s(params, 8 * up / params, T, H, tau, share, star, latency),
        worker_bytes_up=up,
        worker_bytes_down=down,
        coordinator_bytes=coordinator,
        coordinator_bits_per_s=8 * coordinator / seconds,
        coordinator_peak_bits_per_s=max(8 * coordinator / seconds, min(hub, r.workers * busiest)),
        worker_bits_per_s=8 * (up + down) / seconds,
        worker_peak_bits_per_s=max(8 * (up + down) / seconds, min(r.link_bits_per_s, busiest)),
        data_parallel_bytes=data_parallel,
        times_less=data_parallel / (up + down),
        loss=loss_costs(H, tau, codec),
    )


def _check_request(r: Request) -> None:
    for name, value, unit in (
        ("params", r.params, "parameters"),
        ("step_time_s", r.step_time_s, "seconds"),
        ("link_bits_per_s", r.link_bits_per_s, "bits per second"),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value} must be a positive number of {unit}")
    if r.params < 1:
        raise ConfigError(f"params = {r.params} must be at least 1")
    if r.workers < 1:
        raise ConfigError(f"workers = {r.workers} must be at least 1")
    if not 0 <= r.rtt_s < math.inf:
        raise ConfigError(f"rtt_s = {r.rtt_s} must be a number of seconds, 0 or more")
    if r.coordinator_bits_per_s is not None and not r.coordinator_bits_per_s > 0:
        raise ConfigError(f"coordinator_bits_per_s = {r.coordinator_bits_per_s} must be positive")
    if r.layers is not None and r.layers < 1:
        raise ConfigError(f"layers = {r.layers} must be at least 1; leave it out to have it estimated")
    if not 0 < r.target <= 1:
        raise ConfigError(f"target = {r.target} must be a share of the time in (0, 1]")
