"""The schedule of faults: a pure function of its seed in which everything happens, and nothing impossible does."""

from __future__ import annotations

import itertools

import pytest

from diloco.chaos.schedule import COORDINATOR, KINDS, LASTS_S, OF_COORDINATOR, OF_LIARS, schedule

SEEDS = range(30)


def test_the_same_seed_gives_the_same_faults_and_another_seed_others() -> None:
    """Kind, time, length and target follow from seed, minutes and workers alone."""
    assert schedule(7, 5, 4) == schedule(7, 5, 4)
    assert len({schedule(seed, 5, 4) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_ten_minutes_hold_sixty_faults_of_all_kinds(seed: int) -> None:
    """At least 60, every kind at least 5 times, five coordinator kills among them; in order and within the time."""
    faults = schedule(seed, 10, 4)
    assert len(faults) >= 60
    assert min(sum(f.kind == kind for f in faults) for kind in KINDS) >= 5
    assert [f.at for f in faults] == sorted(f.at for f in faults)
    assert all(0 <= f.at and f.until < 600 for f in faults)
    assert all(LASTS_S[f.kind][0] <= f.for_s <= LASTS_S[f.kind][1] for f in faults)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_process_is_not_hit_while_it_is_down(workers: int) -> None:
    """Faults of one target never overlap, whatever the seed; those of the coordinator keep a distance as well."""
    for seed in SEEDS:
        faults = schedule(seed, 10, workers)
        for target in {f.target for f in faults}:
            mine = [f for f in faults if f.target == target]
            assert all(a.until <= b.at for a, b in itertools.pairwise(mine))
            if target == COORDINATOR:
                assert all(b.at - a.until > 5.0 for a, b in itertools.pairwise(mine))


def test_each_kind_hits_whom_it_can_hit() -> None:
    """The coordinator, a worker of the cohort, or a liar of its own, each under a new name."""
    faults = schedule(3, 10, 4)
    for f in faults:
        if f.kind in OF_COORDINATOR:
            assert f.target == COORDINATOR
        else:
            assert f.target.startswith("x" if f.kind in OF_LIARS else "w")
    liars = [f.target for f in faults if f.kind in OF_LIARS]
    assert len(set(liars)) == len(liars)
    assert {f.target for f in faults if f.target.startswith("w")} == {"w0", "w1", "w2", "w3"}


def test_the_shortest_run_has_a_fault() -> None:
    """A few seconds are enough for one."""
    assert len(schedule(0, 0.1, 1)) == 1
