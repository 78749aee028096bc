"""How much of the time a run computes on a given link: the simulator and the closed forms.

Arithmetic only: nothing here measures, reads a clock or touches a network. What to choose is `diloco.planner`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from diloco.errors import ConfigError, nearest

METHODS = ("dp", "diloco", "streaming")

# The published step times assume 60 % MFU; the tables are matched with steps a third longer (45 %).
CALIBRATION = 4 / 3

# Round trips of one exchange with the coordinator, as this project's transport makes it.
TRIPS_UP = 1.0  # before the first byte of a contribution may leave: the upload is announced
TRIPS_BACK = 3.0  # between its last byte and the last of the answer: acknowledged, committed, told, fetched
_FORWARD, _BACK_ACTIVATION, _BACK_WEIGHT = 0.4, 0.3, 0.3  # shares of a step, fitted to the tables


def utilization(
    bw: float,
    L: int,
    T: float,
    gbits: float,
    method: str,
    H: int,
    tau: int = 0,
    frag: int = 3,
    steps: int = 600,
    M: int = 2,
    *,
    traffic: float | None = None,
    latency: float = 0.0,
) -> float:
    """Share of the time spent computing, in (0, 1], while `steps` inner steps run over one serial link.

    A step computes ``F_1..F_L`` forward, then for l = L..1 the backward pass of activations (not for l = 1) and of
    weights. A layer that synchronises releases its reduction after its weight gradient; reductions take turns on
    the link, ``gbits/L * traffic / bw`` seconds each, and the forward pass of that layer ``1 + tau`` steps later
    waits for it. Model of arXiv 2501.18512 (table 4), reconstructed.

    Args:
        bw: link, Gbit/s.
        L: transformer layers; all weigh the same.
        T: published seconds per inner step. The simulated step lasts 4/3 of it, which is what matches the tables;
            pass 3/4 of a step time that was measured.
        gbits: one payload of the whole model, Gbit.
        method: ``dp`` (every layer, every step), ``diloco`` (every layer, each H steps) or ``streaming``
            (fragments of `frag` layers, strided, one every ``H // (P + 1)`` steps).
        M: sites. `traffic` defaults to a ring's ``2 (1 - 1/M)``; for a star give payloads through its busiest link.
        latency: seconds after its last byte has left that a reduction arrives; others use the link meanwhile.

    Raises:
        ConfigError: a value out of range.
    """
    _check(bw, L, T, gbits, method, H, tau, frag, steps, M)
    if not 0 <= latency < math.inf:
        raise ConfigError(f"latency = {latency} must be a number of seconds")
    if traffic is None:
        traffic = 2 * (1 - 1 / M)
    T *= CALIBRATION
    f, a, w = _FORWARD * T / L, _BACK_ACTIVATION * T / L, _BACK_WEIGHT * T / L
    back = L * w + (L - 1) * a
    reduction = gbits * traffic / L / bw
    sends = _schedule(method, L, H, frag)
    waiting: dict[
        int, list[tuple[int, float]]
    ] = {}  # by the step that waits: (layer, when its reduction ends)
    clock = work = net = 0.0
    for step in range(steps):
        done = 0
        # A run of layers that wait for nothing is one addition; `work` adds alike, so a run without waits is 1.
        for layer, end in reversed(waiting.pop(step, ())):
            clock += (layer - done) * f
            work += (layer - done) * f
            clock = max(clock, end)
            done = layer
        clock += (L - done) * f
        work += (L - done) * f
        layers = sends(step)
        if layers:
            queued = waiting.setdefault(step + 1 + tau, [])
            for layer in layers:  # descending, as the backward pass goes
                released = clock + (L - layer) * w + (L - max(layer, 1)) * a
                net = max(net, released) + reduction
                queued.append((layer, net + latency))
        clock += back
        work += back
    return work / clock


def _schedule(method: str, L: int, H: int, frag: int) -> Callable[[int], range]:
    """The layers, last first, that synchronise at a step counted from 0."""
    everything, nothing = range(L - 1, -1, -1), range(0)
    if method == "dp":
        return lambda step: everything
    if method == "diloco":
        return lambda step: nothing if step % H else everything
    P = math.ceil(L / frag)
    gap = max(1, H // (P + 1))
    strided = [range(slot + (L - 1 - slot) // P * P, -1, -P) for slot in range(P)]
    turns = [*strided, nothing]  # the last turn is the embedding's, whose weight the model leaves out
    return lambda step: nothing if step % gap else turns[step // gap % (P + 1)]


def _check(
    bw: float, L: int, T: float, gbits: float, method: str, H: int, tau: int, frag: int, steps: int, M: int
) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"method = {method!r} is unknown: use {', '.join(METHODS)}{nearest(method, METHODS)}"
        )
    for name, value in (("bw", bw), ("T", T), ("gbits", gbits)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value} must be a positive number")
    for name, count in (("L", L), ("H", H), ("frag", frag), ("steps", steps), ("M", M)):
        if count < 1:
            raise ConfigError(f"{name} = {count} must be at least 1")
    if tau < 0:
        raise ConfigError(f"tau = {tau} must be 0 or more inner steps")


# Closed forms, arXiv 2503.09799. Bits are per parameter, bandwidths bit/s, times seconds.


def allreduce_seconds(
    params: float, bits: float, bits_per_s: float, workers: int, latency_s: float = 0.0
) -> float:
    """Least time of one all-reduce: ``2 (1 - 1/M) bits N / bw + latency``."""
    return 2 * (1 - 1 / workers) * bits * params / bits_per_s + latency_s


def data_parallel_seconds(steps: int, step_time_s: float, reduce_s: float) -> float:
    """Run time when every step ends with an exposed reduction: ``T (t_step + t_reduce)``."""
    return steps * (step_time_s + reduce_s)


def diloco_seconds(steps: int, step_time_s: float, reduce_s: float, H: int) -> float:
    """Run time when every H-th step does: ``T t_step + (T / H) t_reduce``."""
    return steps * step_time_s + steps / H * reduce_s


def zero_stall_bits_per_s(
    params: float,
    bits: float,
    step_time_s: float,
    H: int,
    tau: int,
    fragment_share: float,
    traffic: float,
    latency_s: float = 0.0,
) -> float:
    """Link that streaming needs to hide all traffic: the largest fragment within tau steps, the model within H.

    ``bits N traffic max(fragment_share / (tau t_step - latency), 1 / (H t_step))``; infinite where nothing is left of
    tau steps.
    """
    window = tau * step_time_s - latency_s
    if window <= 0:
        return math.inf
    return bits * params * traffic * max(fragment_share / window, 1 / (H * step_time_s))
