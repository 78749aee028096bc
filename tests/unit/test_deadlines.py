"""When a fragment in flight is wanted, from steps and their times."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

import diloco
from diloco.comms.local import LocalConnection
from diloco.worker.deadlines import RECENT, Deadlines


def test_a_deadline_is_the_steps_to_go_times_the_shortest_recent_step() -> None:
    """An evaluation between two steps does not make the deadline look further away."""
    deadlines = Deadlines()
    deadlines.stepped(10.0, None)
    assert deadlines.of([(0, 5)], 1, 1.0) == {}
    for now, seconds in ((12.0, 2.0), (42.0, 30.0), (44.5, 2.5)):
        deadlines.stepped(now, seconds)
    assert deadlines.of([(0, 8), (3, 6), (4, 5)], 5, 1.0) == {0: 50.5, 3: 46.5, 4: 44.5}


def test_what_is_overdue_is_wanted_now() -> None:
    deadlines = Deadlines()
    deadlines.stepped(7.0, 1.0)
    assert deadlines.of([(1, 3)], 9, 1.0) == {1: 7.0}


def test_a_worker_that_makes_fewer_steps_reaches_the_same_step_sooner() -> None:
    """Each step of its own moves the run on by two: half as many are left."""
    deadlines = Deadlines()
    deadlines.stepped(0.0, 4.0)
    assert deadlines.of([(0, 10)], 4, 2.0) == {0: 12.0}


def test_a_run_that_has_become_slower_gets_longer_windows() -> None:
    """Old steps are forgotten."""
    deadlines = Deadlines()
    for now in range(RECENT):
        deadlines.stepped(float(now), 1.0)
    for now in range(RECENT):
        deadlines.stepped(100.0 + 3 * now, 3.0)
    assert deadlines.of([(0, 2)], 1, 1.0) == {0: 100.0 + 3 * (RECENT - 1) + 3.0}


def test_a_worker_tells_its_connection_what_is_in_flight_and_how_far_to_spread_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a contribution leaves, and again, with nothing, once all is merged."""
    told: list[tuple[dict[int, float], float]] = []

    def expect(self: LocalConnection, deadlines: Mapping[int, float], share: float) -> None:
        told.append((dict(deadlines), share))

    monkeypatch.setattr(LocalConnection, "expect", expect)
    config = {"run": {"inner_steps_total": 8}, "stream": {"H": 4, "tau": 2, "pace": 0.25}}
    model = nn.Linear(2, 1)
    optimizer = diloco.DiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.1), diloco.local(config))
    for _ in range(8):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    optimizer.close()
    assert {tuple(deadlines) for deadlines, _ in told} == {(0,), ()}
    assert told[-1][0] == {} and {share for _, share in told} == {0.25}
