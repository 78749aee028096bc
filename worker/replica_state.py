"""A worker's half of the protocol as plain data, and back: what a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diloco.outer import OuterShard
from diloco.worker.replica_slots import Flight, Slot, Turn, start_shard
from diloco.worker.replica_turns import own_from

if TYPE_CHECKING:
    from diloco.worker.replica import Replica

_NUMBERS = (
    *("round", "base", "due", "alpha", "steps", "tokens", "outcome", "overwrite", "refused"),
    *("final", "counted", "rejected", "passed", "accepted"),
)


def state_dict(replica: Replica) -> dict[str, Any]:
    """Everything that continues `replica`: numbers under "meta", tensors under "tensors"."""
    meta: dict[str, Any] = {
        "step": replica.step,
        "pace": replica.pace,
        "next_pace": replica.next_pace,
        "members": replica.members,
        "shard": replica.shard,
        "index": replica.index,
        "incarnation": replica.incarnation,
        "slots": [],
    }
    if replica.lease is not None:
        meta["lease"] = replica.lease.state()
    tensors: dict[str, Tensor] = {}
    for slot in replica.slots:
        p, flight = slot.index, slot.flight
        entry: dict[str, Any] = {
            "version": slot.version,
            "steps": slot.steps,
            "tokens": slot.tokens,
            "adopt": slot.adopt,
            "told": slot.told,
        }
        if slot.shard is not None:
            tensors[f"{p}.params"] = slot.shard.params.clone()
            tensors.update({f"{p}.state.{k}": v.clone() for k, v in slot.shard.state.items()})
        if slot.feedback is not None:
            tensors.update({f"{p}.feedback.{k}": v.clone() for k, v in slot.feedback.state_dict().items()})
        if flight is not None:
            entry["flight"] = {name: getattr(flight, name) for name in _NUMBERS}
            entry["label"] = list(flight.label)
            if flight.frame is not None:
                tensors[f"{p}.frame"] = torch.frombuffer(bytearray(flight.frame), dtype=torch.uint8)
            elif flight.delta is not None:
                tensors[f"{p}.delta"] = flight.delta.clone()
            if flight.sent is not None:
                tensors[f"{p}.sent"] = flight.sent.clone()
            if flight.own is not None:
                tensors[f"{p}.flight_own"] = flight.own.clone()
        _save_late(slot, entry, tensors)
        meta["slots"].append(entry)
    return {"meta": meta, "tensors": tensors}


def load_state_dict(replica: Replica, saved: Mapping[str, Any]) -> None:
    """Inverse of `state_dict`, before the first connection. KeyError or ValueError on another plan's state."""
    meta, tensors = saved["meta"], saved["tensors"]
    replica.step, replica.index, replica.incarnation = meta["step"], meta["index"], meta["incarnation"]
    replica.last_step, replica.shard = replica.step - 1, meta.get("shard", 0)
    replica.pace, replica.next_pace, replica.members = meta["pace"], meta["next_pace"], meta["members"]
    if replica.lease is not None and "lease" in meta:
        replica.lease.load(meta["lease"])
    for slot, entry in zip(replica.slots, meta["slots"], strict=True):
        p = slot.index
        slot.steps, slot.tokens, slot.adopt = entry["steps"], entry["tokens"], entry["adopt"]
        slot.told = entry["told"]
        if f"{p}.params" in tensors:
            slot.shard = start_shard(replica.config, tensors[f"{p}.params"])
            state = {k: tensors[f"{p}.state.{k}"] for k in slot.shard.state}
            slot.shard.load(tensors[f"{p}.params"], state, entry["version"])
        if slot.feedback is not None:
            prefix = f"{p}.feedback."
            slot.feedback.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        if "flight" in entry:
            index, incarnation = entry["label"]
            framed = tensors.get(f"{p}.frame")
            slot.flight = Flight(**entry["flight"], label=(index, incarnation))
            slot.flight.sent = tensors.get(f"{p}.sent")
            # With its answer here it is sent no more.
            slot.flight.delta = None if slot.flight.outcome else tensors.get(f"{p}.delta")
            slot.flight.own = tensors.get(f"{p}.flight_own")
            slot.flight.frame = framed.numpy().tobytes() if framed is not None else None
        _load_late(slot, entry, tensors)


def _save_late(slot: Slot, entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What whole-round overlap keeps besides, and a turn that waits."""
    p, turn = slot.index, slot.turn
    if turn is not None:
        entry["turn"] = {"round": turn.round, "at": turn.at, "steps": turn.steps, "tokens": turn.tokens}
        if turn.delta is not None:
            tensors[f"{p}.turn"] = turn.delta.clone()
    if slot.carry is not None:
        tensors[f"{p}.carry"] = slot.carry.clone()
    if slot.own is not None:
        tensors[f"{p}.own"] = slot.own.params.clone()
        tensors.update({f"{p}.own_state.{k}": v.clone() for k, v in slot.own.state.items()})


def _load_late(slot: Slot, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    p = slot.index
    if "turn" in entry:
        slot.turn = Turn(**entry["turn"], delta=tensors.get(f"{p}.turn"))
    slot.carry = tensors.get(f"{p}.carry")
    if f"{p}.own" in tensors:
        assert slot.shard is not None
        own: OuterShard = own_from(slot.shard)
        own.load(tensors[f"{p}.own"], {k: tensors[f"{p}.own_state.{k}"] for k in own.state}, own.version)
        slot.own = own
