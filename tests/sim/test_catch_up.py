"""A worker that was away for less than a round is not late for the rest of the run."""

from __future__ import annotations

from typing import Any

import pytest

from diloco.worker.replica_slots import Slot, apply_commit
from tests.toy import Cluster, ToyWorker, config


@pytest.mark.parametrize("killed_at", [5.0, 5.7])
@pytest.mark.parametrize("away_s", [2.0, 6.0, 11.0])
def test_a_worker_back_within_a_round_counts_again_and_holds_nobody_up(
    killed_at: float, away_s: float
) -> None:
    """It catches up with what was committed meanwhile; the run loses no more than a few grace periods."""
    c = config(
        run={"inner_steps_total": 200},
        stream={"H": 10, "tau": 2, "alpha": 0.0, "merge": "delay_corrected"},
        codec={"up": "e3m0", "down": "q4_ef"},
        fault={"heartbeat_s": 0.5, "suspect_s": 12.0, "dead_s": 24.0, "fixed_grace_s": 15.0},
        topology={"workers": 4},
    )
    cluster = Cluster(c, flavours=(0, 1, 2, 3))
    for worker in cluster.workers:
        worker.step_s = 0.14
    old, saved = cluster.workers[1], dict[str, object]()
    for k in range(1, 1 + int(killed_at / 1.4)):  # checkpoints every ten steps
        cluster.sim.at(1.4 * k, lambda: saved.update(old.replica.state_dict()))
    cluster.sim.at(killed_at, old.kill)

    def come_back() -> None:
        new = ToyWorker(cluster.sim, "w1", c, flavour=1, nonce=777, step_s=0.14)
        new.replica.load_state_dict(saved)
        cluster.workers[1] = new

    cluster.sim.at(killed_at + away_s, come_back)
    cluster.run(until_s=3000.0)
    assert cluster.coordinator.complete
    assert cluster.sim.now < 200 * 0.14 + away_s + 2 * 15.0
    assert cluster.coordinator.rejections["late"] <= 10
    assert all("w1" in r["contributors"] for r in cluster.disk.commits()[-8:])


def test_a_version_is_not_counted_twice_while_a_job_moves_the_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run on another thread: what a worker says it has does not change before their result is taken in."""
    seen: list[tuple[int, int]] = []

    def observed(slot: Slot, *rest: Any, **options: Any) -> None:
        before = slot.known
        apply_commit(slot, *rest, **options)
        seen.append((before, slot.known))

    monkeypatch.setattr("diloco.worker.replica_jobs.apply_commit", observed)
    Cluster(config(stream={"H": 4, "tau": 2})).run()
    assert len(seen) > 10
    assert all(before == after for before, after in seen)
