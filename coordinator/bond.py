"""The bond between a coordinator and the standby that may replace it, as both journals tell it. Pure.

While a bond stands the coordinator answers workers only with what is on the standby's disk as well, and the standby
may take over. One of the two can end it alone, if the other does not answer, with the votes of the bond's witnesses:
workers, each of whom votes once. The coordinator needs more than half of them, the standby half: never both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diloco.comms.machine import Persist
from diloco.comms.messages import Vote
from diloco.errors import StorageError

COORDINATOR_SIDE = ""

Witness = tuple[str, int]  # a worker's name and the nonce of its life: a new life has no memory of its vote


@dataclass(slots=True)
class Bond:
    """`index` is the number of its record; `votes` are those that were heard, here, by witness."""

    node: str  # the standby's
    index: int
    epoch: int
    witnesses: tuple[Witness, ...]
    votes: dict[Witness, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The same on both sides, and never used twice."""
        return f"{self.epoch}/{self.index}/{self.node}"

    def hear(self, vote: Vote) -> None:
        witness = (vote.worker, vote.nonce)
        if vote.attachment == self.name and witness in self.witnesses:
            self.votes.setdefault(witness, vote.side)

    def missing(self) -> list[str]:
        """Witnesses whose vote was not heard yet."""
        return [name for name, nonce in self.witnesses if (name, nonce) not in self.votes]

    def ended_by_coordinator(self) -> bool:
        return 2 * self._count(COORDINATOR_SIDE) > len(self.witnesses)

    def ended_by_standby(self) -> bool:
        return bool(self.witnesses) and 2 * self._count(self.node) >= len(self.witnesses)

    def _count(self, side: str) -> int:
        return sum(1 for vote in self.votes.values() if vote == side)


def bond_record(node: str, epoch: int, witnesses: Sequence[Witness]) -> Persist:
    return Persist(
        {
            "type": "standby",
            "attached": True,
            "node": node,
            "epoch": epoch,
            "witnesses": [list(w) for w in witnesses],
        }
    )


def end_record(reason: str, node: str = "") -> Persist:
    """`node`: the standby that has taken over, if one has."""
    return Persist({"type": "standby", "attached": False, "reason": reason, "node": node})


def bond_of(record: Mapping[str, Any], index: int) -> Bond | None:
    """The bond that this record, number `index` of its journal, begins; None if it ends one."""
    try:
        if not record["attached"]:
            return None
        witnesses = tuple((str(name), int(nonce)) for name, nonce in record["witnesses"])
        return Bond(str(record["node"]), index, int(record["epoch"]), witnesses)
    except (KeyError, TypeError, ValueError):
        raise StorageError(
            f"journal: record {index} is a damaged standby record; restore the journal from a copy"
        ) from None


def confirmed_record(bond: Bond) -> Persist:
    """The standby has this bond, so that the one before it no longer counts."""
    return Persist({"type": "bonded", "index": bond.index})


def standing(records: Iterable[Mapping[str, Any]]) -> list[Bond]:
    """The bonds at the end of a journal that its standby may have: the newest, after the last that it surely had."""
    found: list[Bond] = []
    for index, record in enumerate(records):
        if record["type"] == "standby":
            bond = bond_of(record, index)
            found = [] if bond is None else [*found, bond][-2:]
        elif record["type"] == "bonded":
            found = [bond for bond in found if bond.index >= record["index"]]
    return found
