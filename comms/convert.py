"""Messages to and from their protobuf form. Pure; frames do not pass here, `Ref`s stand for them.

What comes from the network is checked: string and list lengths, finite numbers (NaN only in `Progress`),
a known message. Anything else raises CorruptDataError. Whether a message makes sense is for the machines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

from diloco.comms import convert_leases as leases
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import messages as m
from diloco.comms.checked import MAX_JSON, MAX_NAME, MAX_REASON, MAX_TIMELINE, parse
from diloco.comms.checked import finite as _finite
from diloco.comms.checked import listed as _list
from diloco.comms.checked import text as _text
from diloco.comms.checked import word as _name
from diloco.comms.transfer import Ref
from diloco.errors import CorruptDataError

__all__ = [
    "coordinator_from_proto",
    "coordinator_refs",
    "coordinator_to_proto",
    "parse",
    "worker_from_proto",
    "worker_ref",
    "worker_to_proto",
]


def worker_to_proto(message: m.FromWorker, ref: Ref | None = None) -> pb.WorkerMessage:
    """`ref` stands for the frame of a Contribution or an Initial, and must be given for these."""
    match message:
        case m.Join():
            return pb.WorkerMessage(
                join=pb.Join(
                    worker=message.worker,
                    nonce=message.nonce,
                    run_id=message.run_id,
                    plan=message.plan,
                    settings=message.settings,
                    versions=message.versions,
                    step=message.step,
                    protocol=message.protocol,
                    epoch=message.epoch,
                )
            )
        case m.Heartbeat():
            return pb.WorkerMessage(
                heartbeat=pb.Heartbeat(
                    worker=message.worker,
                    incarnation=message.incarnation,
                    progress=_progress_to(message.progress),
                    versions=message.versions,
                    in_flight=[pb.FragmentRound(fragment=f, round=r) for f, r in message.in_flight],
                )
            )
        case m.Contribution():
            return pb.WorkerMessage(
                contribution=pb.Contribution(
                    worker=message.worker,
                    incarnation=message.incarnation,
                    fragment=message.fragment,
                    round=message.round,
                    frame=_ref_to(_given(ref, message)),
                    shard=message.shard,
                    ranges=leases.ranges_to(message.ranges),
                )
            )
        case m.Initial():
            return pb.WorkerMessage(
                initial=pb.Initial(
                    worker=message.worker,
                    incarnation=message.incarnation,
                    fragment=message.fragment,
                    frame=_ref_to(_given(ref, message)),
                )
            )
        case m.Skip():
            return pb.WorkerMessage(
                skip=pb.Skip(
                    worker=message.worker,
                    incarnation=message.incarnation,
                    fragment=message.fragment,
                    round=message.round,
                    reason=message.reason[:MAX_REASON],
                )
            )
        case m.Fetch():
            return pb.WorkerMessage(
                fetch=pb.Fetch(
                    worker=message.worker,
                    incarnation=message.incarnation,
                    fragment=message.fragment,
                    differs=message.differs,
                )
            )
        case m.Leave():
            return pb.WorkerMessage(
                leave=pb.Leave(
                    worker=message.worker,
                    incarnation=message.incarnation,
                    reason=message.reason[:MAX_REASON],
                    progress=_progress_to(message.progress),
                    digest=message.digest,
                    timeline=message.timeline[:MAX_TIMELINE],
                )
            )
        case m.Vote(worker, nonce, attachment, side):
            return pb.WorkerMessage(
                vote=pb.Vote(worker=worker, nonce=nonce, attachment=attachment, side=side)
            )
        case m.LeaseRequest():
            return leases.request_to(message)


def worker_from_proto(proto: pb.WorkerMessage, frame: m.Buffer | None = None) -> m.FromWorker:
    """`frame` is what the Ref of a Contribution or an Initial stood for; without it these are refused."""
    match proto.WhichOneof("message"):
        case "join":
            j = proto.join
            return m.Join(
                worker=_name("Join.worker", j.worker),
                nonce=j.nonce,
                run_id=_text("Join.run_id", j.run_id, MAX_NAME),
                plan=_text("Join.plan", j.plan, MAX_JSON),
                settings=_text("Join.settings", j.settings, MAX_JSON),
                versions=_list("Join.versions", j.versions),
                step=j.step,
                protocol=j.protocol,
                epoch=j.epoch,
            )
        case "heartbeat":
            h = proto.heartbeat
            return m.Heartbeat(
                worker=_name("Heartbeat.worker", h.worker),
                incarnation=h.incarnation,
                progress=_progress_from(h.progress),
                versions=_list("Heartbeat.versions", h.versions),
                in_flight=tuple((p.fragment, p.round) for p in _list("Heartbeat.in_flight", h.in_flight)),
            )
        case "contribution":
            c = proto.contribution
            return m.Contribution(
                worker=_name("Contribution.worker", c.worker),
                incarnation=c.incarnation,
                fragment=c.fragment,
                round=c.round,
                frame=_present("Contribution.frame", frame),
                shard=c.shard,
                ranges=leases.ranges_from("Contribution.ranges", c.ranges),
            )
        case "initial":
            i = proto.initial
            return m.Initial(
                worker=_name("Initial.worker", i.worker),
                incarnation=i.incarnation,
                fragment=i.fragment,
                frame=_present("Initial.frame", frame),
            )
        case "skip":
            s = proto.skip
            return m.Skip(
                worker=_name("Skip.worker", s.worker),
                incarnation=s.incarnation,
                fragment=s.fragment,
                round=s.round,
                reason=_text("Skip.reason", s.reason, MAX_REASON),
            )
        case "fetch":
            f = proto.fetch
            differs = _text("Fetch.differs", f.differs, MAX_NAME)
            return m.Fetch(_name("Fetch.worker", f.worker), f.incarnation, f.fragment, differs)
        case "leave":
            v = proto.leave
            return m.Leave(
                worker=_name("Leave.worker", v.worker),
                incarnation=v.incarnation,
                reason=_text("Leave.reason", v.reason, MAX_REASON),
                progress=_progress_from(v.progress),
                digest=_text("Leave.digest", v.digest, MAX_NAME),
                timeline=_text("Leave.timeline", v.timeline, MAX_TIMELINE),
            )
        case "vote":
            b = proto.vote
            side = _text("Vote.side", b.side, MAX_NAME)
            return m.Vote(
                _name("Vote.worker", b.worker), b.nonce, _name("Vote.attachment", b.attachment), side
            )
        case "lease_request":
            return leases.request_from(proto.lease_request)
        case _:
            raise CorruptDataError("WorkerMessage: empty, or of a kind that this version does not know")


def worker_ref(proto: pb.WorkerMessage) -> Ref | None:
    """The Ref in a Contribution or an Initial, None in any other message."""
    match proto.WhichOneof("message"):
        case "contribution":
            return _ref_from("Contribution.frame", proto.contribution.frame)
        case "initial":
            return _ref_from("Initial.frame", proto.initial.frame)
        case _:
            return None


def coordinator_to_proto(message: m.FromCoordinator, refs: Sequence[Ref] = ()) -> pb.CoordinatorMessage:
    """`refs` stand for the frames of a Commit or a Snapshot, in their order."""
    match message:
        case m.Waiting():
            return pb.CoordinatorMessage(waiting=pb.Waiting(joined=message.joined, needed=message.needed))
        case m.Welcome():
            return pb.CoordinatorMessage(
                welcome=pb.Welcome(
                    worker=message.worker,
                    incarnation=message.incarnation,
                    index=message.index,
                    members=message.members,
                    epoch=message.epoch,
                    step=message.step,
                    versions=message.versions,
                    initial=message.initial,
                )
            )
        case m.Refused():
            return pb.CoordinatorMessage(
                refused=pb.Refused(kind=message.kind, reason=message.reason[:MAX_REASON])
            )
        case m.Commit():
            return pb.CoordinatorMessage(
                commit=pb.Commit(
                    fragment=message.fragment,
                    version=message.version,
                    weights=[pb.IndexedWeight(index=i, weight=w) for i, w in message.weights],
                    rounds=[pb.IndexedRound(index=i, round=r) for i, r in message.rounds],
                    digest=message.digest,
                    frames=_indexed(message.frames, refs),
                    local_steps=[pb.IndexedRound(index=i, round=r) for i, r in message.local_steps],
                )
            )
        case m.Rejected():
            return pb.CoordinatorMessage(
                rejected=pb.Rejected(
                    fragment=message.fragment, round=message.round, reason=message.reason[:MAX_REASON]
                )
            )
        case m.Aborted():
            return pb.CoordinatorMessage(
                aborted=pb.Aborted(
                    fragment=message.fragment, round=message.round, reason=message.reason[:MAX_REASON]
                )
            )
        case m.Resend():
            return pb.CoordinatorMessage(resend=pb.Resend(fragment=message.fragment, round=message.round))
        case m.Snapshot():
            return pb.CoordinatorMessage(
                snapshot=pb.Snapshot(
                    fragment=message.fragment,
                    version=message.version,
                    digest=message.digest,
                    frames=_indexed(message.frames, refs),
                    counted=message.counted + 1,
                )
            )
        case m.Claim(attachment, side):
            return pb.CoordinatorMessage(claim=pb.Claim(attachment=attachment, side=side))
        case m.Lease():
            return leases.lease_to(message)


def coordinator_from_proto(
    proto: pb.CoordinatorMessage, frames: Sequence[m.Buffer] = ()
) -> m.FromCoordinator:
    """`frames` are what `coordinator_refs(proto)` stood for, in that order."""
    match proto.WhichOneof("message"):
        case "waiting":
            joined = tuple(_name("Waiting.joined", n) for n in _list("Waiting.joined", proto.waiting.joined))
            return m.Waiting(joined, proto.waiting.needed)
        case "welcome":
            w = proto.welcome
            return m.Welcome(
                worker=_name("Welcome.worker", w.worker),
                incarnation=w.incarnation,
                index=w.index,
                members=w.members,
                epoch=w.epoch,
                step=w.step,
                versions=_list("Welcome.versions", w.versions),
                initial=w.initial,
            )
        case "refused":
            return m.Refused(
                kind=_text("Refused.kind", proto.refused.kind, MAX_NAME),
                reason=_text("Refused.reason", proto.refused.reason, MAX_REASON),
            )
        case "commit":
            c = proto.commit
            return m.Commit(
                fragment=c.fragment,
                version=c.version,
                weights=tuple(
                    (p.index, _finite("Commit.weights", p.weight)) for p in _list("Commit.weights", c.weights)
                ),
                rounds=tuple((p.index, p.round) for p in _list("Commit.rounds", c.rounds)),
                digest=_text("Commit.digest", c.digest, MAX_NAME),
                frames=_filled("Commit.frames", c.frames, frames),
                local_steps=tuple((p.index, p.round) for p in _list("Commit.local_steps", c.local_steps)),
            )
        case "rejected":
            r = proto.rejected
            return m.Rejected(r.fragment, r.round, _text("Rejected.reason", r.reason, MAX_REASON))
        case "aborted":
            a = proto.aborted
            return m.Aborted(a.fragment, a.round, _text("Aborted.reason", a.reason, MAX_REASON))
        case "resend":
            return m.Resend(proto.resend.fragment, proto.resend.round)
        case "snapshot":
            s = proto.snapshot
            return m.Snapshot(
                fragment=s.fragment,
                version=s.version,
                digest=_text("Snapshot.digest", s.digest, MAX_NAME),
                frames=_filled("Snapshot.frames", s.frames, frames),
                counted=s.counted - 1,
            )
        case "claim":
            side = _text("Claim.side", proto.claim.side, MAX_NAME)
            return m.Claim(_name("Claim.attachment", proto.claim.attachment), side)
        case "lease":
            return leases.lease_from(proto.lease)
        case _:
            raise CorruptDataError("CoordinatorMessage: empty, or of a kind that this version does not know")


def coordinator_refs(proto: pb.CoordinatorMessage) -> tuple[Ref, ...]:
    """The Refs in a Commit or a Snapshot, () in any other message."""
    match proto.WhichOneof("message"):
        case "commit":
            frames: Iterable[pb.IndexedObject] = _list("Commit.frames", proto.commit.frames)
        case "snapshot":
            frames = _list("Snapshot.frames", proto.snapshot.frames)
        case _:
            return ()
    return tuple(_ref_from("frames", f.object) for f in frames)


def _progress_to(progress: m.Progress) -> pb.Progress:
    return pb.Progress(**{f.name: getattr(progress, f.name) for f in fields(m.Progress)})


def _progress_from(proto: pb.Progress) -> m.Progress:
    return m.Progress(**{f.name: getattr(proto, f.name) for f in fields(m.Progress)})


def _ref_to(ref: Ref) -> pb.ObjectRef:
    return pb.ObjectRef(key=ref.key, length=ref.length, crc32c=ref.crc32c)


def _ref_from(name: str, proto: pb.ObjectRef) -> Ref:
    return Ref(_name(f"{name}.key", proto.key), proto.length, proto.crc32c)


def _indexed(frames: Sequence[tuple[int, m.Buffer]], refs: Sequence[Ref]) -> list[pb.IndexedObject]:
    return [pb.IndexedObject(index=i, object=_ref_to(ref)) for (i, _), ref in zip(frames, refs, strict=True)]


def _filled(
    name: str, proto: Iterable[pb.IndexedObject], frames: Sequence[m.Buffer]
) -> tuple[tuple[int, m.Buffer], ...]:
    indices = [f.index for f in _list(name, proto)]
    if len(indices) != len(frames):
        raise CorruptDataError(f"{name}: {len(indices)} announced, {len(frames)} arrived")
    return tuple(zip(indices, frames, strict=True))


def _given(ref: Ref | None, message: m.FromWorker) -> Ref:
    if ref is None:
        raise ValueError(f"{type(message).__name__} needs the Ref of its frame")
    return ref


def _present(name: str, frame: m.Buffer | None) -> m.Buffer:
    if frame is None:
        raise CorruptDataError(f"{name}: the message came without its frame")
    return frame
