"""A coordinator rebuilt from its journal: each record repeated in order, each commit checked by its digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diloco.comms import downlink, frame
from diloco.comms.messages import Buffer
from diloco.comms.uplink import codecs_for
from diloco.coordinator import lateness, leasing, values
from diloco.coordinator.membership import Member, Status
from diloco.coordinator.rounds import Committed
from diloco.errors import ConfigError, CorruptDataError, NonFiniteError, StorageError
from diloco.fragments import FragmentPlan
from diloco.outer_defaults import DELAYED, KEPT, WHOLE

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator

Record = Mapping[str, Any]

# What comes of a record that has not what it should have; RuntimeError is torch's word for shapes that do not fit.
DAMAGE = (
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    CorruptDataError,
    ConfigError,
    NonFiniteError,
)


def replay(c: Coordinator, records: Sequence[tuple[Record, Sequence[Buffer]]], now: float) -> None:
    """Repeat the journal's `records` in a fresh coordinator; StorageError if a digest differs or a record is damaged."""
    newest = {str(r.get("fragment")): r.get("version") for r, _ in records if r["type"] == "snapshot"}
    for number, (record, blobs) in enumerate(records):
        try:
            _repeat(c, record, blobs, newest, now)
        except DAMAGE as error:
            raise StorageError(
                f"journal: record {number} of {len(records)} ({record['type']}) is damaged: {error!r}; restore the journal "
                "from a copy"
            ) from error
    for member in c.members.values():  # leases start anew: nobody could be heard while we were away
        member.last_seen = now
        if member.status is not Status.GONE:
            member.status = Status.ACTIVE


def _repeat(
    c: Coordinator, record: Record, blobs: Sequence[Buffer], newest: Mapping[str, Any], now: float
) -> None:
    """`newest`: the last snapshot's version by fragment."""
    match record["type"]:
        case "start":
            c.plan, c.started = FragmentPlan.from_description(record["plan"]), True
            c.codecs = codecs_for(c.config, c.plan)
            for first in record["members"]:
                _member(c, first, now).cohort = True
        case "epoch":
            c.epoch = max(c.epoch, int(record["epoch"]))
        case "member":
            _member(c, record, now)
        case "leave":
            gone = c.members[record["worker"]]
            gone.finished = "complete" if record["reason"] == "complete" else ""
            gone.status, gone.digest = Status.GONE, record["digest"]
        case "lease" | "return":
            leasing.repeat(c, record)
        case "late":
            lateness.restore(c, record, blobs)
        case "forget":
            lateness.drop(c, int(record["index"]), int(record["fragment"]))
        case "initial":
            values.begin(c, int(record["fragment"]), blobs[0])
        case "commit":
            _commit(c, record, blobs, newest.get(str(record["fragment"]), 0), now)
        case "snapshot" if newest[str(record["fragment"])] == record["version"]:
            tensors = {n: frame.decode_frame(b)[1] for n, b in zip(record["names"], blobs, strict=True)}
            c.ledgers[record["fragment"]].load(tensors, int(record["version"]))
            done = c.committed.get(record["fragment"])
            if done is not None and done.version == record["version"]:
                _require_digest(tensors["params"], done.digest)
        case "final":
            c.final = record["digest"]
        case "complete":
            c.complete, c.final = True, record["digest"]


def _hint(c: Coordinator) -> str:
    """Settings that nobody gave have not always been the same."""
    o = c.config.outer
    if {"lr": o.lr, "momentum": o.momentum} not in (WHOLE, DELAYED):
        return ""
    return (
        f"; or the run began with other outer settings than the present lr = {o.lr}, momentum = {o.momentum}: an earlier "
        f"version took lr = {KEPT['lr']}, momentum = {KEPT['momentum']} where neither is given: then give these in [outer]"
    )


def _require_digest(params: Tensor, digest: str) -> None:
    if frame.digest(params) != digest:
        raise ValueError("the snapshot's value is not that of the commit it was taken at")


def _member(c: Coordinator, record: Record, now: float) -> Member:
    member = Member(record["worker"], int(record["nonce"]), int(record["incarnation"]), now)
    member.index = int(record["index"])
    c.members[member.name] = member
    return member


def _commit(c: Coordinator, record: Record, blobs: Sequence[Buffer], snapshot: int, now: float) -> None:
    p, version = int(record["fragment"]), int(record["version"])
    ledger, mode = c.ledgers[p], c.config.codec.down
    parts: list[downlink.Part] = []
    if blobs:
        contributors = zip(record["indices"], record["weights"], blobs, strict=True)
        parts = [downlink.Part(i, w, b) for i, w, b in contributors]
    frames: downlink.Frames = ()
    if parts and version > snapshot:
        frames = downlink.close(
            mode, ledger, parts, c.codecs[p], fragment=p, run_id=c.run_hash, rule=c.rule, pieces=c.pieces(p)
        )
        if frame.digest(ledger.shard.params) != record["digest"]:
            raise StorageError(
                f"journal: repeating commit {version} of fragment {p} gives another digest than it recorded; "
                f"the journal is damaged, or this machine computes differently: restore it from a copy{_hint(c)}"
            )
    elif parts and mode == "relay":
        frames = tuple((part.index, part.frame) for part in parts)
    c.late.pop(p, None)
    leasing.repeat(c, record)
    rounds = tuple(zip(record["indices"], record["rounds"], strict=True))
    c.counted.update({(p, index): (number, version) for index, number in rounds})
    c.account(
        p,
        Committed(
            version,
            now,
            tuple(zip(record["indices"], record["weights"], strict=True)),
            rounds,
            record["digest"],
            frames,
            tuple((int(i), int(n)) for i, n in record.get("local_steps", ())),
        ),
        sum(record["tokens"]),
        int(record["step"]),
    )
