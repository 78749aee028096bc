"""What the peers of a run without a coordinator say to each other, as values. No encoding, no transport.

Any of them may lead; what a leader and its followers say to each other are the messages of `diloco.comms.messages`,
each within `Under`, so that what a leader said before it was replaced is known by its epoch. Every message may arrive
twice. The rules are in `diloco.peer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diloco.comms.messages import Commit, Message, Snapshot

Head = tuple[int, str]  # a fragment's newest version at a peer, and its digest; (-1, "") while it has none


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's place in the run, as every leader must know it."""

    worker: str
    nonce: int
    incarnation: int
    index: int
    cohort: bool  # in its first life, and here since the start
    gone: bool  # left by its own word
    finished: str  # "complete", or ""


@dataclass(frozen=True, slots=True)
class Beacon:
    """Sign of life, of everybody to everybody: whom I follow and what I hold. With my own name in it: follow me."""

    peer: str
    epoch: int
    leader: str  # "": nobody yet
    able: bool  # holds the value of every fragment: it can lead the run on
    heads: tuple[Head, ...]  # by fragment
    whole: tuple[
        int, ...
    ]  # by fragment the newest version of which it has the commit with all frames; 0: none
    step: int
    seats: tuple[Seat, ...] = ()
    ruling: bool = False  # of the leader alone: it knows all that its followers know, and takes contributions
    founded: tuple[Head, ...] = ()  # what the ruling leader began with


@dataclass(frozen=True, slots=True)
class Ask:
    """To who has the newest version of this fragment: hand it to me, I am about to lead."""

    epoch: int
    leader: str
    fragment: int


@dataclass(frozen=True, slots=True)
class Handover:
    """A fragment with its outer state and the commit that made it: to a candidate, and with a leader's snapshots.

    Whoever has it can lead: it knows which rounds counted, and can publish the commit should that not have happened.
    """

    epoch: int
    leader: str
    value: Snapshot = field(repr=False)
    commit: Commit | None = field(repr=False)  # with every contributor's frame; None if it is not whole here


@dataclass(frozen=True, slots=True)
class Under:
    """`message` belongs to the epoch of this leader; whoever follows another drops it."""

    epoch: int
    leader: str
    message: Message


BetweenPeers = Beacon | Ask | Handover | Under
