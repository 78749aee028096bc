"""The checks behind `diloco chaos`: silent on a sound journal, and each speaks up for the violation it is there for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from diloco.chaos import checks
from diloco.chaos.checks import Holding

Records = list[dict[str, Any]]


def commit(fragment: int, version: int, rounds: tuple[int, ...] = (), **other: Any) -> dict[str, Any]:
    numbers = rounds or (version, version)
    return {
        "type": "commit",
        "fragment": fragment,
        "version": version,
        "contributors": [f"w{i}" for i in range(len(numbers))],
        "indices": list(range(len(numbers))),
        "weights": [1 / len(numbers)] * len(numbers),
        "rounds": list(numbers),
        "tokens": [10] * len(numbers),
        "digest": f"{fragment}-{version}",
        **other,
    }


def sound() -> Records:
    return [
        {"type": "start", "plan": "{}", "epoch": 1, "members": []},
        *({"type": "initial", "fragment": p, "digest": f"{p}-0"} for p in (0, 1)),
        *(commit(p, v) for v in (1, 2, 3) for p in (0, 1)),
        {"type": "epoch", "epoch": 2},
        {"type": "member", "worker": "w1", "index": 1, "incarnation": 2},
        commit(0, 4, (4, 3)),  # the new life of w1 repeats a round of its last one
        {"type": "complete", "versions": [4, 3], "digest": "end"},
    ]


def report() -> dict[str, Any]:
    workers = [{"id": f"w{i}", "live": True, "digest": "end"} for i in (0, 1)]
    return {"commits": 7, "workers": workers, "global_digest": "end"}


def test_a_sound_run_violates_nothing() -> None:
    """Restarts and new lives included."""
    records = sound()
    assert checks.gaps(records) == []
    assert checks.counted_twice(records) == []
    assert checks.lost(records[:4], records) == []
    assert checks.ahead(records, [{"id": "w0", "versions": [4, 3]}, {"id": "new", "versions": []}]) == []
    assert checks.unequal(records, [Holding("w0", 0, 4, "0-4"), Holding("w1", 1, 0, "1-0")]) == []
    assert checks.unlike_the_end(records, report(), "end") == []


def _drop(records: Records) -> None:
    del records[5]


def _double(records: Records) -> None:
    records.insert(6, copy.deepcopy(records[5]))


@pytest.mark.parametrize(("plant", "words"), [(_drop, "missing"), (_double, "doubled")])
def test_a_missing_and_a_doubled_version_are_seen(plant: Callable[[Records], None], words: str) -> None:
    """Fragment and version are named."""
    records = sound()
    plant(records)
    (found,) = checks.gaps(records)
    assert words in found and "fragment 0" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"indices": [0, 0]}, "counted twice"),
        ({"weights": [0.5, 0.4]}, "sum to 0.9"),
        ({"rounds": [1, 2]}, "round 1 of worker 0 had been counted before"),
    ],
)
def test_work_that_counts_twice_is_seen(change: dict[str, Any], words: str) -> None:
    """In one commit, or in two of the same life."""
    records = sound()
    records[5] |= change
    assert any(words in found for found in checks.counted_twice(records))


def test_a_round_repeated_without_a_new_life_is_seen() -> None:
    """It is the member record that excuses the repetition."""
    records = [r for r in sound() if r["type"] != "member"]
    assert len(checks.counted_twice(records)) == 1


def test_a_record_that_is_gone_or_changed_is_seen() -> None:
    """A journal may grow only at its end."""
    before = sound()
    assert "gone" in checks.lost(before, before[:-1])[0]
    after = sound()
    after[3]["digest"] = "other"
    assert "changed" in checks.lost(before, after)[0]


def test_a_worker_ahead_of_the_journal_is_seen() -> None:
    """It has heard of a commit that a restart would not know."""
    (found,) = checks.ahead(sound(), [{"id": "w0", "versions": [4, 4]}])
    assert "w0" in found and "version 4 of fragment 1" in found


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (Holding("w0", 0, 4, "0-3"), "is 0-3, not 0-4"),
        (Holding("w0", 1, 0, "bad"), "is bad, not 1-0"),
        (Holding("w0", 0, 5, "0-5"), "not in the journal"),
    ],
)
def test_a_replica_that_differs_is_seen(held: Holding, words: str) -> None:
    """At a committed version, at the starting value, or at a version that never was."""
    (found,) = checks.unequal(sound(), [held])
    assert words in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r, j: r.update(commits=6), "counts 6"),
        (lambda r, j: r["workers"][1].update(digest="x"), "w1 ended with x"),
        (lambda r, j: r.update(workers=[]), "no worker"),
        (lambda r, j: j.pop(), "complete"),
        (lambda r, j: r.update(global_digest="x"), "the journal repeated"),
    ],
)
def test_an_end_that_does_not_fit_is_seen(change: Callable[..., Any], words: str) -> None:
    """Commits, replicas, the end itself, and what a rebuilt run gives."""
    records, told = sound(), report()
    change(told, records)
    assert any(words in found for found in checks.unlike_the_end(records, told, "end"))


def test_tokens_of_liars_are_not_committed_work() -> None:
    """The mean over fragments of what the others contributed."""
    assert checks.committed_tokens(sound(), 2) == 70.0
    assert checks.committed_tokens(sound(), 2, frozenset({"w1"})) == 35.0
