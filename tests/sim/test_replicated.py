"""Replicated runs: every worker gets the payloads of a round and takes the outer step by itself, as everyone does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.comms import frame
from diloco.comms.machine import Action, Event, Received
from diloco.comms.messages import Commit, Fetch
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from diloco.errors import RefusedError
from tests.sim.faults import CALM, ROUGH, STORM, arm, bits, replace_worker, require_equal_ends, require_sound
from tests.toy import Cluster, ToyModel, ToyWorker, config

torch.set_num_threads(1)

OVERLAP: dict[str, dict[str, Any]] = {
    "none": {"overlap": "none"},
    "inner": {"overlap": "inner", "tau": 2},
    "delay_corrected": {"overlap": "delay_corrected", "tau": 3},
    "delayed": {"overlap": "delayed"},
    "eager": {"overlap": "eager"},
}
RULES: dict[str, dict[str, dict[str, Any]]] = {
    "clip_median": {"robust": {"kind": "clip_median"}},
    "norm_outlier": {"robust": {"kind": "norm_outlier"}},
    "trimmed": {"robust": {"kind": "trimmed"}},
    "coord_median": {"robust": {"kind": "coord_median"}},
    "centered_clip": {"robust": {"kind": "centered_clip"}},
    "cos_gate": {"robust": {"kind": "cos_gate"}},
    "rda": {"weights": {"merge": "rda"}},
    "tokens, by steps": {"weights": {"mode": "tokens", "normalize": "steps"}},
}


def replicated(kind: str = "replicated", /, **sections: Any) -> RunConfig:
    """Three workers, a lossy codec with error feedback; `kind` is the topology."""
    codec = {"up": "e3m0", "block": 16, "ef": "on", "down": "relay", **sections.pop("codec", {})}
    topology = {"kind": kind, "workers": 3, "checkpoint_every_commits": 3, **sections.pop("topology", {})}
    return config(codec=codec, topology=topology, **sections)


def three(c: RunConfig, seed: int = 0, weather: Weather | None = None) -> Cluster:
    return Cluster(c, seed=seed, weather=weather, flavours=(0, 1, 2))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two outer states are equal bit for bit."""
    return a.keys() == b.keys() and all(frame.digest(a[k]) == frame.digest(b[k]) for k in a)


def require_replicas(cluster: Cluster) -> None:
    """Whoever finished holds every fragment's value, version and outer state exactly as the coordinator does."""
    require_sound(cluster)
    require_equal_ends(cluster)
    for worker in cluster.workers:
        for slot in worker.replica.slots if worker.finished else ():
            shard = cluster.coordinator.ledgers[slot.index].shard
            assert slot.shard is not None and slot.version == shard.version
            assert same(slot.shard.state, shard.state), f"{worker.name}, fragment {slot.index}"


@pytest.mark.parametrize("mode", OVERLAP)
def test_a_replicated_run_is_the_central_one_bit_for_bit(mode: str) -> None:
    """Same payloads, same order of summation, same step: in every overlap mode nothing tells the two apart."""
    stream = OVERLAP[mode]
    central = three(replicated("central", stream=stream)).run()
    cluster = three(replicated(stream=stream)).run()
    assert bits(cluster) == bits(central)
    assert cluster.coordinator.rejections["digest_differs"] == 0
    require_replicas(cluster)
    assert cluster.coordinator.commits == central.coordinator.commits > 15


@pytest.mark.parametrize("mode", OVERLAP)
def test_timing_changes_no_bit(mode: str) -> None:
    """Promise 6: delays, duplicates, reordering, losses and slow workers give the same parameters."""
    c = replicated(stream=OVERLAP[mode])
    expected = bits(three(c).run())
    for seed in range(3):
        cluster = three(c, seed, ROUGH)
        cluster.workers[seed % 3].step_s = 2.0
        assert bits(cluster.run()) == expected, seed
        require_replicas(cluster)


@pytest.mark.parametrize("rule", RULES)
def test_every_worker_repeats_the_rule_of_the_run(rule: str) -> None:
    """Robust rules and weights are computed by each worker: no digest ever differs from the coordinator's."""
    cluster = three(replicated(**RULES[rule]), 1, ROUGH).run()
    require_replicas(cluster)
    assert cluster.coordinator.rejections["digest_differs"] == 0
    assert bits(cluster) == bits(three(replicated("central", **RULES[rule])).run())


@pytest.mark.parametrize("kind", ["sgdm", "nesterov", "adam", "gpa"])
def test_workers_hold_the_outer_state_of_every_optimizer(kind: str) -> None:
    """Momentum, moments and averages are on each worker, and equal the coordinator's."""
    cluster = three(replicated(outer={"kind": kind, "lr": 0.3})).run()
    require_replicas(cluster)
    states = [slot.shard.state for slot in cluster.workers[1].replica.slots if slot.shard is not None]
    assert states and all(any(bool(t.any()) for t in state.values()) for state in states)


@pytest.mark.parametrize("mode", OVERLAP)
def test_a_worker_whose_momentum_is_damaged_says_so_and_takes_the_runs(mode: str) -> None:
    """Its next digest differs; it reports that, gets value and outer state, and the run ends as if nothing had been."""
    c = replicated(stream=OVERLAP[mode], run={"inner_steps_total": 30})
    expected = bits(three(c).run())
    cluster = three(c)
    said: list[Fetch] = []
    inner = cluster.coordinator.handle

    def listen(event: Event, now: float) -> list[Action]:
        if isinstance(event, Received) and isinstance(event.message, Fetch) and event.message.differs:
            said.append(event.message)
        return inner(event, now)

    cluster.coordinator.handle = listen  # type: ignore[method-assign]

    def damage(step: int, model: ToyModel) -> None:
        if step == 12:
            shard = cluster.workers[1].replica.slots[0].shard
            assert shard is not None
            shard.state["momentum"][0] += 0.25

    cluster.workers[1].poison = damage
    cluster.run()
    assert {message.worker for message in said} == {"w1"} and {message.fragment for message in said} == {0}
    assert cluster.coordinator.rejections["digest_differs"] == 1
    assert cluster.coordinator.members["w1"].rejected["digest_differs"] == 1
    assert bits(cluster) == expected
    require_replicas(cluster)


def test_a_difference_that_is_reported_twice_counts_once() -> None:
    """Answers get lost and the report is repeated; it still is one difference."""
    for seed in range(3):
        cluster = three(replicated(run={"inner_steps_total": 30}), seed, Weather(drop=0.3, duplicate=0.3))

        def damage(step: int, model: ToyModel, cluster: Cluster = cluster) -> None:
            shard = cluster.workers[2].replica.slots[1].shard
            if step == 9 and shard is not None:
                shard.params[0] += 1.0

        cluster.workers[2].poison = damage
        cluster.run()
        assert cluster.coordinator.rejections["digest_differs"] == 1
        require_replicas(cluster)


@pytest.mark.parametrize("mode", OVERLAP)
def test_a_newcomer_gets_the_outer_state_with_the_value(mode: str) -> None:
    """Before its first step it holds value and momentum of one version, and it takes the later steps by itself."""
    c = replicated(stream=OVERLAP[mode], run={"inner_steps_total": 50})
    cluster = three(c)
    held: list[bool] = []
    moving: dict[tuple[int, int], Mapping[str, Tensor]] = {}
    inner = cluster.coordinator.handle

    def record(event: Event, now: float) -> list[Action]:
        actions = inner(event, now)
        for p, ledger in cluster.coordinator.ledgers.items():
            copy = {name: tensor.clone() for name, tensor in ledger.shard.state.items()}
            moving.setdefault((p, ledger.shard.version), copy)
        return actions

    cluster.coordinator.handle = record  # type: ignore[method-assign]

    def look(step: int, model: ToyModel) -> None:
        for slot in cluster.workers[3].replica.slots if not held else ():
            assert slot.shard is not None and slot.version > 0
            held.append(same(slot.shard.state, moving[slot.index, slot.version]))

    def join() -> None:
        cluster.workers.append(ToyWorker(cluster.sim, "w3", c, flavour=3, nonce=9))
        cluster.workers[3].poison = look

    cluster.sim.at(17.0, join)
    cluster.run(until_s=600.0)
    assert held and all(held)
    assert cluster.coordinator.rejections["digest_differs"] == 0
    assert any("w3" in r["contributors"] for r in cluster.disk.commits())
    require_replicas(cluster)


@pytest.mark.parametrize("mode", OVERLAP)
def test_a_killed_worker_leaves_the_others_bit_identical(mode: str) -> None:
    """Whenever one of three dies, the run goes on within a few silences and the survivors agree on all of it."""
    c = replicated(stream=OVERLAP[mode])
    normal = three(c).run().sim.now
    for seed in range(4):
        cluster = three(c, seed, ROUGH if seed % 2 else CALM)
        cluster.sim.at(0.5 + seed * 4.7, cluster.workers[seed % 3].kill)
        cluster.run(until_s=normal + 150.0)
        require_replicas(cluster)
        assert sum(w.finished for w in cluster.workers) == 2


@pytest.mark.parametrize("mode", OVERLAP)
def test_crashes_of_the_coordinator_and_restarts_of_a_worker_lose_nothing(mode: str) -> None:
    """The journal holds the payloads; a worker that starts from nothing gets the momentum again."""
    c = replicated(stream=OVERLAP[mode], run={"inner_steps_total": 30})
    for seed in range(3):
        cluster = three(c, seed, STORM if seed % 2 else CALM)
        cluster.sim.at(6.0 + seed, partial(arm, cluster, seed, 3.0))
        cluster.sim.at(11.0 + 2 * seed, partial(replace_worker, cluster, seed % 3, 700 + seed))
        cluster.run(until_s=2000.0)
        require_sound(cluster)
        assert cluster.coordinator.epoch > 1 and all(w.finished for w in cluster.workers)
        # Whoever was still at work when the others were gone made the last commits alone.
        assert cluster.coordinator.global_digest() in {w.replica.digest() for w in cluster.workers}


def test_workers_get_payloads_and_no_result() -> None:
    """A commit carries the others' contributions as they were sent, and never the value that comes of them."""
    cluster = three(replicated())
    sizes: set[int] = set()
    inner = cluster.workers[0].replica.handle

    def look(event: Event, now: float) -> list[Action]:
        if isinstance(event, Received) and isinstance(event.message, Commit):
            headers = [frame.unpack(blob)[0] for _, blob in event.message.frames]
            assert [h.worker for h in headers] == [i for i, _ in event.message.frames]
            assert 0 not in dict(event.message.frames), "its own it still holds"
            sizes.add(len(headers))
        return inner(event, now)

    cluster.workers[0].replica.handle = look  # type: ignore[method-assign]
    cluster.run()
    assert sizes == {2}


def test_a_central_worker_is_refused_by_a_replicated_run() -> None:
    """Whether workers step by themselves is the run's to say."""
    cluster = three(replicated())
    stranger = ToyWorker(cluster.sim, "stranger", replicated("central"), flavour=3)
    cluster.run()
    stop = stranger.replica.stopped
    assert stop is not None and isinstance(stop.error, RefusedError)
    assert "topology.kind = 'central' on the worker" in str(stop.error)
    assert "stranger" not in cluster.coordinator.members
