"""What goes wrong when: the faults of a chaos run as a pure function of its seed, length and number of workers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Seconds that a fault of each kind lasts; of a killed process, those until it is started again.
LASTS_S: dict[str, tuple[float, float]] = {
    "kill": (1.0, 4.0),
    "stop": (2.0, 7.0),
    "partition": (2.0, 7.0),
    "slow": (5.0, 12.0),
    "corrupt": (3.0, 8.0),
    "replay": (2.0, 4.0),
    "nan": (14.0, 20.0),
    "sign_flip": (14.0, 20.0),
    "coordinator_kill": (0.5, 3.0),
    "disk_full": (3.0, 6.0),
}
KINDS = tuple(LASTS_S)
OF_COORDINATOR = frozenset({"coordinator_kill", "disk_full"})
OF_LIARS = frozenset({"nan", "sign_flip"})
COORDINATOR = "coordinator"

EVERY_S = 8.5  # between the beginnings of two faults, on average
JITTER = 0.4  # of that, at random
TAIL_S = (
    30.0  # at most this much at the end is left without new faults, so that the last ones can be got over
)
RECOVERY_S = 6.0  # a worker is let alone for this long after a fault, if another one can be hit instead


@dataclass(frozen=True, slots=True)
class Fault:
    """`at` is in seconds since the run's first commit; `target` is a worker, a liar ("x1") or the coordinator."""

    kind: str
    at: float
    for_s: float
    target: str

    @property
    def until(self) -> float:
        return self.at + self.for_s


def schedule(seed: int, minutes: float, workers: int) -> tuple[Fault, ...]:
    """The faults of a run of `minutes`, in order of time; every ten in a row have one of each kind.

    No two faults of the coordinator follow each other directly, and no worker is hit while another fault of it lasts.
    """
    rng = random.Random(seed)
    count = max(1, int((60 * minutes - min(TAIL_S, 12 * minutes)) / EVERY_S))
    kinds = _deck(rng, count)
    free = {f"w{i}": 0.0 for i in range(workers)}
    found: list[Fault] = []
    for i, kind in enumerate(kinds):
        at = round((i + JITTER * rng.random()) * EVERY_S, 2)
        for_s = round(rng.uniform(*LASTS_S[kind]), 2)
        if kind in OF_COORDINATOR:
            target = COORDINATOR
        elif kind in OF_LIARS:
            target = f"x{sum(f.kind in OF_LIARS for f in found)}"
        else:
            target = _victim(rng, free, at)
            at = max(at, round(free[target], 2))
            free[target] = at + for_s + RECOVERY_S
        found.append(Fault(kind, at, for_s, target))
    return tuple(sorted(found, key=lambda f: f.at))


def _deck(rng: random.Random, count: int) -> list[str]:
    """`count` kinds, shuffled ten by ten."""
    deck: list[str] = []
    while len(deck) < count:
        hand = list(KINDS)
        rng.shuffle(hand)
        _part(rng, hand, deck[-1:])
        deck += hand
    return deck[:count]


def _part(rng: random.Random, hand: list[str], before: Sequence[str]) -> None:
    """Shuffle until no two of the coordinator's faults are neighbours: a dead process cannot be hit again."""
    while any(a in OF_COORDINATOR and b in OF_COORDINATOR for a, b in pairwise([*before, *hand])):
        rng.shuffle(hand)


def _victim(rng: random.Random, free: dict[str, float], at: float) -> str:
    idle = sorted(name for name, when in free.items() if when <= at)
    return rng.choice(idle) if idle else min(free, key=lambda name: (free[name], name))
