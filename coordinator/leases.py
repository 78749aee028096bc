"""The lease table: which blocks of the data are free, leased to whom, or committed. Pure; no messages, no journal.

Data is an endless list of blocks per shard (a block is one training window; what block n holds is a pure function of
seed, epoch, shard and n, see `diloco.worker.sampler`). ``data.mode = "leased"`` has one shard, the whole corpus;
``"deficit"`` has `data.shards` of them. A block is free, leased to one worker, or committed, and the three together
are all blocks before the shard's `ends`. Everything moves by `apply` of a record or by `commit`, both of which a
journal repeats: so a rebuilt table is the same table.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diloco.ranges import MAX_RANGES, Ranges, both, count, minus, normal, parsed, split

MOST_LEASED = 1 << 22  # blocks of one worker at a time: what a hoarder or a liar can hold back
OFFERED = MAX_RANGES // 2  # pieces up to which returned blocks are leased; using them up may make more


@dataclass(slots=True)
class Holder:
    """What one worker has. `number` counts the answered requests of its present life, `incarnation`."""

    incarnation: int = 0
    number: int = 0
    ranges: Ranges = ()
    sizes: tuple[int, ...] = ()  # blocks per epoch of each shard, as this life said
    told: bool = True  # of what was taken from it
    heard: int = field(default=0, compare=False)  # newest request, also if its answer changed nothing


def deficits(sizes: Sequence[int], consumed: Sequence[int]) -> list[int]:
    """max(size share - consumed share, 0) of each shard, times the totals so that it is exact (2401.09135).

    Before anything is consumed, and where all shares are met exactly, these are the sizes.
    """
    size, done = sum(sizes), sum(consumed)
    found = [max(s * done - c * size, 0) for s, c in zip(sizes, consumed, strict=True)]
    return found if any(found) else list(sizes)


def draw(seed: int, number: int, weights: Sequence[int]) -> int:
    """The index drawn with probability proportional to `weights`, whole numbers; depends on the arguments alone."""
    word = hashlib.sha256(f"lease {seed} {number}".encode()).digest()
    at = int.from_bytes(word, "little") % sum(weights)
    for index, weight in enumerate(weights):
        if at < weight:
            return index
        at -= weight
    raise AssertionError("weights are whole numbers of which one is positive")


class LeaseTable:
    """All blocks of a run by shard. `offer` and `returning` make records, `apply` and `commit` carry them out."""

    def __init__(self, seed: int, shards: int) -> None:
        self.seed = seed
        self.sizes: tuple[int, ...] = ()  # blocks per epoch of each shard, once a commit has counted some
        self.ends = [0] * shards  # blocks that were ever leased
        self.free: Ranges = ()  # and have been returned
        self.holders: dict[str, Holder] = {}
        self.committed: Ranges = ()
        self.consumed = [0] * shards  # committed blocks by shard
        self.grants = 0
        self.returned = 0  # blocks, over the whole run
        self.serial = 0  # changes so far: of two descriptions the later has the higher one

    # ---- what may happen next ----

    def offer(
        self, worker: str, incarnation: int, number: int, want: int, kept: Ranges, sizes: tuple[int, ...]
    ) -> dict[str, Any] | None:
        """The record that answers a worker's request, None if its answer is what it holds already.

        The first request of a life keeps of what the last life held what it names in `kept`; the rest is returned,
        unless that left more than `MAX_RANGES` pieces: then it keeps all. It says what its `sizes` are; nobody else is
        bound by that before a commit. Raises ValueError if they are not those of the run's data, or not as before.
        """
        holder = self.holders.get(worker, Holder())
        anew = incarnation != holder.incarnation
        known = self.sizes or (() if anew else holder.sizes)
        if len(sizes) != len(self.ends) or min(sizes) < 1 or known not in ((), sizes):
            raise ValueError(
                f"{list(sizes)} blocks in {len(sizes)} shards where the run has {self._words(known)}"
            )
        if (incarnation, number) <= (holder.incarnation, holder.number):
            return None
        held = both(holder.ranges, kept) if anew else holder.ranges
        if len(held) > MAX_RANGES:
            held = holder.ranges
        back = minus(holder.ranges, held)
        want = min(want, MOST_LEASED - count(held))
        granted = self._choose(worker, want, held, normal((*self.free, *back)), sizes)
        if not (anew or granted):
            return None
        record: dict[str, Any] = {
            "type": "lease",
            "worker": worker,
            "incarnation": incarnation,
            "number": number,
            "ranges": [list(r) for r in granted],
        }
        if back:
            record["returned"] = [list(r) for r in normal(back)]
        if anew and not self.sizes:
            record["sizes"] = list(sizes)
        return record

    def _choose(self, worker: str, want: int, held: Ranges, free: Ranges, sizes: tuple[int, ...]) -> Ranges:
        """`want` blocks of one shard: what was returned first, then what nobody has had. In few pieces."""
        if want < 1:
            return ()
        shard = 0
        if len(sizes) > 1:
            shard = draw(self.seed, self.grants, deficits(sizes, self._out(worker, want, held)))
        pieces = [r for r in free if r[0] == shard][: max(0, OFFERED - len(held))]
        again, _ = split(pieces, want)
        end, more = self.ends[shard], want - count(again)
        if not more or len(held) + len(again) >= MAX_RANGES:
            return again
        return normal((*again, (shard, end, end + more)))

    def _out(self, worker: str, want: int, held: Ranges) -> list[int]:
        """Blocks of each shard that are consumed or with a worker, when `worker` asks for `want` more.

        What is with a worker counts, else all requests between two commits would draw alike. But nobody counts for
        more than twice the median worker, else one that hoards would keep the others from the shards it has.
        """
        others = [h.ranges for name, h in self.holders.items() if name != worker and h.ranges]
        shares = sorted([count(held) + want, *map(count, others)])
        most, out = 2 * shares[(len(shares) - 1) // 2], list(self.consumed)
        for ranges in (held, *others):
            whole = max(count(ranges), most)
            for shard in range(len(out)):
                out[shard] += count(r for r in ranges if r[0] == shard) * most // whole
        return out

    def returning(self, worker: str, pending: Ranges = ()) -> dict[str, Any] | None:
        """The record by which all that `worker` holds becomes free, but for `pending`; None if that is nothing."""
        holder = self.holders.get(worker)
        back = minus(holder.ranges, pending) if holder is not None else ()
        return {"type": "return", "worker": worker, "ranges": [list(r) for r in back]} if back else None

    def lacking(self, worker: str, ranges: Ranges, pending: Ranges = ()) -> Ranges:
        """Which of `ranges` the worker does not hold, or has in `pending` already; ValueError if they are no ranges."""
        return minus(normal(ranges), minus(self.held(worker), pending))

    def scatters(self, worker: str, ranges: Ranges) -> bool:
        """Whether what the worker holds would be in too many pieces, and in more than now, without `ranges`."""
        held = self.held(worker)
        return len(minus(held, ranges)) > max(MAX_RANGES, len(held))

    def held(self, worker: str) -> Ranges:
        return self.holders[worker].ranges if worker in self.holders else ()

    def agreed(self) -> tuple[int, ...]:
        """The sizes of the run's data: those of its commits, or before the first what most holders say; () for a tie."""
        if self.sizes:
            return self.sizes
        said = Counter(h.sizes for h in self.holders.values() if h.sizes).most_common(2)
        return said[0][0] if said and (len(said) < 2 or said[0][1] > said[1][1]) else ()

    def disagreement(self, worker: str) -> str:
        """What is wrong with the sizes that the worker has said; "" if nothing is."""
        sizes, agreed = self.holders.get(worker, Holder()).sizes, self.agreed()
        if not sizes or not agreed or sizes == agreed:
            return ""
        return f"{list(sizes)} blocks in {len(sizes)} shards where the run has {self._words(agreed)}"

    # ---- what has happened ----

    def apply(self, record: Mapping[str, Any]) -> None:
        """Carry out a "lease" or a "return" record."""
        worker = str(record["worker"])
        holder = self.holders.setdefault(worker, Holder())
        if record["type"] == "return":
            self._take_back(holder, parsed(record["ranges"]))
            return
        holder.sizes, holder.heard = tuple(record.get("sizes", self.sizes)) or holder.sizes, 0
        self._take_back(holder, parsed(record.get("returned", ())))
        holder.incarnation, holder.number = int(record["incarnation"]), int(record["number"])
        granted = parsed(record["ranges"])
        self.free = minus(self.free, granted)
        holder.ranges = normal((*holder.ranges, *granted))
        for shard, _, hi in granted:
            self.ends[shard] = max(self.ends[shard], hi)
        self.grants += bool(granted)
        self.serial += 1

    def _take_back(self, holder: Holder, ranges: Ranges) -> None:
        holder.ranges = minus(holder.ranges, ranges)
        self.free = normal((*self.free, *ranges))
        self.returned += count(ranges)
        self.serial += 1

    def commit(self, worker: str, ranges: Ranges) -> None:
        """A durable commit has counted the contribution made with `ranges`. ValueError if they are not the worker's."""
        if not ranges:
            return
        if missing := self.lacking(worker, ranges):
            raise ValueError(f"{worker!r} commits blocks that it does not hold: {missing}")
        holder = self.holders[worker]
        self.sizes = self.agreed() or holder.sizes
        holder.ranges = minus(holder.ranges, ranges)
        self.committed = normal((*self.committed, *ranges))
        for shard, lo, hi in ranges:
            self.consumed[shard] += hi - lo
        self.serial += 1

    # ---- facts ----

    def leased(self) -> Ranges:
        return tuple(r for holder in self.holders.values() for r in holder.ranges)

    def check(self) -> None:
        """Free, leased and committed blocks are all that were ever leased, each once. AssertionError otherwise."""
        everything = tuple((shard, 0, end) for shard, end in enumerate(self.ends) if end)
        assert normal((*self.free, *self.leased(), *self.committed)) == everything, (
            "blocks are lost or doubled"
        )
        assert sum(self.consumed) == count(self.committed)

    def facts(self, block_tokens: int) -> dict[str, Any]:
        """For people and metrics: numbers of blocks, and the committed tokens of each shard."""
        return {
            "free": count(self.free),
            "leased": count(self.leased()),
            "committed": count(self.committed),
            "returned": self.returned,
            "tokens": [blocks * block_tokens for blocks in self.consumed],
            "epochs": [blocks / size for blocks, size in zip(self.consumed, self.sizes, strict=False)],
        }

    def _words(self, sizes: tuple[int, ...]) -> str:
        return f"{list(sizes)} in {len(self.ends)}" if sizes else f"{len(self.ends)} shards"
