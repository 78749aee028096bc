"""A worker's half of the protocol as plain data, and back: what a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diloco.worker.replica_slots import Flight, start_shard

if TYPE_CHECKING:
    from diloco.worker.replica import Replica

_NUMBERS = ("round", "base", "due", "alpha", "steps", "tokens", "outcome", "overwrite", "refused")


def state_dict(replica: Replica) -> dict[str, Any]:
    """Everything that continues `replica`: numbers under "meta", tensors under "tensors"."""
    meta: dict[str, Any] = {
        "step": replica.step,
        "index": replica.index,
        "incarnation": replica.incarnation,
        "slots": [],
    }
    tensors: dict[str, Tensor] = {}
    for slot in replica.slots:
        p, flight = slot.index, slot.flight
        entry: dict[str, Any] = {
            "version": slot.version,
            "steps": slot.steps,
            "tokens": slot.tokens,
            "adopt": slot.adopt,
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
        meta["slots"].append(entry)
    return {"meta": meta, "tensors": tensors}


def load_state_dict(replica: Replica, saved: Mapping[str, Any]) -> None:
    """Inverse of `state_dict`, before the first connection. KeyError or ValueError on another plan's state."""
    meta, tensors = saved["meta"], saved["tensors"]
    replica.step, replica.index, replica.incarnation = meta["step"], meta["index"], meta["incarnation"]
    for slot, entry in zip(replica.slots, meta["slots"], strict=True):
        p = slot.index
        slot.steps, slot.tokens, slot.adopt = entry["steps"], entry["tokens"], entry["adopt"]
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
            slot.flight.sent, slot.flight.delta = tensors.get(f"{p}.sent"), tensors.get(f"{p}.delta")
            slot.flight.frame = framed.numpy().tobytes() if framed is not None else None
