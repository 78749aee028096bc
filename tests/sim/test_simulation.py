"""Thousands of whole runs under faults drawn by seed, each promise looked at after every event.

`python -m tests.sim.replay SEED` runs a seed again and shrinks it. 1,000 seeds belong to every test run, 10,000 to the
long one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from tests.sim.replay import explain
from tests.sim.scenario import DELAYS, FAULTS, Fault, Scenario, scenario, shrunk
from tests.sim.trial import outcome_of, outcome_of_seed

SHORT, LONG = 1_000, 10_000  # seeds
FEW, MANY = 50, 250  # of them to a test
PROCESSES = 2
EVENTS = 200  # that every run has at least


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as made:
        yield made


def require_all_kept(pool: ProcessPoolExecutor, seeds: range) -> None:
    outcomes = list(pool.map(outcome_of_seed, seeds, chunksize=5))
    failing = [o.seed for o in outcomes if o.violation]
    assert not failing, f"seeds {failing}; the first of them: {explain(failing[0])}"
    small = [o.seed for o in outcomes if o.events < EVENTS]
    assert not small, f"seeds {small} have fewer than {EVENTS} events"


@pytest.mark.parametrize("first", range(0, SHORT, FEW))
def test_every_promise_holds_after_every_event(first: int, pool: ProcessPoolExecutor) -> None:
    """Promises 1 to 6 and I15 to I19, from 1 to 16 workers, with and without a standby."""
    require_all_kept(pool, range(first, first + FEW))


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, LONG, MANY))
def test_every_promise_holds_after_every_event_of_many_runs(first: int, pool: ProcessPoolExecutor) -> None:
    """The same over ten thousand seeds."""
    require_all_kept(pool, range(first, first + MANY))


def test_a_seed_is_one_run() -> None:
    """The same seed gives the same events and the same end, to the last digit: a failing one can be replayed."""
    for seed in (3, 11, 17):
        assert outcome_of(scenario(seed)) == outcome_of(scenario(seed))


def test_seeds_cover_every_fault_every_number_of_workers_and_both_kinds_of_run() -> None:
    """What is drawn for the short set has everything in it, many times."""
    drawn = [scenario(seed) for seed in range(SHORT)]
    kinds = [fault.kind for s in drawn for fault in s.faults]
    assert set(kinds) == set(FAULTS) and all(kinds.count(kind) >= 50 for kind in FAULTS)
    assert {s.workers for s in drawn} >= {1, 2, 3, 4, 5, 6, 8, 11, 16}
    assert 300 < sum(s.standby for s in drawn) < 500 < sum(not s.delays_only for s in drawn)
    assert all(f.kind in DELAYS for s in drawn if s.delays_only for f in s.faults)


def test_a_failing_run_is_shrunk_to_the_faults_that_it_needs() -> None:
    """Of five faults the two remain without which it does not fail."""
    kinds = ("part", "nan", "storm", "kill worker", "replay")
    drawn = replace(scenario(0), faults=tuple(Fault(float(i), kind) for i, kind in enumerate(kinds)))

    def fails(s: Scenario) -> bool:
        return {"nan", "replay"} <= {fault.kind for fault in s.faults}

    assert [fault.kind for fault in shrunk(drawn, fails).faults] == ["nan", "replay"]
