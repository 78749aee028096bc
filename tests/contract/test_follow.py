"""The way between a coordinator and its standby over gRPC: records arrive whole, or not at all; only a coordinator follows."""

from __future__ import annotations

import datetime
import json
import queue
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from diloco.comms import convert_following, tls
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import diloco_v1_pb2_grpc as services
from diloco.comms.authority import Authority
from diloco.comms.chunks import MAX_CHUNK_BYTES
from diloco.comms.following import PRIMARY, STANDBY, Ack, Beat, Entry, Follow, Parted, Reached, Turned
from diloco.comms.grpc_follow import FollowService
from diloco.comms.grpc_follower import FollowClient
from diloco.comms.grpc_options import grpc
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.machine import Event, Received
from diloco.errors import CorruptDataError

WAIT_S = 30.0
FOLLOW = Follow("n", "run", "{}", 1, 0, "")
FRAMES = [bytes(range(256)) * 40, b"", b"x" * 5000]
M = TypeVar("M")


class Journal:
    """Two records, one with bulk data."""

    def __init__(self) -> None:
        sizes = [len(frame) for frame in FRAMES]
        self.records: list[dict[str, Any]] = [
            {"type": "start"},
            {"type": "commit", "blobs": {"file": "00000001.bin", "sizes": sizes}},
        ]
        self.data: bytes | None = b"".join(FRAMES)

    def entry(self, index: int) -> tuple[str, str]:
        record = self.records[index]
        return json.dumps(record), record["blobs"]["file"] if "blobs" in record else ""

    def blob(self, name: str) -> bytes | None:
        assert name == "00000001.bin"
        return self.data


class End:
    """One side's inbox."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def message(self, sender: str, kind: type[M]) -> M:
        limit = time.monotonic() + WAIT_S
        while time.monotonic() < limit:
            event = self.events.get(timeout=WAIT_S)
            assert isinstance(event, Received) and event.sender == sender
            if isinstance(event.message, kind):
                return event.message
        raise AssertionError(f"no {kind.__name__} came")


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(closing: ExitStack, journal: Journal, keys: Path | None = None) -> tuple[End, FollowService, str]:
    end = End()
    service = FollowService(end.events.put, journal.entry, journal.blob, chunk_bytes=1000)
    server = GrpcServer(lambda event: None, dict, keys=keys, more=[service.handler])
    address = f"127.0.0.1:{server.start()}"
    closing.callback(server.close)
    return end, service, address


def follow(closing: ExitStack, address: str, **options: Any) -> tuple[End, FollowClient]:
    end = End()
    client = FollowClient(address, end.events.put, **options)
    client.start()
    closing.callback(client.close)
    end.message(PRIMARY, Reached)
    client.send(FOLLOW)
    return end, client


def test_records_arrive_with_their_bulk_data_and_are_acknowledged(closing: ExitStack) -> None:
    """In chunks, cut into frames again; a record whose bulk data is gone keeps its line."""
    journal = Journal()
    primary, service, address = serve(closing, journal)
    standby, client = follow(closing, address)
    assert primary.message(STANDBY, Follow) == FOLLOW
    for message in (Entry(0), Entry(1), Beat(2)):
        service.send(message)
    first, second = standby.message(PRIMARY, Entry), standby.message(PRIMARY, Entry)
    assert (first.index, first.record, list(first.blobs)) == (0, {"type": "start"}, [])
    assert (second.index, second.record) == (1, {"type": "commit"})
    assert [bytes(blob) for blob in second.blobs] == FRAMES
    assert standby.message(PRIMARY, Beat).count in (-1, 2)
    client.send(Ack(2, True))
    assert primary.message(STANDBY, Ack) == Ack(2, True)
    journal.data = None
    service.send(Entry(1))
    gone = standby.message(PRIMARY, Entry)
    assert gone.record == journal.records[1] and not gone.blobs


def test_who_is_turned_away_hears_why_and_comes_again(closing: ExitStack) -> None:
    """The stream ends, both sides are told, and the client opens another one."""
    primary, service, address = serve(closing, Journal())
    standby, _ = follow(closing, address)
    primary.message(STANDBY, Follow)
    service.send(Turned("slow", "why", 5, "chain"))
    assert standby.message(PRIMARY, Turned) == Turned("slow", "why", 5, "chain")
    standby.message(PRIMARY, Parted)
    primary.message(STANDBY, Parted)
    standby.message(PRIMARY, Reached)


def test_bulk_data_beyond_the_bound_is_not_fetched(closing: ExitStack) -> None:
    """The stream is given up, and nothing of it is delivered."""
    primary, service, address = serve(closing, Journal())
    standby, _ = follow(closing, address, max_blob_bytes=100)
    primary.message(STANDBY, Follow)
    service.send(Entry(1))
    event = standby.events.get(timeout=WAIT_S)
    assert event == Received(PRIMARY, Parted())


def test_bulk_data_that_is_damaged_on_the_way_is_fetched_again(closing: ExitStack) -> None:
    """The CRC32C of the whole does not fit: nothing is delivered, and the next attempt starts over."""
    journal = Journal()
    whole = journal.data
    assert whole is not None
    answers = [whole, b"y" + whole[1:]]  # announced, then sent wrong
    journal.blob = lambda name: answers.pop(0) if answers else whole  # type: ignore[method-assign]
    primary, service, address = serve(closing, journal)
    standby, client = follow(closing, address)
    primary.message(STANDBY, Follow)
    service.send(Entry(1))
    standby.message(PRIMARY, Parted)
    standby.message(PRIMARY, Reached)
    client.send(FOLLOW)
    primary.message(STANDBY, Follow)
    service.send(Entry(1))
    assert [bytes(blob) for blob in standby.message(PRIMARY, Entry).blobs] == FRAMES


def test_a_second_standby_waits_while_another_one_follows(closing: ExitStack) -> None:
    """RESOURCE_EXHAUSTED; the same one is let in again, and replaces its old stream."""
    primary, _, address = serve(closing, Journal())
    follow(closing, address)
    primary.message(STANDBY, Follow)
    channel = closing.enter_context(grpc.insecure_channel(address))
    stub: Any = services.FollowServiceStub(channel)  # type: ignore[no-untyped-call]
    other = Follow("m", "run", "{}", 1, 0, "")
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Follow(iter([convert_following.request_to_proto(other)]), timeout=WAIT_S))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    again = stub.Follow(
        iter([convert_following.request_to_proto(FOLLOW)]), timeout=WAIT_S
    )  # kept: else cancelled
    assert primary.message(STANDBY, Follow) == FOLLOW
    again.cancel()


def test_only_a_coordinators_certificate_may_follow(closing: ExitStack, tmp_path: Path) -> None:
    """With keys: workers and operators are denied both calls, a coordinator follows."""
    keys = tmp_path / "keys"
    made = Authority(keys, datetime.datetime.now(datetime.UTC))
    made.create([], 30)
    folders = {role: made.member(role, role, [], 30) for role in ("worker", "operator")}
    primary, _, address = serve(closing, Journal(), keys)
    for role, folder in folders.items():
        pem = [(folder / name).read_bytes() for name in ("ca.crt", f"{role}.key", f"{role}.crt")]
        options = [("grpc.ssl_target_name_override", tls.COORDINATOR_NAME)]
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*pem), options=options)
        stub: Any = services.FollowServiceStub(closing.enter_context(channel))  # type: ignore[no-untyped-call]
        first = convert_following.request_to_proto(FOLLOW)
        for call in (stub.Follow(iter([first])), stub.FetchBlob(pb.BlobRequest(name="00000001.bin"))):
            with pytest.raises(grpc.RpcError) as refused:
                list(call)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    follow(closing, address, keys=keys)
    assert primary.message(STANDBY, Follow) == FOLLOW


def test_what_no_journal_says_is_refused() -> None:
    """Lines that are no record, sizes that do not fit the bulk data, negative counts, empty messages."""
    good = pb.FollowEntry(index=0, record='{"type":"commit","blobs":{"file":"a","sizes":[1]}}')
    assert bytes(convert_following.entry_from_proto(good, b"x").blobs[0]) == b"x"
    for entry, blob in (
        (pb.FollowEntry(record="{"), None),
        (pb.FollowEntry(record="[]"), None),
        (pb.FollowEntry(record="{}"), None),
        (pb.FollowEntry(index=-1, record=good.record), None),
        (good, b"xy"),
        (pb.FollowEntry(record='{"type":"commit"}'), b"x"),
        (pb.FollowEntry(record='{"type":"commit","blobs":{"file":"a","sizes":[-1,2]}}'), b"x"),
    ):
        with pytest.raises(CorruptDataError):
            convert_following.entry_from_proto(entry, blob)
    for request in (pb.FollowRequest(), pb.FollowRequest(ack=pb.FollowAck(count=-1))):
        with pytest.raises(CorruptDataError):
            convert_following.request_from_proto(request)
    with pytest.raises(CorruptDataError):
        convert_following.response_from_proto(pb.FollowResponse())
    assert len(FRAMES[0]) < MAX_CHUNK_BYTES
