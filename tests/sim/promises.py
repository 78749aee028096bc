"""The promises, looked at after every event of a simulated run: each method raises `Violation` with what is broken.

A `Book` is one disk read record by record, with a second, plain implementation of the outer step beside it; the `Watch`
has the books of all nodes, what any worker was told, and what each worker had in flight. Nothing here uses the
product's arithmetic except to decode frames.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diloco.comms import frame
from diloco.comms.codec import Codec
from diloco.comms.machine import Send
from diloco.comms.messages import Buffer, Commit, Refused, Snapshot
from diloco.config import RunConfig
from diloco.coordinator import leasing
from diloco.coordinator.state import Coordinator
from diloco.worker.replica import Flight, Replica
from tests.toy import ToyModel

TOKENS = 10  # of an inner step of a toy worker
EXACT = ("g_fp32", "relay")  # ways down that lose nothing: the plain outer step gives the same value


class Violation(AssertionError):
    """A promise is broken; the number is that of the promise or invariant."""


def require(holds: bool, promise: str, what: str) -> None:
    if not holds:
        raise Violation(f"{promise}: {what}")


@dataclass
class Book:
    """One journal as a whole: what it says must be so by itself (promises 1, 3, 4, 5; I8, I15, I17)."""

    config: RunConfig
    codecs: Sequence[Codec]
    versions: dict[int, int] = field(default_factory=dict)
    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    rounds: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  # (fragment, index) -> newest that counted
    lives: dict[int, int] = field(default_factory=dict)  # index -> incarnation
    tokens: int = 0
    by_worker: dict[tuple[str, int], int] = field(default_factory=dict)  # (name, fragment) -> tokens
    finals: set[str] = field(default_factory=set)
    blocks: set[tuple[int, int]] = field(default_factory=set)  # of leased data, as committed
    values: dict[int, Tensor] = field(default_factory=dict)
    momenta: dict[int, Tensor] = field(default_factory=dict)

    def add(self, record: dict[str, Any], blobs: Sequence[Buffer]) -> None:
        match record["type"]:
            case "start":
                self.lives |= {m["index"]: m["incarnation"] for m in record["members"]}
            case "member":
                self.lives[record["index"]] = record["incarnation"]
                self.rounds = {k: n for k, n in self.rounds.items() if k[1] != record["index"]}
            case "initial":
                p = record["fragment"]
                require(p not in self.versions, "5", f"fragment {p} got a second starting value")
                self.versions[p], self.digests[p, 0] = 0, record["digest"]
                self.values[p] = frame.decode_frame(blobs[0])[1]
                self.momenta[p] = torch.zeros_like(self.values[p])
            case "commit":
                require(not self.finals, "1", "a commit after the run's value was final")
                self._commit(record, blobs)
            case "final" | "complete":
                self.finals.add(record["digest"])

    def _commit(self, r: dict[str, Any], blobs: Sequence[Buffer]) -> None:
        p, version, indices = r["fragment"], r["version"], r["indices"]
        where = f"commit {version} of fragment {p}"
        require(version == self.versions[p] + 1, "3", f"{where} follows {self.versions[p]}")
        require(bool(indices) and len(blobs) == len(indices), "1", f"{where} names nobody")
        require(indices == sorted(set(indices)), "4", f"{where} counts a worker twice: {indices}")
        require(abs(sum(r["weights"]) - 1.0) < 1e-9, "1 (I8)", f"{where}: weights sum to {sum(r['weights'])}")
        require(
            max(r["weights"]) - min(r["weights"]) < 1e-12, "1 (I8)", f"{where}: weights are {r['weights']}"
        )
        for name, index, number, tokens, blob in zip(
            r["contributors"], indices, r["rounds"], r["tokens"], blobs, strict=True
        ):
            header = frame.read_header(blob)
            told = (header.fragment, header.round, header.worker, header.tokens)
            require(told == (p, number, index, tokens), "1", f"{where}: {name}'s frame says {told}")
            require(header.base_version == version - 1, "4", f"{where}: {name} measured from another version")
            require(header.incarnation == self.lives[index], "4", f"{where} counts a former life of {name}")
            require(number > self.rounds.get((p, index), -1), "4", f"{where} counts round {number} again")
            require(header.steps > 0, "5", f"{where}: {name} has no work of its own")
            self.rounds[p, index] = number
            self.by_worker[name, p] = self.by_worker.get((name, p), 0) + tokens
        for shard, low, high in (part for ranges in r.get("ranges", ()) for part in ranges):
            named = {(shard, block) for block in range(low, high)}
            require(not named & self.blocks, "4 (I17)", f"{where} has blocks that were committed before")
            self.blocks |= named
        self.versions[p], self.digests[p, version] = version, r["digest"]
        self.tokens += sum(r["tokens"])
        if self.config.codec.down in EXACT:
            self._step(p, blobs)

    def _step(self, p: int, blobs: Sequence[Buffer]) -> None:
        """b <- mu b + D; G <- G - lr (D + mu b), with D the plain mean over the accepted set, clipped if asked for."""
        deltas = [frame.decode_frame(blob, codec=self.codecs[p])[1].double() for blob in blobs]
        if self.config.robust.kind == "clip_median":
            norms = [float(d.norm()) for d in deltas]
            middle = statistics.median(norms)
            deltas = [
                d if n <= middle or n == 0.0 else d * (middle / n) for d, n in zip(deltas, norms, strict=True)
            ]
        mean, outer = torch.stack(deltas).mean(0), self.config.outer
        b = self.momenta[p] = self.momenta[p].double() * outer.momentum + mean
        self.values[p] = self.values[p].double() - outer.lr * (mean + outer.momentum * b)

    def compare(self, p: int, held: Tensor) -> None:
        """What the coordinator holds after the newest commit of `p`."""
        require(bool(torch.isfinite(held).all()), "5", f"fragment {p} is not finite")
        if self.config.codec.down in EXACT and self.versions.get(p, 0) > 0:
            close = torch.allclose(self.values[p].float(), held, rtol=1e-4, atol=1e-4)
            require(close, "1", f"fragment {p}: another value than the contributions of its commit give")
            self.values[p] = held.clone()  # so that roundings do not add up


@dataclass
class Seen:
    """A round in flight when it was first seen, and once encoded what error feedback held before and after."""

    flight: Flight
    due: int
    before: Tensor | None = None
    after: Tensor | None = None


class Watch:
    """Everything that was seen of a run. `tampered`: frames were changed on their way, so digests may differ."""

    def __init__(self, config: RunConfig, codecs: Sequence[Codec], *, tampered: bool) -> None:
        self.config, self.codecs, self.tampered = config, codecs, tampered
        self.books: dict[str, Book] = {}
        self.told: dict[tuple[int, int], str] = {}  # (fragment, version) -> digest, as any worker heard it
        self.trained: dict[str, int] = {}  # inner steps by name, over all lives
        self.leaders: dict[int, str] = {}  # epoch -> node
        self._led: set[tuple[str, int]] = set()
        self._held: dict[tuple[str, int], tuple[Replica, int]] = {}
        self._flights: dict[tuple[str, int], Seen] = {}

    # ---- nodes ----

    def record(self, node: str, first: bool, record: dict[str, Any], blobs: Sequence[Buffer]) -> None:
        """It is on the node's disk now; `first` of a new journal."""
        if first or node not in self.books:
            self.books[node] = Book(self.config, self.codecs)
        self.books[node].add(record, blobs)

    def committed(self, node: str, coordinator: Coordinator, p: int) -> None:
        book = self.books[node]
        if p in coordinator.ledgers and coordinator.ledgers[p].shard.version == book.versions[p]:
            book.compare(p, coordinator.ledgers[p].shard.params)
        for (name, fragment), tokens in book.by_worker.items():
            if fragment == p:
                made = TOKENS * self.trained.get(name, 0)
                require(tokens <= made, "4 (I17)", f"{tokens} tokens of {name} counted, it has made {made}")

    def says(self, node: str, action: Send) -> None:
        """Nobody hears of anything before it is on the disk of whoever says it."""
        message, book = action.message, self.books.get(node)
        if isinstance(message, Commit | Snapshot):
            key = (message.fragment, message.version)
            durable = book is not None and book.digests.get(key) == message.digest
            require(durable, "3", f"{node} announces {key}, which is not on its disk")
        if isinstance(message, Refused) and message.kind == "final" and message.reason:
            durable = book is not None and message.reason in book.finals
            require(durable, "3", f"{node} announces a final value that is not on its disk")

    def leads(self, node: str, life: int, c: Coordinator, now: float) -> None:
        book = self.books.get(node)
        if book is None:
            return
        if (node, life) not in self._led:
            self._led.add((node, life))
            other = self.leaders.setdefault(c.epoch, node)
            require(other == node, "3", f"{node} and {other} both lead epoch {c.epoch}")
            for key, digest in self.told.items():
                require(book.digests.get(key) == digest, "3", f"{node} leads without the announced {key}")
        require(
            c.tokens == book.tokens, "4 (I17)", f"{c.tokens} tokens counted, {book.tokens} in the journal"
        )
        for name, holder in c.leases.holders.items() if c.leases is not None and not c.complete else ():
            kept = holder.ranges and not (name in c.members and c.members[name].live)
            pending = kept and name in c.members and leasing._pending(c, c.members[name].index)
            require(not kept or bool(pending), "5 (I17)", f"{name} is not there and keeps blocks")
        if not self.tampered:
            require(not c.rejections["digest_differs"], "2", "a worker got another digest from a commit")
        fault = self.config.fault
        longest = fault.round_timeout_s + (fault.fixed_grace_s or 0.0) + 20.0
        for p, r in c.rounds.items():
            require(
                now - r.opened < longest, "5", f"a round of fragment {p} is open for {now - r.opened:g} s"
            )

    def hears(self, message: object) -> None:
        """Whatever any worker hears of a version must be the same, whoever says it."""
        if isinstance(message, Commit | Snapshot):
            key = (message.fragment, message.version)
            digest = self.told.setdefault(key, message.digest)
            require(digest == message.digest, "1", f"two different commits {key} were announced")

    # ---- workers ----

    def begins(self, replica: Replica, model: ToyModel) -> None:
        """The first step of a life: on the run's weights, and on nothing else."""
        for slot in replica.slots:
            require(slot.shard is not None, "5", f"{replica.worker} trains without the run's values")
            if slot.shard is not None and slot.flight is None and not slot.adopt and not replica.end.final:
                same = torch.equal(model.read(slot.index), slot.shard.params)
                require(same, "5", f"{replica.worker} begins on other weights than the run's")

    def worker(self, replica: Replica) -> None:
        for slot in replica.slots:
            key = (replica.worker, slot.index)
            held = (replica, slot.version)
            if slot.shard is not None and not slot.broken and not slot.jobs and self._held.get(key) != held:
                self._held[key] = held
                want = self.told.get((slot.index, slot.version))
                if slot.version:
                    same = frame.digest(slot.shard.params) == want
                    require(
                        same, "2 (I6)", f"{replica.worker} holds another version {slot.version} of {key[1]}"
                    )
            differs = bool(slot.differs) and not self.tampered
            require(not differs, "2", f"{replica.worker} got another digest for fragment {slot.index}")
            self._flight(replica, key)

    def _flight(self, r: Replica, key: tuple[str, int]) -> None:
        slot, seen = r.slots[key[1]], self._flights.get(key)
        flight = slot.flight
        over = r.flushing or bool(r.end.final) or slot.shard is None
        if seen is not None and flight is not seen.flight:
            at = f"fragment {key[1]} of {r.worker} is merged at step {r.step} and was due at {seen.due}"
            require(over or r.step >= seen.due or not math.isfinite(seen.due), "6", at)
            del self._flights[key]
            seen = None
        if flight is None:
            return
        if seen is None:
            seen = self._flights[key] = Seen(flight, flight.due)
        require(over or flight.due == seen.due, "6", f"a merge of {r.worker} moved to step {flight.due}")
        feedback = slot.feedback
        if feedback is None or flight.frame is None or flight.delta is not None:
            return
        if not flight.outcome and feedback.pending and seen.after is None:
            state = feedback.state_dict()
            seen.before, seen.after = state["before"].clone(), state["residual"].clone()
        elif flight.outcome and seen.after is not None and feedback.residual is not None:
            want = seen.after if flight.outcome == "merged-in" else seen.before
            same = want is not None and torch.equal(feedback.residual, want)
            require(same, "I9", f"error feedback of {r.worker} after a round that was {flight.outcome}")

    def forget(self, worker: str) -> None:
        """A new life begins under the name."""
        for kept in (self._held, self._flights):
            for key in [key for key in kept if key[0] == worker]:
                del kept[key]
