"""How a committed update travels back: both ends of each downlink mode, side by side.

The rule is "apply what was sent": the coordinator moves its own copy by exactly what the workers can decode, so
that all replicas stay bit-identical with any codec. `close` is the coordinator's end, `open_commit` a worker's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diloco import robust
from diloco.aggregate import step_scales
from diloco.comms.codec import Codec, get
from diloco.comms.feedback import ErrorFeedback
from diloco.comms.frame import (
    COORDINATOR,
    FLAG_EF,
    FLAG_FINAL,
    decode_frame,
    encode_frame,
    frame_of,
    is_final,
    read_header,
    unpack,
)
from diloco.comms.messages import Buffer
from diloco.comms.payload import flat, require_finite
from diloco.comms.requantise import requantised
from diloco.comms.scratch import scratch
from diloco.errors import CorruptDataError
from diloco.late import BASE, rebase_mean, tracks_bases
from diloco.outer import OuterShard, State
from diloco.overlap import Bases, advance
from diloco.robust import MEAN, Rule

# Modes in which every worker repeats the outer step and so needs the outer optimizer's state.
WORKERS_STEP = frozenset({"relay", "mean_q"})
WHOLE = frozenset({"g_fp32", "g_bf16"})  # a commit brings the value itself, from whatever it came

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
    bases: Bases | None = None  # asynchronous runs with stream.compensate

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
        if self.bases is not None:
            kept |= {f"base.{version}": value for version, value in self.bases.kept.items()}
        return kept

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.shard.load(tensors["params"], state, version)
        if self.master is not None:
            self.master.copy_(tensors["master"])
        if self.feedback is not None and "residual" in tensors:
            self.feedback.load_state_dict({"residual": tensors["residual"]})
        if self.bases is not None:
            found = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
            self.bases.kept = {int(v): value.clone() for v, value in found.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """One accepted contribution: its worker's index, its weight, its frame."""

    index: int
    weight: float
    frame: Buffer = field(repr=False)


def weighted_mean(parts: Sequence[Part], numel: int, codec: Codec, out: Tensor | None = None) -> Tensor:
    """``sum w_i dec(frame_i)`` in ascending worker index, fp32 [numel]; in `out` if it is given."""
    mean = torch.zeros(numel, dtype=torch.float32) if out is None else out.zero_()
    ordered = sorted(parts, key=lambda p: p.index)
    payloads = [unpack(part.frame, codec=codec)[1] for part in ordered]
    codec.decode_add_all(payloads, [part.weight for part in ordered], mean)
    return mean


Pieces = Sequence[tuple[int, int]]


def combined(
    rule: Rule,
    parts: Sequence[Part],
    numel: int,
    codec: Codec,
    state: State,
    pieces: Pieces = (),
    out: Tensor | None = None,
) -> Tensor:
    """The update, fp32 [numel], that `parts` make under `rule`; alike on every node that has their frames.

    Norms are those of the headers, which the coordinator has checked against the values. A rule that carries
    something from round to round finds it in `state` and leaves the new one there. `pieces`: see `robust.combine`.
    The result may be in `out`.
    """
    if rule.plain:
        return weighted_mean(parts, numel, codec, out)
    parts = sorted(parts, key=lambda p: p.index)
    opened = [unpack(part.frame, codec=codec) for part in parts]
    shares, count = [part.weight for part in parts], len(parts)
    scales = step_scales([h.steps for h, _ in opened], shares) if rule.by_steps else [1.0] * count
    if rule.clips(count):
        norms = [scale * h.l2norm for scale, (h, _) in zip(scales, opened, strict=True)]
        scales = [s * cut for s, cut in zip(scales, robust.clip_scales(norms), strict=True)]
    if rule.dense(count):
        deltas = [codec.decode(payload, numel) for _, payload in opened]
        for delta, scale in zip(deltas, scales, strict=True):
            delta.mul_(scale)
        update = robust.combine(rule, deltas, shares, state.get("center"), pieces)
    else:
        scaled = [replace(part, weight=part.weight * s) for part, s in zip(parts, scales, strict=True)]
        update = weighted_mean(scaled, numel, codec)
    if "center" in state:
        state["center"].copy_(update)
    return update


def close(
    mode: str,
    ledger: Ledger,
    parts: Sequence[Part],
    codec: Codec,
    *,
    fragment: int,
    run_id: int,
    rule: Rule = MEAN,
    pieces: Pieces = (),
) -> Frames:
    """Apply one outer step to `ledger` and return the frames that let every worker do the same."""
    shard = ledger.shard
    n = shard.params.numel()
    mean = combined(rule, parts, n, codec, shard.state, pieces, scratch(n))
    _rebase(shard, mean, parts)
    if ledger.bases is not None:
        base = unpack(parts[0].frame, codec=codec)[0].base_version
        mean = ledger.bases.corrected(mean, parts[0].weight, base, shard.params)
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
    final = all(is_final(p.frame) for p in parts)
    if mode == "relay":
        advance(shard, mean, len(parts), final=final)
        return tuple((p.index, p.frame) for p in sorted(parts, key=lambda p: p.index))
    if mode == "mean_q":
        frame = encode_frame(codec, mean, **label, flags=FLAG_FINAL if final else 0)
        advance(shard, codec.decode(unpack(frame, codec=codec)[1], n), len(parts), final=final)
    elif mode == "q4_ef":
        assert ledger.feedback is not None
        payload = requantised(shard, mean, ledger.feedback, (run_id, COORDINATOR, fragment, label["round"]))
        if payload is not None:
            frame = frame_of(codec, payload, n, **label, flags=FLAG_EF)
        else:
            update = shard.optimizer.update(shard.params, mean, shard.state)
            frame = encode_frame(ledger.feedback, update, **label)
            ledger.feedback.commit()
            shard.subtract(decode_frame(frame, codec=codec)[1])
    elif mode == "g_bf16":
        assert ledger.master is not None
        # Workers measured from the rounded copy: rebase to the master, as if they had sent their parameters.
        mean.add_(ledger.master - shard.params)
        shard.optimizer.step(ledger.master, mean, shard.state)
        frame = encode_frame(get("bf16"), ledger.master, **label)
        shard.replace(decode_frame(frame)[1])
    else:
        shard.apply(mean)
        frame = _as_it_lies(shard.params, **label)
    if ledger.bases is not None:
        ledger.bases.add(shard.version, shard.params)
    return ((0, frame),)


def open_commit(
    mode: str,
    shard: OuterShard,
    frames: Frames,
    weights: Sequence[tuple[int, float]],
    codec: Codec,
    *,
    rule: Rule = MEAN,
    pieces: Pieces = (),
) -> None:
    """Advance a worker's copy by one commit.

    Under ``relay`` `frames` must hold every contributor's frame, the worker's own included.
    CorruptDataError if there is no frame at all, KeyError if one is missing.
    """
    if mode == "relay":
        parts = _paired(frames, weights)
        n = shard.params.numel()
        mean = combined(rule, parts, n, codec, shard.state, pieces, scratch(n))
        _rebase(shard, mean, parts)
        advance(shard, mean, len(parts), final=all(is_final(p.frame) for p in parts))
        return
    if not frames:
        raise CorruptDataError("a commit without frames: only a snapshot brings its value")
    values = decode_frame(frames[0][1], codec=codec if mode in ("mean_q", "q4_ef") else None)[1]
    if mode == "mean_q":
        advance(shard, values, len(weights), final=is_final(frames[0][1]))
    elif mode == "q4_ef":
        shard.subtract(values)
    else:
        shard.replace(values)


def _paired(frames: Frames, weights: Sequence[tuple[int, float]]) -> list[Part]:
    """A part for each of `weights`; of a worker that is there twice the earlier round first. KeyError if one is missing."""
    found: dict[int, list[Buffer]] = {}
    for index, framed in frames:
        found.setdefault(index, []).append(framed)
    for several in found.values():
        if len(several) > 1:
            several.sort(key=lambda framed: read_header(framed).round)
    parts = []
    for index, weight in weights:
        if not found.get(index):
            raise KeyError(index)
        parts.append(Part(index, weight, found[index].pop(0)))
    return parts


def _rebase(shard: OuterShard, mean: Tensor, parts: Sequence[Part]) -> None:
    """Where late contributions count: as if those among `parts` had been measured from the value as it is now."""
    if tracks_bases(shard.state):
        stale = [(part.weight, shard.version - read_header(part.frame).base_version) for part in parts]
        rebase_mean(mean, [(w, s) for w, s in stale if s], shard.params, shard.state)


def snapshot_frames(mode: str, shard: OuterShard, *, fragment: int, run_id: int) -> Frames:
    """A fragment's value, and its outer state where workers need it, as fp32 frames in a fixed order.

    Before the first commit the state is what every worker begins with, and is not sent.
    """
    tensors = [shard.params]
    if mode in WORKERS_STEP and shard.version:
        # Only who repeats the aggregation needs what it starts from.
        repeated = mode == "relay"
        names = sorted(
            name for name in shard.state if repeated or not (name == "center" or name.startswith(BASE))
        )
        tensors += [shard.state[name] for name in names]
    return tuple((i, value_frame(t, fragment, shard.version, run_id)) for i, t in enumerate(tensors))


def value_frame(values: Tensor, fragment: int, version: int, run_id: int, *, worker: int = 0) -> bytes:
    """Plain fp32 values in a frame: starting values and snapshots."""
    return _as_it_lies(
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


def _as_it_lies(values: Tensor, **label: int) -> bytes:
    """An fp32 frame is its values' own memory behind a header: copied once. NonFiniteError for NaN and infinity."""
    try:
        return frame_of(get("fp32"), flat(values).numpy().data.cast("B"), values.numel(), **label)
    except CorruptDataError:
        require_finite(values)
        raise


def load_snapshot(shard: OuterShard, frames: Frames, version: int) -> None:
    """Inverse of `snapshot_frames`; `shard` is one that has just begun."""
    tensors = [decode_frame(frame)[1] for _, frame in frames]
    names = sorted(shard.state) if len(tensors) > 1 else []
    shard.load(tensors[0], dict(zip(names, tensors[1:], strict=True)), version)
