"""Error feedback when only a snapshot tells a worker how its round ended."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from diloco.comms.messages import Commit, Snapshot
from tests.toy import Cluster, config


@pytest.mark.parametrize("counts", [True, False])
def test_a_snapshot_says_whether_the_round_in_flight_counts(counts: bool) -> None:
    """If it does, the residual stays as the round left it, else it is rolled back: nothing is sent twice or lost."""
    c = config(
        stream={"layout": "single"},
        codec={"up": "stat", "down": "relay", "ef": "on"},
        fault={"quorum": 1, "fixed_grace_s": 1.0},
        run={"inner_steps_total": 30},
    )
    cluster = Cluster(c)
    replica = cluster.workers[1].replica
    receive = replica.receive
    kept: list[bool] = []

    def lossy(message: Any, now: float) -> Any:
        if isinstance(message, Commit) and message.version == 2:
            return []  # it is in this one, and never hears of it
        if isinstance(message, Snapshot) and not counts:
            message = dataclasses.replace(message, counted=-1)
        return receive(message, now)

    settle = replica._settle_by_snapshot

    def observed(which: Any, snapshot: Snapshot) -> None:
        waits = which.flight is not None and not which.flight.outcome and which.feedback.pending
        before = which.feedback.residual
        settle(which, snapshot)
        if waits:
            kept.append(torch.equal(before, which.feedback.residual))
            assert which.flight.outcome == ("merged-in" if counts else "left-out")
            assert not which.feedback.pending

    replica.receive = lossy  # type: ignore[method-assign]
    replica._settle_by_snapshot = observed  # type: ignore[method-assign,assignment]
    cluster.run()
    assert kept[:1] == [counts]
