"""Sets of blocks as ranges, and what can be done with them. Pure; who leases what is in the coordinator and the worker.

A range is (shard, lo, hi): the blocks lo, ..., hi - 1 of the order in which the shard is read. `Ranges` have no block
twice. Functions keep the order of their first argument, except `normal`, which sorts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Range = tuple[int, int, int]
Ranges = tuple[Range, ...]

# Pieces that one worker's blocks may be in: it bounds what a message, a record and a comparison cost.
MAX_RANGES = 256


def normal(ranges: Iterable[Range]) -> Ranges:
    """The same blocks in ascending order, neighbours joined.

    Raises ValueError for a range that is empty or negative, and for a block that is there twice.
    """
    joined: list[Range] = []
    for shard, lo, hi in sorted(ranges):
        if shard < 0 or not 0 <= lo < hi:
            raise ValueError(f"({shard}, {lo}, {hi}) is no range of blocks")
        last = joined[-1] if joined else (-1, 0, 0)
        if last[0] == shard and lo < last[2]:
            raise ValueError(f"block {lo} of shard {shard} is there twice")
        if last[0] == shard and lo == last[2]:
            joined[-1] = (shard, last[1], hi)
        else:
            joined.append((shard, lo, hi))
    return tuple(joined)


def count(ranges: Iterable[Range]) -> int:
    """How many blocks there are."""
    return sum(hi - lo for _, lo, hi in ranges)


def union(*parts: Iterable[Range]) -> Ranges:
    """The blocks that are in any part, ascending, neighbours joined; what is no range is left out."""
    joined: list[Range] = []
    for shard, lo, hi in sorted(r for part in parts for r in part if r[1] < r[2]):
        if joined and joined[-1][0] == shard and lo <= joined[-1][2]:
            joined[-1] = (shard, joined[-1][1], max(hi, joined[-1][2]))
        else:
            joined.append((shard, lo, hi))
    return tuple(joined)


def minus(ranges: Iterable[Range], other: Iterable[Range]) -> Ranges:
    """What is in `ranges` and not in `other`; O((n + m) log m), since a worker chooses how many pieces there are."""
    gone, left = union(other), list[Range]()
    for shard, lo, hi in ranges:
        at = bisect_right(gone, (shard, lo, lo))
        if at and gone[at - 1][0] == shard and gone[at - 1][2] > lo:
            at -= 1  # begins before `lo` and goes on behind it
        while at < len(gone) and gone[at][0] == shard and gone[at][1] < hi:
            if lo < gone[at][1]:
                left.append((shard, lo, gone[at][1]))
            lo = gone[at][2]
            at += 1
        if lo < hi:
            left.append((shard, lo, hi))
    return tuple(left)


def both(ranges: Iterable[Range], other: Iterable[Range]) -> Ranges:
    """What is in `ranges` and in `other`."""
    held = tuple(ranges)
    return minus(held, minus(held, other))


def split(ranges: Iterable[Range], blocks: int) -> tuple[Ranges, Ranges]:
    """The first `blocks` blocks (all, if there are no more), and the rest."""
    first: list[Range] = []
    rest: list[Range] = []
    for shard, lo, hi in ranges:
        cut = min(hi, lo + blocks)
        if lo < cut:
            first.append((shard, lo, cut))
        if cut < hi:
            rest.append((shard, cut, hi))
        blocks -= cut - lo
    return tuple(first), tuple(rest)


def chain(*parts: Iterable[Range]) -> Ranges:
    """One part after the other, a range that goes on where the last one ended joined to it."""
    joined: list[Range] = []
    for shard, lo, hi in (r for part in parts for r in part):
        if joined and joined[-1][0] == shard and joined[-1][2] == lo:
            joined[-1] = (shard, joined[-1][1], hi)
        else:
            joined.append((shard, lo, hi))
    return tuple(joined)


def parsed(values: Iterable[Iterable[int]]) -> Ranges:
    """Ranges from JSON's lists of three numbers. Raises ValueError for anything else."""
    found: list[Range] = []
    for value in values:
        shard, lo, hi = (int(number) for number in value)
        found.append((shard, lo, hi))
    return tuple(found)
