"""How a committed update travels back: both ends of each downlink mode, side by side.

The rule is "apply what was sent": the coordinator moves its own copy by exactly what the workers can decode, so
that all replicas stay bit-identical with any codec. `close` is the coordinator's end, `open_commit` a worker's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diloco.comms.codec import Codec, get
from diloco.comms.feedback import ErrorFeedback
from diloco.comms.frame import decode_frame, encode_frame, unpack
from diloco.comms.messages import Buffer
from diloco.config import Codec as CodecConfig
from diloco.errors import CorruptDataError
from diloco.outer import OuterShard, State

# Modes in which every worker repeats the outer step and so needs the outer optimizer's state.
WORKERS_STEP = frozenset({"relay", "mean_q"})

Frames = tuple[tuple[int, Buffer], ...]


@dataclass(slots=True)
class Ledger:
    """A fragment as the coordinator holds it.

    `shard.params` is what all replicas hold. `master` (g_bf16) is the unrounded value behind it; `feedback`
    (q4_ef) keeps what the codec lost of earlier updates.
    """

    shard: OuterShard
    master: Tensor | None = None
    feedback: ErrorFeedback | None = None

    @classmethod
    def start(cls, shard: OuterShard, mode: str, codec: Codec) -> Ledger:
        if mode == "g_bf16":
            master = shard.params.clone()
            shard.params.copy_(master.to(torch.bfloat16))
            return cls(shard, master=master)
        return cls(shard, feedback=ErrorFeedback(codec, 1.0) if mode == "q4_ef" else None)

    def tensors(self) -> State:
        """Everything that must survive a restart, by name."""
        kept = {"params": self.shard.params, **{f"state.{k}": v for k, v in self.shard.state.items()}}
        if self.master is not None:
            kept["master"] = self.master
        if self.feedback is not None and self.feedback.residual is not None:
            kept["residual"] = self.feedback.residual
        return kept

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.shard.load(tensors["params"], state, version)
        if self.master is not None:
            self.master.copy_(tensors["master"])
        if self.feedback is not None and "residual" in tensors:
            self.feedback.load_state_dict({"residual": tensors["residual"]})


@dataclass(frozen=True, slots=True)
class Part:
    """One accepted contribution: its worker's index, its weight, its frame."""

    index: int
    weight: float
    frame: Buffer = field(repr=False)


def uplink_codec(config: CodecConfig) -> Codec:
    """The codec that the configuration's [codec] section names, for contributions and requantised updates."""
    match config.up:
        case "fp32" | "fp16" | "bf16":
            return get(config.up)
        case "stat":
            return get("stat")
        case "topk":
            return get("topk", k=config.topk, chunk=config.chunk)
    return get(config.up, block=config.block)


def weighted_mean(parts: Sequence[Part], numel: int, codec: Codec) -> Tensor:
    """``sum w_i dec(frame_i)`` in ascending worker index, fp32 [numel]."""
    mean = torch.zeros(numel, dtype=torch.float32)
    for part in sorted(parts, key=lambda p: p.index):
        _, payload = unpack(part.frame, codec=codec)
        codec.decode_add(payload, part.weight, mean)
    return mean


def close(
    mode: str, ledger: Ledger, parts: Sequence[Part], codec: Codec, *, fragment: int, run_id: int
) -> Frames:
    """Apply one outer step to `ledger` and return the frames that let every worker do the same."""
    shard = ledger.shard
    mean = weighted_mean(parts, shard.params.numel(), codec)
    label = {
        "fragment": fragment,
        "round": shard.version + 1,
        "base_version": shard.version,
        "run_id": run_id,
        "worker": 0,
        "incarnation": 0,
        "steps": 0,
        "tokens": 0,
    }
    if mode == "relay":
        shard.apply(mean)
        return tuple((p.index, p.frame) for p in sorted(parts, key=lambda p: p.index))
    if mode == "mean_q":
        frame = encode_frame(codec, mean, **label)
        shard.apply(decode_frame(frame)[1])
    elif mode == "q4_ef":
        assert ledger.feedback is not None
        update = shard.optimizer.update(shard.params, mean, shard.state)
        frame = encode_frame(ledger.feedback, update, **label)
        ledger.feedback.commit()
        shard.subtract(decode_frame(frame)[1])
    elif mode == "g_bf16":
        assert ledger.master is not None
        # Workers measured from the rounded copy: rebase to the master, as if they had sent their parameters.
        mean.add_(ledger.master - shard.params)
        shard.optimizer.step(ledger.master, mean, shard.state)
        frame = encode_frame(_plain("bf16"), ledger.master, **label)
        shard.replace(decode_frame(frame)[1])
    else:
        shard.apply(mean)
        frame = encode_frame(_plain("fp32"), shard.params, **label)
    return ((0, frame),)


def open_commit(
    mode: str, shard: OuterShard, frames: Frames, weights: Sequence[tuple[int, float]], codec: Codec
) -> None:
    """Advance a worker's copy by one commit.

    Under ``relay`` `frames` must hold every contributor's frame, the worker's own included.
    CorruptDataError if there is no frame at all, KeyError if one is missing.
    """
    if mode == "relay":
        by_index = dict(frames)
        parts = [Part(index, weight, by_index[index]) for index, weight in weights]
        shard.apply(weighted_mean(parts, shard.params.numel(), codec))
        return
    if not frames:
        raise CorruptDataError("a commit without frames: only a snapshot brings its value")
    values = decode_frame(frames[0][1])[1]
    if mode == "mean_q":
        shard.apply(values)
    elif mode == "q4_ef":
        shard.subtract(values)
    else:
        shard.replace(values)


def snapshot_frames(mode: str, shard: OuterShard, *, fragment: int, run_id: int) -> Frames:
    """A fragment's value, and its outer state where workers need it, as fp32 frames in a fixed order."""
    tensors = [shard.params]
    if mode in WORKERS_STEP:
        tensors += [shard.state[name] for name in sorted(shard.state)]
    return tuple((i, value_frame(t, fragment, shard.version, run_id)) for i, t in enumerate(tensors))


def value_frame(values: Tensor, fragment: int, version: int, run_id: int, *, worker: int = 0) -> bytes:
    """Plain fp32 values in a frame: starting values and snapshots."""
    return encode_frame(
        _plain("fp32"),
        values,
        fragment=fragment,
        round=version,
        base_version=version,
        run_id=run_id,
        worker=worker,
        incarnation=0,
        steps=0,
        tokens=0,
    )


def load_snapshot(shard: OuterShard, frames: Frames, version: int) -> None:
    """Inverse of `snapshot_frames`."""
    tensors = [decode_frame(frame)[1] for _, frame in frames]
    names = sorted(shard.state) if len(tensors) > 1 else []
    shard.load(tensors[0], dict(zip(names, tensors[1:], strict=True)), version)


def _plain(name: str) -> Codec:
    return get(name)
