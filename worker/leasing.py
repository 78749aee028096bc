"""A worker's half of the data leases: which blocks it may train on, and which went into what it sends. No I/O, no data.

Blocks wait in `ahead`, are `drawn` for the step that is being computed, are `fresh` until fragment 0 is sent, and
`flying` until its round has ended; that fragment's commit commits them (why that one: `diloco.coordinator.leasing`). A
round that did not count gives its blocks back to `fresh` where the work, or a share of it, is still in the parameters,
so that the next round covers it, and to the front of `ahead` where it is lost: then they are trained again.

What the coordinator says is held is the truth. Blocks that it no longer names are dropped; where work on them is in the
parameters already, the worker goes on from the run's value (`abandon`), since somebody else does that work or it has
been committed by an earlier life. Blocks that it names and that are nowhere here are trained again.

Requests are sent while at least a lease's length is ahead, one at a time, again with each heartbeat and each new
connection until they are answered. `Leasing` is the bookkeeping, the functions are its places in `Replica`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diloco.comms.machine import COORDINATOR, Action, Send
from diloco.comms.messages import Lease, LeaseRequest, Rejected
from diloco.errors import ConfigError
from diloco.ranges import MAX_RANGES, Ranges, both, chain, count, minus, parsed, split, union
from diloco.worker.replica_slots import Flight, Slot

if TYPE_CHECKING:
    from diloco.worker.replica import Replica

LEDGER = 0  # the fragment whose contributions name blocks
SHORTEST = 8  # inner steps of a lease, at least: with H = 1 a request at every step would be one too many
_LISTS = ("ahead", "drawn", "fresh", "flying", "handed")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has no answer yet. `known`: what was here when it was made; nothing of it is news."""

    number: int
    want: int
    known: Ranges


class Leasing:
    """What one worker holds. `per_step`: blocks of an inner step; `sizes`: blocks of each shard of its data."""

    def __init__(self, per_step: int, sizes: tuple[int, ...]) -> None:
        self.per_step, self.sizes = per_step, sizes
        self.ahead: Ranges = ()
        self.drawn: Ranges = ()
        self.fresh: Ranges = ()
        self.flying: Ranges = ()
        self.handed: Ranges = ()  # came late: the next commit of the fragment has them
        self.number = 0  # of this life's newest request
        self.asked: Asked | None = None
        self.serial = -1  # of the newest description of what we hold
        self.confirmed = False  # this life knows what it holds
        self.unsure = False  # something was refused: ask what we hold
        self.abandoned = False  # the parameters hold work that must not count

    @property
    def held(self) -> Ranges:
        return (*self.drawn, *self.ahead, *self.fresh, *self.flying)

    def ready(self, blocks: int) -> bool:
        return self.confirmed and not self.abandoned and count(self.ahead) >= blocks

    def draw(self, blocks: int) -> Ranges:
        """The next `blocks` blocks, for the step that is being computed; only when `ready`."""
        assert self.ready(blocks), "blocks are drawn only when they are there"
        taken, self.ahead = split(self.ahead, blocks)
        self.drawn = chain(self.drawn, taken)
        return taken

    def undraw(self) -> None:
        """The step was not made."""
        self.ahead, self.drawn = chain(self.drawn, self.ahead), ()

    def lack(self, steps_left: int, H: int) -> int:
        """How many blocks to ask for: none while a lease's length is ahead, or all that the run still needs."""
        length = max(H, SHORTEST) * self.per_step
        need = max(0, steps_left * self.per_step - count(self.drawn))  # the coming step has its blocks
        here = count(self.ahead)
        return 0 if here >= min(length, need) else min(2 * length, need) - here

    def shrink(self, ranges: Ranges) -> None:
        """Only these are still ours, wherever they are."""
        self.ahead, self.flying = both(self.ahead, ranges), both(self.flying, ranges)
        self.handed = both(self.handed, ranges)
        if minus((*self.fresh, *self.drawn), ranges):
            self.abandoned = True

    def settle(self, *, counted: bool, kept: bool, later: bool = False) -> None:
        """The round in flight has ended: it counted, or will `later`, or its work is `kept` in the parameters, or lost."""
        blocks, self.flying = self.flying, ()
        if later:
            self.handed = chain(self.handed, blocks)
        elif not counted and kept:
            self.fresh = chain(blocks, self.fresh)
        elif not counted:
            self.ahead = chain(blocks, self.ahead)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, between two steps: the cursor is the beginning of `ahead`."""
        return {name: [list(r) for r in getattr(self, name)] for name in _LISTS}

    def load(self, saved: Mapping[str, Any]) -> None:
        for name in _LISTS:
            setattr(self, name, parsed(saved.get(name, ())))
        self.undraw()


# ---- places in Replica ----


def require_data(r: Replica) -> None:
    """ConfigError if a setting needs something said about the data, and it was not."""
    if r.config.weights.mode == "shard" and not r.shard:
        raise ConfigError(
            "weights.mode = 'shard' needs the size of this worker's data: DiLoCo(..., shard=number of tokens)"
        )
    if r.config.data.mode != "static" and r.lease is None:
        raise ConfigError(
            f"data.mode = {r.config.data.mode!r} needs data by lease: diloco.worker.drawing.lease(optimizer, ...) before "
            "join(), and draw(optimizer, blocks) before each step; or set data.mode = 'static'"
        )


def ask(r: Replica, *, again: bool = False) -> list[Action]:
    """The request that is due, if one is; with `again` also the one that is not answered yet."""
    lease = r.lease
    if lease is None or not r.joined or r.leaving is not None or r.flushing:
        return []
    if lease.asked is None:
        want = lease.lack(r.config.run.inner_steps_total - r.step, r.plan.H)
        if lease.confirmed and not want and not lease.unsure:
            return []
        lease.number, lease.unsure = lease.number + 1, False
        asked = lease.asked = Asked(lease.number, want, lease.held)
    elif again:
        asked = lease.asked
    else:
        return []
    kept = () if lease.confirmed else union(asked.known)[:MAX_RANGES]
    return [
        Send(
            COORDINATOR,
            LeaseRequest(r.worker, r.incarnation, asked.number, asked.want, kept, lease.sizes),
        )
    ]


def welcomed(r: Replica, *, fresh: bool) -> list[Action]:
    """A new life of the worker starts its requests at 1; after a new connection the last one is repeated.

    If all are answered there is a new one: what was taken from us we may not have heard, least from a new coordinator.
    """
    lease = r.lease
    if lease is not None and fresh:
        lease.number, lease.asked, lease.serial, lease.confirmed = 0, None, -1, False
    elif lease is not None:
        lease.unsure = lease.unsure or lease.asked is None
    return ask(r, again=True)


def told(r: Replica, message: Lease) -> list[Action]:
    """What the coordinator says that we hold."""
    lease = r.lease
    if lease is None or message.incarnation != r.incarnation or message.serial < lease.serial:
        return []
    asked, lease.serial = lease.asked, message.serial
    lease.shrink(message.ranges)
    if asked is None or message.number != asked.number:
        return ask(r)
    known = (*asked.known, *lease.held, *lease.handed) if lease.confirmed else lease.held
    lease.ahead = chain(lease.ahead, minus(message.ranges, known))
    lease.asked, lease.confirmed = None, True
    return ask(r)


def refused(r: Replica, message: Rejected) -> list[Action]:
    """A contribution was made with blocks that are not ours any more: its work must not come back in the next one."""
    lease, slot = r.lease, r.slots[message.fragment]
    if lease is None or message.fragment != LEDGER or not message.reason.startswith("lease:"):
        return []
    if slot.flight is not None and slot.flight.round == message.round:
        slot.flight.overwrite, lease.flying = True, ()
    lease.unsure = lease.abandoned = True
    return ask(r)


def trained(r: Replica) -> None:
    """The step with the drawn blocks is made."""
    if r.lease is not None:
        r.lease.fresh, r.lease.drawn = chain(r.lease.fresh, r.lease.drawn), ()


def departs(r: Replica, slot: Slot) -> None:
    """A round of the fragment leaves, with all that was trained since the last one."""
    if r.lease is not None and slot.index == LEDGER:
        r.lease.fresh, r.lease.flying = (), chain(r.lease.flying, r.lease.fresh)


def carried(r: Replica, slot: Slot) -> Ranges:
    """The blocks that the contribution in flight names."""
    return r.lease.flying if r.lease is not None and slot.index == LEDGER else ()


def ended(r: Replica, slot: Slot, flight: Flight) -> None:
    """The round is over and is merged now."""
    if r.lease is None or slot.index != LEDGER:
        return
    lease, policy = r.lease, r.config.fault.late
    late = flight.outcome == "left-out" and not (flight.refused or flight.overwrite or flight.final)
    rolled_back = late and policy == "rollback" and flight.frame is not None
    if rolled_back:  # and what was done since it left
        lease.ahead, lease.fresh = chain(lease.fresh, lease.ahead), ()
    stays = flight.alpha > 0.0 or flight.sent is not None or (late and r.config.codec.ef_recover)
    stays = flight.outcome == "aborted" or (stays and not r.whole_round) or (late and policy == "isolate")
    lease.settle(
        counted=flight.outcome == "merged-in",
        kept=stays and not (flight.overwrite or rolled_back),
        later=flight.accepted and flight.outcome == "left-out",
    )


def replaced(r: Replica, slot: Slot) -> None:
    """The parameters became the run's value: what was trained since the last round is lost."""
    if r.lease is not None and slot.index == LEDGER:
        r.lease.ahead, r.lease.fresh = chain(r.lease.fresh, r.lease.ahead), ()


def forgot(r: Replica, slot: Slot) -> None:
    """The slot became a newcomer's, with a round in flight, if there was one, whose outcome we shall not hear."""
    if r.lease is not None and slot.index == LEDGER:
        r.lease.ahead = chain(r.lease.flying, r.lease.fresh, r.lease.ahead)
        r.lease.flying = r.lease.fresh = ()


def abandon(r: Replica) -> None:
    """By the training thread: let go of all work that is not in a commit, and go on from the values that we have."""
    lease = r.lease
    if lease is None or not lease.abandoned:
        return
    lease.abandoned, lease.unsure = False, True
    for slot in r.slots:
        slot.steps = slot.tokens = 0
        slot.turn = slot.carry = None
        slot.adopt = slot.shard is not None
        if slot.flight is not None:
            slot.flight.overwrite = True
            if slot.own is not None:  # a whole round is measured from here
                r.parameters.write(slot.index, slot.own.params)
    # What of it still is ours comes back with the next lease, as blocks that are nowhere here.
    lease.fresh = lease.drawn = ()
