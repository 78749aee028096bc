"""A coordinator that dies between recording a commit with its snapshot and telling anybody about it."""

from __future__ import annotations

from typing import Any

import pytest

from diloco.comms.machine import COORDINATOR, Persist
from tests.toy import Cluster, config


class Crash(Exception):
    """Raised where the process would have died."""


@pytest.mark.parametrize("down", ["relay", "mean_q", "q4_ef", "g_fp32", "g_bf16"])
def test_workers_get_a_commit_of_which_only_the_snapshot_is_left(down: str) -> None:
    """The restarted coordinator no longer has that commit's frames: what it sends instead lets the run complete."""
    codec: dict[str, Any] = {"up": "fp32" if down.startswith("g_") else "int4", "down": down}
    cluster = Cluster(config(codec=codec, topology={"checkpoint_every_commits": 1}))
    deaths = 0

    def write(action: Persist) -> None:
        nonlocal deaths
        cluster.disk.write(action)
        if action.record["type"] == "snapshot" and action.record["version"] == 2 and deaths < 2:
            deaths += 1
            raise Crash

    cluster.sim.on_persist[COORDINATOR] = write
    for _ in range(2):
        with pytest.raises(Crash):
            cluster.run()
        cluster.restart_coordinator()
    cluster.run()
    assert deaths == 2 and cluster.coordinator.complete
    assert {w.replica.digest() for w in cluster.workers} == {cluster.coordinator.global_digest()}
