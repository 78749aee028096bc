"""Whole runs with `codec.bits`: two bits in both directions, refused when a worker has others, taken over by a successor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms.sim import Weather
from diloco.config import RunConfig
from diloco.errors import RefusedError
from tests.sim.faults import ROUGH, arm, require_equal_ends, require_sound
from tests.sim.peers import Swarm, require_promises
from tests.toy import Cluster, ToyWorker, config

torch.set_num_threads(1)


def settings(**codec: Any) -> RunConfig:
    given = {"up": "stat", "ef": "on", "down": "relay", "topk": 4, "chunk": 16, **codec}
    # Nobody is given up for being slow, so that timing does not decide who takes part in a round.
    patient = {"suspect_s": 2e3, "dead_s": 4e3, "fixed_grace_s": 1e3, "round_timeout_s": 3e3}
    return config(codec=given, outer={"kind": "sgd"}, topology={"workers": 3}, fault=patient)


def digests(c: RunConfig, weather: Weather | None = None) -> list[str]:
    cluster = Cluster(c, seed=3, weather=weather, flavours=(0, 1, 2))
    if weather is not None:
        cluster.sim.at(8.0, lambda: arm(cluster, 5))
    cluster.run(until_s=20_000.0)
    require_sound(cluster)
    require_equal_ends(cluster)
    assert all(worker.finished for worker in cluster.workers)
    return sorted(record["digest"] for record in cluster.disk.commits())


@pytest.mark.parametrize("down", ["relay", "mean_q", "q4_ef"])
@pytest.mark.parametrize("up", ["stat", "topk"])
def test_bits_decide_the_result_and_no_timing_does(up: str, down: str) -> None:
    """Delays, losses and a crash of the coordinator leave every commit as it is; other bits give other commits."""
    found = {bits: digests(settings(up=up, down=down, bits=bits)) for bits in (2, 4, 8)}
    assert found[2] != found[4] != found[8] != found[2]
    assert digests(settings(up=up, down=down)) == found[4 if up == "stat" else 2]
    assert digests(settings(up=up, down=down, bits=8), ROUGH) == found[8]


def test_a_worker_with_other_bits_is_refused_and_told() -> None:
    """At the join, before anything is sent."""
    cluster = Cluster(settings(bits=2), flavours=(0, 1, 2))
    stranger = ToyWorker(cluster.sim, "stranger", settings(bits=8), flavour=3)
    cluster.run()
    stop = stranger.replica.stopped
    assert stop is not None and isinstance(stop.error, RefusedError)
    assert "codec.bits = 8 on the worker and 2 in the run" in str(stop.error)


@pytest.mark.parametrize("codec", [{"up": "topk", "bits": 8}, {"up": "stat", "bits": 2, "groups": "tensor"}])
def test_a_successor_reads_what_only_the_plan_explains(codec: dict[str, Any]) -> None:
    """The leader dies; the next one goes on from frames whose sizes alone do not tell their codec."""
    given = {"ef": "on", "down": "relay", "topk": 4, "chunk": 16, **codec}
    c = config(codec=given, outer={"kind": "sgd"}, topology={"kind": "replicated", "workers": 3})
    swarm = Swarm(c, seed=1)
    swarm.once_started(6.0, partial(setattr, swarm.peers[0], "fuse", 3))
    swarm.run(until_s=600.0)
    require_promises(swarm)
    assert swarm.leaders[-1] == "w1" and len(swarm.live) == 2
