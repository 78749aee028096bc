"""What a worker keeps per fragment, and the heavy jobs on it (encode, open, restore) as plain functions.

The state machine that decides when to run them is in `diloco.worker.replica`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from diloco import outer
from diloco.comms import downlink, frame
from diloco.comms.codec import Codec
from diloco.comms.feedback import ErrorFeedback
from diloco.comms.messages import Commit, Snapshot, Welcome
from diloco.config import RunConfig
from diloco.delta import merge, merge_delay_corrected
from diloco.errors import CorruptDataError
from diloco.fragments import FragmentPlan
from diloco.late import base_state
from diloco.overlap import outer_optimizer
from diloco.robust import MEAN, Rule, rule_of


class Parameters(Protocol):
    """The worker's copy of the model, fragment by fragment, as flat fp32 tensors."""

    def read(self, fragment: int) -> Tensor:
        """A copy of the fragment's current values [numel]."""
        ...

    def write(self, fragment: int, values: Tensor) -> None: ...


@dataclass(slots=True)
class Flight:
    """A round of one fragment between its send and its merge."""

    round: int
    base: int
    due: int  # the inner step at which it is merged
    alpha: float
    steps: int
    tokens: int
    sent: Tensor | None = None  # the parameters as they were sent, kept for delay_corrected only
    delta: Tensor | None = None  # what is to be encoded, until it is
    frame: bytes | None = None
    label: tuple[int, int] = (-1, -1)  # index and incarnation in the frame's header
    since: float = 0.0
    outcome: str = ""  # "", "merged-in", "left-out", "aborted"
    overwrite: bool = False  # local values are not fit to keep (non-finite), or are the global ones anyway
    refused: bool = False  # the coordinator will not have this contribution: do not offer it again
    own: Tensor | None = None  # the pseudo-gradient itself, kept where the next boundary needs it
    final: bool = False  # the round that ends the run
    counted: bool = False  # in a commit that could not be opened here: a snapshot brings its value
    rejected: bool = False  # told that it does not count: in async mode the next value is then the answer
    passed: bool = False  # a commit is here that does not count it: see `diloco.worker.replica_late`
    accepted: bool = False  # told that it came late and will be in the next commit


@dataclass(slots=True)
class Turn:
    """A round that has ended and has not left yet: the one before it is not taken in."""

    round: int
    at: int  # the inner step of the run at which it ended
    delta: Tensor | None = None  # measured already in whole-round overlap, else when it leaves
    steps: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Slot:
    """One fragment at this worker. `shard` is the anchor: what the worker last took, or is about to take.

    Once training has begun the anchor moves only while a round is in flight; what arrives between rounds waits.
    """

    index: int
    shard: outer.OuterShard | None = None
    feedback: ErrorFeedback | None = None
    flight: Flight | None = None
    steps: int = 0  # inner steps since the last send
    tokens: int = 0
    jobs: int = 0  # decode jobs not yet back
    target: int = 0  # the version that they lead to; meanwhile the anchor's own may change on another thread
    restoring: bool = False  # the job under way takes a snapshot
    waiting: dict[int, Commit] = field(default_factory=dict)  # commits to be applied, by version
    kept: Snapshot | None = None  # a snapshot to be taken, like `waiting`
    adopt: bool = False  # take the anchor as it is: after the first snapshot
    broken: bool = False  # a commit could not be applied: only a snapshot helps
    differs: str = ""  # the digest that the last commit gave here, if it names another
    turn: Turn | None = None
    # Whole-round overlap only: where this worker's round started (eager: with its own outer state), and what an
    # aborted round leaves for the next.
    own: outer.OuterShard | None = None
    carry: Tensor | None = None
    told: int = 0  # inner steps per H that the last commit asks of this worker; 0: none

    @property
    def version(self) -> int:
        return self.shard.version if self.shard else 0

    def forget(self) -> None:
        """Become a newcomer's slot: the run's value is taken whole, as soon as a snapshot is here."""
        self.shard = self.flight = self.kept = None
        self.turn = self.own = self.carry = None
        self.steps = self.tokens = 0
        self.waiting.clear()
        if self.feedback is not None:
            self.feedback = ErrorFeedback(self.feedback.codec, self.feedback.beta)

    @property
    def reached(self) -> int:
        """The anchor's version once the jobs under way are back."""
        return self.target if self.jobs and not self.restoring else self.version

    @property
    def known(self) -> int:
        """The newest version that needs nothing more from the coordinator."""
        version = self.reached
        if self.kept is not None:
            version = max(version, self.kept.version)
        while version + 1 in self.waiting:
            version += 1
        return version


def is_of_plan(message: object, fragments: int) -> bool:
    """Whether a message from outside is about the `fragments` that there are: the one it names, or all of them."""
    if isinstance(message, Welcome):
        return len(message.versions) == fragments
    return 0 <= getattr(message, "fragment", 0) < fragments


def merged(flight: Flight, local: Tensor, new: Tensor) -> Tensor:
    """What the worker goes on with, fp32 [n], when its round is over and the anchor has become `new`."""
    if flight.overwrite:
        return new
    if flight.sent is not None:
        return merge_delay_corrected(local, new, flight.sent)
    return merge(local, new, flight.alpha)


def start_shard(config: RunConfig, values: Tensor) -> outer.OuterShard:
    """A fresh anchor with `values` [n]; with the outer state only where workers step themselves."""
    optimizer = outer_optimizer(config)
    if config.codec.down in downlink.WORKERS_STEP:
        shard = outer.OuterShard.start(optimizer, values)
        if config.codec.down == "relay":
            shard.state.update(rule_of(config).state(values.numel()))
            shard.state.update(base_state(config, values.numel()))
        return shard
    return outer.OuterShard(optimizer, values.clone())


def apply_commit(
    slot: Slot,
    commit: Commit,
    mode: str,
    codec: Codec,
    index: int,
    *,
    rule: Rule = MEAN,
    pieces: downlink.Pieces = (),
) -> None:
    """Move the anchor by one commit, or to its version if it brings the whole value. CorruptDataError if that is impossible or gives another digest."""
    shard, frames, flight = slot.shard, commit.frames, slot.flight
    assert shard is not None
    # After one that could not be applied the next ones, which were under way, would only give wrong values.
    if mode not in downlink.WHOLE and commit.version != shard.version + 1:
        reason = f"fragment {slot.index}: version {commit.version} cannot follow {shard.version}"
        raise CorruptDataError(reason)
    # Twice with a round that came late, which is among `frames`.
    counted = sum(i == index for i, _ in commit.weights)
    if mode == "relay" and counted > sum(i == index for i, _ in frames):
        if flight is None or flight.frame is None:
            raise CorruptDataError(f"fragment {slot.index} version {commit.version}: our own frame is gone")
        frames = (*frames, (index, flight.frame))
    downlink.open_commit(mode, shard, frames, commit.weights, codec, rule=rule, pieces=pieces)
    shard.version = commit.version
    if (held := frame.digest(shard.params)) != commit.digest:
        slot.differs = held
        raise CorruptDataError(f"fragment {slot.index} version {commit.version}: digests differ")


def shard_of(snapshot: Snapshot, plan: FragmentPlan, config: RunConfig) -> outer.OuterShard:
    """The anchor that a snapshot describes. CorruptDataError if its size, frames or digest are not right."""
    if not snapshot.frames:
        raise CorruptDataError(f"snapshot of fragment {snapshot.fragment} is empty")
    values = frame.decode_frame(snapshot.frames[0][1])[1]
    if values.numel() != plan.fragments[snapshot.fragment].numel or frame.digest(values) != snapshot.digest:
        raise CorruptDataError(f"snapshot of fragment {snapshot.fragment}: size or digest differs")
    shard = start_shard(config, values)
    downlink.load_snapshot(shard, snapshot.frames, snapshot.version)
    return shard
