"""A coordinator and its standby as real processes: one is killed, the other goes on, and no worker ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.processes import (
    SLOW,
    Cluster,
    Process,
    assert_all_identical,
    assert_versions_have_no_gap,
    wait_for,
)

LONG_S = 120.0
# Nobody is given up, and the standby is not dropped, because a busy machine holds them back.
FAULT = {"heartbeat_s": 0.5, "suspect_s": 30.0, "dead_s": 90.0, "fixed_grace_s": 30.0, "standby_s": 30.0}


def test_a_standby_takes_over_from_a_killed_coordinator_which_then_follows_it(tmp_path: Path) -> None:
    """kill -9: the same workers finish the run at the standby, and every commit that the dead one announced is there.

    The old coordinator, started again, announces nothing and ends with 3; as a standby it takes the new one's journal.
    """
    sections: dict[str, Any] = {"model": SLOW, "run": {"inner_steps_total": 400}, "fault": FAULT}
    sections["topology"] = {"checkpoint_every_commits": 2}
    with Cluster(tmp_path / "a", **sections) as first, Cluster(tmp_path / "b", **sections) as second:
        first.slow(True)
        primary, standby = first.coordinator(), second.coordinator("--standby", first.address)
        addresses = f"{second.address},{first.address}"  # the standby sends them on to the coordinator
        workers = [first.worker(f"w{i}", address=addresses) for i in range(2)]
        everybody = (primary, standby, *workers)
        wait_for("commits", lambda: len(first.commits) >= 4, *everybody, timeout_s=LONG_S)
        _wait_in_step(first, *everybody)
        primary.kill()
        dead = [c["digest"] for c in first.commits]
        wait_for("the takeover", lambda: _phase(second) == "running", standby, *workers, timeout_s=LONG_S)
        before = len(second.commits)
        wait_for("commits", lambda: len(second.commits) >= before + 4, standby, *workers, timeout_s=LONG_S)
        assert [c["digest"] for c in second.commits][: len(dead) - 1] == dead[: len(dead) - 1]
        assert {c["epoch"] for c in second.commits} == {1, 2}

        old = first.coordinator("--resume")
        assert old.wait(LONG_S) == 3, old.text
        assert "another coordinator has taken over this run" in old.text
        copy = first.coordinator("--standby", second.address)
        _wait_in_step(second, copy, standby, *workers)
        first.slow(False)
        assert [p.wait(LONG_S) for p in (*workers, standby, copy)] == [0, 0, 0, 0], standby.text + copy.text
        assert_versions_have_no_gap(second.commits)
        assert sum(1 for r in second.journal if r["type"] == "complete") == 1
        report = second.report
        assert_all_identical(report)
        assert all(w["steps"] == 400 for w in report["workers"])
        assert first.commits == second.commits


def test_a_copy_of_a_journal_is_not_continued_as_a_coordinators(tmp_path: Path) -> None:
    """A standby that has not taken over may lack records: --resume on its journal ends with 2 and says what to do."""
    with Cluster(tmp_path / "a") as first, Cluster(tmp_path / "b") as second:
        primary, standby = first.coordinator(), second.coordinator("--standby", first.address)
        workers = [first.worker(f"w{i}", address=f"{first.address},{second.address}") for i in range(2)]
        assert [p.wait(LONG_S) for p in (*workers, primary, standby)] == [0, 0, 0, 0], standby.text
        assert second.commits == first.commits
        again = second.coordinator("--resume")
        assert again.wait(LONG_S) == 2
        assert "a standby's copy" in again.text


def _wait_in_step(cluster: Cluster, *processes: Process) -> None:
    def in_step() -> bool:
        return ((cluster.status() or {}).get("standby") or {}).get("state") == "in step"

    wait_for("a standby in step", in_step, *processes, timeout_s=LONG_S)


def _phase(cluster: Cluster) -> str:
    return str((cluster.status() or {}).get("phase"))
