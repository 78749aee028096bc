"""The gRPC transport with keys: who gets in, as whom, and who is thrown out, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import datetime
import json
import queue
import secrets
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import diloco_v1_pb2_grpc, metrics, tls
from diloco.comms.audit import Audit
from diloco.comms.authority import Authority
from diloco.comms.connect import connect
from diloco.comms.convert import worker_to_proto
from diloco.comms.grpc_client import GrpcConnection
from diloco.comms.grpc_options import grpc, health_pb2, health_pb2_grpc
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.limits import Lobby
from diloco.comms.machine import COORDINATOR, Connected, Connection, Event, Lost, Received
from diloco.comms.messages import Commit, Contribution, FromWorker, Heartbeat, Join, Progress, Refused
from diloco.comms.query import fetch_status, measure
from diloco.comms.tls_probe import probe
from diloco.comms.transfer import Ref
from diloco.comms.uploads import QuotaError, Uploads
from diloco.config import RunConfig
from diloco.errors import RefusedError
from diloco.worker.session import DiLoCo

WAIT_S = 15.0
MIB = 1 << 20
M = TypeVar("M")
services: Any = diloco_v1_pb2_grpc  # generated without types
DENIED = grpc.StatusCode.PERMISSION_DENIED


def authority(folder: Path, days_ago: float = 0) -> Authority:
    return Authority(folder, datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days_ago))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Workers ada and eve and operator op, with their coordinator."""
    made = authority(tmp_path / "keys")
    made.create([], 30)
    for name in ("ada", "eve"):
        made.member("worker", name, [], 30)
    made.member("operator", "op", [], 30)
    return tmp_path / "keys"


class Side:
    """A server with its inbox as a queue and its audit log."""

    def __init__(self, keys: Path | None, **options: Any) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.log = keys.parent / "audit.jsonl" if keys is not None else None
        status = {"config": {"stream": {"H": 30}}, "commits": 3}
        self.server = GrpcServer(self.events.put, lambda: status, keys=keys, audit=Audit(self.log), **options)
        self.address = f"127.0.0.1:{self.server.start()}"

    def message(self, kind: type[M]) -> M:
        return _message(kind, lambda: self.events.get(timeout=WAIT_S))

    @property
    def audit(self) -> list[dict[str, Any]]:
        assert self.log is not None
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


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


def serve(closing: ExitStack, keys: Path | None, **options: Any) -> Side:
    side = Side(keys, **options)
    closing.callback(side.server.close)
    return side


def dial(closing: ExitStack, address: str, keys: Path | None, **options: Any) -> GrpcConnection:
    connection = GrpcConnection([address], keys=keys, **options)
    closing.callback(connection.close)
    return connection


def join(connection: Connection, worker: str) -> None:
    assert connection.receive(WAIT_S) == Connected(COORDINATOR)
    connection.send(Join(worker, 1, "run", "{}", "{}"))


def worker_keys(keys: Path, name: str) -> Path:
    return keys / "workers" / name


def open_channel(closing: ExitStack, address: str, folder: Path, role: str) -> grpc.Channel:
    """A peer made from gRPC's own parts, to do what our client would not; its keys are not looked at."""
    pem = {part: (folder / name).read_bytes() for part, name in _parts(role).items()}
    credentials = grpc.ssl_channel_credentials(pem["ca"], pem["key"], pem["crt"])
    options = [("grpc.ssl_target_name_override", tls.COORDINATOR_NAME), ("grpc.use_local_subchannel_pool", 1)]
    return closing.enter_context(grpc.secure_channel(address, credentials, options=options))


def _parts(role: str) -> dict[str, str]:
    return {"ca": "ca.crt", "crt": f"{role}.crt", "key": f"{role}.key"}


class RawSession:
    def __init__(self, channel: grpc.Channel, worker: str) -> None:
        self.transfer: Any = services.TransferServiceStub(channel)
        self._requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        coordinator: Any = services.CoordinatorServiceStub(channel)
        self.responses: Iterator[pb.SessionResponse] = coordinator.Session(
            iter(self._requests.get, None), timeout=2 * WAIT_S
        )
        self.say(Join(worker, 1, "run", "{}", "{}"))

    def say(self, message: FromWorker) -> None:
        self._requests.put(pb.SessionRequest(message=worker_to_proto(message)))

    def end(self) -> None:
        self._requests.put(None)


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    found: Any = error.value
    return found.code(), found.details()


# ---- those who belong ----


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_cross_mutual_tls_bit_identical_both_ways(
    closing: ExitStack, keys: Path, channels: int
) -> None:
    side = serve(closing, keys)
    connection = dial(closing, side.address, worker_keys(keys, "ada"), channels=channels)
    join(connection, "ada")
    side.message(Join)
    frame = secrets.token_bytes(3 * MIB + 5)
    connection.send(Contribution("ada", 1, 2, 30, frame))
    assert side.message(Contribution).frame == frame
    commit = Commit(1, 17, ((0, 1.0),), ((0, 16),), "ab12", ((0, frame),))
    side.server.send("ada", commit)
    assert receive(connection, Commit) == commit
    serial = tls.identity_of((worker_keys(keys, "ada") / "worker.crt").read_bytes()).serial
    connected = side.audit[0]
    assert (connected["event"], connected["worker"], connected["serial"]) == (
        "connected",
        "ada",
        f"{serial:x}",
    )


def test_a_loop_of_ones_own_is_called_as_its_keys_say(closing: ExitStack, keys: Path) -> None:
    """`diloco.DiLoCo` without a worker's name takes that of the connection's certificate, and is let in with it."""
    side = serve(closing, keys)
    connection = connect(f"grpc://{side.address}", keys=worker_keys(keys, "ada"))
    model = torch.nn.Linear(4, 4)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DiLoCo(model, inner, connection, config=RunConfig(), join=False)
    closing.callback(optimizer.close)
    connection.receive(WAIT_S)
    connection.send(Join(optimizer.replica.worker, 1, "run", "{}", "{}"))
    assert side.message(Join).worker == optimizer.replica.worker == "ada"


def test_a_served_address_beyond_loopback_needs_no_insecure_with_keys(closing: ExitStack, keys: Path) -> None:
    """And the address is in no certificate: it is the coordinator's name in it that counts."""
    side = serve(closing, keys, listen="0.0.0.0:0")
    port = side.address.rpartition(":")[2]
    assert (
        probe(f"127.0.0.2:{port}", tls.load_keys(worker_keys(keys, "ada"), ["worker"], time.time())).outcome
        == "ok"
    )
    assert fetch_status(f"127.0.0.2:{port}", WAIT_S, worker_keys(keys, "ada")) is not None


@pytest.mark.parametrize("reader", ["operators/op", "workers/ada", "."])
def test_everybody_with_a_certificate_may_read_the_status(
    closing: ExitStack, keys: Path, reader: str
) -> None:
    """Operator, worker, and the coordinator's own keys; settings too."""
    side = serve(closing, keys)
    assert (fetch_status(side.address, WAIT_S, keys / reader) or {})["commits"] == 3
    assert dial(closing, side.address, keys / reader).settings() == {"stream": {"H": 30}}


def test_a_link_is_measured_through_the_status_call(closing: ExitStack, keys: Path) -> None:
    """Positive rates, a round trip, hardly any skew on one machine; the echo is bounded whatever is asked for."""
    side = serve(closing, keys)
    facts = measure(side.address, tls.load_keys(keys / "operators" / "op", ["operator"], time.time()))
    assert facts is not None and facts.status["commits"] == 3
    assert facts.up_bps > 1e5 and facts.down_bps > 1e5 and 0 < facts.rtt_s < 5 and abs(facts.skew_s) < 5
    stub: Any = services.CoordinatorServiceStub(
        open_channel(closing, side.address, keys / "operators" / "op", "operator")
    )
    assert len(stub.GetStatus(pb.GetStatusRequest(echo=2**32 - 1), timeout=WAIT_S).echo) == MIB


# ---- those who do not ----


def _asking(channel: grpc.Channel) -> list[Callable[[], Any]]:
    """The calls that need no session."""
    coordinator: Any = services.CoordinatorServiceStub(channel)
    health = health_pb2_grpc.HealthStub(channel)
    return [
        lambda: coordinator.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S),
        lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S),
    ]


def test_no_call_of_any_service_is_answered_without_a_certificate(closing: ExitStack, keys: Path) -> None:
    """Plain text, TLS without a certificate, a certificate of another CA, an expired one: the handshake fails."""
    side = serve(closing, keys)
    foreign = authority(keys.parent / "foreign")
    foreign.create([], 30)
    stranger = foreign.member("worker", "ada", [], 30)
    shutil.copy(keys / "ca.crt", stranger / "ca.crt")  # it trusts us, we do not trust it
    expired = authority(keys, days_ago=40).member("worker", "old", [], 30)
    root = (keys / "ca.crt").read_bytes()
    override = [("grpc.ssl_target_name_override", tls.COORDINATOR_NAME)]
    channels = {
        "plain": closing.enter_context(grpc.insecure_channel(side.address)),
        "no certificate": closing.enter_context(
            grpc.secure_channel(side.address, grpc.ssl_channel_credentials(root), options=override)
        ),
        "other CA": open_channel(closing, side.address, stranger, "worker"),
        "expired": open_channel(closing, side.address, expired, "worker"),
    }
    for name, channel in channels.items():
        assert {refusal(call)[0] for call in _asking(channel)} == {grpc.StatusCode.UNAVAILABLE}, name
        session = RawSession(channel, "ada")
        assert refusal(lambda s=session: next(s.responses))[0] is grpc.StatusCode.UNAVAILABLE, name  # type: ignore[misc]
        session.end()
    assert side.events.empty()


def test_a_worker_cannot_join_as_another(closing: ExitStack, keys: Path) -> None:
    """Refused with both names, which the client reports as a refusal; nothing reaches the inbox; it is on record."""
    side = serve(closing, keys)
    connection = dial(closing, side.address, worker_keys(keys, "eve"))
    join(connection, "ada")
    refused = receive(connection, Refused)
    assert refused.kind == "identity" and "'eve'" in refused.reason and "'ada'" in refused.reason
    assert side.events.empty()
    line = next(line for line in side.audit if line["event"] == "refused")
    assert (line["worker"], line["certificate"], line["host"]) == ("ada", "worker 'eve'", "127.0.0.1")


def test_an_operator_reads_the_status_and_gets_nothing_else(closing: ExitStack, keys: Path) -> None:
    """A session is refused to our client, every other method to anybody's."""
    side = serve(closing, keys)
    assert receive(dial(closing, side.address, keys / "operators" / "op"), Refused).kind == "identity"
    channel = open_channel(closing, side.address, keys / "operators" / "op", "operator")
    transfer: Any = services.TransferServiceStub(channel)
    for call in (
        lambda: transfer.BeginUpload(pb.BeginUploadRequest(), timeout=WAIT_S),
        lambda: transfer.Upload(iter(()), timeout=WAIT_S),
        lambda: transfer.CommitUpload(pb.CommitUploadRequest(), timeout=WAIT_S),
        lambda: next(transfer.Download(pb.DownloadRequest(), timeout=WAIT_S)),
    ):
        code, words = refusal(call)
        assert code is DENIED and "may read the status" in words
    assert side.events.empty()


def test_the_session_of_another_worker_cannot_be_used_even_with_its_token(
    closing: ExitStack, keys: Path
) -> None:
    """Eve with ada's token can neither upload nor download in ada's name."""
    side = serve(closing, keys)
    ada = RawSession(open_channel(closing, side.address, worker_keys(keys, "ada"), "worker"), "ada")
    token = next(ada.responses).opened.session
    transfer: Any = services.TransferServiceStub(
        open_channel(closing, side.address, worker_keys(keys, "eve"), "worker")
    )
    message = worker_to_proto(Contribution("ada", 1, 0, 1, b"x"), Ref("k", 1, 0))
    begin = pb.BeginUploadRequest(session=token, message=message)
    for call in (
        lambda: transfer.BeginUpload(begin, timeout=WAIT_S),
        lambda: transfer.Upload(iter([pb.UploadChunk(session=token, key="k", generation=1)]), timeout=WAIT_S),
        lambda: transfer.CommitUpload(pb.CommitUploadRequest(session=token, key="k"), timeout=WAIT_S),
        lambda: next(transfer.Download(pb.DownloadRequest(session=token, key="k"), timeout=WAIT_S)),
    ):
        code, words = refusal(call)
        assert code is DENIED and "'eve'" in words
    assert ada.transfer.BeginUpload(begin, timeout=WAIT_S).generation > 0
    ada.end()


def test_revoking_ends_the_session_and_its_uploads_within_seconds_and_nobody_elses(
    closing: ExitStack, keys: Path
) -> None:
    """Eve is lost, told why, and every further call of hers is denied; ada's session goes on without a break."""
    side = serve(closing, keys)
    ada = dial(closing, side.address, worker_keys(keys, "ada"))
    join(ada, "ada")
    side.message(Join)
    channel = open_channel(closing, side.address, worker_keys(keys, "eve"), "worker")
    eve = RawSession(channel, "eve")
    token = next(eve.responses).opened.session
    message = worker_to_proto(Contribution("eve", 1, 0, 1, b"x"), Ref("k", 1, 0))
    begun = eve.transfer.BeginUpload(pb.BeginUploadRequest(session=token, message=message), timeout=WAIT_S)
    waiting: queue.SimpleQueue[pb.UploadChunk | None] = queue.SimpleQueue()
    opening = pb.UploadChunk(session=token, key="k", generation=begun.generation)
    waiting.put(opening)
    upload = eve.transfer.Upload.future(iter(waiting.get, None), timeout=WAIT_S)
    side.message(Join)
    assert authority(keys).revoke("eve")
    began = time.monotonic()
    code, words = refusal(lambda: next(eve.responses))
    assert code is DENIED and "revoked" in words and time.monotonic() - began < 5
    waiting.put(pb.UploadChunk(offset=0, data=b"x"))
    assert refusal(upload.result)[0] in (grpc.StatusCode.UNAUTHENTICATED, DENIED)
    while side.events.get(timeout=WAIT_S) != Lost("eve"):
        pass
    assert {refusal(call)[0] for call in _asking(channel)} == {DENIED}
    assert "revoked" in receive(dial(closing, side.address, worker_keys(keys, "eve")), Refused).reason
    with pytest.raises(RefusedError, match="revoked"):
        fetch_status(side.address, WAIT_S, worker_keys(keys, "eve"))
    ada.send(Heartbeat("ada", 1, Progress(), (0,)))
    assert side.message(Heartbeat).worker == "ada"
    assert [line["worker"] for line in side.audit if line["event"] == "ended"] == ["eve"]
    waiting.put(None)
    eve.end()


def test_a_certificate_that_expires_ends_its_session(
    closing: ExitStack, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the coordinator passes its end while the worker is connected."""
    side = serve(closing, keys)
    connection = dial(closing, side.address, worker_keys(keys, "ada"))
    join(connection, "ada")
    side.message(Join)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 31 * 86400)
    assert "expired" in receive(connection, Refused).reason


# ---- what a worker is told when TLS itself says no ----


def test_a_client_reports_what_trying_again_cannot_mend(closing: ExitStack, keys: Path) -> None:
    """Another run's keys, no keys, keys against a coordinator without: each a refusal with the remedy."""
    side, plain = serve(closing, keys), serve(closing, None)
    foreign = authority(keys.parent / "foreign")
    foreign.create([], 30)
    stranger = foreign.member("worker", "ada", [], 30)
    cases = [
        (side.address, stranger, "not from the CA of these keys"),
        (side.address, None, "--keys"),
        (plain.address, worker_keys(keys, "ada"), "without TLS"),
    ]
    connections = [dial(closing, address, folder) for address, folder, _ in cases]
    for connection, (address, folder, words) in zip(connections, cases, strict=True):
        refused = receive(connection, Refused)
        assert refused.kind == "identity" and words in refused.reason and address in refused.reason
        with pytest.raises(RefusedError, match=words):
            connection.settings()
        with pytest.raises(RefusedError, match=words):
            fetch_status(address, 5.0, folder)
    shutil.copy(keys / "ca.crt", stranger / "ca.crt")
    mixed = tls.Keys(stranger, tls.identity_of((stranger / "worker.crt").read_bytes()), b"", b"", b"")
    trusting = tls.Keys(stranger, mixed.identity, (keys / "ca.crt").read_bytes(), b"", b"")
    assert "hangs up on the certificate" in probe(side.address, trusting).words


def test_a_worker_cannot_pass_for_the_coordinator(closing: ExitStack, keys: Path) -> None:
    """Even one whose certificate is good for serving at that very host: clients ask for the coordinator's name."""
    authority(keys).member("worker", "mallory", ["127.0.0.1", "localhost"], 30)
    folder = worker_keys(keys, "mallory")
    server = grpc.server(ThreadPoolExecutor(2))
    pair = [((folder / "worker.key").read_bytes(), (folder / "worker.crt").read_bytes())]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    server.start()
    closing.callback(server.stop, None)
    refused = receive(dial(closing, f"127.0.0.1:{port}", worker_keys(keys, "ada")), Refused)
    assert "another node of the run" in refused.reason


def test_an_address_that_is_only_down_is_tried_for_ever(closing: ExitStack, keys: Path) -> None:
    """A coordinator that comes late, with the right keys, is joined."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    connection = dial(closing, f"127.0.0.1:{port}", worker_keys(keys, "ada"))
    assert connection.receive(2.0) is None
    side = serve(closing, keys, listen=f"127.0.0.1:{port}")
    join(connection, "ada")
    assert side.message(Join).worker == "ada"


# ---- renewal ----


def test_renewed_certificates_are_used_without_a_restart(closing: ExitStack, keys: Path) -> None:
    """The coordinator shows its new one at the next handshake; a worker shows its own at the next session."""
    side = serve(closing, keys)
    mine = tls.load_keys(worker_keys(keys, "ada"), ["worker"], time.time())
    before = probe(side.address, mine).server
    connection = dial(closing, side.address, worker_keys(keys, "ada"))
    join(connection, "ada")
    side.message(Join)
    authority(keys).coordinator([], 60, renew=True)
    after = probe(side.address, mine).server
    assert before is not None and after is not None and before.serial != after.serial
    assert after.serial == tls.identity_of((keys / "coordinator.crt").read_bytes()).serial
    authority(keys).member("worker", "ada", [], 60, renew=True)
    side.server.close()
    again = serve(closing, keys, listen=side.address)
    assert connection.receive(WAIT_S) == Lost(COORDINATOR)
    join(connection, "ada")
    again.message(Join)
    serial = tls.identity_of((worker_keys(keys, "ada") / "worker.crt").read_bytes()).serial
    assert [line["serial"] for line in again.audit if line["event"] == "connected"][-1] == f"{serial:x}"


def test_while_two_authorities_are_trusted_workers_of_both_get_in(closing: ExitStack, keys: Path) -> None:
    """Both CA certificates in every ca.crt: how a new authority takes over."""
    new = authority(keys.parent / "new")
    new.create([], 30)
    fresh = new.member("worker", "bob", [], 30)
    both = (keys / "ca.crt").read_bytes() + (new.folder / "ca.crt").read_bytes()
    for folder in (keys, worker_keys(keys, "ada"), fresh):
        (folder / "ca.crt").write_bytes(both)
    side = serve(closing, keys)
    for name, folder in (("ada", worker_keys(keys, "ada")), ("bob", fresh)):
        join(dial(closing, side.address, folder), name)
        assert side.message(Join).worker == name


# ---- bounds ----


def test_joins_in_quick_succession_are_put_off_and_other_workers_are_not(
    closing: ExitStack, keys: Path
) -> None:
    """Of 25 joins of eve in a row some are put off, not refused for good; ada joins meanwhile."""
    side = serve(closing, keys)
    channel = open_channel(closing, side.address, worker_keys(keys, "eve"), "worker")
    outcomes = []
    for _ in range(25):
        session = RawSession(channel, "eve")
        try:
            next(session.responses)
            outcomes.append("in")
        except grpc.RpcError as error:
            outcomes.append(error.code().name)
        session.end()
    assert set(outcomes) == {"in", "RESOURCE_EXHAUSTED"} and outcomes[:20] == ["in"] * 20
    connection = dial(closing, side.address, worker_keys(keys, "ada"))
    join(connection, "ada")
    while side.message(Join).worker != "ada":
        pass


def test_sessions_that_say_nothing_give_way_to_those_who_come() -> None:
    """Two places: the third pushes the first out, other peers are not touched, time ends the rest."""

    async def story() -> list[str]:
        lobby, told = Lobby(2, 0.4), []

        async def silent(name: str, peer: str) -> None:
            try:
                async with lobby.wait(peer):
                    await asyncio.Event().wait()
            except TimeoutError:
                told.append(name)

        tasks = []
        for name, peer in (("other", "p"), ("first", "q"), ("second", "q"), ("third", "q")):
            tasks.append(asyncio.create_task(silent(name, peer)))
            await asyncio.sleep(0.02)
        assert told == ["first"]
        async with lobby.wait("q"):
            assert told == ["first"]
            await asyncio.sleep(0.02)
        assert told == ["first", "second"]
        await asyncio.gather(*tasks)
        return told

    assert asyncio.run(story()) == ["first", "second", "other", "third"]


def test_many_who_ask_for_the_status_at_once_share_an_answer(closing: ExitStack) -> None:
    """Of twenty questions within the second that an answer takes hardly any costs another one."""
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()

    def status() -> dict[str, Any]:
        asked.put(1)
        threading.Event().wait(1.0)
        return {"commits": 3}

    server = GrpcServer(lambda event: None, status)
    channel = closing.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.start()}"))
    closing.callback(server.close)
    stub: Any = services.CoordinatorServiceStub(channel)
    calls = [stub.GetStatus.future(pb.GetStatusRequest(), timeout=WAIT_S) for _ in range(20)]
    assert {json.loads(call.result().json)["commits"] for call in calls} == {3}
    assert asked.qsize() <= 3


def test_an_announced_length_beyond_the_models_is_refused_at_once(closing: ExitStack, keys: Path) -> None:
    """4 GiB where the largest fragment has kilobytes: refused for good, nothing is set aside for it."""
    side = serve(closing, keys, object_limit=lambda: 1000)
    eve = RawSession(open_channel(closing, side.address, worker_keys(keys, "eve"), "worker"), "eve")
    token = next(eve.responses).opened.session
    for length, expected in (
        (1 << 32, grpc.StatusCode.INVALID_ARGUMENT),
        (1001, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        message = worker_to_proto(Contribution("eve", 1, 0, 1, b""), Ref("k", length, 0))
        begin = pb.BeginUploadRequest(session=token, message=message)
        code, words = refusal(lambda b=begin: eve.transfer.BeginUpload(b, timeout=WAIT_S))  # type: ignore[misc]
        assert code is expected and "limit" in words
    eve.end()


def test_who_holds_the_most_upload_space_gives_way(keys: Path) -> None:
    """Of 100 bytes eve holds 90: ada gets hers, eve's running attempt is fenced off, and eve gets no more."""

    def message(worker: str, key: str, length: int) -> pb.WorkerMessage:
        return worker_to_proto(Contribution(worker, 1, 0, 1, b""), Ref(key, length, 0))

    uploads = Uploads(100, 100, 8)
    generations = {key: uploads.begin("eve", message("eve", key, 45))[1] for key in ("a", "b")}
    held = uploads.find("eve", "b", generations["b"])
    held.streams = 1
    uploads.begin("ada", message("ada", "k", 40))
    with pytest.raises(Exception, match="not under way"):
        uploads.find("eve", "a", generations["a"])  # the idle one goes first
    assert uploads.find("eve", "b", generations["b"]) is held
    for _ in range(2):
        with pytest.raises(QuotaError):
            uploads.begin("eve", message("eve", "c", 45))
    uploads.begin("bob", message("bob", "k", 30))
    assert held.receiving.generation != generations["b"]


# ---- the metrics page ----


class _One(Collector):
    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("diloco_test", "One.")
        family.add_metric([], 1)
        yield family


def _page(port: int, keys: Path, client: tuple[Path, Path] | None) -> str:
    context = ssl.create_default_context(cafile=keys / "ca.crt")
    if client is not None:
        context.load_cert_chain(*client)
    with urllib.request.urlopen(f"https://127.0.0.1:{port}/metrics", timeout=WAIT_S, context=context) as page:
        return str(page.read().decode())


def test_metrics_beyond_loopback_need_a_certificate_and_a_silent_peer_stops_no_scrape(
    closing: ExitStack, keys: Path
) -> None:
    """An operator reads the page while somebody holds a connection without a word; without a certificate no page."""
    (_, port), stop = metrics.serve("0.0.0.0:0", _One(), keys)
    closing.callback(stop)
    silent = closing.enter_context(socket.create_connection(("127.0.0.1", port)))
    operator = (keys / "operators" / "op" / "operator.crt", keys / "operators" / "op" / "operator.key")
    assert "diloco_test 1.0" in _page(port, keys, operator)
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        _page(port, keys, None)
    silent.close()


def test_metrics_on_loopback_stay_plain(closing: ExitStack, keys: Path) -> None:
    (_, port), stop = metrics.serve(None, _One(), keys)
    closing.callback(stop)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as page:
        assert b"diloco_test 1.0" in page.read()
