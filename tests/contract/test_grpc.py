"""The gRPC transport over real sockets on loopback, through its public interface."""

from __future__ import annotations

import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import pytest

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import diloco_v1_pb2_grpc
from diloco.comms.chunks import crc32c
from diloco.comms.connect import connect
from diloco.comms.convert import worker_to_proto
from diloco.comms.grpc_client import GrpcConnection
from diloco.comms.grpc_options import grpc, health_pb2, health_pb2_grpc
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.machine import COORDINATOR, Connected, Connection, Event, Lost, Received
from diloco.comms.messages import (
    Commit,
    Contribution,
    Fetch,
    FromWorker,
    Heartbeat,
    Initial,
    Join,
    Leave,
    Progress,
    Rejected,
    Resend,
    Snapshot,
    Welcome,
)
from diloco.comms.transfer import Ref, ref_of
from diloco.errors import ConfigError, EnvironmentProblem

WAIT_S = 15.0
MIB = 1 << 20
M = TypeVar("M")
services: Any = diloco_v1_pb2_grpc  # generated without types


class Side:
    """A server with its inbox as a queue."""

    def __init__(self, listen: str = "127.0.0.1:0", **options: Any) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.status: Mapping[str, Any] = {"config": {"stream": {"H": 30}}, "commits": 3}
        self.server = GrpcServer(self.events.put, lambda: self.status, listen=listen, **options)
        self.port = self.server.start()
        self.address = f"127.0.0.1:{self.port}"

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_S)

    def message(self, kind: type[M]) -> M:
        """The next message of `kind`; others are skipped."""
        return _message(kind, self.next)


def _message(kind: type[M], following: Callable[[], Event | None]) -> M:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        event = following()
        assert event is not None, f"no {kind.__name__} came"
        if isinstance(event, Received) and isinstance(event.message, kind):
            return event.message
    raise AssertionError(f"no {kind.__name__} came")


def receive(connection: Connection, kind: type[M]) -> M:
    return _message(kind, lambda: connection.receive(WAIT_S))


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(closing: ExitStack, listen: str = "127.0.0.1:0", **options: Any) -> Side:
    side = Side(listen, **options)
    closing.callback(side.server.close)
    return side


def dial(closing: ExitStack, address: str, **options: Any) -> GrpcConnection:
    connection = GrpcConnection([address], **options)
    closing.callback(connection.close)
    return connection


def join(connection: Connection, worker: str = "ada", nonce: int = 1) -> None:
    assert connection.receive(WAIT_S) == Connected(COORDINATOR)
    connection.send(Join(worker, nonce, "run", "{}", "{}"))


def test_a_join_arrives_and_its_welcome_comes_back(closing: ExitStack) -> None:
    """Connected comes first on both sides, then the messages, equal field by field."""
    side = serve(closing)
    connection = dial(closing, side.address)
    assert connection.receive(WAIT_S) == Connected(COORDINATOR)
    sent = Join("ada", 2**64 - 1, "run", '{"fragments": []}', "{}", versions=(3, 0), step=7)
    connection.send(sent)
    assert side.next() == Connected("ada")
    assert side.next() == Received("ada", sent)
    welcome = Welcome("ada", 1, 0, 2, 5, 60, versions=(3, 4), initial=True)
    side.server.send("ada", welcome)
    assert connection.receive(WAIT_S) == Received(COORDINATOR, welcome)


def test_leave_gets_out_before_a_close_and_the_server_then_sees_the_worker_lost(closing: ExitStack) -> None:
    """close() flushes what was queued."""
    side = serve(closing)
    connection = dial(closing, side.address)
    join(connection)
    side.message(Join)
    for fragment in range(2000):
        connection.send(Fetch("ada", 1, fragment))
    leave = Leave("ada", 1, "complete", Progress(step=9), "abcd")
    connection.send(leave)
    connection.close()
    assert repr(side.message(Leave)) == repr(leave)  # NaN fields make messages unequal
    assert side.next() == Lost("ada")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contribution_of_several_mib_arrives_bit_identical(closing: ExitStack, channels: int) -> None:
    """Over one channel and over several; traffic counts exactly the frame, wire_bytes a little more."""
    side = serve(closing)
    connection = dial(closing, side.address, channels=channels, chunk_bytes=256 << 10)
    join(connection)
    frame = secrets.token_bytes(5 * MIB + 17)
    connection.send(Contribution("ada", 1, 2, 30, memoryview(frame)))
    connection.send(Contribution("ada", 1, 2, 30, memoryview(frame)))  # under way: not sent twice
    got = side.message(Contribution)
    assert (got.worker, got.incarnation, got.fragment, got.round) == ("ada", 1, 2, 30)
    assert got.frame == frame
    connection.send(Initial("ada", 1, 4, b"x" * 1000))
    assert side.message(Initial).frame == b"x" * 1000
    assert side.server.traffic() == {"ada": (len(frame) + 1000, 0)}
    assert connection.traffic() == (len(frame) + 1000, 0)
    up, down = side.server.wire_bytes()["ada"]
    assert len(frame) + 1000 < up < 1.001 * len(frame) + 1100 and down == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_commit_with_frames_arrives_at_two_clients(closing: ExitStack, channels: int) -> None:
    """Both get equal frames, and what follows about the same fragment comes after it."""
    side = serve(closing, chunk_bytes=128 << 10)
    frames = ((0, secrets.token_bytes(3 * MIB + 5)), (2, b""))
    commit = Commit(1, 17, ((0, 0.25), (2, 0.75)), ((0, 16), (2, 15)), "ab12", frames)
    connections = {
        name: dial(closing, side.address, channels=channels, chunk_bytes=64 << 10) for name in ("ada", "bob")
    }
    for name, connection in connections.items():
        join(connection, name)
        side.message(Join)
    for name in connections:
        side.server.send(name, commit)
        side.server.send(name, Resend(1, 18))
        side.server.send(name, commit)
    for connection in connections.values():
        assert connection.receive(WAIT_S) == Received(COORDINATOR, commit)
        assert connection.receive(WAIT_S) == Received(COORDINATOR, Resend(1, 18))
        assert connection.receive(WAIT_S) == Received(COORDINATOR, commit)
        assert connection.traffic() == (0, 3 * MIB + 5)
    assert side.server.traffic() == {name: (0, 3 * MIB + 5) for name in connections}


def test_the_outbox_keeps_two_versions_and_a_message_without_its_frames_is_not_delivered(
    closing: ExitStack,
) -> None:
    """Three versions are announced before the first is fetched: the oldest is gone, the others arrive."""
    side = serve(closing)
    connection = dial(closing, side.address)
    join(connection)
    side.message(Join)
    snapshots = [Snapshot(0, version, "d", ((0, bytes([version]) * MIB),)) for version in (1, 2, 3)]
    for snapshot in snapshots:
        side.server.send("nobody", snapshot)
    for snapshot in snapshots:
        side.server.send("ada", snapshot)
    assert connection.receive(WAIT_S) == Received(COORDINATOR, snapshots[1])
    assert connection.receive(WAIT_S) == Received(COORDINATOR, snapshots[2])


def test_a_client_reconnects_by_itself_to_a_server_restarted_on_its_port(closing: ExitStack) -> None:
    """Lost, then Connected; after a new Join messages flow again, and those sent meanwhile are dropped."""
    first = Side()
    connection = dial(closing, first.address)
    join(connection)
    first.message(Join)
    first.server.close()
    assert connection.receive(WAIT_S) == Lost(COORDINATOR)
    connection.send(Fetch("ada", 1, 0))
    second = serve(closing, first.address)
    assert second.port == first.port
    join(connection)
    connection.send(Fetch("ada", 1, 1))
    assert second.next() == Connected("ada")
    second.message(Join)
    assert second.next() == Received("ada", Fetch("ada", 1, 1))


def test_a_contribution_sent_while_offline_arrives_once_the_server_is_there(closing: ExitStack) -> None:
    """Frames are not control messages: they wait for a session."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    connection = dial(closing, f"127.0.0.1:{port}")
    connection.send(Contribution("ada", 1, 0, 1, b"frame"))
    side = serve(closing, f"127.0.0.1:{port}")
    join(connection)
    assert side.message(Contribution).frame == b"frame"


def test_what_is_sent_before_the_join_of_a_session_is_dropped(closing: ExitStack) -> None:
    """A message meant for the session before must not open the new one."""
    side = serve(closing)
    connection = dial(closing, side.address)
    assert connection.receive(WAIT_S) == Connected(COORDINATOR)
    connection.send(Fetch("ada", 1, 0))
    connection.send(Join("ada", 1, "run", "{}", "{}"))
    assert side.next() == Connected("ada")
    side.message(Join)
    connection.send(Fetch("ada", 1, 1))
    assert side.next() == Received("ada", Fetch("ada", 1, 1))


def test_an_address_that_does_not_answer_is_passed_over(closing: ExitStack) -> None:
    side = serve(closing)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        connection = connect(f"grpc://127.0.0.1:{silent.getsockname()[1]},{side.address}")
        closing.callback(connection.close)
        join(connection)
        assert side.message(Join).worker == "ada"


def test_a_new_session_of_a_worker_replaces_the_old_one_without_a_lost(closing: ExitStack) -> None:
    """The server reports the new Connected only; the old connection learns of it; messages go to the new one."""
    side = serve(closing)
    with ExitStack() as early:
        old = dial(early, side.address)
        join(old, nonce=1)
        assert side.next() == Connected("ada")
        side.message(Join)
        new = dial(closing, side.address)
        join(new, nonce=2)
        assert side.next() == Connected("ada")
        assert side.message(Join).nonce == 2
        assert old.receive(WAIT_S) == Lost(COORDINATOR)
    side.server.send("ada", Resend(0, 1))
    assert new.receive(WAIT_S) == Received(COORDINATOR, Resend(0, 1))
    new.close()
    assert side.next() == Lost("ada")


class Proxy:
    """A TCP relay to `port`. Once `limit` bytes have gone up a connection, it cuts all, one time.

    With `freeze` that connection is not cut but passes nothing on any more.
    """

    def __init__(self, port: int, limit: int, freeze: bool) -> None:
        self._port, self._limit, self._freeze = port, limit, freeze
        self._closing = threading.Event()
        self.cuts = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._run(self._accept)

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            outer = socket.create_connection(("127.0.0.1", self._port))
            with self._lock:
                self._sockets += [inner, outer]
            self._run(self._copy, inner, outer, True)
            self._run(self._copy, outer, inner, False)

    def _copy(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                passed += len(data)
                if up and passed > self._limit and not self.cuts:
                    self.cuts += 1
                    self._cut((source, target) if self._freeze else ())
                    if self._freeze:
                        self._closing.wait()
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self, spared: tuple[socket.socket, ...] = ()) -> None:
        with self._lock:
            for end in self._sockets:
                with suppress(OSError):
                    if end not in spared:
                        end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        self._closing.set()
        self._cut()
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()


@pytest.mark.parametrize(("mib", "freeze"), [(6, False), (6, True), (15.9, True)])
def test_an_upload_cut_off_in_the_middle_is_resumed_where_it_stopped(
    closing: ExitStack, mib: float, freeze: bool
) -> None:
    """After `mib` of 16 MiB all connections break, or the control's breaks and the data's is stuck.

    The frame arrives whole, and at most the spans that were beyond a gap at the break are accepted twice.
    """
    side = serve(closing)
    proxy = Proxy(side.port, int(mib * MIB), freeze)
    closing.callback(proxy.close)
    connection = dial(closing, proxy.address, chunk_bytes=256 << 10)
    join(connection)
    frame = secrets.token_bytes(16 * MIB)
    connection.send(Contribution("ada", 1, 0, 1, frame))
    assert connection.receive(WAIT_S) == Lost(COORDINATOR)
    join(connection)
    assert side.message(Contribution).frame == frame
    assert proxy.cuts == 1
    assert len(frame) <= side.server.traffic()["ada"][0] < 1.5 * len(frame)
    assert connection.traffic()[0] < 2 * len(frame)


class RawWorker:
    """A peer made from protoc's own stubs, to do what our client would not."""

    def __init__(self, address: str, worker: str = "eve") -> None:
        self.channel = grpc.insecure_channel(address)
        self.transfer: Any = services.TransferServiceStub(self.channel)
        self._requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        coordinator: Any = services.CoordinatorServiceStub(self.channel)
        self.responses: Iterator[pb.SessionResponse] = coordinator.Session(iter(self._requests.get, None))
        self.say(Join(worker, 1, "run", "{}", "{}"))
        self.token = next(self.responses).opened.session

    def say(self, message: FromWorker) -> None:
        self._requests.put(pb.SessionRequest(message=worker_to_proto(message)))

    def begin(self, message: Contribution, ref: Ref, token: bytes | None = None) -> pb.BeginUploadResponse:
        session = self.token if token is None else token
        request = pb.BeginUploadRequest(session=session, message=worker_to_proto(message, ref))
        begun: pb.BeginUploadResponse = self.transfer.BeginUpload(request, timeout=WAIT_S)
        return begun

    def upload(self, key: str, generation: int, chunks: list[pb.UploadChunk]) -> None:
        opening = pb.UploadChunk(session=self.token, key=key, generation=generation)
        self.transfer.Upload(iter([opening, *chunks]), timeout=WAIT_S)

    def commit(self, key: str, generation: int) -> None:
        request = pb.CommitUploadRequest(session=self.token, key=key, generation=generation)
        self.transfer.CommitUpload(request, timeout=WAIT_S)

    def download(self, key: str, offset: int, limit: int) -> list[pb.DownloadChunk]:
        request = pb.DownloadRequest(session=self.token, key=key, offset=offset, limit=limit)
        return list(self.transfer.Download(request, timeout=WAIT_S))

    def end(self) -> None:
        self._requests.put(None)

    def close(self) -> None:
        self.end()
        self.channel.close()


@pytest.fixture
def raw(closing: ExitStack) -> tuple[Side, RawWorker]:
    side = serve(closing, max_object_bytes=8 * MIB, max_upload_bytes_total=12 * MIB, max_uploads_per_worker=3)
    worker = RawWorker(side.address)
    closing.callback(worker.close)
    side.message(Join)
    return side, worker


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details() or ""


FRAME = b"0123456789" * 100
GIFT = Contribution("eve", 1, 0, 1, FRAME)


def test_a_corrupted_chunk_is_refused_and_the_upload_can_go_on(raw: tuple[Side, RawWorker]) -> None:
    """DATA_LOSS for one wrong byte; then the intact bytes are accepted, and a repeated commit delivers once."""
    side, worker = raw
    ref = ref_of("k", FRAME)
    first = worker.begin(GIFT, ref).generation
    head = pb.UploadChunk(crc32c=crc32c(FRAME[:500]), data=FRAME[:500])
    bad = pb.UploadChunk(offset=500, crc32c=crc32c(FRAME[500:]), data=b"\x00" + FRAME[501:])
    code, why = refusal(lambda: worker.upload("k", first, [head, bad]))
    assert code is grpc.StatusCode.DATA_LOSS and "CRC32C" in why
    begun = worker.begin(GIFT, ref)
    assert begun.offset == 500
    code, _ = refusal(lambda: worker.commit("k", begun.generation))
    assert code is grpc.StatusCode.OUT_OF_RANGE
    tail = pb.UploadChunk(offset=500, crc32c=crc32c(FRAME[500:]), data=FRAME[500:])
    code, _ = refusal(lambda: worker.upload("k", first, [tail]))
    assert code is grpc.StatusCode.ABORTED  # an older generation is fenced off
    worker.upload("k", begun.generation, [tail])
    worker.commit("k", begun.generation)
    worker.commit("k", begun.generation)
    assert side.message(Contribution).frame == FRAME
    worker.say(Fetch("eve", 1, 0))
    assert side.next() == Received("eve", Fetch("eve", 1, 0))


def test_a_part_of_a_frame_can_be_fetched_with_protocs_stubs(raw: tuple[Side, RawWorker]) -> None:
    """From an offset, up to a limit; what is not offered is NOT_FOUND."""
    side, worker = raw
    side.server.send("eve", Snapshot(1, 2, "d", ((0, FRAME),)))
    key = next(worker.responses).message.snapshot.frames[0].object.key
    (chunk,) = worker.download(key, 100, 50)
    assert (chunk.offset, chunk.crc32c, chunk.data) == (100, crc32c(FRAME[100:150]), FRAME[100:150])
    code, _ = refusal(lambda: worker.download("snapshot/1/1/0", 0, 0))
    assert code is grpc.StatusCode.NOT_FOUND


def test_a_session_that_does_not_begin_with_a_join_is_ended(closing: ExitStack) -> None:
    side = serve(closing)
    with grpc.insecure_channel(side.address) as channel:
        session: Any = services.CoordinatorServiceStub(channel).Session
        request = pb.SessionRequest(message=worker_to_proto(Fetch("eve", 1, 0)))
        _, why = refusal(lambda: next(session(iter([request]), timeout=WAIT_S)))
    assert "must be a Join" in why
    assert side.events.empty()


def test_an_upload_stream_without_progress_is_ended_by_the_server(closing: ExitStack) -> None:
    """The stream is open and silent for `stall_s`: DEADLINE_EXCEEDED, and the upload can be begun again."""
    side = serve(closing, stall_s=0.2)
    worker = RawWorker(side.address)
    closing.callback(worker.close)
    generation = worker.begin(GIFT, ref_of("k", FRAME)).generation
    chunks: queue.SimpleQueue[pb.UploadChunk | None] = queue.SimpleQueue()
    chunks.put(pb.UploadChunk(session=worker.token, key="k", generation=generation))
    code, _ = refusal(lambda: worker.transfer.Upload(iter(chunks.get, None), timeout=WAIT_S))
    chunks.put(None)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert worker.begin(GIFT, ref_of("k", FRAME)).generation > generation


def test_an_oversize_object_is_refused_before_anything_is_allocated(raw: tuple[Side, RawWorker]) -> None:
    """A claim of 2^62 bytes is answered at once, naming the limit and what to do."""
    _, worker = raw
    code, why = refusal(lambda: worker.begin(GIFT, Ref("k", 1 << 62, 0)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(8 * MIB) in why and "max_object_bytes" in why


def test_open_uploads_are_limited_in_bytes_and_abandoned_ones_give_way(raw: tuple[Side, RawWorker]) -> None:
    """Two of 6 MiB fill 12 MiB; at three small ones the oldest idle one is dropped."""
    _, worker = raw
    worker.begin(GIFT, Ref("a", 6 * MIB, 0))
    worker.begin(GIFT, Ref("b", 6 * MIB, 0))
    code, _ = refusal(lambda: worker.begin(GIFT, Ref("c", 1, 0)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    worker.begin(GIFT, Ref("a", 1, 0))
    worker.begin(GIFT, Ref("c", 1, 0))
    stale = worker.begin(GIFT, Ref("b", 6 * MIB, 0)).generation
    worker.begin(GIFT, Ref("d", 1, 0))
    worker.begin(GIFT, Ref("e", 1, 0))
    code, _ = refusal(lambda: worker.commit("b", stale))
    assert code is grpc.StatusCode.ABORTED


def test_transfers_need_the_token_of_a_live_session(raw: tuple[Side, RawWorker]) -> None:
    """Not none, not a guess, and not that of a session that has ended."""
    side, worker = raw
    for token in (b"", b"guess" * 3):
        code, _ = refusal(lambda token=token: worker.begin(GIFT, ref_of("k", FRAME), token))  # type: ignore[misc]
        assert code is grpc.StatusCode.UNAUTHENTICATED
    worker.end()
    assert side.next() == Lost("eve")
    code, _ = refusal(lambda: worker.begin(GIFT, ref_of("k", FRAME)))
    assert code is grpc.StatusCode.UNAUTHENTICATED


def test_a_message_in_another_workers_name_ends_the_session(raw: tuple[Side, RawWorker]) -> None:
    """PERMISSION_DENIED, and nothing of it reaches the inbox but the loss of the liar."""
    side, worker = raw
    worker.say(Fetch("ada", 1, 0))
    code, why = refusal(lambda: next(worker.responses))
    assert code is grpc.StatusCode.PERMISSION_DENIED and "ada" in why
    assert side.next() == Lost("eve")


def test_a_contribution_that_is_refused_for_good_comes_back_as_rejected(closing: ExitStack) -> None:
    """The worker hears why, as if the coordinator had looked at it."""
    side = serve(closing, max_object_bytes=100)
    connection = dial(closing, side.address)
    join(connection)
    connection.send(Contribution("ada", 1, 3, 9, b"x" * 101))
    rejected = receive(connection, Rejected)
    assert (rejected.fragment, rejected.round) == (3, 9) and "101 bytes" in rejected.reason


def test_settings_are_the_coordinators_config_and_none_when_nobody_answers(closing: ExitStack) -> None:
    """No session is needed; an address that does not answer is skipped."""
    side = serve(closing)
    connection = connect(f"grpc://{side.address}")
    closing.callback(connection.close)
    assert connection.settings() == {"stream": {"H": 30}}
    side.status = {}
    assert connection.settings() is None


def test_a_port_in_use_is_an_environment_problem_that_names_the_address(closing: ExitStack) -> None:
    side = serve(closing)
    with pytest.raises(EnvironmentProblem, match=f"127.0.0.1:{side.port}.*choose another port"):
        Side(side.address)


@pytest.mark.parametrize(
    "listen", ["", "7700", "localhost:", "localhost:x", "localhost:70000", "a b:1", "::1:1"]
)
def test_an_address_that_makes_no_sense_is_an_environment_problem(listen: str) -> None:
    with pytest.raises(EnvironmentProblem, match=r"listen: .*write for example 127\.0\.0\.1:7700"):
        Side(listen)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_other_machines_are_not_served_without_tls_unless_that_is_asked_for(
    closing: ExitStack, listen: str
) -> None:
    with pytest.raises(EnvironmentProblem, match="TLS is off"):
        Side(listen)
    if listen == "0.0.0.0:0":
        assert serve(closing, listen, insecure=True).port > 0


@pytest.mark.parametrize("url", ["http://a:1", "a", "grpc://", "grpc://a:0", "a:1,b", "grpc://a:99999", ""])
def test_connect_refuses_what_is_not_a_coordinators_address(url: str) -> None:
    with pytest.raises(ConfigError, match="coordinator: "):
        connect(url)


def test_the_health_service_says_serving(closing: ExitStack) -> None:
    side = serve(closing)
    with grpc.insecure_channel(side.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(
            health_pb2.HealthCheckRequest(service="diloco.v1.TransferService"), timeout=WAIT_S
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_close_waits_for_workers_to_leave_but_not_longer(closing: ExitStack) -> None:
    """With a worker that leaves, a long grace ends early; what was sent before still arrives."""
    side = serve(closing)
    connection = dial(closing, side.address)
    join(connection)
    side.message(Join)
    side.server.send("ada", Resend(1, 2))
    closer = threading.Thread(target=side.server.close, args=(WAIT_S,))
    began = time.monotonic()
    closer.start()
    assert receive(connection, Resend) == Resend(1, 2)
    connection.close()
    closer.join()
    assert time.monotonic() - began < WAIT_S / 2


def test_heartbeats_pass_while_a_large_frame_is_under_way(closing: ExitStack) -> None:
    """Control has a connection of its own: the heartbeat overtakes 64 MiB that were sent before it."""
    side = serve(closing)
    connection = dial(closing, side.address)
    join(connection)
    side.message(Join)
    connection.send(Contribution("ada", 1, 0, 1, bytes(64 * MIB)))
    connection.send(Heartbeat("ada", 1, Progress(), (0,)))
    first = side.next()
    assert isinstance(first, Received) and isinstance(first.message, Heartbeat)
    assert len(side.message(Contribution).frame) == 64 * MIB
