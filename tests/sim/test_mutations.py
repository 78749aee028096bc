"""The simulation finds bugs: each that is planted breaks a promise within a few seeds."""

from __future__ import annotations

import pytest

from tests.sim.mutations import MUTATIONS, SEEDS, caught


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(name: str) -> None:
    """Which seed finds which is in docs/simulation.md."""
    found = caught(name)
    assert found is not None, f"{name} breaks no promise within {SEEDS} seeds"
    print(f"{name}: seed {found[0]}: {found[1]}")
