"""How long a round waits for late ones: never less than before, longer where overlap leaves the time (`fault.gamma`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diloco.comms.messages import Progress
from diloco.config import Fault
from diloco.coordinator.pace import deadlines, grace_s, slack_s
from diloco.coordinator.rounds import GRACE_FLOOR_S, Answer, Arrivals, Round
from diloco.coordinator.state import Coordinator
from tests.toy import Cluster, config

torch.set_num_threads(1)


def running(steps_per_s: float = 1.0, **sections: dict[str, Any]) -> Coordinator:
    """A coordinator whose workers have said how fast they are: the second half as fast as the first."""
    stream = {"H": 100, "tau": 80, **sections.pop("stream", {})}
    cluster = Cluster(config(stream=stream, run={"inner_steps_total": 200}, **sections))
    cluster.sim.run(600.0, lambda: cluster.coordinator.started)
    for i, member in enumerate(cluster.coordinator.by_index()):
        member.progress = Progress(steps_per_s=steps_per_s / (1 + i))
    return cluster.coordinator


def waiting(opened: float, quorum_at: float) -> Round:
    found = Round(opened)
    found.answers[0] = Answer(0, 1, 10, b"")
    found.quorum_at = quorum_at
    return found


def test_grace_is_the_share_gamma_of_what_overlap_leaves() -> None:
    """gamma (tau T_step - T_quorum - T_sync), T_step that of the fastest worker; above the floor it decides."""
    for gamma in (0.5, 0.9, 1.0):
        c = running(fault={"gamma": gamma})
        assert slack_s(c, 0, waiting(10.0, 15.0)) == pytest.approx(80.0 - 5.0)
        assert grace_s(c, 0, waiting(10.0, 15.0)) == pytest.approx(gamma * 75.0)
        assert grace_s(c, 0, waiting(10.0, 85.0)) == GRACE_FLOOR_S  # the result is due nearly at once


def test_the_way_back_to_the_slowest_link_is_taken_off() -> None:
    """T_sync is a round trip and the bytes of the last commit at that worker's rate."""
    c = running()
    p = 0
    c.by_index()[1].progress = Progress(steps_per_s=0.5, rtt_s=2.0)
    assert slack_s(c, p, waiting(0.0, 0.0)) == pytest.approx(78.0)


@pytest.mark.parametrize(
    ("stream", "steps_per_s"),
    [({"tau": 0}, 1.0), ({"tau": 80}, 0.0), ({"overlap": "delayed", "tau": 1}, 1.0), ({"tau": 20}, 1.0)],
)
def test_without_such_time_gamma_changes_nothing(stream: dict[str, Any], steps_per_s: float) -> None:
    """No overlap, speeds unknown, or less of it than is waited anyway: the grace period is the learnt one."""
    for gamma in (0.0, 0.9):
        c = running(steps_per_s, stream=stream, fault={"gamma": gamma})
        assert grace_s(c, 0, waiting(0.0, 0.0)) == GRACE_FLOOR_S


def test_more_than_the_time_out_is_never_waited_and_the_operators_word_stands() -> None:
    """Whatever the speeds are said to be."""
    arrivals = Arrivals()
    assert arrivals.grace_s(Fault(), 1e9) == Fault().round_timeout_s
    assert arrivals.grace_s(Fault(fixed_grace_s=2.0), 1e9) == 2.0
    c = running(1e-9)
    c.rounds[0] = waiting(0.0, 5.0)
    assert deadlines(c) == [5.0 + c.config.fault.round_timeout_s]
