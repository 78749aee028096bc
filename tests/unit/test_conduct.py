"""When a worker's bad contributions shut it out, and for how long."""

from __future__ import annotations

from diloco.coordinator.membership import COOL_OFF_ROUNDS, WINDOW_ROUNDS, Conduct

FRAGMENTS = 3


def offend(conduct: Conduct, number: int, ended: int, limit: int = 5, life: int = 1) -> bool:
    return conduct.offend((life, 0, number), ended, FRAGMENTS, limit)


def test_the_fifth_bad_contribution_shuts_out_for_the_cool_off() -> None:
    """Not one earlier; and the time is that of ended rounds of all fragments."""
    conduct = Conduct()
    assert [offend(conduct, number, 10 + number) for number in range(5)] == [False] * 4 + [True]
    end = 14 + COOL_OFF_ROUNDS * FRAGMENTS
    assert conduct.barred(14) and conduct.barred(end - 1) and not conduct.barred(end)


def test_after_the_cool_off_the_count_starts_anew() -> None:
    """One more bad one is not enough; five more are."""
    conduct = Conduct()
    for number in range(5):
        offend(conduct, number, 0)
    assert [offend(conduct, number, 50) for number in range(5, 10)] == [False] * 4 + [True]


def test_old_offences_are_forgotten() -> None:
    """Four a long time ago and four now are no five within the window."""
    conduct = Conduct()
    for number in range(4):
        offend(conduct, number, 0)
    later = WINDOW_ROUNDS * FRAGMENTS
    assert not any(offend(conduct, 10 + number, later) for number in range(4))
    assert offend(conduct, 20, later)


def test_the_same_contribution_again_counts_once_and_in_another_life_anew() -> None:
    """Duplicates are the network's doing."""
    conduct = Conduct()
    assert not any(offend(conduct, 1, 0) for _ in range(20))
    assert [offend(conduct, 1, 0, life=life) for life in range(2, 6)] == [False] * 3 + [True]


def test_a_limit_of_zero_never_shuts_out() -> None:
    """Off means off."""
    conduct = Conduct()
    assert not any(offend(conduct, number, 0, limit=0) for number in range(100))
    assert not conduct.barred(0)
