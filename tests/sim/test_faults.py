"""Whole runs of the real machines in virtual time, under seeded faults: what may differ, and what never."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms import frame
from diloco.comms.machine import COORDINATOR, Action, Connected, Event, Received
from diloco.comms.sim import Weather
from diloco.coordinator.membership import Status
from diloco.coordinator.state import Coordinator
from tests.sim.faults import ROUGH, arm, bits, replace_worker, require_equal_ends, require_sound
from tests.toy import Cluster, ToyModel, ToyWorker, config

torch.set_num_threads(1)

# ---- promise 6: timing does not change results ----


@pytest.mark.parametrize("down", ["g_fp32", "relay"])
def test_other_weather_gives_the_same_bits(down: str) -> None:
    """Delays, duplicates, reordering and losses change no bit of the result, over 30 seeds."""
    c = config(codec={"up": "e3m0", "down": down}, topology={"workers": 3})
    expected = bits(Cluster(c, flavours=(0, 1, 2)).run())
    for seed in range(30):
        cluster = Cluster(c, seed=seed, weather=ROUGH, flavours=(0, 1, 2)).run()
        assert bits(cluster) == expected, f"seed {seed}"
        require_sound(cluster)
        require_equal_ends(cluster)


def test_step_times_do_not_change_results() -> None:
    """A worker three times as slow as the other, within the grace period, changes no bit."""
    expected = bits(Cluster(config()).run())
    cluster = Cluster(config())
    cluster.workers[1].step_s = 3.0
    assert bits(cluster.run()) == expected


def test_replayed_and_reordered_messages_leave_the_result_unchanged() -> None:
    """Every message the coordinator ever got, sent to it again in the middle and in random order, changes nothing."""
    expected = bits(Cluster(config()).run())
    cluster = Cluster(config())
    seen: list[Event] = []
    inner = cluster.coordinator.handle

    def record(event: Event, now: float) -> list[Action]:
        if isinstance(event, Received) and len(seen) < 400:
            seen.append(event)
        return inner(event, now)

    cluster.coordinator.handle = record  # type: ignore[method-assign]
    shuffle = random.Random(3)

    def replay() -> None:
        for event in shuffle.sample(seen, len(seen)):
            cluster.sim.at(shuffle.uniform(0, 0.5), partial(cluster.sim.deliver, COORDINATOR, event))

    for at in (4.0, 9.0, 14.0):
        cluster.sim.at(at, replay)
    assert bits(cluster.run()) == expected
    require_sound(cluster)
    assert sum(sum(r["tokens"]) for r in cluster.disk.commits()) == 2 * 20 * 10 * len(
        cluster.coordinator.ledgers
    )


# ---- the coordinator dies ----


def test_a_coordinator_killed_between_any_two_actions_changes_no_result() -> None:
    """Wherever it dies, it restarts from the journal alone; no version is lost or doubled and the run ends alike."""
    expected = bits(Cluster(config()).run())
    for fuse in range(0, 150, 3):
        cluster = Cluster(config(), seed=fuse)
        arm(cluster, fuse)
        cluster.run()
        require_sound(cluster)
        require_equal_ends(cluster)
        assert bits(cluster) == expected, f"died after {fuse} actions"


@pytest.mark.parametrize("down", ["relay", "mean_q", "q4_ef", "g_bf16"])
def test_a_coordinator_that_dies_again_and_again_loses_nothing(down: str) -> None:
    """Several crashes in one run, with snapshots in the journal and error feedback on both sides."""
    c = config(
        codec={"up": "e3m0", "down": down, "ef": "on"},
        outer={"momentum": 0.0},
        topology={"workers": 2, "checkpoint_every_commits": 2},
    )
    calm = Cluster(c).run()
    for seed in range(6):
        cluster = Cluster(c, seed=seed, weather=Weather(duplicate=0.1))
        for k in range(4):
            cluster.sim.at(1.0 + 5 * k, partial(arm, cluster, 3 * k + seed, 1.0))
        cluster.run()
        require_sound(cluster)
        require_equal_ends(cluster)
        assert len(cluster.disk.commits()) == len(calm.disk.commits())


def test_a_coordinator_that_comes_up_empty_is_refused_the_workers() -> None:
    """Without its journal it must not start the run over: workers that hold committed versions stop and say why."""
    cluster = Cluster(config())

    def forget() -> None:
        cluster.disk.records.clear()
        cluster.restart_coordinator()

    cluster.sim.at(12.0, forget)
    cluster.sim.run(5000.0, lambda: all(w.replica.stopped is not None for w in cluster.workers))
    for worker in cluster.workers:
        stop = worker.replica.stopped
        assert stop is not None and stop.error is not None and "lost committed rounds" in str(stop.error)
    assert cluster.coordinator.commits == 0


def test_restore_at_any_commit_continues_bit_for_bit() -> None:
    """I19: the journal up to any commit gives the state that made the rest of the journal."""
    c = config(topology={"workers": 2, "checkpoint_every_commits": 3})
    cluster = Cluster(c).run()
    records = cluster.disk.records
    for cut, (record, _) in enumerate(records):
        if record["type"] != "commit":
            continue
        first, second = Coordinator(c), Coordinator(c)
        first.restore(records[: cut + 1], 0.0)
        p = record["fragment"]
        assert frame.digest(first.ledgers[p].shard.params) == record["digest"]
        second.restore(records, 0.0)
        assert second.global_digest() == cluster.coordinator.global_digest()


# ---- a worker dies, hangs, lags, lies ----


def test_a_killed_worker_costs_the_rest_a_bounded_time() -> None:
    """Whenever one of three dies, the others finish, at most a few silences later."""
    normal = Cluster(config(topology={"workers": 3}), flavours=(0, 1, 2)).run().sim.now
    for seed in range(25):
        cluster = Cluster(config(topology={"workers": 3}), seed=seed, flavours=(0, 1, 2))
        cluster.sim.at(seed * 0.9, cluster.workers[seed % 3].kill)
        cluster.run(until_s=normal + 100.0)
        require_sound(cluster)
        require_equal_ends(cluster)
        assert sum(w.finished for w in cluster.workers) >= 2


def test_a_seeder_that_dies_is_replaced_though_messages_are_lost() -> None:
    """The run waits for the first worker's starting values; when it dies, the next is asked until it has answered."""
    for seed in range(20):
        cluster = Cluster(config(), seed=seed, weather=Weather(drop=0.3))
        cluster.sim.at(0.2 + seed * 0.1, cluster.workers[0].kill)
        cluster.sim.at(60.0, partial(replace_worker, cluster, 0, 900))  # the start cohort needs its two
        cluster.run(until_s=1000.0)
        require_sound(cluster)
        assert cluster.workers[1].finished


def test_a_restarted_worker_joins_again_and_finishes() -> None:
    """A new life under the old name gets the run's values, trains at the run's step and ends with its digest."""
    for seed in range(25):
        cluster = Cluster(config(), seed=seed)
        cluster.sim.at(1.0 + seed * 0.7, partial(replace_worker, cluster, 1, 500 + seed))
        cluster.run(until_s=400.0)
        require_sound(cluster)
        assert all(w.finished for w in cluster.workers)
        assert cluster.coordinator.members["w1"].incarnation >= 2
        assert cluster.workers[1].replica.digest() == cluster.coordinator.global_digest()


def test_a_joiner_takes_the_runs_values_before_its_first_step() -> None:
    """A third worker that appears in the middle trains on the run's weights from its first step."""
    c = config(run={"inner_steps_total": 40})
    cluster = Cluster(c)
    seen: list[bool] = []

    def look(step: int, model: ToyModel) -> None:
        if not seen:
            slots = cluster.workers[2].replica.slots
            seen.append(all(s.shard is not None for s in slots) and any(s.version > 0 for s in slots))

    def join() -> None:
        cluster.workers.append(ToyWorker(cluster.sim, "w2", c, flavour=4, nonce=9))
        cluster.workers[2].poison = look

    cluster.sim.at(15.0, join)
    cluster.run(until_s=400.0)
    assert seen == [True]
    assert 10 < cluster.workers[2].trained < 40
    assert any("w2" in r["contributors"] for r in cluster.disk.commits())
    require_sound(cluster)
    require_equal_ends(cluster)


def test_a_joiner_without_work_of_its_own_is_no_contributor() -> None:
    """Who comes when all steps are done takes the result and adds nothing to it."""
    c = config(run={"inner_steps_total": 20})
    cluster = Cluster(c)
    cluster.workers[0].step_s = cluster.workers[1].step_s = 1.0
    cluster.sim.at(20.2, lambda: cluster.workers.append(ToyWorker(cluster.sim, "w2", c, flavour=4, nonce=9)))
    cluster.run(until_s=400.0)
    assert cluster.workers[-1].name == "w2"
    assert cluster.workers[-1].trained or not any("w2" in r["contributors"] for r in cluster.disk.commits())
    require_sound(cluster)


def test_a_hung_worker_costs_one_grace_period() -> None:
    """It sends heartbeats but no work: the other waits once, not in every round."""
    c = config(run={"inner_steps_total": 60})
    normal = Cluster(c).run().sim.now
    cluster = Cluster(c)
    hung = cluster.workers[1]

    def hang() -> None:
        hung.finished = True  # the trainer stands still; the protocol's half goes on

    cluster.sim.at(10.4, hang)
    first = cluster.workers[0]
    cluster.sim.run(5000.0, lambda: first.finished)
    assert cluster.sim.now < normal + 35.0
    assert cluster.coordinator.members["w1"].status is Status.ACTIVE
    require_sound(cluster)


def test_one_worker_always_late_does_not_change_the_other() -> None:
    """I16: what a worker sends after the round is closed is not used, and the late one still follows the run."""
    c = config(run={"inner_steps_total": 40}, fault={"fixed_grace_s": 0.0, "quorum": 1})
    cluster = Cluster(c)
    # Measured before the other one's, but much longer under way.
    cluster.workers[1].step_s = 0.9
    cluster.sim.at(0.8, lambda: cluster.sim.slow_s.update(w1=2.5))
    cluster.run(until_s=2000.0)
    require_sound(cluster)
    alone = Cluster(config(run={"inner_steps_total": 40}, topology={"workers": 1}), flavours=(0,)).run()
    wanted = [(r["fragment"], r["version"], r["digest"]) for r in alone.disk.commits()]
    commits = [(r["fragment"], r["version"], r["digest"]) for r in cluster.disk.commits()]
    assert commits[:20] == wanted[:20], "the other worker's run is not what it is alone"
    assert cluster.coordinator.rejections["late"] > 0
    assert cluster.workers[1].finished
    assert cluster.workers[1].replica.digest() == cluster.coordinator.global_digest()


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_worker_with_nan_sits_rounds_out_and_recovers(drop: float) -> None:
    """Rounds go on without it, it takes the global values, and its later contributions count again."""
    c = config(run={"inner_steps_total": 40})
    for seed in range(5):
        cluster = Cluster(c, seed=seed, weather=Weather(drop=drop, duplicate=drop))

        def poison(step: int, model: ToyModel) -> None:
            if step == 13:
                for tensor in model.tensors.values():
                    tensor.fill_(float("nan"))

        cluster.workers[1].poison = poison
        cluster.run(until_s=2000.0)
        require_sound(cluster)
        assert cluster.coordinator.rejections["skipped_by_worker"] > 0
        contributors = [r["contributors"] for r in cluster.disk.commits()]
        assert ["w0"] in contributors, "no round went on without it"
        assert contributors[-1] == ["w0", "w1"], "it never came back"
        assert all(bool(torch.isfinite(v).all()) for v in cluster.values().values())


def test_a_lone_worker_with_nan_recovers_though_messages_are_lost() -> None:
    """With nobody else in the round it is aborted; the loss of that answer must not hold the worker for ever."""
    c = config(topology={"workers": 1})
    for seed in range(10):
        cluster = Cluster(c, seed=seed, weather=Weather(drop=0.2, duplicate=0.2), flavours=(0,))

        def poison(step: int, model: ToyModel) -> None:
            if step == 7:
                model.tensors["head"].fill_(float("inf"))

        cluster.workers[0].poison = poison
        cluster.run(until_s=3000.0)
        assert cluster.coordinator.aborts > 0
        require_sound(cluster)
        require_equal_ends(cluster)


def test_an_abort_that_is_lost_on_the_way_is_said_again() -> None:
    """No quorum: the round ends, and each contributor goes on with its work though the first answer never came."""
    c = config(fault={"quorum": 2, "round_timeout_s": 20.0, "dead_s": 4000.0, "suspect_s": 3000.0})
    for seed in range(8):
        cluster = Cluster(c, seed=seed, weather=Weather(drop=0.3))
        cluster.sim.at(8.5, cluster.workers[1].kill)
        cluster.sim.run(4000.0, lambda cluster=cluster: cluster.workers[0].finished)  # type: ignore[misc]
        assert cluster.coordinator.aborts > 0
        require_sound(cluster)


# ---- who is refused ----


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"stream": {"H": 6}}, "stream.H = 6 on the worker and 5"),
        ({"outer": {"lr": 0.1}}, "outer.lr = 0.1 on the worker"),
        ({"run": {"run_id": "other"}}, "run.run_id = 'other'"),
    ],
)
def test_a_worker_of_another_run_is_refused_with_the_difference(section: dict[str, Any], said: str) -> None:
    """It stops with an error that names what differs and both values; the run does not notice."""
    cluster = Cluster(config())
    stranger = ToyWorker(cluster.sim, "stranger", config(**section), flavour=3)
    cluster.run()
    assert stranger.replica.stopped is not None and said in str(stranger.replica.stopped.error)
    assert "stranger" not in cluster.coordinator.members


def test_a_worker_with_another_model_is_refused_with_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tensor that differs is named with both shapes."""
    cluster = Cluster(config())
    with monkeypatch.context() as patch:
        patch.setattr("tests.toy.SHAPES", {"embed": (7, 3), "blocks.0.w": (5, 6)})
        stranger = ToyWorker(cluster.sim, "stranger", config(), flavour=3)
    cluster.sim.at(3.0, lambda: cluster.sim.deliver("stranger", Connected(COORDINATOR)))
    cluster.run()
    stop = stranger.replica.stopped
    assert stop is not None and stop.error is not None and "blocks.0.w" in str(stop.error)
