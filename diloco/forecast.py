"""What a configured run should cost on a given link: its rounds, one by one, on a worker's own way to the coordinator.

Arithmetic only: nothing here measures. Unlike `diloco.linkmodel`, which reproduces published tables, this follows the
run's real plan, its frames' sizes, both directions of the link and its round trip.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from diloco.errors import ConfigError
from diloco.fragments import FragmentPlan
from diloco.linkmodel import TRIPS_BACK, TRIPS_UP

STEPS = 20_000  # of a longer run the beginning stands for all of it
PEAK_S = 1.0  # a peak rate is a mean over so long
# With pacing an answer is spread over so much of the time that the way up has left it. Nothing but the merge follows.
BACK_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Site:
    """One worker: seconds per inner step, its link in bit/s each way, seconds there and back."""

    step_time_s: float
    up_bps: float = math.inf
    down_bps: float = math.inf
    rtt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one worker. Bytes are frames over the whole run; rates are bit/s, peaks over any `PEAK_S` seconds."""

    utilisation: float  # compute / (compute + waiting)
    seconds: float
    exposed_s: float
    hidden_s: float  # in flight while the worker computed, summed over rounds
    bytes_up: int
    bytes_down: int
    mean_up_bps: float
    mean_down_bps: float
    peak_up_bps: float
    peak_down_bps: float


def forecast(
    plan: FragmentPlan,
    steps: int,
    site: Site,
    up: Sequence[int],
    down: Sequence[int],
    *,
    tau: int,
    pace: float = 0.0,
    flush: Collection[int] = (),
) -> Forecast:
    """`steps` inner steps with the fragments of `plan`, `up[p]` and `down[p]` bytes a round, merged `tau` steps later.

    A contribution leaves after `TRIPS_UP` round trips, contributions in turn; its answer is here `TRIPS_BACK` round
    trips after its last byte plus the time of its own bytes, answers in turn. With `pace` a contribution takes
    at least that share of the time until the merge, and its answer `BACK_SHARE` of what is then left. Every worker is as fast as this one; coding, aggregation and
    the coordinator's disk take no time. The fragments `flush` are sent once more at the end.

    Raises:
        ConfigError: no steps, or a time or rate that is not positive.
    """
    _check(plan, steps, site, up, down)
    T, simulated = site.step_time_s, min(steps, STEPS)
    waiting: dict[int, list[float]] = {}
    uplink, downlink = _Way(site.up_bps), _Way(site.down_bps)
    clock = exposed = in_flight = 0.0

    def send(p: int, deadline: float) -> float:
        done = uplink.carry(up[p], clock + TRIPS_UP * site.rtt_s, deadline, pace)
        back = BACK_SHARE if pace else 0.0
        return downlink.carry(down[p], done + TRIPS_BACK * site.rtt_s, deadline, back)

    for step in range(1, simulated + 1):
        clock += T
        for p in plan.due(step):
            answered = send(p, clock + tau * T)
            in_flight += answered - clock
            waiting.setdefault(min(step + tau, simulated), []).append(answered)
        late = max(waiting.pop(step, ()), default=clock)
        exposed += max(0.0, late - clock)
        clock = max(clock, late)
    if flush and simulated == steps:
        ends = [send(p, clock) for p in flush]
        in_flight += sum(ends) - len(ends) * clock
        exposed += max(ends) - clock
        clock = max(ends)
    rounds = [_rounds(plan, f.index, steps) + (f.index in flush) for f in plan.fragments]
    seconds = clock * steps / simulated
    bytes_up = sum(n * size for n, size in zip(rounds, up, strict=True))
    bytes_down = sum(n * size for n, size in zip(rounds, down, strict=True))
    return Forecast(
        utilisation=min(1.0, simulated * T / clock),
        seconds=seconds,
        exposed_s=exposed * steps / simulated,
        hidden_s=max(0.0, in_flight - exposed) * steps / simulated,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        mean_up_bps=8 * bytes_up / seconds,
        mean_down_bps=8 * bytes_down / seconds,
        peak_up_bps=uplink.peak(),
        peak_down_bps=downlink.peak(),
    )


class _Way:
    """One direction of a link: transfers in turn, and when each byte of them passed."""

    def __init__(self, bps: float) -> None:
        self._bps = bps
        self._free = 0.0
        self._passed: list[tuple[float, float, int]] = []  # begin, end, bytes

    def carry(self, size: int, ready: float, deadline: float, pace: float) -> float:
        """When `size` bytes that may leave at `ready` are all through."""
        begin = max(ready, self._free)
        self._free = begin + 8 * size / self._bps
        end = max(self._free, ready + pace * (deadline - ready))
        if size:
            self._passed.append((begin, end, size))
        return end

    def peak(self) -> float:
        """The highest mean rate over `PEAK_S` seconds, bit/s; it begins or ends with a transfer."""
        passed = self._passed[-2000:]
        edges = {t for begin, end, _ in passed for t in (begin, end - PEAK_S)}
        return max((self._between(passed, t) for t in edges), default=0.0) * 8 / PEAK_S

    @staticmethod
    def _between(passed: Sequence[tuple[float, float, int]], start: float) -> float:
        stop, total = start + PEAK_S, 0.0
        for begin, end, size in passed:
            if end <= begin:
                total += size if start <= begin <= stop else 0
            elif begin < stop and end > start:
                total += size * (min(end, stop) - max(begin, start)) / (end - begin)
        return total


def _rounds(plan: FragmentPlan, fragment: int, steps: int) -> int:
    """How often the fragment has its turn within `steps` inner steps."""
    first = plan.fragments[fragment].first_step
    turns = (steps - first) // plan.H + 1 if steps >= first else 0
    skipped = first == 0 or plan.first_round == "full"  # step 0 is no turn
    return max(0, turns - skipped)


def _check(plan: FragmentPlan, steps: int, site: Site, up: Sequence[int], down: Sequence[int]) -> None:
    if steps < 1:
        raise ConfigError(f"steps = {steps} must be at least 1")
    for name, value in (
        ("step_time_s", site.step_time_s),
        ("up_bps", site.up_bps),
        ("down_bps", site.down_bps),
    ):
        if not value > 0:
            raise ConfigError(f"{name} = {value} must be positive")
    if not 0 < site.step_time_s < math.inf or not 0 <= site.rtt_s < math.inf:
        raise ConfigError(f"step_time_s = {site.step_time_s} and rtt_s = {site.rtt_s} must be finite")
    if len(up) != len(plan.fragments) or len(down) != len(plan.fragments):
        raise ConfigError(
            f"up and down name {len(up)} and {len(down)} fragments, the plan has {len(plan.fragments)}"
        )
