"""A run under attack, as real processes: strangers, thieves, the revoked, liars and floods. The honest ones finish."""

from __future__ import annotations

import queue
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from diloco.cli import main
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import diloco_v1_pb2_grpc, frame, tls, uplink
from diloco.comms.connect import connect
from diloco.comms.convert import worker_to_proto
from diloco.comms.grpc_options import grpc
from diloco.comms.machine import Connection, Received
from diloco.comms.messages import Contribution, Join, Leave, Progress, Rejected, Welcome
from diloco.comms.transfer import Ref
from diloco.config import RunConfig
from diloco.settings import settings_json
from diloco.worker.model import build_model
from diloco.worker.session import ModelParameters
from tests.processes import SLOW
from tests.secured import WAIT_S, Secured, authority, handshake, is_cut_off, resident, running

M = TypeVar("M")
services: Any = diloco_v1_pb2_grpc  # generated without types
LENGTH = 200  # inner steps: 20 seconds while the model is slow
QUICK = {"heartbeat_s": 0.5, "suspect_s": 2.0, "dead_s": 4.0}


def test_strangers_stay_out_and_the_revoked_go_while_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No keys, another CA's, expired keys, keys under another name: exit 3 with the reason; and so for a worker that
    is revoked in mid-run. TLS 1.2 gets no handshake. The other two workers complete, bit-identical."""
    cluster = Secured(
        tmp_path, ["w0", "w1", "w2"], model=SLOW, run={"inner_steps_total": LENGTH}, fault=QUICK,
        topology={"workers": 3},
    )  # fmt: skip
    foreign = authority(tmp_path / "foreign")
    foreign.create([], 30)
    stranger = foreign.member("worker", "w9", [], 30)
    impostor = tmp_path / "impostor"
    shutil.copytree(stranger, impostor)
    shutil.copy(cluster.keys / "ca.crt", impostor / "ca.crt")
    expired = authority(cluster.keys, days_ago=40).member("worker", "old", [], 30)
    with running(cluster, ["w0", "w1", "w2"]) as (coordinator, *workers):
        strangers = [
            (cluster.worker("n0"), "--keys"),
            (cluster.worker("w9", "--keys", str(stranger)), "not from the CA of these keys"),
        ]
        for name, folder, words in (
            ("w8", cluster.keys_of("w0"), "those of worker 'w0'"),
            ("old", expired, "has expired on"),
            ("w9", impostor, "not issued by the CA"),
        ):
            flags = ["--coordinator", cluster.address, "--id", name, "--keys", str(folder)]
            assert main(["worker", str(tmp_path / cluster.config), *flags]) == 3
            assert words in capsys.readouterr().err
        assert _tls(cluster, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(OSError):
            _tls(cluster, ssl.TLSVersion.TLSv1_2)
        began = time.monotonic()
        assert main(["keys", "revoke", "w2", "--keys", str(cluster.keys)]) == 0
        assert workers[2].wait() == 3, workers[2].text
        assert "revoked" in workers[2].text
        before = len(cluster.commits)
        cluster.wait_commits(before + 2, coordinator, *workers[:2])
        for process, words in strangers:
            assert process.wait() == 3, process.text
            assert words in process.text and "Traceback" not in process.text, process.text
        assert time.monotonic() - began < 60
    ended = [line for line in cluster.audit if line["event"] == "ended"]
    assert [line["worker"] for line in ended] == ["w2"]
    assert {line["worker"] for line in cluster.audit if line["event"] == "joined"} == {"w0", "w1", "w2"}
    last = cluster.commits[-1]
    assert set(last["contributors"]) == {"w0", "w1"}


def _tls(cluster: Secured, version: ssl.TLSVersion, name: str = "w0") -> str | None:
    with handshake(cluster, name, version) as wrapped:
        return wrapped.version()


# ---- an insider who lies, and floods ----


def test_a_lying_insider_and_floods_cost_neither_rounds_nor_memory(tmp_path: Path) -> None:
    """Eve has good keys: another's name, replays, 4 GiB lengths, silent sessions; with hundreds of connections."""
    cluster = Secured(
        tmp_path, ["w0", "w1", "eve"], model=SLOW, run={"inner_steps_total": LENGTH}, fault=QUICK
    )
    with running(cluster, ["w0", "w1"]) as (coordinator, *workers), ExitStack() as stack:
        held = resident(coordinator)
        _replay(cluster)
        channel = _lies(cluster, stack)
        silent, sessions = _flood(cluster, stack, channel)
        stack.callback(sessions.clear)  # held open until then
        before, began = len(cluster.commits), time.monotonic()
        cluster.wait_commits(before + 3, coordinator, *workers)
        assert [is_cut_off(one) for one in silent] == [True, True]
        assert cluster.status() is not None and time.monotonic() - began < 30
        assert resident(coordinator) - held < 150e6, "the coordinator's memory has grown with the floods"
    counted = [c for c in cluster.commits if "eve" in c["contributors"]]
    assert len(counted) <= 1
    assert (tmp_path / "runs" / "r" / "audit.jsonl").stat().st_size < 1e6


def _receive(connection: Connection, kind: type[M]) -> M:
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        event = connection.receive(1.0)
        if isinstance(event, Received) and isinstance(event.message, kind):
            return event.message
    raise AssertionError(f"no {kind.__name__} came")


def _replay(cluster: Secured) -> None:
    """A whole contribution, sent again as it is, and again as if it were of the next round."""
    config = RunConfig.load(cluster.folder / cluster.config)
    plan = ModelParameters(build_model("nano", 32, 0, 256), config).plan
    connection = connect(f"grpc://{cluster.address}", keys=cluster.keys_of("eve"))
    try:
        connection.receive(10)
        connection.send(Join("eve", 77, "r", plan.describe(), settings_json(config)))
        welcome = _receive(connection, Welcome)
        honest = frame.encode_frame(
            uplink.uplink_codec(config.codec),
            1e-4 * torch.randn(plan.fragments[0].numel, generator=torch.Generator().manual_seed(1)),
            fragment=0,
            round=1,
            base_version=welcome.versions[0],
            run_id=frame.run_id_hash("r"),
            worker=welcome.index,
            incarnation=welcome.incarnation,
            steps=10,
            tokens=1280,
        )
        for number in (1, 1, 2):
            connection.send(Contribution("eve", welcome.incarnation, 0, number, honest))
        rejected = _receive(connection, Rejected)
        assert rejected.fragment == 0
        connection.send(Leave("eve", welcome.incarnation, "caught", Progress(), ""))
    finally:
        connection.close()


def _lies(cluster: Secured, stack: ExitStack) -> grpc.Channel:
    """Another worker's name, and lengths of 4 GiB in an announcement and in a message's own header."""
    folder = cluster.keys_of("eve")
    parts = [(folder / name).read_bytes() for name in ("ca.crt", "worker.key", "worker.crt")]
    channel = stack.enter_context(
        grpc.secure_channel(
            cluster.address,
            grpc.ssl_channel_credentials(*parts),
            options=tls.channel_options(tls.load_keys(folder, ["worker"], time.time())),
        )
    )
    code, words = _refusal(lambda: next(_session(channel, stack, Join("w0", 1, "r", "{}", "{}"))))
    assert code is grpc.StatusCode.PERMISSION_DENIED and "'eve'" in words
    mine = _session(channel, stack, Join("eve", 78, "r", "{}", "{}"))
    token = next(mine).opened.session
    transfer: Any = services.TransferServiceStub(channel)
    message = worker_to_proto(Contribution("eve", 1, 0, 1, b""), Ref("k", 1 << 32, 0))
    begin = pb.BeginUploadRequest(session=token, message=message)
    code, words = _refusal(lambda: transfer.BeginUpload(begin, timeout=WAIT_S))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "4294967296" in words
    _message_of_4_gib(cluster)
    return channel


def _session(channel: grpc.Channel, stack: ExitStack, join: Join | None) -> Iterator[pb.SessionResponse]:
    requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
    if join is not None:
        requests.put(pb.SessionRequest(message=worker_to_proto(join)))
    stub: Any = services.CoordinatorServiceStub(channel)
    stack.callback(requests.put, None)
    responses: Iterator[pb.SessionResponse] = stub.Session(iter(requests.get, None))
    return responses


def _refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    found: Any = error.value
    return found.code(), found.details()


def _message_of_4_gib(cluster: Secured) -> None:
    """HTTP/2 by hand: a call whose message claims 2^32 - 1 bytes. The server ends the call without waiting for them."""

    def header(name: str, value: str) -> bytes:
        return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    def http2(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
        )

    path = "/diloco.v1.CoordinatorService/GetStatus"
    headers = b"\x83\x87" + b"".join(
        header(*pair)
        for pair in (
            (":path", path),
            (":authority", tls.COORDINATOR_NAME),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        )
    )
    message = b"\x00" + b"\xff" * 4 + b"x" * 1000
    with handshake(cluster, "eve", ssl.TLSVersion.TLSv1_3) as wrapped:
        wrapped.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + http2(4, 0, 0, b"")
            + http2(1, 4, 1, headers)
            + http2(0, 0, 1, message)
        )
        wrapped.settimeout(WAIT_S)
        answers = wrapped.makefile("rb")
        while True:
            head = answers.read(9)
            assert len(head) == 9, "the connection was closed"
            answers.read(int.from_bytes(head[:3], "big"))
            if (
                head[3] in (1, 3) and int.from_bytes(head[5:], "big") == 1
            ):  # HEADERS or RST_STREAM of our call
                return


def _flood(
    cluster: Secured, stack: ExitStack, channel: grpc.Channel
) -> tuple[list[socket.socket], list[Iterator[pb.SessionResponse]]]:
    """150 silent TCP connections, 150 with half a handshake, 100 idle TLS ones, 100 sessions without a Join."""
    plains = []
    for number in range(300):
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", cluster.port), WAIT_S))
        plains.append(plain)
        if number % 2:
            plain.sendall(b"\x16\x03\x01\x40\x00\x01" + b"\x00" * 100)  # a ClientHello that never goes on
    for _ in range(100):
        stack.enter_context(handshake(cluster, "eve", ssl.TLSVersion.TLSv1_3))
    return plains[:2], [_session(channel, stack, None) for _ in range(100)]
