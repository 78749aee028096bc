"""Overlap modes under crashes, deaths, losses and lies: the same promises as the blocking run, mode by mode."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms import frame
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from tests.sim.faults import CALM, ROUGH, STORM, arm, replace_worker, require_equal_ends, require_sound
from tests.sim.test_mixed_faults import fault
from tests.toy import Cluster, ToyModel, ToyWorker, config

torch.set_num_threads(1)

LOSSY = {"up": "e3m0", "block": 16, "ef": "on"}
ROUNDS: dict[str, dict[str, Any]] = {
    "delay_corrected": {
        "stream": {"overlap": "delay_corrected", "tau": 3},
        "codec": {"down": "q4_ef", **LOSSY},
    },
    "delayed": {"stream": {"overlap": "delayed"}, "codec": {"down": "relay", **LOSSY}},
    "eager": {"stream": {"overlap": "eager"}, "codec": {"down": "relay", **LOSSY}},
    "eager, mean requantised": {"stream": {"overlap": "eager"}, "codec": {"down": "mean_q", **LOSSY}},
}
ASYNC: dict[str, Any] = {
    "stream": {"overlap": "async", "compensate": 0.3},
    "codec": {"down": "g_fp32", **LOSSY},
    "fault": {"s_max": 8},
    "outer": {"lr": 0.2},
    "weights": {"dn_N": 2},
}
MODES = {**ROUNDS, "async": ASYNC}


def of(mode: str, **sections: dict[str, Any]) -> RunConfig:
    base = MODES[mode]
    names = {*base, *sections}
    return config(**{name: {**base.get(name, {}), **sections.get(name, {})} for name in names})


def require_counted_once(cluster: Cluster) -> None:
    """No round of a worker's life is in two commits."""
    seen: set[tuple[int, int, int, int]] = set()
    for record, blobs in cluster.disk.records:
        if record["type"] == "commit":
            for blob in blobs:
                h = frame.unpack(blob)[0]
                key = (record["fragment"], h.worker, h.incarnation, h.round)
                assert key not in seen, f"counted twice: {key}"
                seen.add(key)


def require_promises(cluster: Cluster) -> None:
    require_sound(cluster)
    require_counted_once(cluster)
    if not cluster.coordinator.asynchronous:
        require_equal_ends(cluster)


@pytest.mark.parametrize("mode", ROUNDS)
def test_a_coordinator_that_crashes_changes_no_bit(mode: str) -> None:
    """Killed between any two of its actions and restarted from the journal: every commit is as without the crash."""
    c = of(mode, topology={"workers": 2, "checkpoint_every_commits": 3})
    quiet = Cluster(c).run().coordinator.global_digest()
    for seed in range(5):
        cluster = Cluster(c, seed=seed, weather=ROUGH if seed % 2 else CALM)
        for at in (2.0 + seed, 13.0 + seed):
            cluster.sim.at(at, partial(arm, cluster, seed % 7, 4.0))
        cluster.run()
        require_promises(cluster)
        assert cluster.coordinator.epoch > 1
        assert cluster.coordinator.global_digest() == quiet, seed


def test_an_asynchronous_coordinator_that_crashes_loses_and_doubles_nothing() -> None:
    """What was committed stays, what was not is sent again; each contribution counts once."""
    c = of("async", topology={"workers": 3, "checkpoint_every_commits": 3})
    for seed in range(8):
        cluster = Cluster(c, seed=seed, weather=ROUGH if seed % 2 else CALM, flavours=(0, 1, 2))
        for at in (2.0 + seed, 13.0 + seed):
            cluster.sim.at(at, partial(arm, cluster, seed % 7, 4.0))
        cluster.run()
        require_promises(cluster)
        assert cluster.coordinator.epoch > 1 and all(w.finished for w in cluster.workers)
        rounds = {(r["fragment"], r["indices"][0], r["rounds"][0]) for r in cluster.disk.commits()}
        assert cluster.coordinator.rejections["late"] or len(rounds) == 3 * (4 + 5 + 5 + 5)


@pytest.mark.parametrize("mode", MODES)
def test_a_crash_in_the_middle_of_a_restart_is_survived(mode: str) -> None:
    """The journal up to any commit gives the digest that the commit recorded."""
    from diloco.coordinator.state import Coordinator

    c = of(mode, topology={"workers": 2, "checkpoint_every_commits": 4})
    cluster = Cluster(c).run()
    records = cluster.disk.records
    for cut, (record, _) in enumerate(records):
        if record["type"] == "commit":
            restored = Coordinator(c)
            restored.restore(records[: cut + 1], 0.0)
            shard = restored.ledgers[record["fragment"]].shard
            assert frame.digest(shard.params) == record["digest"]
            assert shard.version == record["version"]


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_worker_costs_the_rest_a_bounded_time(mode: str) -> None:
    """Whenever one of three dies, the others finish and agree."""
    c = of(mode, topology={"workers": 3})
    normal = Cluster(c, flavours=(0, 1, 2)).run().sim.now
    for seed in range(4):
        cluster = Cluster(c, seed=seed, flavours=(0, 1, 2))
        cluster.sim.at(seed * 3.3, cluster.workers[seed % 3].kill)
        cluster.run(until_s=normal + 100.0)
        require_promises(cluster)
        assert sum(w.finished for w in cluster.workers) >= 2


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_restarted_from_nothing_finishes_with_the_others(mode: str) -> None:
    """A new life takes the run's value, with its momentum where workers step, and counts again."""
    c = of(mode, run={"inner_steps_total": 40})
    for seed in range(4):
        cluster = Cluster(c, seed=seed)
        cluster.sim.at(3.0 + seed * 2.7, partial(replace_worker, cluster, 1, 500 + seed))
        cluster.run(until_s=600.0)
        require_sound(cluster)
        require_counted_once(cluster)
        assert all(w.finished for w in cluster.workers)
        if mode != "async":  # it is the last to finish
            assert cluster.workers[1].replica.digest() == cluster.coordinator.global_digest()
        assert any(1 in r["indices"] for r in cluster.disk.commits()[-6:])
        assert max(float(v.abs().max()) for v in cluster.values().values()) < 20.0


@pytest.mark.parametrize("mode", MODES)
def test_a_joiner_starts_from_the_runs_value(mode: str) -> None:
    """A third worker in the middle trains on committed values from its first step and contributes."""
    c = of(mode, run={"inner_steps_total": 40})
    cluster = Cluster(c)
    digests: list[bool] = []

    def look(step: int, model: ToyModel) -> None:
        slots = cluster.workers[2].replica.slots
        digests.append(all(s.shard is not None and s.version > 0 for s in slots))

    def join() -> None:
        cluster.workers.append(ToyWorker(cluster.sim, "w2", c, flavour=2, nonce=9))
        cluster.workers[2].poison = look

    cluster.sim.at(15.0, join)
    cluster.run(until_s=600.0)
    require_promises(cluster)
    assert digests and all(digests)
    assert any("w2" in r["contributors"] for r in cluster.disk.commits())
    assert cluster.workers[2].finished


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_with_nan_sits_rounds_out_and_recovers(mode: str) -> None:
    """Nobody's value becomes NaN, the worker takes a sound one, and its later work counts."""
    c = of(mode, run={"inner_steps_total": 40})
    for seed in range(3):
        cluster = Cluster(c, seed=seed, weather=Weather(drop=0.05 * seed))

        def poison(step: int, model: ToyModel) -> None:
            if step == 13:
                for tensor in model.tensors.values():
                    tensor.fill_(float("nan"))

        cluster.workers[1].poison = poison
        cluster.run(until_s=2000.0)
        require_promises(cluster)
        assert cluster.coordinator.rejections["skipped_by_worker"] > 0
        assert all(bool(torch.isfinite(v).all()) for v in cluster.values().values())
        assert all(bool(torch.isfinite(t).all()) for w in cluster.workers for t in w.model.tensors.values())
        assert any("w1" in r["contributors"] for r in cluster.disk.commits()[-6:])


@pytest.mark.parametrize("mode", ["delayed", "eager"])
def test_the_work_of_an_aborted_round_goes_into_the_next(mode: str) -> None:
    """Its parameters have moved on without it, so the contribution itself is kept and sent again with the next."""
    c = of(
        mode,
        codec={"up": "fp32", "ef": "off", "down": "relay"},
        stream={"layout": "single"},
        outer={"kind": "sgd", "lr": 0.7},
        run={"inner_steps_total": 40},
        fault={"quorum": 2, "round_timeout_s": 6.0, "suspect_s": 3000.0, "dead_s": 4000.0},
    )
    cluster = Cluster(c)
    slow, other = cluster.workers[1], cluster.workers[0]
    kept: dict[int, tuple[Any, int]] = {}
    own: dict[int, Any] = {}
    fresh: list[Any] = []
    cluster.sim.at(6.5, lambda: setattr(slow, "step_s", 12.0))
    cluster.sim.at(12.0, lambda: setattr(slow, "step_s", 1.0))

    def look(step: int, model: ToyModel) -> None:
        slot = other.replica.slots[0]
        if step in (11, 15, 16):
            assert slot.flight is not None and slot.own is not None
            kept[step], own[step] = (slot.flight.own, slot.flight.steps), slot.own.params.clone()
        if step == 15:
            fresh.append(own[15] - model.read(0))

    other.poison = look
    cluster.run(until_s=3000.0)
    require_sound(cluster)
    require_counted_once(cluster)
    assert cluster.coordinator.aborts == 1
    (aborted, first), (sent, second) = kept[11], kept[16]
    assert (first, second) == (5, 10)
    torch.testing.assert_close(sent, aborted + fresh[0])
    if mode == "eager":  # no mean has come: only the fresh part is new
        torch.testing.assert_close(own[16], own[15] - 0.7 * fresh[0] / 2, rtol=1e-5, atol=1e-6)
    told = [frame.unpack(b)[0].steps for r, bs in cluster.disk.records if r["type"] == "commit" for b in bs]
    assert 10 in told
    assert all(w.finished for w in cluster.workers)


@pytest.mark.parametrize("mode", MODES)
def test_mixed_faults_leave_every_run_sound_and_finished(mode: str) -> None:
    """Crashes, deaths, restarts, slow workers, black-outs, losses and duplicates, mixed by seed."""
    for seed in range(14):
        source = random.Random(seed)
        workers = source.choice([1, 2, 3])
        c = of(
            mode,
            topology={"workers": workers, "checkpoint_every_commits": source.choice([1, 3, 50])},
            weights={**MODES[mode].get("weights", {}), "dylu": source.choice([True, False])},
        )
        weather = source.choice([CALM, ROUGH, STORM])
        cluster = Cluster(c, seed=seed, weather=weather, flavours=tuple(range(workers)))
        for worker in cluster.workers:
            worker.tell_speed = True
        used: dict[str, int] = {}
        for _ in range(source.randrange(1, 5)):
            at = source.uniform(0.0, 30.0)
            cluster.sim.at(at, partial(fault, cluster, source, weather, used))
        try:
            cluster.run(until_s=3000.0)
            require_sound(cluster)
            require_counted_once(cluster)
        except AssertionError as error:
            raise AssertionError(f"{mode}, seed {seed}: {error}; faults {used}") from error
        stops = [w.replica.stopped for w in cluster.workers if w.alive]
        assert all(stop is None or stop.error is None for stop in stops), f"seed {seed}: {stops}"
        assert any(w.finished for w in cluster.workers), f"seed {seed}"
