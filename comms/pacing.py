"""Which transfer may use the link, and how fast: nearest deadline first, at the lowest rate that is in time. Pure.

Times are in seconds on any monotonic clock and are handed in. Who waits for a turn on a real clock is in
`diloco.comms.turns`; when a fragment is wanted is known to the worker's session.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

SLICE_S = 0.05  # a paced transfer takes what its rate gives in so long
MIN_SLICE = 4 << 10  # bytes, and at least so many: each is a call of its own, with its headers

AIM_S = 0.5  # a span waits so long on the way for bytes before it, its own included
FIRST_SPAN, MIN_SPAN, MAX_SPAN = 8 << 10, 4 << 10, 32 << 20  # bytes
FLOORS = 64  # spans whose shortest time is taken for the way's own


@dataclass(slots=True, eq=False)
class Claim:
    """A transfer's claim to one direction of the link: bytes `[at, end)` of an object are not under way yet."""

    fragment: int
    since: float  # when the transfer was first wanted, whatever attempts have failed since
    at: int
    end: int
    urgent: bool = False  # somebody waits for it right now
    flying: int = 0  # bytes that are under way: taken, and not answered yet

    @property
    def left(self) -> int:
        return self.end - self.at


class Window:
    """How many bytes are sent before an answer is waited for: a span, as large as passes in `AIM_S`.

    More would pile up in buffers on the way, where neither a more urgent transfer nor one of gRPC's own pings can
    overtake it: on a slow link these would take the peer for dead. A span that took `seconds` until its answer, with
    `floor` the shortest of the newest `FLOORS`, makes the next ones AIM_S / (seconds - floor) times as long as those of
    its time, at most twice as long as they are. One that is short itself says the same when much was under way with it,
    and nothing when it was not: then what delayed it, or its answer, was something else.
    """

    def __init__(self) -> None:
        self.size = FIRST_SPAN
        self._newest: deque[float] = deque(maxlen=FLOORS)

    @property
    def floor(self) -> float:
        """Seconds that a span takes at least; 0 before the first."""
        return min(self._newest, default=0.0)

    @property
    def fill(self) -> int:
        """Bytes that keep the way busy until an answer is back: about what passes in 60 ms."""
        return max(MIN_SLICE, self.size // 8)

    def answered(self, size: int, seconds: float, window: int, under_way: int) -> None:
        """A span of `size` bytes, when spans were to be `window` long and `under_way` bytes were, its own included."""
        self._newest.append(seconds)
        fits = int(window * AIM_S / max(seconds - self.floor, 1e-3))
        if fits < self.size:
            if under_way >= window:
                self.size = max(MIN_SPAN, fits)
        elif size >= self.size:  # a shorter one says nothing about longer ones
            self.size = min(2 * self.size, fits, MAX_SPAN)


class Pacer:
    """One direction of a link, shared by the claims that have entered.

    What is wanted first gets its turns first, after what is urgent and before what has no deadline; of one fragment,
    what was asked for first: of two versions none waits for parts of the other. Others get one when nothing of it is
    left that is not under way, and while that is not answered no more than keeps the way busy: on a slow link a span
    beside the last ones of a fragment that is waited for would hold them up for as long as it takes itself.
    A claim made at time s of a fragment wanted at time d is to be through by D = s + share (d - s). The rate is the
    lowest that keeps all of these: with the claims in order of their turns, and debt for what a slice took ahead of it,

        rate(now) = max over k of (debt + left_1 + ... + left_k) / (D_k - now),  unlimited once a D_k has passed

    (the online rule "optimal available" of Yao, Demers and Shenker 1995, for a fixed order). So a transfer is spread
    evenly over its window, goes faster as soon as it falls behind, and is never later than it would be without
    pacing, or than D.
    """

    def __init__(self) -> None:
        self._deadlines: Mapping[int, float] = {}
        self._share = 0.0
        self._claims: list[Claim] = []
        self._debt = 0.0  # bytes
        self._paid_at = -math.inf

    def expect(self, deadlines: Mapping[int, float], share: float, now: float) -> None:
        """From now on fragments are wanted at these times, and `share` of the time until then may be used."""
        self._pay(now)
        self._deadlines, self._share = dict(deadlines), share

    def enter(self, claim: Claim, now: float) -> None:
        self._pay(now)
        self._claims.append(claim)

    def leave(self, claim: Claim, now: float) -> None:
        """It is through, or its attempt is over. A claim that has left already is let go again."""
        self._pay(now)
        if claim in self._claims:
            self._claims.remove(claim)

    def __contains__(self, claim: Claim) -> bool:
        return claim in self._claims

    def clear(self) -> None:
        self._claims.clear()

    def rate(self, now: float) -> float:
        """Bytes per second that all deadlines together ask for; infinity where one has passed, or there is none."""
        total, needed = self._debt, 0.0
        for claim in sorted(self._claims, key=self._rank):
            if not claim.left:
                continue
            total += claim.left
            seconds = self._through_by(claim) - now
            if seconds <= 0:
                return math.inf
            needed = max(needed, total / seconds)
        return needed or math.inf

    def wait(self, claim: Claim, now: float) -> float | None:
        """Seconds until `claim` may take its next bytes, 0 for now; None while a more urgent one has some left."""
        if not claim.left:
            return 0.0
        first = min((c for c in self._claims if c.left), key=self._rank)
        if self._rank(first) != self._rank(claim) or (claim.flying and self._behind(claim)):
            return None
        self._pay(now)
        return self._debt / self.rate(now) if self._debt > 0 else 0.0

    def take(self, claim: Claim, most: int, now: float, fill: int | None = None) -> tuple[int, int]:
        """The next bytes [start, end) of the object, at most `most`; empty when all are under way.

        At most `fill` while the last bytes of something more urgent are. `answered` is to be told of what was taken.
        """
        self._pay(now)
        rate = self.rate(now)
        size = min(most, claim.left)
        if fill is not None and self._behind(claim):
            size = min(size, fill)
        if not math.isinf(rate):
            size = min(size, max(MIN_SLICE, int(rate * SLICE_S)))
            self._debt += size
        start = claim.at
        claim.at += size
        claim.flying += size
        return start, claim.at

    def answered(self, claim: Claim, size: int) -> None:
        """Bytes that were taken are there, or lost."""
        claim.flying -= size

    @property
    def under_way(self) -> int:
        """Bytes that were taken and are not answered."""
        return sum(claim.flying for claim in self._claims)

    def _behind(self, claim: Claim) -> bool:
        """Whether bytes of something more urgent are under way."""
        mine = self._rank(claim)
        return any(c.flying and self._rank(c) < mine for c in self._claims)

    def _pay(self, now: float) -> None:
        if self._debt > 0:
            rate = self.rate(now)
            paid = self._debt if math.isinf(rate) else rate * (now - self._paid_at)
            self._debt = max(0.0, self._debt - paid)
        self._paid_at = now

    def _rank(self, claim: Claim) -> tuple[float, float, float]:
        if claim.urgent:  # in turn: what is asked for again must not hold up what has not been brought yet
            return -math.inf, claim.since, claim.fragment
        return self._deadlines.get(claim.fragment, math.inf), claim.fragment, claim.since

    def _through_by(self, claim: Claim) -> float:
        deadline = self._deadlines.get(claim.fragment, math.inf)
        if claim.urgent or not self._share:
            return -math.inf
        return claim.since + self._share * (deadline - claim.since)
