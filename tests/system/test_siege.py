"""A running coordinator under all of it at once: a thousand connections, drips, fuzzed calls, frames and floods of words.

Everybody here holds good keys or none; how strangers are turned away is in `test_security.py`.
"""

from __future__ import annotations

import contextlib
import queue
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from diloco.comms import convert, convert_following, frame, tls, uplink
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import grpc_options as options
from diloco.comms.chunks import Chunk, crc32c, write_chunk
from diloco.comms.connect import connect
from diloco.comms.following import Follow
from diloco.comms.grpc_options import grpc
from diloco.comms.machine import Connected, Received
from diloco.comms.messages import Contribution, Fetch, Heartbeat, Join, Leave, Progress, Welcome
from diloco.comms.transfer import Ref
from diloco.config import RunConfig
from diloco.settings import settings_json
from diloco.worker.model import build_model
from diloco.worker.session import ModelParameters
from tests.fuzz.mutate import edited
from tests.fuzz.wire import NORM_AT, assembled
from tests.fuzz.words import garbled
from tests.processes import SLOW
from tests.secured import WAIT_S, Secured, handshake, is_cut_off, resident, running

CALLS = 2000
FRAMES = 200
QUICK = {"heartbeat_s": 0.5, "suspect_s": 2.0, "dead_s": 4.0, "quarantine_after": 1000}
HELLO = b"\x16\x03\x01\x40\x00\x01" + b"\x00" * 100  # a ClientHello that never goes on
# A bug of the server would be one of these.
BUGS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}


@pytest.mark.long
def test_a_siege_costs_neither_rounds_nor_memory(tmp_path: Path) -> None:
    """1,000 connections; drips into handshakes and calls; 2,000 fuzzed calls of every method, none of which ends in an
    error of the server's own; 200 fuzzed frames; heartbeats of 100,000 entries. Rounds go on, the two honest complete."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server's children inherit it
    cluster = Secured(tmp_path, ["w0", "w1", "eve"], model=SLOW, run={"inner_steps_total": 300}, fault=QUICK)
    try:
        with running(cluster, ["w0", "w1"]) as (coordinator, *workers), ExitStack() as stack:
            held = resident(coordinator)
            before = len(cluster.commits)
            crowd = _crowd(cluster, stack)
            drips = _drips(cluster, stack)
            _fuzzed_calls(cluster, stack)
            _fuzzed_frames(cluster)
            _floods(cluster, stack)
            cluster.wait_commits(before + 3, coordinator, *workers)
            assert is_cut_off(crowd[0]) and is_cut_off(crowd[1]), "a handshake may take 10 s"
            assert is_cut_off(drips[0]), "also when it goes on, byte by byte"
            assert cluster.status() is not None
            grown = resident(coordinator) - held
            print(f"grown by {grown / 1e6:.0f} MB")
            assert grown < 250e6, f"the coordinator has grown by {grown / 1e6:.0f} MB"
        assert len(cluster.commits) >= before + 6
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _crowd(cluster: Secured, stack: ExitStack) -> list[socket.socket]:
    """800 TCP connections, of which half say nothing and half begin a handshake, and 200 idle ones inside TLS."""
    plains = [
        stack.enter_context(socket.create_connection(("127.0.0.1", cluster.port), WAIT_S)) for _ in range(800)
    ]
    for plain in plains[1::2]:
        plain.sendall(HELLO)
    for _ in range(200):
        stack.enter_context(handshake(cluster, "eve", ssl.TLSVersion.TLSv1_3))
    return plains


def _drips(cluster: Secured, stack: ExitStack) -> list[socket.socket]:
    """Ten handshakes and ten calls to which one byte is added every half second, for as long as the test runs."""
    slow = [socket.create_connection(("127.0.0.1", cluster.port), WAIT_S) for _ in range(10)]
    inside = [handshake(cluster, "eve", ssl.TLSVersion.TLSv1_3) for _ in range(10)]
    for one in (*slow, *inside):
        stack.enter_context(one)
    done = threading.Event()

    def drip() -> None:
        at = 0
        words = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" * 100
        while not done.wait(0.5):
            for sockets, text in ((slow, HELLO), (inside, words)):
                for one in sockets:
                    with contextlib.suppress(OSError):  # cut off: what is to happen
                        one.sendall(text[at % len(text) :][:1])
            at += 1

    thread = threading.Thread(target=drip)
    thread.start()
    stack.callback(thread.join)
    stack.callback(done.set)
    return slow


def _channel(cluster: Secured, stack: ExitStack) -> grpc.Channel:
    folder = cluster.keys_of("eve")
    parts = [(folder / name).read_bytes() for name in ("ca.crt", "worker.key", "worker.crt")]
    keys = tls.load_keys(folder, ["worker"], time.time())
    credentials = grpc.ssl_channel_credentials(*parts)
    return stack.enter_context(
        grpc.secure_channel(cluster.address, credentials, options=tls.channel_options(keys))
    )


def _session(channel: grpc.Channel, stack: ExitStack) -> tuple[bytes, queue.SimpleQueue[bytes | None], Any]:
    """The token, what is said and what is heard in a session of eve's that only the transport knows of.

    Tried again while the coordinator takes no more joins from this address: the fuzzed calls have used them up.
    """
    limit = time.monotonic() + 3 * WAIT_S
    while True:
        words: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        join = pb.SessionRequest(message=convert.worker_to_proto(Join("eve", 1, "r", "{}", "{}")))
        words.put(join.SerializeToString())
        method: Any = channel.stream_stream(options.SESSION)
        heard = method(iter(words.get, None))
        try:
            opened = pb.SessionResponse.FromString(next(heard))
        except grpc.RpcError as error:
            words.put(None)
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > limit:
                raise
            time.sleep(1.0)
            continue
        stack.callback(words.put, None)
        return opened.opened.session, words, heard


def _fuzzed_calls(cluster: Secured, stack: ExitStack) -> None:
    rng, channel = Random(1), _channel(cluster, stack)
    token, *_ = _session(channel, stack)
    contribution = convert.worker_to_proto(Contribution("eve", 1, 0, 1, b""), Ref("k", 5, crc32c(b"frame")))
    join = pb.SessionRequest(message=convert.worker_to_proto(Join("eve", 1, "r", "{}", "{}")))
    follow = convert_following.request_to_proto(Follow("node", "r", "{}", 1, 0, ""))
    chunk = pb.UploadChunk.FromString(write_chunk(Chunk(0, crc32c(b"frame"), b"frame", token, "k", 1)))
    calls: list[tuple[str, str, Any]] = [
        ("unary_unary", options.GET_STATUS, pb.GetStatusRequest(echo=5)),
        (
            "unary_unary",
            options.BEGIN_UPLOAD,
            pb.BeginUploadRequest(session=token, message=contribution),
        ),
        (
            "unary_unary",
            options.COMMIT_UPLOAD,
            pb.CommitUploadRequest(session=token, key="k", generation=1),
        ),
        ("stream_unary", options.UPLOAD, chunk),
        ("unary_stream", options.DOWNLOAD, pb.DownloadRequest(session=token, key="commit/0/1/0")),
        ("stream_stream", options.FOLLOW, follow),
        ("unary_stream", options.FETCH_BLOB, pb.BlobRequest(name="00000003.bin")),
    ]
    seen: dict[str, int] = {}
    for number in range(CALLS):
        kind, path, proto = rng.choice(calls)
        if (
            number >= 0.9 * CALLS
        ):  # at the end: each one that is let in ends the session whose token is used above
            kind, path, proto = "stream_stream", options.SESSION, join
        code = _outcome(channel, kind, path, garbled(rng, proto))
        seen[code.name] = seen.get(code.name, 0) + 1
        assert code not in BUGS, f"{path}: {code}"
    assert {"OK", "DATA_LOSS", "PERMISSION_DENIED"} <= set(seen), seen
    assert seen.get("UNAUTHENTICATED", 0) < 0.5 * CALLS, "most calls reach what is behind the token"


def _outcome(channel: grpc.Channel, kind: str, path: str, raw: bytes) -> grpc.StatusCode:
    call = getattr(channel, kind)(path)
    given = iter([raw]) if kind.startswith("stream") else raw
    try:
        answer = call(given, timeout=WAIT_S)
        if kind.endswith("stream"):
            list(answer)
    except grpc.RpcError as error:
        found: Any = error
        code: grpc.StatusCode = found.code()
        return code
    return grpc.StatusCode.OK


def _fuzzed_frames(cluster: Secured) -> None:
    """Eve as a member: frames with a checksum that is right, and words about things that are not."""
    rng = Random(2)
    config = RunConfig.load(cluster.folder / cluster.config)
    plan = ModelParameters(build_model("nano", 32, 0, 256), config).plan
    codec = uplink.uplink_codec(config.codec)
    with contextlib.closing(connect(f"grpc://{cluster.address}", keys=cluster.keys_of("eve"))) as connection:
        welcome = _welcome(connection, Join("eve", 77, "r", plan.describe(), settings_json(config)))
        values = 1e-4 * torch.randn(plan.fragments[0].numel, generator=torch.Generator().manual_seed(1))
        for number in range(FRAMES):
            whole = frame.encode_frame(
                codec, values, fragment=0, round=number, base_version=welcome.versions[0],
                run_id=frame.run_id_hash("r"), worker=welcome.index, incarnation=welcome.incarnation, steps=10,
                tokens=1280,
            )  # fmt: skip
            head = whole[: frame.HEADER_SIZE]
            if rng.random() < 0.5:
                head = edited(rng, head[:NORM_AT], 2) + head[NORM_AT:]
            bad = assembled(head, edited(rng, whole[frame.HEADER_SIZE :], 16))
            connection.send(Contribution("eve", welcome.incarnation, 0, number, bad))
            connection.send(Fetch("eve", welcome.incarnation, rng.choice((0, 1, 999)), "zz"))
        connection.send(Leave("eve", welcome.incarnation, "caught", Progress(), ""))


def _welcome(connection: Any, join: Join) -> Welcome:
    """Asks again in every session, as a worker does: in a siege one may break."""
    limit, heard = time.monotonic() + 3 * WAIT_S, []
    while time.monotonic() < limit:
        event = connection.receive(1.0)
        if isinstance(event, Received) and isinstance(event.message, Welcome):
            return event.message
        if isinstance(event, Connected):
            connection.send(join)
        if event is not None:
            heard.append(event)
    raise AssertionError(f"no Welcome came, but {heard[-5:]}")


def _floods(cluster: Secured, stack: ExitStack) -> None:
    """100 heartbeats of 100,000 entries each, as fast as they are taken: 1.5 GB of objects, if all were kept."""
    channel = _channel(cluster, stack)
    _, words, heard = _session(channel, stack)
    beat = Heartbeat("eve", 2, Progress(), (), tuple((0, 1 + i) for i in range(100_000)))
    raw = pb.SessionRequest(message=convert.worker_to_proto(beat)).SerializeToString()
    for _ in range(100):
        words.put(raw)
    words.put(None)
    with contextlib.suppress(grpc.RpcError):  # cut off, or served to the end
        for _ in _bounded(heard):
            pass


def _bounded(heard: Iterator[bytes]) -> Iterator[bytes]:
    limit = time.monotonic() + 3 * WAIT_S
    for raw in heard:
        yield raw
        assert time.monotonic() < limit
