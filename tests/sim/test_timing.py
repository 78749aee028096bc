"""Promise 6 in virtual time: the same seed on a network of any timing gives the same bits, over many settings.

A run's trajectory is the digest of every commit. Each setting has one reference run on a calm network; every other
run draws its own delays, reordering, duplicates, losses, step times and changes of weather.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms.machine import Action, Event, Received
from diloco.comms.messages import Contribution, Welcome
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from tests.sim.faults import require_equal_ends, require_sound
from tests.toy import Cluster, config

torch.set_num_threads(1)

TIMINGS = 20  # other timings per setting
UPS = ("fp32", "bf16", "int8", "e4m3", "e3m0", "nf4", "int4", "stat", "topk")
DOWNS = ("relay", "mean_q", "q4_ef", "g_fp32", "g_bf16")
OVERLAPS = (
    "inner",
    "inner",
    "none",
    "delayed",
    "eager",
    "delay_corrected",
)  # async depends on the order of arrival

Trajectory = dict[tuple[int, int], str]  # (fragment, version): digest


def setting(number: int) -> RunConfig:
    """The `number`-th draw of H, tau, alpha, overlap, codecs, optimizer and size of the run.

    Nobody is given up for being slow: who takes part in a round is what timing may decide, and the only thing.
    """
    source = random.Random(number)
    H, overlap = source.randrange(3, 9), source.choice(OVERLAPS)
    workers, up = source.choice([2, 3, 4]), source.choice(UPS)
    ef = up == "topk" or source.random() < 0.3
    sections: dict[str, dict[str, Any]] = {
        "run": {"inner_steps_total": source.randrange(2 * H, 4 * H)},
        "stream": {
            "H": H,
            "tau": source.randrange(0, min(4, H)),
            "alpha": source.choice([0.0, 0.25, 0.5, 0.9]),
            "overlap": overlap,
            "frag_layers": source.choice([1, 2]),
            "layout": source.choice(["strided", "sequential", "balanced", "single"]),
            "first_round": source.choice(["short", "full"]),
        },
        "codec": {
            "up": up,
            "down": source.choice(DOWNS[:2] if overlap == "eager" else DOWNS),
            "block": 16,
            "topk": 4,
            "chunk": 16,
            "ef": "on" if ef else "off",
        },
        "outer": {"kind": "sgd"} if ef else {"kind": source.choice(["nesterov", "sgdm", "sgd"])},
        "weights": {"mode": "uniform" if overlap == "eager" else source.choice(["uniform", "tokens"])},
        "topology": {"workers": workers, "checkpoint_every_commits": source.choice([2, 50])},
        "fault": {"suspect_s": 2e3, "dead_s": 4e3, "fixed_grace_s": 1e3, "round_timeout_s": 3e3},
    }
    return config(**sections)


def weather(source: random.Random) -> Weather:
    """From a calm network to one whose delays are longer than a round, so that messages overtake one another."""
    shortest = source.choice([0.0, 0.01, 0.5])
    jitter = source.choice([0.0, 0.05, 1.0, 6.0])
    return Weather(
        (shortest, shortest + jitter), source.choice([0.0, 0.1, 0.4]), source.choice([0.0, 0.0, 0.1])
    )


def trajectory(cluster: Cluster) -> Trajectory:
    return {(r["fragment"], r["version"]): r["digest"] for r in cluster.disk.commits()}


def calm(c: RunConfig) -> Trajectory:
    cluster = Cluster(c, flavours=range(c.topology.workers)).run()
    require_equal_ends(cluster)
    found = trajectory(cluster)
    assert len(found) == sum(cluster.coordinator.versions()) > 0
    return found


def other_timing(c: RunConfig, seed: int) -> tuple[Cluster, list[str]]:
    """The same run with every timing drawn from `seed`; also the senders of contributions as they first came in."""
    source = random.Random(seed)
    cluster = Cluster(c, seed=seed, weather=weather(source), flavours=range(c.topology.workers))
    arrivals: dict[tuple[int, int, str], None] = {}
    inner = cluster.coordinator.handle

    def listen(event: Event, now: float) -> list[Action]:
        if isinstance(event, Received) and isinstance(event.message, Contribution):
            arrivals[event.message.fragment, event.message.round, event.message.worker] = None
        return inner(event, now)

    cluster.coordinator.handle = listen  # type: ignore[method-assign]
    for worker in cluster.workers:
        worker.step_s = source.choice([0.05, 0.5, 1.0, 3.0])
    for _ in range(source.randrange(4)):
        change = partial(setattr, cluster.sim, "weather", weather(source))
        cluster.sim.at(source.uniform(0.0, 40.0), change)
        worker = source.choice(cluster.workers)
        cluster.sim.at(
            source.uniform(0.0, 40.0), partial(setattr, worker, "step_s", source.uniform(0.01, 5.0))
        )
    return cluster.run(until_s=20_000.0), [sender for _, _, sender in arrivals]


def compare(number: int, timings: int) -> None:
    c = setting(number)
    expected = calm(c)
    ends, orders = set(), set()
    for seed in range(number * timings, (number + 1) * timings):
        try:
            cluster, arrivals = other_timing(c, seed)
            assert trajectory(cluster) == expected, "another result"
            require_sound(cluster)
            require_equal_ends(cluster)
        except AssertionError as error:
            raise AssertionError(
                f"setting {number}, timing seed {seed}: {error}\n{c.stream} {c.codec}"
            ) from error
        ends.add(cluster.sim.now)
        orders.add(tuple(arrivals))
    assert len(ends) > timings // 2, "the timings do not differ"
    assert len(orders) > 2, "contributions always come in the same order"


def test_a_starter_whose_welcome_is_lost_still_begins_at_the_first_step() -> None:
    """The starting values reach it all the same, the other works on, and a later welcome must not send it ahead."""
    c = config(stream={"overlap": "none", "tau": 0, "alpha": 0.0}, fault={"fixed_grace_s": 1e3})
    expected = calm(c)
    cluster = Cluster(c)
    inner = cluster.workers[1].replica.receive
    lost: list[Welcome] = []

    def receive(message: Any, now: float) -> list[Action]:
        if isinstance(message, Welcome) and not lost:
            lost.append(message)
            return []
        return inner(message, now)

    cluster.workers[1].replica.receive = receive  # type: ignore[method-assign]
    assert trajectory(cluster.run()) == expected
    assert lost and cluster.workers[1].trained == c.run.inner_steps_total


@pytest.mark.parametrize("number", range(5))
def test_network_timing_does_not_change_a_bit(number: int) -> None:
    """Promise 6: delays, reordering, duplicates, losses and slow workers leave every commit's digest as it was."""
    compare(number, TIMINGS)


@pytest.mark.long
@pytest.mark.parametrize("number", range(5, 50))
def test_a_thousand_timings_do_not_change_a_bit(number: int) -> None:
    """The same for the rest of 50 settings with 20 timings each: 1,000 runs with those above."""
    compare(number, TIMINGS)
