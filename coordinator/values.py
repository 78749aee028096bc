"""A fragment's value: where it starts, and how it is handed to whoever lacks it. Functions over the coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diloco import outer
from diloco.comms import codec, downlink, frame
from diloco.comms.messages import Buffer, Fetch, Initial, Refused, Snapshot
from diloco.coordinator.gates import check_contribution
from diloco.coordinator.membership import Member
from diloco.errors import CorruptDataError
from diloco.late import base_state
from diloco.overlap import bases_for, outer_optimizer

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator


def seeder(c: Coordinator) -> Member | None:
    """Who gives the starting values: the lowest live index, while any is missing."""
    assert c.plan is not None
    if len(c.ledgers) == len(c.plan.fragments):
        return None
    return next((m for m in c.by_index() if m.live), None)


def initial(c: Coordinator, member: Member, message: Initial) -> None:
    assert c.plan is not None
    if message.fragment in c.ledgers or seeder(c) is not member:
        return
    try:
        values = check_contribution(
            message.frame, c.plan, message.fragment, c.run_hash, codec.get("fp32")
        ).values
    except CorruptDataError as error:
        c.send(member.name, Refused("corrupt", str(error)))
        return
    c.persist(
        {"type": "initial", "fragment": message.fragment, "digest": frame.digest(values)}, [message.frame]
    )
    begin(c, message.fragment, message.frame)
    for other in c.by_index():
        if other is not member and other.live:
            snapshot(c, other, message.fragment)


def begin(c: Coordinator, fragment: int, initial: Buffer) -> None:
    """The fragment's starting value is here."""
    shard = outer.OuterShard.start(outer_optimizer(c.config), frame.decode_frame(initial)[1])
    shard.state.update(c.rule.state(shard.params.numel()))
    shard.state.update(base_state(c.config, shard.params.numel()))
    c.ledgers[fragment] = downlink.Ledger.start(shard, c.config.codec.down, c.codecs[fragment])
    c.ledgers[fragment].bases = bases_for(c.config, shard.params)


def fetch(c: Coordinator, member: Member, message: Fetch) -> None:
    """Somebody lacks the value, or computed another one from the same commit, which is noted: it gets the run's."""
    if message.fragment not in c.ledgers:
        return  # of no fragment, or of one that has no value yet: there is nothing to differ from
    if message.differs and member.differed.get(message.fragment) != message.differs:
        member.differed[message.fragment] = message.differs
        c.rejections["digest_differs"] += 1
        member.rejected["digest_differs"] += 1
    snapshot(c, member, message.fragment)


def snapshot(c: Coordinator, member: Member, fragment: int) -> None:
    ledger = c.ledgers.get(fragment)
    if ledger is None:
        return  # it is sent to everybody as soon as the starting value is here
    shard = ledger.shard
    frames = downlink.snapshot_frames(c.config.codec.down, shard, fragment=fragment, run_id=c.run_hash)
    counted, _ = c.counted.get((fragment, member.index), (-1, 0))
    c.send(member.name, Snapshot(fragment, shard.version, frame.digest(shard.params), frames, counted))
