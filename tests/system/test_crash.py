"""Processes that are killed, interrupted and started again: the run goes on, and nothing is lost or counted twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from diloco.worker import checkpoint
from tests.processes import (
    SLOW,
    WAIT_S,
    Cluster,
    Process,
    assert_all_identical,
    assert_versions_have_no_gap,
    wait_for,
)

# Short leases, so that a dead worker is seen as dead while the test waits; and patience with one that came back in the
# middle of a round and is behind by as much.
FAULT = {"heartbeat_s": 0.5, "suspect_s": 2.0, "dead_s": 4.0, "fixed_grace_s": 10.0}
# Where no worker dies nobody may be given up: a worker that a busy machine holds back is waited for.
PATIENT = {"heartbeat_s": 0.5, "suspect_s": 20.0, "dead_s": 60.0, "fixed_grace_s": 20.0}


def _interrupt(process: Process) -> None:
    """SIGINT ends it with 130 within 3 s: of a machine that has nothing else to do, or in proportion longer."""
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    begun = time.monotonic()
    process.signal(signal.SIGINT)
    assert process.wait() == 130, process.text
    assert time.monotonic() - begun < 3.0 * crowd, f"{process.name} took its time\n{process.text}"


@pytest.mark.parametrize("down", ["relay", pytest.param("q4_ef", marks=pytest.mark.long)])
def test_a_killed_and_an_interrupted_coordinator_continue_their_run(tmp_path: Path, down: str) -> None:
    """kill -9 and, later, SIGINT (130 within 3 s): with --resume on the same port the same workers finish the run.

    Snapshots are frequent, so that the second restart begins from a compacted journal.
    """
    topology = {"checkpoint_every_commits": 2}
    run = {"inner_steps_total": 120}
    with Cluster(
        tmp_path, model=SLOW, run=run, codec={"down": down}, topology=topology, fault=PATIENT
    ) as cluster:
        cluster.slow(True)
        first = cluster.coordinator()
        workers = [cluster.worker(f"w{i}") for i in range(2)]
        cluster.wait_commits(4, first, *workers)
        first.kill()
        before = len(cluster.commits)
        second = cluster.coordinator("--resume")
        cluster.wait_commits(before + 4, second, *workers)
        _interrupt(second)
        assert "--resume" in second.text
        before = len(cluster.commits)
        third = cluster.coordinator("--resume")
        cluster.wait_commits(before + 1, third, *workers)
        status = wait_for("an answer", cluster.status, third)
        assert status["epoch"] == 3 and [m["incarnation"] for m in status["members"]] == [1, 1]
        cluster.slow(False)
        assert [p.wait() for p in (*workers, third)] == [0, 0, 0], third.text
        assert_versions_have_no_gap(cluster.commits)
        assert sum(1 for r in cluster.journal if r["type"] == "complete") == 1
        report = cluster.report
        assert report["commits"] == len(cluster.commits)
        assert_all_identical(report)
        assert all(w["steps"] == 120 for w in report["workers"])


def test_a_run_that_was_complete_when_the_coordinator_died_only_needs_its_report(tmp_path: Path) -> None:
    """Killed after the last record and before the report: --resume writes the report and exits with 0."""
    with Cluster(tmp_path, topology={"workers": 1}, run={"inner_steps_total": 10}) as cluster:
        first = cluster.coordinator()
        worker = cluster.worker("w0")
        assert [worker.wait(), first.wait()] == [0, 0]
        report = cluster.report
        (cluster.run_dir / "report.json").unlink()
        assert cluster.coordinator("--resume").wait(20) == 0
        assert cluster.report["global_digest"] == report["global_digest"]
        assert cluster.report["commits"] == report["commits"]


def test_a_worker_may_be_killed_interrupted_and_come_back(tmp_path: Path) -> None:
    """kill -9 stops nobody else; the same name comes back as its next life; SIGINT keeps a checkpoint to go on from."""
    run = {"inner_steps_total": 400}
    with Cluster(tmp_path, model=SLOW, run=run, fault=FAULT) as cluster:
        cluster.slow(True)
        coordinator = cluster.coordinator()
        w0, w1 = (cluster.worker(f"w{i}") for i in range(2))
        cluster.wait_commits(2, coordinator, w0, w1)
        w1.kill()
        cluster.wait_member("w1", lambda m: m["state"] == "dead", coordinator, w0)
        before = len(cluster.commits)
        cluster.wait_commits(before + 2, coordinator, w0)
        assert cluster.commits[-1]["contributors"] == ["w0"]

        w1 = cluster.worker("w1")
        member = cluster.wait_member("w1", lambda m: m["state"] == "active", coordinator, w0, w1)
        assert member["incarnation"] == 2

        def contributes_again() -> bool:
            return any(c["contributors"] == ["w0", "w1"] for c in cluster.commits[before:])

        wait_for("a commit of both", contributes_again, coordinator, w0, w1)

        _interrupt(w1)
        found = checkpoint.load(cluster.run_dir / "workers" / "w1" / "checkpoint")
        assert found is not None
        step = found[1]["replica"]["step"]
        assert step > 10
        w1 = cluster.worker("w1")
        assert int(w1.wait_text(r"resumed at inner step (\d+)")[1]) >= step
        member = cluster.wait_member("w1", lambda m: m["state"] == "active", coordinator, w0, w1)
        assert member["incarnation"] == 3
        cluster.slow(False)
        assert [p.wait(2 * WAIT_S) for p in (w0, w1, coordinator)] == [0, 0, 0], coordinator.text
        assert_versions_have_no_gap(cluster.commits)
        report = cluster.report
        assert all(w["steps"] == 400 and w["live"] for w in report["workers"])
        # With so short a lease one may finish before the other; whoever was last holds the final value.
        assert report["global_digest"] in {w["digest"] for w in report["workers"]}


def test_a_worker_waiting_for_others_can_be_interrupted(tmp_path: Path) -> None:
    """SIGINT while the start cohort is incomplete, or while no coordinator is there, ends a worker within 3 s."""
    with Cluster(tmp_path) as cluster:
        coordinator = cluster.coordinator()
        waiting = cluster.worker("w0")
        cluster.wait_member("w0", lambda m: m["state"] == "joining", coordinator, waiting)
        _interrupt(waiting)
        coordinator.kill()
        alone = cluster.worker("w0")
        alone.wait_text("metrics")
        _interrupt(alone)
