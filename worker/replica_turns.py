"""A fragment's turn at a worker: what is sent, what its parameters become, and how a run ends.

Plain functions on a `Replica`, called by the training thread alone. In most modes a round is sent at once and merged
tau steps later. In ``delayed`` and ``eager`` it travels for a whole round: at each boundary the last one is taken in
and the next one leaves, so that a fragment still has one round in flight. Messages are in `replica` and `replica_jobs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diloco.comms.machine import Action, Compute
from diloco.delta import pseudo_gradient
from diloco.outer import OuterShard
from diloco.overlap import EagerAverage, compensate, eager_update
from diloco.worker import leasing, replica_end, replica_jobs, replica_late
from diloco.worker.replica_slots import Flight, Slot, Turn, merged

if TYPE_CHECKING:
    from diloco.worker.replica import Replica


def take(r: Replica, slot: Slot, at: int) -> list[Action]:
    """Inner step `at` of the run is the fragment's turn."""
    if r.end.final:
        return []
    number = r.plan.round_of(slot.index, at)
    if r.whole_round:
        _hold(r, slot, number, at)
        return []
    if slot.flight is not None:  # a slow worker's step was so long that the last round is still to be merged
        slot.turn = Turn(number, at)
        return []
    ours = (r.index, number)
    # A worker back from its checkpoint repeats its last round: the commit that has it is then the answer.
    if slot.known > slot.version and not any(ours in commit.rounds for commit in slot.waiting.values()):
        slot.turn = Turn(number, at)
        return _catch_up(r, slot, number)
    return send(r, slot, number, at + r.tau, r.alpha)


def _catch_up(r: Replica, slot: Slot, number: int) -> list[Action]:
    """Take in what was committed between two rounds, before the next one is measured; what was learnt is kept.

    Else the round would be measured from a version that is not the newest, and be late, and so would every later one.
    """
    assert slot.shard is not None
    slot.flight = Flight(number, slot.version, r.step, 0.0, 0, 0, since=r.now)
    slot.flight.sent = slot.shard.params.clone()
    return replica_jobs.open_waiting(r, slot)


def merge(r: Replica) -> list[Action]:
    """Write what is due into the parameters, then send what waited for that. Only when nothing is missing."""
    actions: list[Action] = []
    leasing.abandon(r)
    for slot in r.slots:
        if slot.adopt and slot.flight is None and slot.shard is not None:
            _adopt(r, slot)
        flight = slot.flight
        if flight is not None and flight.due <= r.step:
            assert r.settled(slot)
            if slot.told:  # from the next common deadline on, which may be now
                r.next_pace, slot.told = slot.told, 0
                r.pace = r.next_pace if r.step % r.plan.H == 0 else r.pace
            if r.whole_round and not flight.final:
                actions += _boundary(r, slot)
            else:
                _finish(r, slot, flight)
        if slot.turn is not None and slot.flight is None and not r.flushing:
            if r.whole_round:
                actions += _boundary(r, slot)
            else:
                turn, slot.turn = slot.turn, None
                actions += send(r, slot, turn.round, turn.at + r.tau, r.alpha)
    replica_end.write(r)
    return [*actions, *leasing.ask(r)]


def drain(r: Replica) -> None:
    """The run is over: what is in flight is merged now."""
    r.flushing = True
    for slot in r.slots:
        if slot.flight is not None:
            slot.flight.due = r.step
        if (
            r.mode == "delayed"
            and slot.steps
            and slot.turn is None
            and slot.own is not None
            and not r.end.final
        ):
            _hold(r, slot, r.plan.flush_round(slot.index, r.step), r.step)


def flush(r: Replica) -> list[Action]:
    """Send every fragment once more and take the result whole, so that the global value covers every step."""
    actions: list[Action] = []
    everywhere = r.plan.due(r.step) if r.alpha == 0.0 else ()
    for slot in r.slots if not r.end.final else ():
        number, shard = r.plan.flush_round(slot.index, r.step), slot.shard
        assert shard is not None
        if r.mode == "delayed" and (slot.turn is not None or slot.carry is not None):
            turn = slot.turn or Turn(number, r.step, torch.zeros_like(shard.params), slot.steps, slot.tokens)
            slot.turn = None
            actions += _launch(r, slot, turn, number, r.step, final=True)
        # With nobody else in its rounds an eager worker has what they gave; others differ until the last average.
        elif slot.steps or slot.index not in everywhere or (r.mode == "eager" and _count(shard) > 1):
            actions += send(r, slot, number, r.step, 0.0, final=True)
    return actions


def send(r: Replica, slot: Slot, number: int, due: int, alpha: float, *, final: bool = False) -> list[Action]:
    """Send the distance between the anchor and the parameters; merge the commit at step `due`."""
    shard = slot.shard
    assert shard is not None and slot.flight is None, "a fragment has at most one round in flight"
    local = r.parameters.read(slot.index)
    keep = local if r.corrected and due > r.step else None
    delta = pseudo_gradient(shard.params, local)
    flight = _flight(r, slot, number, due, delta, slot.steps, slot.tokens)
    flight.alpha, flight.sent, flight.final = alpha, keep, final
    flight.own = delta if r.config.codec.ef_recover else None
    idle = slot.steps == 0 and not bool(delta.any())
    slot.steps = slot.tokens = 0
    return _depart(r, slot, flight, idle)


def _flight(r: Replica, slot: Slot, number: int, due: int, delta: Tensor, steps: int, tokens: int) -> Flight:
    told = min(max(1, steps), 4 * r.plan.H)  # more can come together after aborted rounds
    tokens = tokens * told // max(1, steps)  # those of the steps that are told
    assert slot.shard is not None
    return Flight(number, slot.shard.version, due, 0.0, told, tokens, delta=delta, since=r.now)


def _depart(r: Replica, slot: Slot, flight: Flight, idle: bool) -> list[Action]:
    slot.flight = flight
    leasing.departs(r, slot)
    if idle:  # a newcomer without work of its own must not dilute the others'
        flight.overwrite, flight.delta, flight.own = True, None, None
        return [*replica_jobs.answer(r, slot, flight), *replica_jobs.open_waiting(r, slot)]
    return [Compute(replica_jobs.encode_job(r, slot, flight)), *replica_jobs.open_waiting(r, slot)]


def _adopt(r: Replica, slot: Slot) -> None:
    """Go on from the anchor as it is."""
    assert slot.shard is not None
    slot.adopt = False
    r.parameters.write(slot.index, slot.shard.params)
    slot.steps = slot.tokens = 0
    leasing.replaced(r, slot)
    if r.whole_round:
        slot.own, slot.carry = own_from(slot.shard), None
        if slot.turn is not None:
            slot.turn = Turn(slot.turn.round, slot.turn.at, torch.zeros_like(slot.shard.params))


def aborted(r: Replica, slot: Slot, number: int) -> None:
    """The round has ended without a commit."""
    flight = slot.flight
    if flight is None or flight.round != number or flight.outcome:
        return
    if slot.feedback is not None:
        slot.feedback.rollback()
    flight.outcome = "aborted"
    # The work is still in the parameters: the next round covers it. In whole rounds it is kept apart.
    if not flight.overwrite and (not r.whole_round or flight.final):
        slot.steps, slot.tokens = slot.steps + flight.steps, slot.tokens + flight.tokens


def _finish(r: Replica, slot: Slot, flight: Flight) -> None:
    shard = slot.shard
    assert shard is not None
    leasing.ended(r, slot, flight)
    replica_late.recover(r, slot, flight)
    if replica_late.stays(r, slot, flight):
        pass
    elif replica_late.rolls_back(r, slot, flight):
        r.parameters.write(slot.index, shard.params)
    elif flight.outcome != "aborted" or flight.overwrite:
        local = r.parameters.read(slot.index)
        r.parameters.write(slot.index, merged(flight, local, shard.params))
        if r.whole_round:
            slot.own = own_from(shard)
    slot.flight, slot.adopt = None, False


# ---- whole rounds of overlap ----


def _hold(r: Replica, slot: Slot, number: int, at: int) -> None:
    """Measure the round that ends here; it leaves when the one before has been taken in."""
    assert slot.own is not None
    delta = pseudo_gradient(slot.own.params, r.parameters.read(slot.index))
    slot.turn = Turn(number, at, delta, slot.steps, slot.tokens)
    slot.steps = slot.tokens = 0


def _boundary(r: Replica, slot: Slot) -> list[Action]:
    """Take in the round that was in flight, if there was one, and send the one that is held, if the run goes on."""
    flight, turn = slot.flight, slot.turn
    slot.flight, slot.adopt = None, False
    if flight is not None and flight.outcome == "aborted" and not flight.overwrite:
        slot.carry = flight.own  # it is in nobody's value: the next round takes it along
        slot.steps, slot.tokens = slot.steps + flight.steps, slot.tokens + flight.tokens
    if flight is not None:
        leasing.ended(r, slot, flight)
        replica_late.recover(r, slot, flight)
    if r.mode == "delayed":
        _delayed(r, slot, turn)
    else:
        _eager(r, slot, flight, turn)
    if turn is None or r.flushing:
        return []
    slot.turn = None
    return _launch(r, slot, turn, turn.round, turn.at + r.plan.H)


def _launch(
    r: Replica, slot: Slot, turn: Turn, number: int, due: int, *, final: bool = False
) -> list[Action]:
    assert turn.delta is not None
    delta, steps, tokens = turn.delta, turn.steps, turn.tokens
    if slot.carry is not None:
        delta, slot.carry = delta + slot.carry, None
        steps, tokens, slot.steps, slot.tokens = steps + slot.steps, tokens + slot.tokens, 0, 0
    flight = _flight(r, slot, number, due, delta, steps, tokens)
    flight.own, flight.final = delta, final
    return _depart(r, slot, flight, idle=steps == 0 and not bool(delta.any()))


def _delayed(r: Replica, slot: Slot, turn: Turn | None) -> None:
    """theta <- G: what was done since the last boundary is in the held round alone."""
    shard, own = slot.shard, slot.own
    assert shard is not None and own is not None
    if turn is not None and turn.delta is not None:
        turn.delta = compensate(turn.delta, r.config.stream.compensate, shard.params, own.params)
    r.parameters.write(slot.index, shard.params)
    own.params.copy_(shard.params)


def _eager(r: Replica, slot: Slot, flight: Flight | None, turn: Turn | None) -> None:
    """G_m <- Outer(G_m, E_m), theta <- G_m; at the end of a run what the worker did since then is kept on top."""
    shard, own = slot.shard, slot.own
    assert shard is not None and own is not None
    fresh = turn.delta if turn is not None else None
    start = own.params.clone() if fresh is None else own.params
    unfit = fresh is not None and not bool(torch.isfinite(fresh).all())
    if unfit or (flight is not None and shard.version > flight.base + 1):
        slot.own = own = own_from(
            shard
        )  # several rounds went by without this worker: it becomes an average one
        flight = None
    mean, count, before, absent = _last(r, shard, flight)
    if not unfit and (fresh is not None or (count > 1 and mean is not None)):
        own.apply(eager_update(mean, count, fresh, before, absent=absent))
    if fresh is None:
        local = r.parameters.read(slot.index)
        r.parameters.write(slot.index, local.add_(own.params - start))
    else:
        r.parameters.write(slot.index, own.params)


def _last(
    r: Replica, shard: OuterShard, flight: Flight | None
) -> tuple[Tensor | None, int, Tensor | None, bool]:
    """Of the round before this boundary: its mean, its contributors, this worker's part, whether it was absent."""
    if shard.version == 0:
        return None, max(1, r.members), None, False
    mean, count = shard.state["previous"], _count(shard)
    if flight is None:  # the average worker's part is the mean
        return mean, count, mean, False
    if flight.outcome == "aborted":
        return None, count, None, False
    if flight.outcome == "merged-in":
        return mean, count, flight.own, False
    return mean, count, None, True


def _count(shard: OuterShard) -> int:
    return int(shard.state["count"].item())


def own_from(shard: OuterShard) -> OuterShard:
    """This worker's own value, equal to the shared one; with the outer optimizer of its own if it has one."""
    optimizer = shard.optimizer
    if not isinstance(optimizer, EagerAverage):
        return OuterShard(optimizer, shard.params.clone(), shard.version)
    kept = {k: v.clone() for k, v in shard.state.items() if k not in ("previous", "count")}
    return OuterShard(optimizer.inner, shard.params.clone(), shard.version, kept)
