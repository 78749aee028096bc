"""The lease table under any order of requests, returns and commits: no block twice, none lost, rebuilt exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.coordinator.leases import MOST_LEASED, LeaseTable, deficits, draw
from diloco.ranges import Ranges, both, count, minus, normal, parsed, split

SIZES = (50, 30, 20)

block_sets = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 20)), max_size=25)


def as_ranges(blocks: set[tuple[int, int]]) -> Ranges:
    return normal((shard, at, at + 1) for shard, at in blocks)


def as_blocks(ranges: Ranges) -> list[tuple[int, int]]:
    return [(shard, at) for shard, lo, hi in ranges for at in range(lo, hi)]


@given(block_sets, block_sets, st.integers(0, 30))
def test_ranges_are_sets_of_blocks(a: set[tuple[int, int]], b: set[tuple[int, int]], n: int) -> None:
    """Difference, intersection and division as sets have them; ascending, neighbours joined."""
    left, right = as_ranges(a), as_ranges(b)
    assert as_blocks(left) == sorted(a) and count(left) == len(a)
    assert set(as_blocks(minus(left, right))) == a - b
    assert set(as_blocks(both(left, right))) == a & b
    first, rest = split(left, n)
    assert as_blocks(first) == sorted(a)[:n] and as_blocks(rest) == sorted(a)[n:]
    assert parsed(json.loads(json.dumps(left))) == left


@pytest.mark.parametrize(
    "wrong", [((0, 3, 3),), ((0, 5, 4),), ((-1, 0, 1),), ((0, -1, 1),), ((0, 0, 2), (0, 1, 3))]
)
def test_what_is_no_set_of_blocks_is_refused(wrong: Ranges) -> None:
    with pytest.raises(ValueError):
        normal(wrong)


class Model:
    """A table driven by random decisions, beside what must be so."""

    def __init__(self, shards: int) -> None:
        self.sizes = SIZES[:shards]
        self.table = LeaseTable(seed=7, shards=shards)
        self.journal: list[dict[str, Any]] = []
        self.lives: dict[str, tuple[int, int]] = {}
        self.committed: list[tuple[int, int]] = []

    def request(self, worker: str, want: int, new_life: bool, keep: int) -> None:
        incarnation, number = self.lives.get(worker, (1, 0))
        if new_life:
            incarnation, number = incarnation + 1, 0
        held = self.held(worker)
        kept = split(held, keep)[0] if new_life else ()
        free, ends = set(as_blocks(self.table.free)), list(self.table.ends)
        record = self.table.offer(worker, incarnation, number + 1, want, kept, self.sizes)
        if record is None:
            assert not want and incarnation == self.table.holders[worker].incarnation
            return
        self.apply(record)
        again = self.table.offer(worker, incarnation, number + 1, want, kept, self.sizes)
        assert again is None, "the same request was answered twice"
        self.lives[worker] = incarnation, number + 1
        granted = as_blocks(parsed(record["ranges"]))
        assert len(granted) == want
        back = set(as_blocks(held)) - set(as_blocks(kept)) if new_life else set()
        assert all(block in free | back or block[1] >= ends[block[0]] for block in granted)
        assert len({shard for shard, _ in granted}) <= 1

    def give_back(self, worker: str, keep: int) -> None:
        record = self.table.returning(worker, split(self.held(worker), keep)[0])
        if record is not None:
            self.apply(record)

    def commit(self, worker: str, blocks: int) -> None:
        ranges = split(self.held(worker), blocks)[0]
        self.table.commit(worker, ranges)
        self.journal.append({"type": "commit", "worker": worker, "ranges": [list(r) for r in ranges]})
        self.committed += as_blocks(ranges)

    def held(self, worker: str) -> Ranges:
        return self.table.holders[worker].ranges if worker in self.table.holders else ()

    def apply(self, record: dict[str, Any]) -> None:
        self.table.apply(record)
        self.journal.append(record)

    def require(self) -> None:
        self.table.check()
        assert len(self.committed) == len(set(self.committed)), "a block was committed twice"
        assert sorted(self.committed) == as_blocks(self.table.committed)
        everything = [*as_blocks(self.table.free), *as_blocks(self.table.leased()), *self.committed]
        assert len(everything) == len(set(everything)) == sum(self.table.ends), "a block is lost or doubled"

    def rebuilt(self) -> LeaseTable:
        table = LeaseTable(seed=7, shards=len(self.sizes))
        for record in json.loads(json.dumps(self.journal)):
            if record["type"] == "commit":
                table.commit(record["worker"], parsed(record["ranges"]))
            else:
                table.apply(record)
        return table


names = st.sampled_from(["a", "b", "c"])
steps = st.one_of(
    st.tuples(st.just("request"), names, st.integers(0, 12), st.booleans(), st.integers(0, 12)),
    st.tuples(st.just("give_back"), names, st.integers(0, 8)),
    st.tuples(st.just("commit"), names, st.integers(0, 12)),
)


@settings(deadline=None)
@given(st.integers(1, 3), st.lists(steps, max_size=40))
def test_free_leased_and_committed_are_all_blocks_once(shards: int, moves: list[tuple[Any, ...]]) -> None:
    """After every move; and the journal's records give the same table, down to what it would lease next."""
    model = Model(shards)
    for name, *arguments in moves:
        getattr(model, name)(*arguments)
        model.require()
    rebuilt, table = model.rebuilt(), model.table
    assert vars(rebuilt).keys() == vars(table).keys()
    for name in vars(table):
        assert getattr(rebuilt, name) == getattr(table, name), name
    assert rebuilt.offer("d", 1, 1, 5, (), model.sizes) == table.offer("d", 1, 1, 5, (), model.sizes)


def leased(
    table: LeaseTable, worker: str, want: int, number: int = 1, sizes: tuple[int, ...] = (100,)
) -> Ranges:
    record = table.offer(worker, 1, number, want, (), sizes)
    assert record is not None
    table.apply(record)
    return parsed(record["ranges"])


def test_nobody_commits_what_another_holds_or_what_is_committed() -> None:
    table = LeaseTable(0, 1)
    mine, theirs = leased(table, "a", 10), leased(table, "b", 10)
    with pytest.raises(ValueError, match="does not hold"):
        table.commit("a", theirs)
    table.commit("a", mine)
    with pytest.raises(ValueError, match="does not hold"):
        table.commit("a", mine)
    with pytest.raises(ValueError, match="does not hold"):
        table.commit("nobody", theirs)
    table.check()
    assert table.facts(8) == {
        "free": 0, "leased": 10, "committed": 10, "returned": 0, "tokens": [80], "epochs": [0.1]
    }  # fmt: skip


def test_what_was_returned_is_leased_before_anything_new() -> None:
    table = LeaseTable(0, 1)
    leased(table, "a", 10)
    table.commit("a", ((0, 3, 5),))
    record = table.returning("a")
    assert record is not None
    table.apply(record)
    assert leased(table, "b", 12) == ((0, 0, 3), (0, 5, 14))


def test_an_old_request_and_other_data_lease_nothing() -> None:
    """A duplicate, one of an earlier life, and a worker whose corpus has another size than the committed one."""
    table = LeaseTable(0, 1)
    table.commit("a", leased(table, "a", 4, number=2))
    assert table.offer("a", 1, 2, 4, (), (100,)) is None and table.offer("a", 1, 1, 4, (), (100,)) is None
    for sizes in ((99,), (100, 100), (), (0,)):
        with pytest.raises(ValueError, match="where the run has"):
            table.offer("b", 1, 1, 4, (), sizes)


def test_a_hoarder_gets_a_bounded_number_of_blocks() -> None:
    table = LeaseTable(0, 1)
    leased(table, "a", 1 << 40)
    assert count(table.leased()) == MOST_LEASED
    assert table.offer("a", 1, 2, 1 << 40, (), (100,)) is None


def test_deficit_sampling_follows_what_is_lacking() -> None:
    """Sizes .5/.3/.2, consumed 60/30/10 of 100: weights 0, 0, .1, so the third shard surely (spec, section 11)."""
    assert deficits((50, 30, 20), (60, 30, 10)) == [0, 0, 1000]
    assert deficits((50, 30, 20), (0, 0, 0)) == deficits((50, 30, 20), (5, 3, 2)) == [50, 30, 20]
    assert {draw(1, n, [0, 0, 7]) for n in range(50)} == {2}
    drawn = [draw(1, n, [50, 30, 20]) for n in range(4000)]
    assert drawn == [draw(1, n, [50, 30, 20]) for n in range(4000)]
    for shard, share in enumerate((0.5, 0.3, 0.2)):
        assert drawn.count(shard) / 4000 == pytest.approx(share, abs=0.04)


def test_shares_come_near_the_sizes_and_stay_there() -> None:
    """Whatever is drawn by deficit: after 200 leases no shard is more than two leases from its share."""
    table = LeaseTable(3, 3)
    for number in range(1, 201):
        table.commit("a", leased(table, "a", 8, number, SIZES))
        table.check()
    total = sum(table.consumed)
    for size, done in zip(SIZES, table.consumed, strict=True):
        assert abs(done - total * size / 100) <= 16
