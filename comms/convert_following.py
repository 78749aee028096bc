"""What a coordinator and its standby say, to and from protobuf. Pure; bulk data does not pass here, a `Ref` stands for it.

What comes from the network is checked as in `diloco.comms.convert`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.checked import MAX_JSON, MAX_NAME, MAX_REASON, text, word
from diloco.comms.following import Ack, Beat, Entry, Follow, Turned
from diloco.comms.messages import Buffer
from diloco.comms.transfer import Ref
from diloco.errors import CorruptDataError

MAX_RECORD = MAX_JSON + (512 << 10)  # characters of one line: a record of the start holds a Join's plan


def request_to_proto(message: Follow | Ack) -> pb.FollowRequest:
    if isinstance(message, Ack):
        return pb.FollowRequest(ack=pb.FollowAck(count=message.count, ready=message.ready))
    return pb.FollowRequest(
        follow=pb.Follow(
            node=message.node,
            run_id=message.run_id,
            settings=message.settings,
            epoch=message.epoch,
            count=message.count,
            chain=message.chain,
        )
    )


def request_from_proto(proto: pb.FollowRequest) -> Follow | Ack:
    if proto.WhichOneof("request") == "ack":
        return Ack(_count("FollowAck.count", proto.ack.count), proto.ack.ready)
    if proto.WhichOneof("request") != "follow":
        raise CorruptDataError("FollowRequest: empty, or of a kind that this version does not know")
    f = proto.follow
    return Follow(
        node=word("Follow.node", f.node),
        run_id=text("Follow.run_id", f.run_id, MAX_NAME),
        settings=text("Follow.settings", f.settings, MAX_JSON),
        epoch=_count("Follow.epoch", f.epoch),
        count=_count("Follow.count", f.count),
        chain=text("Follow.chain", f.chain, MAX_NAME),
    )


def entry_to_proto(index: int, line: str, blob: Ref | None) -> pb.FollowResponse:
    """Record `index` as its line in the journal."""
    ref = None if blob is None else pb.ObjectRef(key=blob.key, length=blob.length, crc32c=blob.crc32c)
    return pb.FollowResponse(entry=pb.FollowEntry(index=index, record=line, blob=ref))


def response_to_proto(message: Beat | Turned) -> pb.FollowResponse:
    if isinstance(message, Beat):
        return pb.FollowResponse(beat=pb.FollowBeat(count=message.count))
    reason = message.reason[:MAX_REASON]
    return pb.FollowResponse(
        turned=pb.FollowTurned(kind=message.kind, reason=reason, count=message.count, chain=message.chain)
    )


def response_from_proto(proto: pb.FollowResponse) -> Beat | Turned:
    """Anything but an entry; for that see `entry_ref` and `entry_from_proto`."""
    match proto.WhichOneof("response"):
        case "beat":
            return Beat(proto.beat.count)
        case "turned":
            t = proto.turned
            return Turned(
                word("FollowTurned.kind", t.kind),
                text("FollowTurned.reason", t.reason, MAX_REASON),
                _count("FollowTurned.count", t.count),
                text("FollowTurned.chain", t.chain, MAX_NAME),
            )
        case _:
            raise CorruptDataError("FollowResponse: empty, or of a kind that this version does not know")


def entry_ref(proto: pb.FollowEntry) -> Ref | None:
    """What has to be fetched for the entry."""
    if not proto.HasField("blob"):
        return None
    return Ref(word("FollowEntry.blob", proto.blob.key), proto.blob.length, proto.blob.crc32c)


def entry_from_proto(proto: pb.FollowEntry, blob: Buffer | None) -> Entry:
    """`blob` is all bulk data of the record, one frame after another; None where there is none, or none any more."""
    index = _count("FollowEntry.index", proto.index)
    record = _record(text("FollowEntry.record", proto.record, MAX_RECORD))
    if blob is None:
        return Entry(index, record)
    sizes = _sizes(record)
    view = memoryview(blob)
    if sum(sizes) != view.nbytes:
        raise CorruptDataError(
            f"record {index}: bulk data of {view.nbytes} bytes where {sum(sizes)} are named"
        )
    frames, at = [], 0
    for size in sizes:
        frames.append(view[at : at + size])
        at += size
    return Entry(index, {key: value for key, value in record.items() if key != "blobs"}, frames)


def _record(line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"FollowEntry.record: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("type"), str):
        raise CorruptDataError("FollowEntry.record: not a record")
    epoch = record.get("epoch", 0)
    if not isinstance(epoch, int) or not 0 <= epoch < 1 << 63:
        raise CorruptDataError(f"FollowEntry.record: epoch = {epoch!r} is not one")
    return record


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number that a record can hold")


def _sizes(record: Mapping[str, Any]) -> Sequence[int]:
    listed = record.get("blobs")
    sizes = listed.get("sizes") if isinstance(listed, dict) else None
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise CorruptDataError("FollowEntry: bulk data for a record that names none")
    return sizes


def _count(name: str, value: int) -> int:
    if value < 0:
        raise CorruptDataError(f"{name}: {value} is negative")
    return value
