"""What a worker sends, and the heavy jobs behind it: encode, open, restore. Plain functions on a `Replica`.

Jobs are closures that the driver runs away from the training thread, in order; the state machine that asks for
them and takes their results is in `diloco.worker.replica`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diloco import outer
from diloco.aggregate import rda_pieces
from diloco.comms import downlink, frame
from diloco.comms.codec import Codec
from diloco.comms.feedback import ErrorFeedback
from diloco.comms.machine import COORDINATOR, Action, Compute, Send
from diloco.comms.messages import (
    FLUSHED,
    Claim,
    Commit,
    Contribution,
    Heartbeat,
    Initial,
    Join,
    Leave,
    Skip,
    Snapshot,
    Vote,
    Welcome,
)
from diloco.errors import CorruptDataError, NonFiniteError
from diloco.settings import settings_json
from diloco.worker import leasing
from diloco.worker.replica_slots import Flight, Slot, apply_commit, shard_of, start_shard

if TYPE_CHECKING:
    from diloco.worker.replica import Replica


def encode_job(r: Replica, slot: Slot, flight: Flight) -> Callable[[], Any]:
    delta, encoder = flight.delta, slot.feedback or r.codecs[slot.index]  # those of now: see Slot.forget
    assert delta is not None

    def encode() -> tuple[str, Slot, Flight, bytes | NonFiniteError, tuple[int, int]]:
        label = (r.index, r.incarnation)
        try:
            return "encoded", slot, flight, _frame(r, slot, encoder, delta, flight, label), label
        except NonFiniteError as error:
            return "encoded", slot, flight, error, label

    return encode


def encoded(
    r: Replica, slot: Slot, flight: Flight, made: bytes | NonFiniteError, label: tuple[int, int]
) -> list[Action]:
    """Send what was encoded. If its round has got its answer meanwhile, tell the error feedback instead."""
    flight.delta = None
    if slot.flight is not flight:
        return []  # forgotten, together with the error feedback that it was encoded with
    if isinstance(made, NonFiniteError):
        flight.overwrite = True
    else:
        flight.frame, flight.label = made, label
    if not flight.outcome and not flight.counted:
        return answer(r, slot, flight) if r.joined else []
    if slot.feedback is not None:
        lost = flight.outcome in ("left-out", "aborted") and not flight.accepted
        settle = slot.feedback.rollback if lost else slot.feedback.commit
        settle()
    return []


def _frame(
    r: Replica,
    slot: Slot,
    encoder: Codec | ErrorFeedback,
    delta: Tensor,
    flight: Flight,
    label: tuple[int, int],
) -> bytes:
    return frame.encode_frame(
        encoder,
        delta,
        fragment=slot.index,
        round=flight.round,
        base_version=flight.base,
        run_id=r.run_hash,
        worker=label[0],
        incarnation=label[1],
        steps=flight.steps,
        tokens=flight.tokens,
        flags=frame.FLAG_FINAL if flight.final and r.mode == "eager" else 0,
    )


def open_waiting(r: Replica, slot: Slot) -> list[Action]:
    """Take what waits, in order. Only while a round is in flight, or at the end: nobody else then reads the anchor."""
    kept = slot.kept
    if slot.restoring or (kept is not None and slot.jobs):
        return []
    if kept is not None and slot.shard is not None and kept.version <= slot.version and not slot.broken:
        slot.kept = kept = None
    free = slot.flight is not None or r.end.near
    if kept is not None and (slot.shard is None or slot.adopt or slot.broken or free):
        slot.kept, slot.restoring, slot.jobs = None, True, slot.jobs + 1
        return [Compute(_restore_job(r, slot, kept))]
    if kept is not None or slot.broken:
        return []
    actions: list[Action] = []
    while free and (commit := slot.waiting.pop(slot.reached + 1, None)) is not None:
        slot.jobs, slot.target = slot.jobs + 1, commit.version
        actions.append(Compute(open_job(r, slot, commit)))
    return actions


def open_job(r: Replica, slot: Slot, commit: Commit) -> Callable[[], Any]:
    def open_one() -> tuple[str, Slot, Commit, CorruptDataError | None]:
        try:
            pieces = rda_pieces(r.plan.fragments[slot.index]) if r.rule.by_direction else ()
            codec = r.codecs[slot.index]
            apply_commit(slot, commit, r.config.codec.down, codec, r.index, rule=r.rule, pieces=pieces)
        except (CorruptDataError, KeyError) as error:
            return "opened", slot, commit, CorruptDataError(str(error))
        return "opened", slot, commit, None

    return open_one


def _restore_job(r: Replica, slot: Slot, snapshot: Snapshot) -> Callable[[], Any]:
    def restore() -> tuple[str, Slot, Snapshot, outer.OuterShard | None]:
        try:
            return "restored", slot, snapshot, shard_of(snapshot, r.plan, r.config)
        except (CorruptDataError, ValueError, RuntimeError):
            return "restored", slot, snapshot, None

    return restore


def answer(r: Replica, slot: Slot, flight: Flight) -> list[Action]:
    """What this worker says to the round: its contribution, or that it has none; nothing yet while it is encoded."""
    if flight.overwrite or flight.refused:
        flight.since = r.now
        reason = "nothing of its own" if flight.steps == 0 else "non-finite pseudo-gradient"
        reason = "refused before" if flight.refused else reason
        skip = Skip(r.worker, r.incarnation, slot.index, flight.round, reason)
        return [Send(COORDINATOR, skip)]
    if flight.frame is None:
        return []
    flight.since = r.now
    here = (r.index, r.incarnation)
    if flight.label != here:  # the header names the life that sends it
        flight.frame, flight.label = frame.relabel(flight.frame, worker=here[0], incarnation=here[1]), here
    held = leasing.carried(r, slot)
    message = Contribution(r.worker, r.incarnation, slot.index, flight.round, flight.frame, r.shard, held)
    return [Send(COORDINATOR, message)]


def join(r: Replica) -> Join:
    return Join(
        worker=r.worker,
        nonce=r.nonce,
        run_id=r.config.run.run_id,
        plan=r.plan.describe(),
        settings=settings_json(r.config),
        versions=r.versions(),
        step=r.step,
        epoch=r.epoch,
    )


def vote(r: Replica, claim: Claim) -> Vote:
    """For the side that asked first about this bond of a coordinator and its standby; asked again, the same."""
    side = r.votes.setdefault(claim.attachment, claim.side)
    return Vote(r.worker, r.nonce, claim.attachment, side)


def give_initial(r: Replica, message: Welcome) -> list[Action]:
    """This worker's starting values become the run's."""
    actions: list[Action] = []
    for slot in r.slots:
        if slot.shard is None and message.versions[slot.index] == 0:
            values = r.parameters.read(slot.index)
            slot.shard = start_shard(r.config, values)
            if r.config.codec.down == "g_bf16":
                slot.shard.params.copy_(values.bfloat16())
            slot.adopt = True
        if slot.version == 0 and slot.shard is not None:
            # The anchor, rounded where the downlink rounds: a repeated offer must have the same bits as the first.
            framed = downlink.value_frame(slot.shard.params, slot.index, 0, r.run_hash, worker=r.index)
            actions.append(Send(COORDINATOR, Initial(r.worker, r.incarnation, slot.index, framed)))
    return actions


def flushed(r: Replica) -> list[Action]:
    """Our last contribution is sent: said with each heartbeat until we hear the run's final value."""
    if not r.end.asked or r.end.final:
        return []
    return [Send(COORDINATOR, Leave(r.worker, r.incarnation, FLUSHED, r.current_progress(), r.end.held))]


def heartbeat(r: Replica) -> list[Action]:
    r.next_heartbeat = r.now + r.config.fault.heartbeat_s
    old = r.now - 3 * r.config.fault.heartbeat_s
    in_flight = tuple(
        (s.index, f.round)
        for s in r.slots
        if (f := s.flight) is not None and not f.outcome and not s.jobs and f.delta is None and f.since <= old
    )
    if r.leaving is not None:
        return [Send(COORDINATOR, r.leaving)]
    if not r.joined:
        return [Send(COORDINATOR, join(r))] if r.connected else []
    beat = Heartbeat(r.worker, r.incarnation, r.current_progress(), r.versions(), in_flight)
    lacking = [s for s in r.slots if (s.shard is None or s.broken) and not s.jobs]
    fetches = [Send(COORDINATOR, r.fetch(s)) for s in lacking]
    return [Send(COORDINATOR, beat), *fetches, *leasing.ask(r, again=True), *flushed(r)]
