"""One round of one fragment: who has answered, and when it is time to commit or to give up. No I/O."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from diloco.comms.messages import Buffer
from diloco.config import Fault
from diloco.ranges import Ranges


class Verdict(StrEnum):
    WAIT = "wait"
    COMMIT = "commit"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Answer:
    """A contribution that passed the gates; `round` is the sender's own number for it."""

    index: int
    round: int
    tokens: int
    frame: Buffer = field(repr=False)
    steps: int = 1
    norm: float = 0.0  # of the decoded values
    shard: int = 0  # tokens of the sender's data, under weights.mode = "shard"
    staleness: int = 0  # commits between the value it was measured from and the newest one
    ranges: Ranges = ()  # the leased blocks that it was made with


@dataclass(frozen=True, slots=True)
class Committed:
    """The newest commit of a fragment, kept to answer resends and latecomers."""

    version: int
    at: float
    weights: tuple[tuple[int, float], ...]
    rounds: tuple[tuple[int, int], ...]
    digest: str
    frames: tuple[tuple[int, Buffer], ...] = field(repr=False)
    local_steps: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Round:
    """OPEN -> QUORUM -> GRACE -> COMMITTED | ABORTED, for one fragment at one base version."""

    opened: float
    answers: dict[int, Answer] = field(default_factory=dict)  # by worker index
    skipped: dict[int, int] = field(default_factory=dict)  # worker index -> round it had nothing for
    quorum_at: float | None = None

    def has(self, index: int) -> bool:
        return index in self.answers or index in self.skipped

    def waits_for(self, expected: Collection[int]) -> list[int]:
        return [index for index in expected if not self.has(index)]

    def judge(
        self, expected: Collection[int], quorum: int, grace_s: float, timeout_s: float, now: float
    ) -> Verdict:
        """Commit when every expected member has answered, or a quorum has and the grace period is over."""
        if not self.waits_for(expected):
            return Verdict.COMMIT if self.answers else Verdict.ABORT
        if len(self.answers) >= quorum:
            if self.quorum_at is None:
                self.quorum_at = now
            return Verdict.COMMIT if now >= self.quorum_at + grace_s else Verdict.WAIT
        self.quorum_at = None  # a member came back, or took its answer back
        return Verdict.ABORT if now >= self.opened + timeout_s else Verdict.WAIT

    def deadline(self, grace_s: float, timeout_s: float) -> float:
        return self.opened + timeout_s if self.quorum_at is None else self.quorum_at + grace_s


GRACE_FLOOR_S = 30.0


@dataclass(slots=True)
class Arrivals:
    """Learns from past rounds how far apart honest members arrive, so that nobody has to guess a timeout."""

    spread_s: float = 0.0

    def learn(self, first: float, last: float) -> None:
        self.spread_s = max(last - first, 0.8 * self.spread_s + 0.2 * (last - first))

    def grace_s(self, fault: Fault, slack_s: float = 0.0) -> float:
        """How long a round with a quorum waits for the rest.

        As long as members have been apart, three times over, and at least the floor; or longer, for the share `gamma`
        of `slack_s`, the time in which nobody needs the result yet (see `diloco.coordinator.pace.slack_s`).
        """
        if fault.fixed_grace_s is not None:
            return fault.fixed_grace_s
        learnt = max(GRACE_FLOOR_S, 3.0 * self.spread_s)
        return min(fault.round_timeout_s, max(learnt, fault.gamma * slack_s))
