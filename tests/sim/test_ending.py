"""How a run ends when its workers are not done together: all that are alive end with the run's final value."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms.machine import COORDINATOR, Connected, Received
from diloco.comms.messages import FLUSHED, Leave, Progress
from diloco.coordinator.membership import Status
from tests.sim.faults import ROUGH, STORM, arm, require_sound
from tests.sim.succession import World
from tests.toy import Cluster, ToyWorker, config

torch.set_num_threads(1)

FAULT = {
    "heartbeat_s": 0.5,
    "suspect_s": 3.0,
    "dead_s": 8.0,
    "quorum": 1,
    "fixed_grace_s": 0.0,
    "round_timeout_s": 60.0,
    "standby_s": 1.5,
    "takeover_s": 1.0,
}
PATIENCE_S = 8.0 + 2.0  # fault.dead_s and messages on their way


def apart(step_s: float, *, seed: int = 0, **sections: dict[str, Any]) -> Cluster:
    """Two workers, the second much slower: rounds do not wait for it."""
    chosen: dict[str, dict[str, Any]] = {"fault": FAULT, **sections}
    cluster = Cluster(config(**chosen), seed=seed)
    cluster.workers[1].step_s = step_s
    return cluster


def ends(cluster: Cluster) -> set[str]:
    """Digests of the run, of what each finished worker holds, and of its model."""
    found = {cluster.coordinator.global_digest(), cluster.coordinator.final}
    for worker in cluster.workers:
        if worker.finished:
            found.add(worker.replica.digest())
            for p, value in cluster.values().items():
                assert torch.equal(worker.model.read(p), value)
    return found


def after_the_end(cluster: Cluster) -> list[str]:
    kinds = [record["type"] for record, _ in cluster.disk.records]
    return kinds[kinds.index("final") + 1 :]


DOWNS = ("g_fp32", "relay", "mean_q", "q4_ef")
# Eager workers step by themselves, so each way down gives them what that takes.
MODES = [
    *((overlap, down) for overlap in ("inner", "none", "delayed") for down in DOWNS),
    ("eager", "relay"),
    ("eager", "mean_q"),
]


@pytest.mark.parametrize(("overlap", "down"), MODES)
def test_a_worker_that_is_done_first_ends_with_what_the_last_one_gave(overlap: str, down: str) -> None:
    """The second takes three times as long: the first waits for it, and both hold the last commit's value."""
    cluster = apart(
        3.0, codec={"down": down}, stream={"overlap": overlap, "tau": 1 if overlap == "inner" else 0}
    )
    cluster.run(until_s=400.0)
    require_sound(cluster)
    assert len(ends(cluster)) == 1
    assert cluster.disk.commits()[-1]["contributors"] == ["w1"], "the last one was not waited for"
    assert sorted(after_the_end(cluster)) == ["complete", "leave", "leave"]


def test_the_end_survives_lost_and_doubled_messages_and_a_coordinator_that_dies_in_it() -> None:
    """Whatever is lost of the last words, they are said until they are heard; a restart knows that the end was there."""
    for seed in range(12):
        cluster = apart(2.0, seed=seed)
        cluster.sim.weather = STORM if seed % 2 else ROUGH
        cluster.sim.at(21.0 + seed, partial(arm, cluster, seed, 1.0))
        cluster.run(until_s=600.0)
        require_sound(cluster)
        assert len(ends(cluster)) == 1 and all(w.finished for w in cluster.workers)


def test_a_hung_worker_is_not_waited_for_and_ends_with_the_runs_value_when_it_goes_on() -> None:
    """Its heart beats and its trainer stands still: after fault.dead_s the run's value is final without it."""
    for hung_at in (7.5, 17.5):
        cluster = apart(1.0)
        first, hung = cluster.workers
        cluster.sim.at(hung_at, partial(setattr, hung, "finished", True))
        cluster.sim.run(200.0, lambda f=first: f.finished)  # type: ignore[misc]
        assert cluster.sim.now < max(20.0, hung_at) + PATIENCE_S
        assert cluster.coordinator.members["w1"].status is Status.ACTIVE and not cluster.coordinator.complete
        hung.finished, hung.state = False, "stepping"
        cluster.run(until_s=cluster.sim.now + 20.0)
        require_sound(cluster)
        assert hung.finished and len(ends(cluster)) == 1
        assert "commit" not in after_the_end(cluster)


@pytest.mark.parametrize("back", [False, True])
def test_a_worker_killed_before_its_last_contribution_costs_the_others_its_silence_only(back: bool) -> None:
    """Whenever it dies; a new life of it comes too late to count, or in time, and ends like the others."""
    for seed in range(10):
        cluster = apart(1.3, seed=seed)
        at = 17.0 + seed
        cluster.sim.at(at, cluster.workers[1].kill)
        if back:

            def again(cluster: Cluster = cluster) -> None:
                cluster.workers[1] = ToyWorker(cluster.sim, "w1", cluster.config, flavour=1, nonce=7)

            cluster.sim.at(at + 2.0, again)
        cluster.run(until_s=max(26.0, at) + 2 * PATIENCE_S)
        require_sound(cluster)
        assert cluster.workers[0].finished and len(ends(cluster)) == 1


def test_a_worker_far_behind_is_waited_for_until_the_round_timeout() -> None:
    """It never hangs, and would take 170 seconds more: the run ends without the rest of its work, and so does it.

    The time begins when more than half are done, here the second of three, after 45 seconds.
    """
    c = config(
        run={"inner_steps_total": 30}, fault={**FAULT, "round_timeout_s": 40.0}, topology={"workers": 3}
    )
    cluster = Cluster(c, flavours=(0, 1, 2))
    first, second, last = cluster.workers
    second.step_s, last.step_s = 1.5, 7.0
    cluster.sim.run(400.0, lambda: first.finished)
    assert 80.0 < cluster.sim.now < 45.0 + 40.0 + 5.0
    cluster.run(until_s=cluster.sim.now + 20.0)
    require_sound(cluster)
    assert second.finished and last.finished and last.trained < 20 and len(ends(cluster)) == 1


@pytest.mark.parametrize("workers", [2, 3])
def test_one_worker_that_says_it_is_done_does_not_end_the_run_for_the_others(workers: int) -> None:
    """Far from its end, longer than any round may take: the others make all of their steps."""
    c = config(
        run={"inner_steps_total": 200},
        fault={"round_timeout_s": 30.0},
        topology={"workers": workers},
    )
    cluster = Cluster(c, flavours=range(workers))
    name = cluster.workers[-1].name

    def lie() -> None:
        life = cluster.coordinator.members[name].incarnation
        word = Leave(name, life, FLUSHED, Progress(), "none")
        cluster.sim.deliver(COORDINATOR, Received(name, word))

    cluster.sim.at(20.0, lie)
    cluster.run()
    assert [w.trained for w in cluster.workers[:-1]] == [200] * (workers - 1)
    require_sound(cluster)
    assert len(ends(cluster)) == 1 and cluster.coordinator.complete


def test_a_worker_that_is_away_while_the_others_leave_ends_like_them_if_it_has_the_value() -> None:
    """It knows the final digest and holds that value; back after fault.dead_s, it hears that the run is complete."""
    for has in (True, False):
        cluster = apart(1.0)
        first, away = cluster.workers
        cluster.sim.run(200.0, lambda w=away: w.replica.end.asked)  # type: ignore[misc]
        away.finished = True  # its driver does nothing more: it says no goodbye
        cluster.sim.run(200.0, lambda w=away: not w.replica.end.waits)  # type: ignore[misc]
        cluster.sim.remove("w1")
        cluster.sim.run(cluster.sim.now + 60.0, lambda c=cluster: c.coordinator.complete)  # type: ignore[misc]
        assert first.finished and cluster.coordinator.complete
        assert cluster.coordinator.members["w1"].status is Status.DEAD
        if not has:
            away.replica.end.final = "another"
        cluster.sim.add("w1", away.replica)
        cluster.sim.deliver("w1", Connected(COORDINATOR))
        cluster.sim.run(cluster.sim.now + 20.0, lambda w=away: w.replica.stopped is not None)  # type: ignore[misc]
        assert away.replica.stopped is not None
        assert (away.replica.stopped.error is None) is has


def test_a_worker_of_which_nothing_is_heard_is_not_waited_for() -> None:
    """Suspected at the end, it hears of it when it is back, and takes the value as it is."""
    cluster = apart(1.0)
    first, away = cluster.workers
    cluster.sim.at(15.2, partial(cluster.sim.remove, "w1"))
    cluster.sim.run(200.0, lambda: first.finished)
    assert cluster.sim.now < 20.0 + FAULT["suspect_s"] + 2.0
    cluster.sim.add("w1", away.replica)
    away.state = "stepping"
    cluster.run(until_s=cluster.sim.now + 40.0)
    require_sound(cluster)
    assert away.finished and len(ends(cluster)) == 1 and "commit" not in after_the_end(cluster)


def test_the_standby_takes_over_an_end_that_somebody_waits_for() -> None:
    """The coordinator dies while the first worker waits for the second: both end alike under the standby."""
    for seed in range(4):
        world = World(config(fault=FAULT), seed=seed)
        world.workers[1].step_s = 2.0
        world.run(60.0, lambda w=world: w.workers[0].replica.end.asked)  # type: ignore[misc]
        world.kill("a")
        world.finish()
        leader = world.completed()
        assert leader is not None and leader.name == "b"
        digest = next(r["digest"] for r, _ in leader.disk.records if r["type"] == "complete")
        assert {w.replica.digest() for w in world.workers} == {digest}


def test_asynchronous_workers_wait_for_nobody_at_the_end() -> None:
    """They end with different values by design: the first is done long before the second."""
    cluster = apart(3.0, stream={"overlap": "async", "tau": 0, "alpha": 0.0})
    first, last = cluster.workers
    cluster.sim.run(400.0, lambda: first.finished)
    assert cluster.sim.now < 30.0 and not last.finished
    cluster.run(until_s=400.0)
    assert cluster.coordinator.complete and not any(r["type"] == "final" for r, _ in cluster.disk.records)
