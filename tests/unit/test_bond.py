"""Votes about a bond: never can both sides end it, and what counts as standing at the end of a journal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.comms.following import link
from diloco.comms.messages import Vote
from diloco.coordinator.bond import Bond, bond_of, bond_record, confirmed_record, end_record, standing
from diloco.errors import StorageError

WITNESSES = tuple((f"w{i}", 100 + i) for i in range(6))


def bond(count: int, index: int = 3) -> Bond:
    return Bond("s", index, 1, WITNESSES[:count])


@given(st.lists(st.sampled_from(["", "s", None]), min_size=1, max_size=6))
def test_one_side_at_most_can_end_a_bond_and_one_does_when_all_have_voted(sides: list[str | None]) -> None:
    """Each side counts what it heard itself; a witness told both the same."""
    coordinators, standbys = bond(len(sides)), bond(len(sides))
    for (name, nonce), side in zip(WITNESSES, sides, strict=False):
        if side is not None:
            for heard in (coordinators, standbys):
                heard.hear(Vote(name, nonce, heard.name, side))
    ended = coordinators.ended_by_coordinator(), standbys.ended_by_standby()
    assert sum(ended) <= 1
    assert sum(ended) == 1 or None in sides


@pytest.mark.parametrize(
    ("count", "coordinator", "standby"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 3, 2), (5, 3, 3), (6, 4, 3)]
)
def test_the_coordinator_needs_more_than_half_and_the_standby_half(
    count: int, coordinator: int, standby: int
) -> None:
    """One vote fewer does not do."""
    for side, needed in (("", coordinator), ("s", standby)):
        held = bond(count)
        for number, (name, nonce) in enumerate(held.witnesses[:needed], start=1):
            assert not (held.ended_by_coordinator() or held.ended_by_standby())
            held.hear(Vote(name, nonce, held.name, side))
            assert len(held.missing()) == count - number
        assert (held.ended_by_coordinator(), held.ended_by_standby()) == (side == "", side == "s")


def test_only_the_first_vote_of_a_witness_in_this_bond_counts() -> None:
    """Not a stranger's, not that of another life, not one about another bond, and no second one."""
    held = bond(1)
    for vote in (
        Vote("x", 100, held.name, ""),
        Vote("w0", 7, held.name, ""),
        Vote("w0", 100, bond(1, 4).name, ""),
    ):
        held.hear(vote)
        assert not held.votes
    held.hear(Vote("w0", 100, held.name, "s"))
    held.hear(Vote("w0", 100, held.name, ""))
    assert held.ended_by_standby() and not held.ended_by_coordinator()


def test_a_bond_without_witnesses_is_ended_by_nobody() -> None:
    """No votes are no majority."""
    assert not bond(0).ended_by_standby() and not bond(0).ended_by_coordinator()


def test_a_restart_reckons_with_every_bond_that_the_standby_may_have() -> None:
    """The newest, and the one before it unless the standby surely had the newest; none after an end."""
    first, second = (bond_record("s", 1, WITNESSES[:n]).record for n in (2, 1))
    commit = {"type": "commit"}
    one, two = standing([commit, first, commit, second])
    assert (one.index, two.index) == (1, 3) and one.witnesses == WITNESSES[:2]
    confirmed = [commit, first, commit, second, confirmed_record(two).record]
    assert [found.index for found in standing(confirmed)] == [3]
    assert standing([*confirmed, end_record("dropped").record]) == []
    assert standing([commit]) == []


def test_a_damaged_bond_is_an_error() -> None:
    """It must not be taken for none."""
    with pytest.raises(StorageError, match="record 7"):
        bond_of({"type": "standby", "attached": True, "witnesses": [["w0"]], "node": "s", "epoch": 1}, 7)


def test_the_chain_tells_journals_apart_wherever_they_keep_their_bulk_data() -> None:
    """Another record, another order or another beginning gives another digest; "blobs" does not count."""
    a, b = {"type": "commit", "version": 1}, {"type": "commit", "version": 2}
    assert link("", a) != link("", b)
    assert link(link("", a), b) != link(link("", b), a)
    assert link("", {**a, "blobs": {"file": "00000001.bin", "sizes": [1]}}) == link(
        "", dict(reversed(a.items()))
    )
