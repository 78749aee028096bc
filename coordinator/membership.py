"""Who takes part: members, their lives (incarnations), and what silence means. No I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from diloco.comms.messages import Progress
from diloco.config import Fault


class Status(StrEnum):
    JOINING = "joining"  # waiting for the start cohort
    SYNCING = "syncing"  # fetching the run's parameters
    ACTIVE = "active"
    SUSPECT = "suspect"
    DEAD = "dead"
    GONE = "gone"  # left by its own word


LIVE = frozenset({Status.JOINING, Status.SYNCING, Status.ACTIVE, Status.SUSPECT})


WINDOW_ROUNDS = 20  # of every fragment: bad contributions older than this are forgotten
COOL_OFF_ROUNDS = 10  # of every fragment: for so long a worker is shut out


@dataclass(slots=True)
class Conduct:
    """A worker's bad contributions, over all its lives, and whether it is shut out for them.

    Time is counted in ended rounds of the run, committed or aborted, so that it passes even if nobody else is there.
    """

    offences: dict[tuple[int, int, int], int] = field(default_factory=dict)  # what was bad -> when
    barred_until: int = 0

    def offend(self, what: tuple[int, int, int], ended: int, fragments: int, limit: int) -> bool:
        """Note that the contribution `what` was bad; a repetition counts once. True if that shuts the worker out."""
        since = ended - WINDOW_ROUNDS * fragments
        self.offences = {k: at for k, at in self.offences.items() if at > since or k == what}
        self.offences.setdefault(what, ended)
        if not limit or len(self.offences) < limit:
            return False
        self.offences.clear()
        self.barred_until = ended + COOL_OFF_ROUNDS * fragments
        return True

    def barred(self, ended: int) -> bool:
        return ended < self.barred_until


@dataclass(slots=True)
class Member:
    """One worker. `index` is its number in frames and sums, -1 until the start cohort is complete."""

    name: str
    nonce: int
    incarnation: int
    last_seen: float
    status: Status = Status.JOINING
    index: int = -1
    # Fragments whose rounds do not wait for this member. Left out of one commit it is waited for in none, so that
    # a hung trainer with a live heartbeat costs the others one grace period, once; each fragment for which it
    # sends again, be it too late, waits for it again, so that it finds back into the rounds.
    lagging: set[int] = field(default_factory=set)
    cohort: bool = False  # in its first life, and here since the start
    in_step: bool = False  # a commit of this life counted it: it is in the same rounds as the others
    passes: int = 0  # rounds it was sent on from before that
    finished: str = ""
    done: bool = False  # it has sent its last contribution and waits for the run's final value
    moved: float = 0.0  # when its trainer last gave a sign of life
    digest: str = ""
    versions: tuple[int, ...] = ()
    progress: Progress = field(default_factory=Progress)
    # What this worker has sent in this life: contributions that passed the gates.
    steps: int = 0
    tokens: int = 0
    shard: int = 0  # tokens of its data, as its first contribution said; 0 while unknown
    rejected: Counter[str] = field(default_factory=Counter)  # by cause
    conduct: Conduct = field(default_factory=Conduct)
    differed: dict[int, str] = field(
        default_factory=dict
    )  # by fragment the last digest it reported as its own

    def __post_init__(self) -> None:
        self.moved = self.last_seen

    @property
    def tokens_per_step(self) -> float:
        """The mean so far; 0 while unknown."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def live(self) -> bool:
        return self.status in LIVE

    def expires(self, fault: Fault) -> float | None:
        """When silence changes this member's status next."""
        if self.status is Status.SUSPECT:
            return self.last_seen + fault.dead_s
        if self.live:
            return self.last_seen + fault.suspect_s
        return None

    def expire(self, fault: Fault, now: float) -> bool:
        """Apply the passing of time; True if the status changed."""
        before = self.status
        if self.live and now >= self.last_seen + fault.dead_s:
            self.status = Status.DEAD
        elif self.live and self.status is not Status.SUSPECT and now >= self.last_seen + fault.suspect_s:
            self.status = Status.SUSPECT
        return self.status is not before
