"""What simulated links and workers do to the truth: frames that are changed on their way, NaN, flipped signs."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from torch import Tensor

from diloco.comms import downlink, frame
from diloco.comms.messages import Commit, Contribution, Snapshot
from diloco.worker.replica import Replica
from tests.toy import ToyModel


class FlippingCodec:
    """Encodes the negative of what it is given; reads what others send as it is."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, delta: Tensor, key: tuple[int, ...] = ()) -> bytes:
        return bytes(self.inner.encode(-delta, key))

    def encode_rest(self, delta: Tensor, *others: Any) -> bytes:
        return bytes(self.inner.encode_rest(-delta, *others))


def flip(replica: Replica) -> None:
    lying: list[Any] = [FlippingCodec(codec) for codec in replica.codecs]
    replica.codecs = lying
    for slot, codec in zip(replica.slots, lying, strict=True):
        if slot.feedback is not None:
            slot.feedback.codec = codec


def poison(at: int, step: int, model: ToyModel) -> None:
    if step == at:
        for tensor in model.tensors.values():
            tensor.fill_(float("nan"))


def spoilt(message: Any, kind: str, chance: random.Random) -> Any:
    """The message with a bit of its payload turned, or with another value for which all checksums agree ("tamper").

    Headers are left alone: a frame's own checksum is over its payload, the transport's over the whole object.
    """
    if kind == "corrupt" and isinstance(message, Contribution):
        return replace(message, frame=turned(message.frame, chance))
    if not isinstance(message, Commit | Snapshot) or not message.frames:
        return message
    (index, first), *rest = message.frames
    if kind == "corrupt":
        return replace(message, frames=((index, turned(first, chance)), *rest))
    header = frame.read_header(first)
    if (header.codec, header.payload_len) != (0, 4 * header.n):
        return message
    values = frame.decode_frame(first)[1].clone()
    values[chance.randrange(header.n)] *= 1.001
    forged = downlink.value_frame(values, header.fragment, message.version, header.run_id)
    return replace(message, frames=((index, forged), *rest))


def turned(framed: Any, chance: random.Random) -> bytes:
    changed = bytearray(framed)
    changed[chance.randrange(frame.HEADER_SIZE, len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)
