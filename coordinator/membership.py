"""Who takes part: members, their lives (incarnations), and what silence means. No I/O."""

from __future__ import annotations

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
    finished: str = ""
    digest: str = ""
    versions: tuple[int, ...] = ()
    progress: Progress = field(default_factory=Progress)

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
