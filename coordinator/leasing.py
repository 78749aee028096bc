"""Data leases at the coordinator: requests answered, contributions held to their blocks, blocks of the dead returned.

A block enters every fragment of the model, each at a time of its own, and can count as committed only once. **It is
committed by fragment 0**: contributions of that fragment, and no others, name the blocks that they were made with. So a
block is in one journal record at most, the sum over the journal is what the run has read, and every block that is
still leased can be returned and lost to nobody. The price: where a worker dies between the commits of two fragments,
some fragments have its last blocks, up to H steps of them, once more or once less than fragment 0 has. Waiting for all
fragments would not avoid that, since the first commit cannot be undone, and would read such blocks twice in more of them.

Blocks of a worker return when it is dead, has left, or begins a new life that does not hold them any more; those in a
round that is still open wait for its end. Plain functions on the `Coordinator` of `diloco.coordinator.state`; the
table is in `diloco.coordinator.leases`. Every change is a record of the journal before anybody hears of it, so that a
coordinator that restarts, and a standby, have the same table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diloco.comms.messages import Lease, LeaseRequest, Refused
from diloco.config import RunConfig
from diloco.coordinator.gates import Unfit
from diloco.coordinator.leases import LeaseTable
from diloco.coordinator.membership import Member
from diloco.coordinator.rounds import Answer
from diloco.errors import StorageError
from diloco.ranges import MAX_RANGES, Ranges, both, count, minus, parsed

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator

LEDGER = 0  # the fragment whose commits commit blocks


def table_of(config: RunConfig) -> LeaseTable | None:
    """The table that a run of this configuration begins with; None where workers read shards of their own."""
    if config.data.mode == "static":
        return None
    shards = (config.data.shards or config.topology.workers) if config.data.mode == "deficit" else 1
    return LeaseTable(config.run.seed, shards)


def request(c: Coordinator, member: Member, message: LeaseRequest) -> None:
    """Lease the blocks that are wanted, if this request has not been answered yet, and say what the worker holds."""
    table = c.leases
    if table is None or not c.started or c.complete:
        return
    # Of an earlier life nothing is pending; but this one may contribute first and name what it does not keep.
    kept = (*message.kept, *_pending(c, member.index))
    try:
        record = table.offer(
            member.name, member.incarnation, message.number, message.want, kept, message.sizes
        )
    except ValueError as error:
        _refuse(c, member, str(error))
        return
    if record is not None:
        table.apply(record)
        c.persist(record)
    holder = table.holders[member.name]
    holder.heard = max(holder.heard, message.number)
    _tell(c, table, member)


def check(
    c: Coordinator, member: Member, fragment: int, ranges: Ranges, tokens: int, *, in_time: bool = False
) -> None:
    """The contribution was made with blocks that are the sender's, and with no more tokens than they have.

    Blocks of another contribution of the sender that may still be committed are its own no more; one that is
    `in_time` may replace its answer in the open round, and so may name the same. Raises Unfit, cause "lease".
    """
    table = c.leases
    if table is None or fragment != LEDGER:
        if ranges:
            raise Unfit("lease", f"a contribution of fragment {fragment} names blocks, and needs none")
        return
    pending = _held_late(c, member.index) if in_time else _pending(c, member.index)
    try:
        lacking = table.lacking(member.name, ranges, pending)
    except ValueError as error:
        raise Unfit("lease", str(error)) from None
    if lacking:
        raise Unfit("lease", f"{count(lacking)} of {count(ranges)} blocks are not leased to this worker")
    if table.scatters(member.name, (*pending, *ranges)):
        raise Unfit("lease", f"it leaves the lease in more than {MAX_RANGES} pieces: use blocks in order")
    if ranges and (words := table.disagreement(member.name)):
        _refuse(c, member, words)
        raise Unfit("lease", f"of other data: {words}")
    most = count(ranges) * c.config.model.sequence_length
    if tokens > most:
        raise Unfit("lease", f"{tokens} tokens from {count(ranges)} blocks, which have {most}")


def committed(c: Coordinator, fragment: int, names: Sequence[str], answers: Sequence[Answer]) -> list[Answer]:
    """These contributions are in a commit that is about to be durable; returned as its record is to have them.

    That is, with the blocks that still are the sender's. All are, if `check` is right; but a commit that fails would
    fail again after every restart.
    """
    if c.leases is None or fragment != LEDGER:
        return list(answers)
    found = []
    for name, answer in zip(names, answers, strict=True):
        answer = replace(answer, ranges=both(answer.ranges, c.leases.held(name)))
        c.leases.commit(name, answer.ranges)
        found.append(answer)
    return found


def sweep(c: Coordinator) -> None:
    """Return what the dead and those who left hold; tell whoever comes back."""
    table = c.leases
    if table is None or c.complete:
        return
    for name in table.holders:
        member = c.members.get(name)
        if member is None or not member.live:
            record = table.returning(name, _pending(c, member.index) if member else ())
            if record is not None:
                table.apply(record)
                c.persist(record)
                table.holders[name].told = False
        elif not table.holders[name].told and table.holders[name].incarnation == member.incarnation:
            _tell(c, table, member)


def repeat(c: Coordinator, record: Mapping[str, Any]) -> None:
    """A record of the journal, in a coordinator that is being rebuilt. Raises StorageError if it cannot be."""
    if c.leases is None:
        return
    try:
        if record["type"] != "commit":
            c.leases.apply(record)
        elif int(record["fragment"]) == LEDGER:
            for name, ranges in zip(record["contributors"], record.get("ranges", ()), strict=False):
                c.leases.commit(str(name), parsed(ranges))
    except ValueError as error:
        raise StorageError(
            f"journal: a {record['type']} record does not fit the leases before it ({error}): it is damaged, "
            "or data.mode or data.shards are not those that the run began with; restore them"
        ) from None


def facts(c: Coordinator) -> dict[str, Any] | None:
    """For the status; None where nothing is leased."""
    if c.leases is None:
        return None
    return {"mode": c.config.data.mode, **c.leases.facts(c.config.model.sequence_length)}


def _pending(c: Coordinator, index: int) -> Ranges:
    """Blocks in contributions that may still be committed: of the open round, and come late for the next one."""
    answer = c.rounds[LEDGER].answers.get(index) if LEDGER in c.rounds else None
    return (*(answer.ranges if answer is not None else ()), *_held_late(c, index))


def _held_late(c: Coordinator, index: int) -> Ranges:
    answer = c.late.get(LEDGER, {}).get(index)
    return answer.ranges if answer is not None else ()


def _refuse(c: Coordinator, member: Member, words: str) -> None:
    reason = f"data: {words}: give every worker the same data.source, tokenizer and sequence length"
    c.send(member.name, Refused("settings", reason))


def _tell(c: Coordinator, table: LeaseTable, member: Member) -> None:
    """What the worker may use: not what is held of it for the next commit, which it must not train again."""
    holder = table.holders[member.name]
    holder.told = True
    ranges = minus(holder.ranges, _held_late(c, member.index))
    number = max(holder.number, holder.heard)
    c.send(member.name, Lease(holder.incarnation, number, table.serial, ranges))
