"""Workers that were away: what they bring back must not harm the run, and they must count again."""

from __future__ import annotations

import pytest
import torch

from diloco.comms.machine import COORDINATOR, Connected
from tests.toy import Cluster, ToyWorker, config


def test_a_worker_back_from_an_old_checkpoint_takes_the_runs_values() -> None:
    """Weights that are many rounds old are replaced, not averaged in."""
    c = config(run={"inner_steps_total": 60}, fault={"suspect_s": 3.0, "dead_s": 6.0, "fixed_grace_s": 2.0})
    cluster = Cluster(c)
    old = cluster.workers[1]
    saved: dict[str, object] = {}
    cluster.sim.at(7.5, lambda: saved.update(old.replica.state_dict()))
    cluster.sim.at(8.0, old.kill)

    def come_back() -> None:
        new = ToyWorker(cluster.sim, "w1", c, flavour=1, nonce=777)
        new.replica.load_state_dict(saved)
        for tensor in new.model.tensors.values():
            tensor.fill_(1000.0)  # what it held is far away from where the run is by now
        cluster.workers[1] = new

    cluster.sim.at(40.0, come_back)
    cluster.run(until_s=2000.0)
    assert max(float(v.abs().max()) for v in cluster.values().values()) < 20.0
    last = [r["contributors"] for r in cluster.disk.commits()[-10:]]
    assert all("w1" in names for names in last), "the returned worker contributes again"


def test_a_worker_that_hung_once_counts_again() -> None:
    """After one long pause its later work is in commits, not rejected as late for the rest of the run."""
    c = config(run={"inner_steps_total": 120}, fault={"fixed_grace_s": 12.0})
    cluster = Cluster(c)
    hung = cluster.workers[1]
    normal = hung.step_s

    def pause() -> None:
        hung.step_s = 60.0
        cluster.sim.at(60.0, lambda: setattr(hung, "step_s", normal))

    before: list[int] = []
    cluster.sim.at(10.0, pause)
    cluster.sim.at(85.0, lambda: before.append(len(cluster.disk.commits())))
    cluster.run(until_s=3000.0)
    later = cluster.disk.commits()[before[0] :]
    assert sum(len(r["contributors"]) == 2 for r in later) >= 10


def test_reconnecting_in_the_middle_changes_nothing() -> None:
    """The same life joins again: the run's result keeps every bit."""
    c = config(codec={"up": "int8", "down": "relay"})
    quiet = Cluster(c).run().coordinator.global_digest()
    cluster = Cluster(c)
    for at in (3.2, 9.7, 15.1):
        cluster.sim.at(at, lambda: cluster.sim.deliver("w0", Connected(COORDINATOR)))
    assert cluster.run().coordinator.global_digest() == quiet
    assert all(torch.isfinite(v).all() for v in cluster.values().values())


@pytest.mark.parametrize(
    ("H", "tau", "late_s"), [(5, 1, 3.5), (5, 1, 11.5), (12, 0, 5.5), (12, 0, 15.5), (10, 1, 8.5)]
)
def test_a_newcomer_finds_into_the_rounds(H: int, tau: int, late_s: float) -> None:
    """However far the run goes on while it gets ready (less than a grace period), nearly all commits are of both.

    Behind the others by a boundary it must not wait for them on one fragment while they wait for it on another.
    """
    c = config(
        run={"inner_steps_total": 120},
        stream={"H": H, "tau": tau},
        fault={"suspect_s": 3.0, "dead_s": 6.0, "fixed_grace_s": 30.0},
    )
    cluster = Cluster(c)
    cluster.sim.at(7.5, cluster.workers[1].kill)
    before: list[int] = []

    def come_back() -> None:
        new = ToyWorker(cluster.sim, "w1", c, flavour=1, nonce=777, step_s=late_s)
        cluster.sim.at(late_s - 0.5, lambda: setattr(new, "step_s", 1.0))  # only its start is slow
        cluster.workers[1] = new
        before.append(len(cluster.disk.commits()))

    cluster.sim.at(30.0, come_back)
    cluster.run(until_s=2000.0)
    later = cluster.disk.commits()[before[0] :]
    together = sum(len(r["contributors"]) == 2 for r in later)
    assert together > 0.9 * len(later), f"{together} of {len(later)} commits are of both"
    assert cluster.sim.now < 160.0, "nobody waits out grace periods"
