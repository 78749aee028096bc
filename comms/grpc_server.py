"""The coordinator's end of the gRPC transport: sessions, uploads in, downloads out. No coordinator logic.

Everything runs on the shared loop (`diloco.comms.loop`); the public methods may be called from any other thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import grpc_options as options
from diloco.comms import loop
from diloco.comms.address import is_loopback, parse_address
from diloco.comms.chunks import CHUNK_BYTES, GRPC_PREFIX_BYTES, MAX_CHUNK_BYTES, read_chunk, write_chunk
from diloco.comms.convert import coordinator_to_proto, parse, worker_from_proto
from diloco.comms.grpc_options import aio, grpc, health, health_pb2, health_pb2_grpc
from diloco.comms.machine import Connected, Event, Lost, Received
from diloco.comms.messages import Commit, FromCoordinator, FromWorker, Join, Snapshot
from diloco.comms.outbox import Outbox
from diloco.comms.transfer import FencedError, OutOfPlaceError, TooLargeError, cut
from diloco.comms.uploads import QuotaError, Uploads
from diloco.errors import ConfigError, CorruptDataError, DilocoError, EnvironmentProblem

log = logging.getLogger(__name__)

JOIN_S = 60.0  # how long a session may be open before its Join
UPLOAD_KEPT_S = 60.0  # how long uploads outlive a broken session, so that they can be resumed
MAX_QUEUED = 10_000  # control messages to one worker; one that lets more pile up is cut off

_Context = aio.ServicerContext[bytes, bytes]


class _NoSessionError(DilocoError):
    """A transfer without a live session."""


class _NotOfferedError(DilocoError):
    """A download of something that is not in the outbox."""


class _ForeignError(DilocoError):
    """A message in the name of another worker."""


# What a peer is told, most special first: its client decides by the code whether to try again.
_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (TooLargeError, grpc.StatusCode.INVALID_ARGUMENT),
    (_NoSessionError, grpc.StatusCode.UNAUTHENTICATED),
    (_NotOfferedError, grpc.StatusCode.NOT_FOUND),
    (_ForeignError, grpc.StatusCode.PERMISSION_DENIED),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (FencedError, grpc.StatusCode.ABORTED),
    (OutOfPlaceError, grpc.StatusCode.OUT_OF_RANGE),
    (CorruptDataError, grpc.StatusCode.DATA_LOSS),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
)


@contextlib.asynccontextmanager
async def _refusals(context: _Context) -> AsyncIterator[None]:
    """Turns the exceptions above into the status of the call."""
    try:
        yield
    except (DilocoError, TimeoutError) as error:
        code = next((c for kind, c in _CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
        await context.abort(code, str(error) or "no progress for too long")


@dataclass(slots=True)
class _Session:
    worker: str
    nonce: int
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)
    queue: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED))
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""

    def end(self, why: str) -> None:
        self.why = why
        self.ended.set()


@dataclass(slots=True)
class _Counts:
    """Bytes of one worker: of frames, and of what gRPC was given for them, repeats and framing included."""

    frames_up: int = 0
    frames_down: int = 0
    wire_up: int = 0
    wire_down: int = 0


class GrpcServer:
    """Serves workers over gRPC.

    `inbox` gets Connected, Received and Lost events, each `sender` or `peer` a worker's name; `Received` messages
    have their frames. It is called on the loop's thread and must return at once (put the event in a queue).
    `status` returns the run's state as JSON values, its configuration under "config"; it is called on a pool thread.

    `listen` is host:port, port 0 for any. Without `credentials` only loopback is served, unless `insecure`.
    `max_upload_bytes_total` bounds the memory that all unfinished uploads together may take.
    """

    def __init__(
        self,
        inbox: Callable[[Event], None],
        status: Callable[[], Mapping[str, Any]],
        *,
        listen: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        insecure: bool = False,
        max_object_bytes: int = 4 << 30,
        max_upload_bytes_total: int = 16 << 30,
        max_uploads_per_worker: int = 64,
        chunk_bytes: int = CHUNK_BYTES,
        stall_s: float = options.STALL_S,
    ) -> None:
        if not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(f"chunk_bytes: {chunk_bytes} is not between 1 and {MAX_CHUNK_BYTES}")
        self._inbox = inbox
        self._status = status
        self._listen = listen
        self._credentials = credentials
        self._insecure = insecure
        self._chunk_bytes = chunk_bytes
        self._stall_s = stall_s
        self._outbox = Outbox()
        self._uploads = Uploads(max_object_bytes, max_upload_bytes_total, max_uploads_per_worker)
        self._sessions: dict[str, _Session] = {}
        self._tokens: dict[bytes, _Session] = {}
        self._nonces: dict[str, int] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}  # of the uploads of workers that are away
        self._counts: dict[str, _Counts] = {}
        self._empty = asyncio.Event()
        self._server: aio.Server | None = None
        self._closing = False

    def start(self) -> int:
        """Serve; returns the port. Raises EnvironmentProblem when `listen` cannot be used."""
        try:
            host, _ = parse_address(self._listen)
        except ValueError as error:
            raise EnvironmentProblem(
                f"listen: {error}; write for example 127.0.0.1:7700, or [::]:7700 for all interfaces"
            ) from error
        if self._credentials is None and not self._insecure and not is_loopback(host):
            raise EnvironmentProblem(
                f"listen: {self._listen} is reachable from other machines and TLS is off: set up keys, "
                "listen on 127.0.0.1, or allow it explicitly with insecure"
            )
        return loop.run(self._start())

    def send(self, to: str, message: FromCoordinator) -> None:
        """Queue `message` for the worker `to`; dropped when it has no session. Never blocks on the network."""
        refs = self._outbox.put(message) if isinstance(message, Commit | Snapshot) else ()
        response = pb.SessionResponse(message=coordinator_to_proto(message, refs))
        loop.shared_loop().call_soon_threadsafe(self._enqueue, to, response.SerializeToString())

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Per worker: bytes of frames received from it and sent to it."""
        return {worker: (c.frames_up, c.frames_down) for worker, c in list(self._counts.items())}

    def wire_bytes(self) -> dict[str, tuple[int, int]]:
        """Like `traffic`, with chunk headers, gRPC message prefixes and refused or repeated chunks."""
        return {worker: (c.wire_up, c.wire_down) for worker, c in list(self._counts.items())}

    def close(self, grace_s: float = 0.0) -> None:
        """Stop, after at most `grace_s` seconds in which workers may finish and leave. Emits no more Lost."""
        loop.run(self._stop(grace_s))

    # ---- on the loop ----

    async def _start(self) -> int:
        server = aio.server(options=options.SERVER_OPTIONS, maximum_concurrent_rpcs=4096)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    options.COORDINATOR_SERVICE,
                    {
                        "Session": grpc.stream_stream_rpc_method_handler(self._session),
                        "GetStatus": grpc.unary_unary_rpc_method_handler(self._get_status),
                    },
                ),
                grpc.method_handlers_generic_handler(
                    options.TRANSFER_SERVICE,
                    {
                        "BeginUpload": grpc.unary_unary_rpc_method_handler(self._begin_upload),
                        "Upload": grpc.stream_unary_rpc_method_handler(self._upload),
                        "CommitUpload": grpc.unary_unary_rpc_method_handler(self._commit_upload),
                        "Download": grpc.unary_stream_rpc_method_handler(self._download),
                    },
                ),
            )
        )
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        for service in ("", options.COORDINATOR_SERVICE, options.TRANSFER_SERVICE):
            await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._listen)
            else:
                port = server.add_secure_port(self._listen, self._credentials)
        except RuntimeError as error:
            await server.stop(None)
            raise EnvironmentProblem(
                f"cannot listen on {self._listen}: the port is taken or the address is not this machine's; "
                "stop the other process, or choose another port (0: any free one)"
            ) from error
        await server.start()
        self._server = server
        return port

    async def _stop(self, grace_s: float) -> None:
        if self._sessions and grace_s > 0:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        self._closing = True
        for expiry in self._expiries.values():
            expiry.cancel()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def _enqueue(self, to: str, raw: bytes) -> None:
        session = self._sessions.get(to)
        if session is None:
            return
        try:
            session.queue.put_nowait(raw)
        except asyncio.QueueFull:
            session.end(f"{MAX_QUEUED} messages are waiting: the worker does not read")

    async def _session(self, _requests: AsyncIterator[bytes], context: _Context) -> None:
        await context.send_initial_metadata(())  # tells the worker that the way is open
        async with _refusals(context):
            async with asyncio.timeout(JOIN_S):
                raw = options.message_or_end(await context.read())
            if raw is None:
                return
            join = _read_message(raw)
            if not isinstance(join, Join):
                raise CorruptDataError("Session: the first message must be a Join")
            session = self._register(join)
            try:
                self._inbox(Received(join.worker, join))
                await self._serve(session, context)
            finally:
                self._unregister(session)
        if session.ended.is_set():
            await context.abort(grpc.StatusCode.ABORTED, session.why)

    def _register(self, join: Join) -> _Session:
        session = _Session(join.worker, join.nonce)
        old = self._sessions.get(join.worker)
        if old is not None:
            self._tokens.pop(old.token, None)
            old.end("replaced by a newer session of the same worker")
        if (expiry := self._expiries.pop(join.worker, None)) is not None:
            expiry.cancel()
        if self._nonces.get(join.worker) != join.nonce:
            self._uploads.drop(join.worker)  # another life of the process has nothing to resume
        self._nonces[join.worker] = join.nonce
        self._sessions[join.worker] = session
        self._tokens[session.token] = session
        opened = pb.SessionResponse(opened=pb.SessionOpened(session=session.token))
        session.queue.put_nowait(opened.SerializeToString())
        self._inbox(Connected(join.worker))
        return session

    def _unregister(self, session: _Session) -> None:
        self._tokens.pop(session.token, None)
        if self._sessions.get(session.worker) is not session:
            return  # replaced: the worker is not lost
        del self._sessions[session.worker]
        if not self._sessions:
            self._empty.set()
        if not self._closing:
            self._expiries[session.worker] = loop.shared_loop().call_later(
                UPLOAD_KEPT_S, self._expire, session.worker
            )
            self._inbox(Lost(session.worker))

    def _expire(self, worker: str) -> None:
        del self._expiries[worker]
        self._nonces.pop(worker, None)
        self._uploads.drop(worker)

    async def _serve(self, session: _Session, context: _Context) -> None:
        """Until the worker ends the session, it breaks, or `session.end` is called."""
        reader = asyncio.create_task(self._read(session, context))
        writer = asyncio.create_task(_write(session, context))
        ended = asyncio.create_task(session.ended.wait())
        tasks = (reader, writer, ended)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not reader.cancelled() and (error := reader.exception()) is not None:
            raise error

    async def _read(self, session: _Session, context: _Context) -> None:
        while (raw := options.message_or_end(await context.read())) is not None:
            message = _read_message(raw)
            if message.worker != session.worker:
                raise _ForeignError(f"session of {session.worker!r}: a message from {message.worker!r}")
            if self._sessions.get(session.worker) is session:
                self._inbox(Received(session.worker, message))

    async def _get_status(self, raw: bytes, context: _Context) -> bytes:
        status = await asyncio.to_thread(self._status)
        return pb.GetStatusResponse(json=json.dumps(status)).SerializeToString()

    async def _begin_upload(self, raw: bytes, context: _Context) -> bytes:
        async with _refusals(context):
            request = parse(pb.BeginUploadRequest, raw)
            session = self._authorised(request.session)
            offset, generation = self._uploads.begin(session.worker, request.message)
        return pb.BeginUploadResponse(offset=offset, generation=generation).SerializeToString()

    async def _upload(self, _requests: AsyncIterator[bytes], context: _Context) -> bytes:
        async with _refusals(context):
            opening = read_chunk(await self._next(context) or b"")
            session = self._authorised(opening.session)
            upload = self._uploads.find(session.worker, opening.key, opening.generation)
            counts = self._counts.setdefault(session.worker, _Counts())
            upload.streams += 1
            try:
                while (raw := await self._next(context)) is not None:
                    counts.wire_up += len(raw) + GRPC_PREFIX_BYTES
                    chunk = read_chunk(raw)
                    upload.receiving.accept(opening.generation, chunk)
                    counts.frames_up += len(chunk.data)
            finally:
                upload.streams -= 1
        return pb.UploadResponse(offset=upload.receiving.offset).SerializeToString()

    async def _next(self, context: _Context) -> bytes | None:
        """The next message of an upload, None at its end."""
        async with asyncio.timeout(self._stall_s):
            return options.message_or_end(await context.read())

    async def _commit_upload(self, raw: bytes, context: _Context) -> bytes:
        async with _refusals(context):
            request = parse(pb.CommitUploadRequest, raw)
            session = self._authorised(request.session)
            message = self._uploads.commit(session.worker, request.key, request.generation)
            if message is not None:
                self._inbox(Received(session.worker, message))
        return pb.CommitUploadResponse().SerializeToString()

    async def _download(self, raw: bytes, context: _Context) -> None:
        async with _refusals(context):
            request = parse(pb.DownloadRequest, raw)
            session = self._authorised(request.session)
            frame = self._outbox.get(request.key)
            if frame is None:
                raise _NotOfferedError(f"{request.key!r} is not, or no longer, offered: ask for a snapshot")
            end = memoryview(frame).nbytes
            if request.offset > end:
                raise OutOfPlaceError(f"{request.key!r} has {end} bytes, not {request.offset}")
            if request.limit:
                end = min(end, request.offset + request.limit)
            counts = self._counts.setdefault(session.worker, _Counts())
            for chunk in cut(frame, request.offset, end, self._chunk_bytes):
                message = write_chunk(chunk)
                async with asyncio.timeout(self._stall_s):
                    await context.write(message)
                counts.wire_down += len(message) + GRPC_PREFIX_BYTES
                counts.frames_down += len(chunk.data)

    def _authorised(self, token: bytes) -> _Session:
        session = self._tokens.get(token)
        if session is None:
            raise _NoSessionError("no such session, or it is over: open one and join")
        return session


def _read_message(raw: bytes) -> FromWorker:
    return worker_from_proto(parse(pb.SessionRequest, raw).message)


async def _write(session: _Session, context: _Context) -> None:
    while True:
        await context.write(await session.queue.get())
