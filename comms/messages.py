"""What workers and the coordinator say to each other, as values. No encoding, no transport.

Bulk data (frames) rides in `frame` or `frames`; a transport may carry it apart from the rest of the message.
Every message is idempotent: a duplicate is ignored or answered again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from diloco.comms.following import FromPrimary, FromStandby
from diloco.comms.peering import BetweenPeers
from diloco.ranges import Ranges

Buffer = bytes | bytearray | memoryview

PROTOCOL = 1
COUNTS_LATER = "counted later"  # reason of a Rejected: it came late and will be in the fragment's next commit
FLUSHED = "flushed"  # reason of a Leave: our last contribution is sent, we wait for the run's final value


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a worker's training is; times in seconds since its start, losses in nats per byte (NaN: unknown)."""

    step: int = 0
    tokens: int = 0
    loss: float = float("nan")
    lr: float = float("nan")
    tokens_per_s: float = 0.0
    compute_s: float = 0.0
    exposed_s: float = 0.0
    hidden_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    eval_start: float = float("nan")
    eval_end: float = float("nan")
    steps_per_s: float = 0.0  # of computing alone, recent mean
    link_up_bps: float = float("nan")  # bit/s that its transfers reached, towards the coordinator
    link_down_bps: float = float("nan")
    rtt_s: float = float("nan")  # shortest round trip of a small call
    peak_up_bps: float = 0.0  # bit/s, highest mean over a second
    peak_down_bps: float = 0.0


# ---- from a worker ----


@dataclass(frozen=True, slots=True)
class Join:
    """I want in. `nonce` names this life of the process: the same nonce again is a reconnect, not a new life."""

    worker: str
    nonce: int
    run_id: str
    plan: str  # FragmentPlan.describe(): names, shapes, dtypes and fragments, as JSON
    settings: str  # the protocol's part of the configuration, as JSON
    versions: tuple[int, ...] = ()  # per fragment what this worker has merged; empty: nothing yet
    step: int = 0
    protocol: int = PROTOCOL
    epoch: int = 0  # of the coordinator that let this life of the worker in last; 0: none has


@dataclass(frozen=True, slots=True)
class Heartbeat:
    worker: str
    incarnation: int
    progress: Progress
    versions: tuple[int, ...]
    in_flight: tuple[tuple[int, int], ...] = ()  # (fragment, round) sent long ago and not yet answered


@dataclass(frozen=True, slots=True)
class Contribution:
    """One framed pseudo-gradient; the frame's header repeats and completes what stands here."""

    worker: str
    incarnation: int
    fragment: int
    round: int
    frame: Buffer = field(repr=False)
    shard: int = 0  # tokens of the data that this worker reads, where weights count them
    ranges: Ranges = ()  # leased blocks that it was made with; in those of fragment 0 alone


@dataclass(frozen=True, slots=True)
class Initial:
    """The starting value of a fragment, fp32, from the member that the coordinator asked."""

    worker: str
    incarnation: int
    fragment: int
    frame: Buffer = field(repr=False)


@dataclass(frozen=True, slots=True)
class Skip:
    """This worker has nothing fit to send for the round (non-finite values): do not wait for it."""

    worker: str
    incarnation: int
    fragment: int
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Send me a snapshot of this fragment."""

    worker: str
    incarnation: int
    fragment: int
    differs: str = ""  # the digest that I got where the last commit names another; "": I only lack it


@dataclass(frozen=True, slots=True)
class Leave:
    worker: str
    incarnation: int
    reason: str  # "complete", "interrupted", FLUSHED, or words
    progress: Progress
    digest: str  # digest of this worker's global parameters, hex
    timeline: str = ""  # JSON: its newest rounds and computing, for the run's report


@dataclass(frozen=True, slots=True)
class Vote:
    """In `attachment` this life of the worker is for `side`: the first that ever asked it. See Claim."""

    worker: str
    nonce: int
    attachment: str
    side: str


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Lease me `want` blocks more. `number` counts the requests of this life: the same number again is the same request.

    The first one names in `kept` what this worker still holds of an earlier life's lease; 0 blocks only ask what I have.
    """

    worker: str
    incarnation: int
    number: int
    want: int
    kept: Ranges = ()
    sizes: tuple[int, ...] = ()  # blocks of each shard of the data, as this worker sees it


# ---- from the coordinator ----


@dataclass(frozen=True, slots=True)
class Waiting:
    """The start cohort is not complete yet."""

    joined: tuple[str, ...]
    needed: int


@dataclass(frozen=True, slots=True)
class Welcome:
    worker: str
    incarnation: int
    index: int  # the worker's number in frames and in the order of summation
    members: int  # live members, this one included
    epoch: int
    step: int  # the run's inner step: a newcomer starts counting here
    versions: tuple[int, ...]
    initial: bool = False  # True: send your starting values, you define the run's


@dataclass(frozen=True, slots=True)
class Refused:
    """You are not (or no longer) in. `kind`: run, plan, settings, protocol, incarnation, complete, corrupt, standby, final or left.

    "left" answers a Leave; "incarnation" asks to join again, "standby" to join elsewhere; "final" ends the run: nothing
    counts any more, and the value to leave with has the digest `reason`. The others turn the worker away for good.
    """

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Commit:
    """Fragment `fragment` moved to `version`. `frames` are what everyone applies, by contributor index.

    For one shared downlink frame the index is 0; under `relay` there is one frame per other contributor.
    """

    fragment: int
    version: int
    weights: tuple[tuple[int, float], ...]  # (worker index, weight), ascending; weights sum to 1
    rounds: tuple[tuple[int, int], ...]  # (worker index, that worker's round), ascending
    digest: str
    frames: tuple[tuple[int, Buffer], ...] = field(repr=False)
    local_steps: tuple[tuple[int, int], ...] = ()  # (worker index, its inner steps per H from then on)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Your contribution to this round does not count, and why; COUNTS_LATER: not in the round's own commit."""

    fragment: int
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """The round ended without a quorum: keep your work, it goes into the next one."""

    fragment: int
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resend:
    """I do not have your contribution to this round."""

    fragment: int
    round: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A fragment's global value (first frame) and, where workers step themselves, its outer state (the others).

    `counted`: the newest round of the receiver that is in a commit, -1 if none is.
    """

    fragment: int
    version: int
    digest: str
    frames: tuple[tuple[int, Buffer], ...] = field(repr=False)
    counted: int = -1


@dataclass(frozen=True, slots=True)
class Claim:
    """A coordinator and its standby cannot reach each other: who of them shall go on? Vote for `side`.

    `attachment` names the bond that one of them wants to end; `side` is the standby's name, "" the coordinator's.
    """

    attachment: str
    side: str


@dataclass(frozen=True, slots=True)
class Lease:
    """All blocks that this life of the worker holds, committed ones no more; it answers request `number`.

    Of two leases the one with the higher `serial` is the later.
    """

    incarnation: int
    number: int
    serial: int
    ranges: Ranges


FromWorker = Join | Heartbeat | Contribution | Initial | Skip | Fetch | Leave | Vote | LeaseRequest
FromCoordinator = (
    Waiting | Welcome | Refused | Commit | Rejected | Aborted | Resend | Snapshot | Claim | Lease
)
Message = FromWorker | FromCoordinator | FromStandby | FromPrimary | BetweenPeers
