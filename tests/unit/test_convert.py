"""Messages survive the wire field by field, and what a peer should not send is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from subprocess import run
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.comms import checked, convert
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import messages as m
from diloco.comms.transfer import Ref
from diloco.errors import CorruptDataError

ROOT = Path(__file__).parents[2]
GENERATED = ("diloco_v1_pb2.py", "diloco_v1_pb2.pyi", "diloco_v1_pb2_grpc.py")

i64 = st.integers(-(2**63), 2**63 - 1)
u32 = st.integers(0, 2**32 - 1)
name = st.text(min_size=1, max_size=20)
text = st.text(max_size=50)
versions = st.lists(i64, max_size=5).map(tuple)
finite = st.floats(allow_nan=False, allow_infinity=False)
progress = st.builds(
    m.Progress,
    **{n: i64 for n in ("step", "tokens", "bytes_up", "bytes_down")},
    **{n: finite for n in ("loss", "lr", "tokens_per_s", "compute_s", "exposed_s", "hidden_s")},
    **{n: finite for n in ("eval_start", "eval_end", "link_up_bps", "link_down_bps", "rtt_s")},
)
frames = st.lists(st.tuples(u32, st.binary(max_size=9)), max_size=3).map(tuple)
ranges = st.lists(st.tuples(u32, i64, i64), max_size=3).map(tuple)
who = {"worker": name, "incarnation": i64}

FROM_WORKER: dict[type, st.SearchStrategy[Any]] = {
    m.Join: st.builds(
        m.Join,
        name,
        st.integers(0, 2**64 - 1),
        text,
        text,
        text,
        versions=versions,
        step=i64,
        protocol=i64,
        epoch=i64,
    ),
    m.Heartbeat: st.builds(
        m.Heartbeat,
        **who,
        progress=progress,
        versions=versions,
        in_flight=st.lists(st.tuples(u32, i64), max_size=4).map(tuple),
    ),
    m.Contribution: st.builds(
        m.Contribution, **who, fragment=u32, round=i64, frame=st.binary(max_size=9), shard=i64, ranges=ranges
    ),
    m.Initial: st.builds(m.Initial, **who, fragment=u32, frame=st.binary(max_size=9)),
    m.Skip: st.builds(m.Skip, **who, fragment=u32, round=i64, reason=text),
    m.Fetch: st.builds(m.Fetch, **who, fragment=u32, differs=text),
    m.Leave: st.builds(m.Leave, **who, reason=text, progress=progress, digest=text, timeline=text),
    m.Vote: st.builds(m.Vote, name, st.integers(0, 2**64 - 1), name, text),
    m.LeaseRequest: st.builds(m.LeaseRequest, name, i64, i64, i64, kept=ranges, sizes=versions),
}
FROM_COORDINATOR: dict[type, st.SearchStrategy[Any]] = {
    m.Waiting: st.builds(m.Waiting, st.lists(name, max_size=4).map(tuple), i64),
    m.Welcome: st.builds(m.Welcome, name, i64, u32, i64, i64, i64, versions, st.booleans()),
    m.Refused: st.builds(m.Refused, text, text),
    m.Commit: st.builds(
        m.Commit,
        u32,
        i64,
        st.lists(st.tuples(u32, finite), max_size=4).map(tuple),
        st.lists(st.tuples(u32, i64), max_size=4).map(tuple),
        text,
        frames,
    ),
    m.Rejected: st.builds(m.Rejected, u32, i64, text),
    m.Aborted: st.builds(m.Aborted, u32, i64, text),
    m.Resend: st.builds(m.Resend, u32, i64),
    m.Snapshot: st.builds(m.Snapshot, u32, i64, text, frames, st.integers(-1, 2**62)),
    m.Claim: st.builds(m.Claim, name, text),
    m.Lease: st.builds(m.Lease, i64, i64, i64, ranges),
}


@given(st.one_of(*FROM_WORKER.values()))
def test_what_a_worker_says_comes_back_equal(message: m.FromWorker) -> None:
    """Through bytes; a frame's Ref arrives, and the frame is put back in its place."""
    frame = getattr(message, "frame", None)
    ref = None if frame is None else Ref("key", len(frame), 7)
    raw = convert.worker_to_proto(message, ref).SerializeToString()
    proto = convert.parse(pb.WorkerMessage, raw)
    assert convert.worker_ref(proto) == ref
    assert convert.worker_from_proto(proto, frame) == message


@given(st.one_of(*FROM_COORDINATOR.values()))
def test_what_the_coordinator_says_comes_back_equal(message: m.FromCoordinator) -> None:
    """Through bytes; the Refs of all frames arrive in order."""
    bulk = [frame for _, frame in getattr(message, "frames", ())]
    refs = tuple(Ref(f"k{i}", len(frame), i) for i, frame in enumerate(bulk))
    raw = convert.coordinator_to_proto(message, refs).SerializeToString()
    proto = convert.parse(pb.CoordinatorMessage, raw)
    assert convert.coordinator_refs(proto) == refs
    assert convert.coordinator_from_proto(proto, bulk) == message


def test_every_message_has_its_place_in_the_oneofs() -> None:
    """messages.py, the .proto and the two tests above know the same messages."""
    for union, built, proto in (
        (m.FromWorker, FROM_WORKER, pb.WorkerMessage),
        (m.FromCoordinator, FROM_COORDINATOR, pb.CoordinatorMessage),
    ):
        assert set(get_args(union)) == set(built)
        oneof: Any = proto.DESCRIPTOR.oneofs_by_name["message"]
        assert {k.__name__ for k in built} == {f.message_type.name for f in oneof.fields}


def test_nan_passes_in_progress_and_nowhere_else() -> None:
    """NaN there means unknown; a weight must be finite."""
    beat = m.Heartbeat("a", 1, m.Progress(), ())
    back = convert.worker_from_proto(convert.worker_to_proto(beat))
    assert repr(back) == repr(beat)
    for weight in (float("nan"), float("inf")):
        proto = pb.CoordinatorMessage(commit=pb.Commit(weights=[pb.IndexedWeight(weight=weight)]))
        with pytest.raises(CorruptDataError, match="Commit.weights"):
            convert.coordinator_from_proto(proto)


LONG = "x" * (checked.MAX_REASON + 1)
MANY = [1] * (checked.MAX_LIST + 1)


@pytest.mark.parametrize(
    ("proto", "field"),
    [
        (pb.WorkerMessage(), "WorkerMessage"),
        (pb.WorkerMessage(join=pb.Join()), "Join.worker"),
        (pb.WorkerMessage(join=pb.Join(worker="x" * 1025)), "Join.worker"),
        (pb.WorkerMessage(join=pb.Join(worker="a", run_id="x" * 1025)), "Join.run_id"),
        (pb.WorkerMessage(join=pb.Join(worker="a", plan="x" * ((3 << 20) + 1))), "Join.plan"),
        (pb.WorkerMessage(join=pb.Join(worker="a", versions=MANY)), "Join.versions"),
        (pb.WorkerMessage(heartbeat=pb.Heartbeat(worker="a", versions=MANY)), "Heartbeat.versions"),
        (pb.WorkerMessage(skip=pb.Skip(worker="a", reason=LONG)), "Skip.reason"),
        (pb.WorkerMessage(leave=pb.Leave(worker="a", digest=LONG)), "Leave.digest"),
        (pb.WorkerMessage(leave=pb.Leave(worker="a", timeline="x" * (1 << 19))), "Leave.timeline"),
        (pb.WorkerMessage(fetch=pb.Fetch(worker="a", differs=LONG)), "Fetch.differs"),
        (pb.WorkerMessage(contribution=pb.Contribution(worker="a")), "Contribution.frame"),
        (pb.WorkerMessage(initial=pb.Initial(worker="a")), "Initial.frame"),
    ],
)
def test_what_a_worker_may_not_say_is_refused_by_name(proto: pb.WorkerMessage, field: str) -> None:
    with pytest.raises(CorruptDataError, match=field):
        convert.worker_from_proto(proto)


@pytest.mark.parametrize(
    ("proto", "field"),
    [
        (pb.CoordinatorMessage(), "CoordinatorMessage"),
        (pb.CoordinatorMessage(waiting=pb.Waiting(joined=[""])), "Waiting.joined"),
        (pb.CoordinatorMessage(rejected=pb.Rejected(reason=LONG)), "Rejected.reason"),
        (pb.CoordinatorMessage(commit=pb.Commit(frames=[pb.IndexedObject()])), "Commit.frames"),
        (pb.CoordinatorMessage(snapshot=pb.Snapshot(digest=LONG)), "Snapshot.digest"),
    ],
)
def test_what_the_coordinator_may_not_say_is_refused_by_name(
    proto: pb.CoordinatorMessage, field: str
) -> None:
    with pytest.raises(CorruptDataError, match=field):
        convert.coordinator_from_proto(proto)


@pytest.mark.parametrize(
    "read",
    [
        lambda: convert.worker_ref(pb.WorkerMessage(initial=pb.Initial(worker="a"))),
        lambda: convert.coordinator_refs(
            pb.CoordinatorMessage(snapshot=pb.Snapshot(frames=[pb.IndexedObject()]))
        ),
    ],
)
def test_a_ref_without_a_key_is_refused(read: Callable[[], object]) -> None:
    with pytest.raises(CorruptDataError, match="key"):
        read()


def test_a_reason_that_is_too_long_is_cut_by_its_sender() -> None:
    """Words of ours must not make the peer refuse the message."""
    back = convert.worker_from_proto(convert.worker_to_proto(m.Skip("a", 1, 0, 1, LONG)))
    assert isinstance(back, m.Skip) and back.reason == LONG[:-1]


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_is_a_message(raw: bytes) -> None:
    """No other exception than CorruptDataError."""
    try:
        message = convert.worker_from_proto(convert.parse(pb.WorkerMessage, raw), b"")
    except CorruptDataError:
        return
    assert isinstance(message, m.FromWorker)


@pytest.mark.skipif(find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_the_committed_code_is_what_the_proto_file_generates(tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "diloco/comms/diloco_v1.proto"]
    run(command, cwd=ROOT, check=True)
    for file in GENERATED:
        fresh = (tmp_path / "diloco" / "comms" / file).read_text()
        assert fresh == (ROOT / "comms" / file).read_text(), f"{file} is stale: run `make proto`"
