"""What a worker remembers of its newest rounds: when each fragment left, was answered, waited for and merged.

A bounded record, kept beside the protocol and never read by it. `gantt` draws it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Any

from diloco.worker.replica_slots import Flight, Slot

ROUNDS = 400  # newest rounds that are kept, of all fragments together
SPANS = 800  # stretches of computing
MOST_S, MOST = 1e9, 2**53  # times and whole numbers from outside stay below
MOST_EPOCH = 1e10  # the year 2286
JOIN_S = 0.002  # steps that follow each other within this time are one stretch


@dataclass(slots=True)
class Round:
    """One round of one fragment; times in seconds since the recorder began, NaN for what never happened.

    The reply is due when inner step `due` is done. From then until `answered` the trainer waited, `exposed` seconds.
    """

    fragment: int
    number: int
    step: int  # the inner step after which it was sent
    due: int
    sent: float
    answered: float = math.nan
    merged: float = math.nan
    exposed: float = 0.0
    outcome: str = ""
    final: bool = False

    @property
    def hidden(self) -> float:
        """Seconds between sending and reply in which the trainer did not wait for this round."""
        return max(0.0, self.answered - self.sent - self.exposed) if self.answered >= self.sent else 0.0


@dataclass(slots=True)
class Span:
    """Computing without a pause from `begin` to `end`, inner steps `first` to `last`."""

    begin: float
    end: float
    first: int
    last: int


@dataclass(slots=True)
class Total:
    """Of one fragment over the whole life of the worker."""

    rounds: int = 0
    exposed: float = 0.0
    hidden: float = 0.0

    def add(self, other: Total) -> None:
        self.rounds += other.rounds
        self.exposed += other.exposed
        self.hidden += other.hidden


@dataclass(slots=True)
class Timeline:
    """`rounds` in order of merging. `epoch` is the wall-clock time, in Unix seconds, of time 0."""

    epoch: float
    rounds: Sequence[Round]
    spans: Sequence[Span]
    totals: dict[int, Total] = field(default_factory=dict)
    kept_all: bool = True  # nothing older has been let go


class Recorder:
    """Follows the slots of a replica; all methods take the time on the same monotonic clock."""

    def __init__(self, now: float, wall: float) -> None:
        self._begun, self._epoch = now, wall
        self._rounds: deque[Round] = deque(maxlen=ROUNDS)
        self._spans: deque[Span] = deque(maxlen=SPANS)
        self._open: dict[int, tuple[Flight, Round]] = {}
        self._totals: dict[int, Total] = {}
        self._closed = 0

    def computed(self, begin: float, end: float, step: int) -> None:
        """The trainer computed inner step `step` in this time."""
        begin, end = begin - self._begun, end - self._begun
        last = self._spans[-1] if self._spans else None
        if last is not None and begin - last.end <= JOIN_S:
            last.end, last.last = end, step
        else:
            self._spans.append(Span(begin, end, step, step))

    def waited(self, fragments: Iterable[int], begin: float, now: float) -> None:
        """The trainer waited in this time for the rounds in flight of these fragments, for each the whole time."""
        for index in fragments:
            if index in self._open:
                self._open[index][1].exposed += max(0.0, now - begin)

    def follow(self, slots: Sequence[Slot], step: int, now: float) -> None:
        """Note what has changed since the last call: departures, replies, merges."""
        at = now - self._begun
        for slot in slots:
            flight, known = slot.flight, self._open.get(slot.index)
            if known is not None and known[0] is not flight:
                self._close(slot.index, at)
                known = None
            if flight is None:
                continue
            if known is None:
                entry = Round(slot.index, flight.round, step, flight.due, at, final=flight.final)
                known = self._open[slot.index] = (flight, entry)
            if flight.outcome and math.isnan(known[1].answered):
                known[1].answered, known[1].outcome = at, flight.outcome

    def _close(self, fragment: int, at: float) -> None:
        _, entry = self._open.pop(fragment)
        entry.merged = at
        self._rounds.append(entry)
        self._closed += 1
        total = self._totals.setdefault(fragment, Total())
        total.rounds += 1
        total.exposed += entry.exposed
        total.hidden += entry.hidden

    def totals(self) -> dict[int, Total]:
        """Per fragment, of the rounds that are over."""
        return dict(self._totals)

    def read(self) -> Timeline:
        """What is remembered now; rounds still in flight are left out."""
        kept_all = self._closed <= ROUNDS
        return Timeline(self._epoch, list(self._rounds), list(self._spans), self.totals(), kept_all)


def missing(slots: Sequence[Slot], step: int) -> list[int]:
    """Fragments whose reply is due at inner step `step` and not here, or not decoded."""
    return [
        s.index
        for s in slots
        if s.flight is not None and s.flight.due <= step and (s.jobs or not s.flight.outcome)
    ]


def dump(timeline: Timeline) -> str:
    """As one line of JSON, times to a tenth of a millisecond."""
    return json.dumps(
        {
            "epoch": round(timeline.epoch, 4),
            "rounds": [_row(entry) for entry in timeline.rounds],
            "spans": [_row(span) for span in timeline.spans],
            "totals": {str(k): _row(v) for k, v in timeline.totals.items()},
            "kept_all": timeline.kept_all,
        },
        separators=(",", ":"),
    )


def load(text: str) -> Timeline | None:
    """Inverse of `dump`; None for what is no timeline. It comes from another machine: every value is checked.

    Times are finite and within `MOST_S` of 0, only `answered` and `merged` of a round may be unknown; whole numbers lie
    in 0..`MOST`.
    """
    try:
        raw = json.loads(text)
        rounds = [_entry(Round, row) for row in raw["rounds"][-ROUNDS:]]
        spans = [_entry(Span, row) for row in raw["spans"][-SPANS:]]
        totals = {_whole(int(k)): _entry(Total, row) for k, row in raw["totals"].items()}
        epoch = _time(raw["epoch"], MOST_EPOCH)
        return Timeline(epoch, rounds, spans, totals, bool(raw["kept_all"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _row(entry: Round | Span | Total) -> list[Any]:
    values = astuple(entry)
    return [(None if not math.isfinite(v) else round(v, 4)) if isinstance(v, float) else v for v in values]


def _entry(kind: type[Any], row: Sequence[Any]) -> Any:
    """A `Round`, `Span` or `Total` from its values in order; ValueError where one is of another type."""
    made: dict[str, Any] = {}
    for described, value in zip(fields(kind), row, strict=True):
        match described.type:
            case "float":
                unknown = value is None and described.name in ("answered", "merged")
                made[described.name] = math.nan if unknown else _time(value, MOST_S)
            case "int":
                made[described.name] = _whole(value)
            case "bool":
                made[described.name] = bool(value)
            case "str" if isinstance(value, str) and len(value) <= 32:
                made[described.name] = value
            case _:
                raise ValueError(f"{kind.__name__}.{described.name} = {value!r}")
    return kind(**made)


def _time(value: Any, most: float) -> float:
    if not isinstance(value, int | float) or not abs(value) < most:
        raise ValueError(f"{value!r} is not a time in seconds below {most:g}")
    return float(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= MOST:
        raise ValueError(f"a whole number is not in 0..{MOST}")
    return int(value)
