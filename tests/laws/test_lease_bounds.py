"""What one worker can do to the lease table and to the others: few pieces, fair shares, no say in the data's size."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.comms.convert import coordinator_from_proto, coordinator_to_proto
from diloco.comms.messages import Lease
from diloco.coordinator.leases import MOST_LEASED, OFFERED, LeaseTable
from diloco.ranges import MAX_RANGES, Ranges, count, minus, parsed, union

pairs = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12), st.integers(0, 12)), max_size=8)


def blocks(ranges: Ranges) -> list[tuple[int, int]]:
    return [(shard, at) for shard, lo, hi in ranges for at in range(lo, hi)]


def every_other(lo: int, pieces: int) -> Ranges:
    return tuple((0, at, at + 1) for at in range(lo, lo + 2 * pieces, 2))


def asks(
    table: LeaseTable,
    worker: str,
    want: int,
    *,
    life: int = 1,
    number: int = 1,
    kept: Ranges = (),
    sizes: tuple[int, ...] = (1000,),
) -> Ranges:
    """What the worker gets; the table goes on."""
    record = table.offer(worker, life, number, want, kept, sizes)
    if record is None:
        return ()
    table.apply(json.loads(json.dumps(record)))
    table.check()
    return parsed(record["ranges"])


@given(pairs, pairs)
def test_anything_can_be_taken_away_from_ranges_in_any_order(left: Ranges, other: Ranges) -> None:
    """Overlapping, empty and unsorted ranges included: what is left has the order of the first argument."""
    left, other = tuple(left), tuple(other)
    gone = set(blocks(other))
    assert blocks(minus(left, other)) == [block for block in blocks(left) if block not in gone]
    assert blocks(union(left, other)) == sorted({*blocks(left), *blocks(other)})


def test_many_ranges_are_compared_without_comparing_all_with_all() -> None:
    """2^17 pieces less 2^17 others: every pair would be 10^10 comparisons, hours and not a second."""
    pieces = 1 << 17
    assert minus(every_other(0, pieces), every_other(1, pieces)) == every_other(0, pieces)
    assert minus(((0, 0, 2 * pieces),), every_other(1, pieces)) == every_other(0, pieces)


def test_a_new_life_cannot_leave_more_than_so_many_pieces() -> None:
    """It names every other block as kept: it keeps them all, and nobody gets the rest in crumbs."""
    table = LeaseTable(0, 1)
    asks(table, "x", 10000)
    asks(table, "x", 0, life=2, kept=every_other(0, MAX_RANGES + 1))
    assert table.held("x") == ((0, 0, 10000),) and not table.free
    asks(table, "x", 0, life=3, kept=every_other(0, MAX_RANGES))
    assert len(table.held("x")) == MAX_RANGES


def test_a_lease_of_crumbs_is_bounded_whole_and_can_be_sent() -> None:
    """Whoever returns thousands of pieces: others get a bounded number of them, the rest of what they want in one."""
    table = LeaseTable(0, 1)
    begins = {name: asks(table, name, 10 * MAX_RANGES)[0][1] for name in "uvwxyz"}
    for name, lo in begins.items():
        asks(table, name, 0, life=2, kept=every_other(lo, MAX_RANGES))
    assert len(table.free) > 5 * MAX_RANGES
    for number in range(1, 9):
        assert count(asks(table, "honest", 500, number=number)) == 500
    held = table.held("honest")
    assert OFFERED <= len(held) <= MAX_RANGES
    message = Lease(1, 8, table.serial, held)
    assert coordinator_from_proto(coordinator_to_proto(message)) == message
    assert asks(table, "x", 500, life=2, number=2) == (), "who has too many pieces gets no more"


def test_a_commit_that_scatters_a_lease_is_told_from_one_that_uses_it_up() -> None:
    table = LeaseTable(0, 1)
    asks(table, "a", 10000)
    assert not table.scatters("a", every_other(1, MAX_RANGES - 1))
    assert table.scatters("a", every_other(1, MAX_RANGES))
    table.commit("a", every_other(1, MAX_RANGES - 1))
    assert len(table.held("a")) == MAX_RANGES
    assert not table.scatters("a", ((0, 0, 1),)) and table.scatters("a", ((0, 9000, 9001),))


def test_a_request_that_changes_nothing_makes_no_record() -> None:
    """So a worker that asks for nothing again and again writes nothing; its first request says which life it is."""
    table = LeaseTable(0, 1)
    assert table.offer("a", 1, 1, 0, (), (1000,)) is not None
    asks(table, "a", 0)
    assert all(table.offer("a", 1, number, 0, (), (1000,)) is None for number in range(1, 50))
    assert table.offer("a", 1, 50, 1, (), (1000,)) is not None


def test_who_asks_first_does_not_say_how_large_the_data_is() -> None:
    """Nor who says it twice; the first commit does, and then whoever says otherwise is told."""
    table = LeaseTable(0, 1)
    asks(table, "liar", 0, sizes=(7,))
    mine = asks(table, "a", 10)
    assert mine and not table.disagreement("a")
    with pytest.raises(ValueError, match=r"\[9\] blocks in 1 shards where the run has \[7\]"):
        asks(table, "liar", 5, number=2, sizes=(9,))
    asks(table, "b", 10)
    assert table.disagreement("liar") and not table.disagreement("a"), "most say 1000"
    table.commit("a", mine)
    assert table.sizes == (1000,)
    with pytest.raises(ValueError, match=r"where the run has \[1000\]"):
        asks(table, "liar", 5, number=2, sizes=(7,))
    asks(table, "liar", 5, life=2)
    assert not table.disagreement("liar"), "it was put right"


def test_where_one_says_this_and_one_that_the_first_commit_decides() -> None:
    table = LeaseTable(0, 1)
    asks(table, "a", 10, sizes=(7,))
    mine = asks(table, "b", 10)
    assert table.agreed() == () and not table.disagreement("a") and not table.disagreement("b")
    table.commit("b", mine)
    assert table.disagreement("a") and not table.disagreement("b")


def test_who_hoards_one_shard_does_not_keep_the_others_from_it() -> None:
    """Its blocks count for at most twice what the median worker has: the others' shares come near the sizes."""
    table, sizes = LeaseTable(3, 3), (50, 30, 20)
    hoard = asks(table, "hoarder", MOST_LEASED, sizes=sizes)
    for number in range(1, 201):
        for name in "ab":
            table.commit(name, asks(table, name, 8, number=number, sizes=sizes))
    assert count(hoard) == MOST_LEASED
    for size, done in zip(sizes, table.consumed, strict=True):
        assert done == pytest.approx(200 * 16 * size / 100, abs=50)
