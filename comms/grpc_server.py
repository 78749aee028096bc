"""The coordinator's end of the gRPC transport: sessions, uploads in, downloads out. No coordinator logic.

Everything runs on the shared loop (`diloco.comms.loop`); the public methods may be called from any other thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import grpc_options as options
from diloco.comms import loop, tls
from diloco.comms.address import is_loopback, parse_address
from diloco.comms.audit import Audit
from diloco.comms.chunks import CHUNK_BYTES, GRPC_PREFIX_BYTES, MAX_CHUNK_BYTES, read_chunk, write_chunk
from diloco.comms.convert import coordinator_to_proto, parse
from diloco.comms.grpc_access import (
    Access,
    Context,
    ForbiddenError,
    Gate,
    NoSessionError,
    NotOfferedError,
    TooManyError,
    host_of,
    refusals,
)
from diloco.comms.grpc_options import aio, grpc
from diloco.comms.grpc_sessions import Counts, Session, read_message, write_messages
from diloco.comms.limits import Lobby, max_connections
from diloco.comms.machine import Connected, Event, Lost, Received
from diloco.comms.messages import FLUSHED, Commit, FromCoordinator, Join, Leave, Refused, Snapshot, Welcome
from diloco.comms.outbox import Outbox
from diloco.comms.tls import Identity
from diloco.comms.transfer import OutOfPlaceError, cut
from diloco.comms.uploads import Uploads
from diloco.errors import ConfigError, CorruptDataError, EnvironmentProblem

JOIN_S = 60.0  # how long a session may be open before its Join
UPLOAD_KEPT_S = 60.0  # how long uploads outlive a broken session, so that they can be resumed
MAX_SESSIONS = 1024
PLACES = 256  # sessions per peer that have not joined yet
WATCH_S = 1.0  # how often the list of revoked certificates is looked at
MAX_ECHO = 1 << 20
NO_REFUSALS = ("left", "complete", "incarnation", "standby", "final")  # a goodbye, or "join again"


class GrpcServer:
    """Serves workers over gRPC.

    `inbox` gets Connected, Received and Lost events, each `sender` or `peer` a worker's name; `Received` messages
    have their frames. It is called on the loop's thread and must return at once (put the event in a queue).
    `status` returns the run's state as JSON values, its configuration under "config"; it is called on a pool thread.

    `listen` is host:port, port 0 for any. With `keys`, a folder made by `diloco keys`, every call needs a
    certificate of that authority; without, only loopback is served, unless `insecure`. `audit` hears who came and
    who was refused. `max_upload_bytes_total` bounds the memory that all unfinished uploads together may take;
    `object_limit` may lower `max_object_bytes` as soon as it is known what the largest object can be. `more` are the
    handlers of further services.
    """

    def __init__(
        self,
        inbox: Callable[[Event], None],
        status: Callable[[], Mapping[str, Any]],
        *,
        listen: str = "127.0.0.1:0",
        keys: Path | None = None,
        insecure: bool = False,
        audit: Audit | None = None,
        max_object_bytes: int = 4 << 30,
        object_limit: Callable[[], int | None] = lambda: None,
        max_upload_bytes_total: int = 16 << 30,
        max_uploads_per_worker: int = 64,
        chunk_bytes: int = CHUNK_BYTES,
        stall_s: float = options.STALL_S,
        more: Sequence[grpc.GenericRpcHandler] = (),
    ) -> None:
        if not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(f"chunk_bytes: {chunk_bytes} is not between 1 and {MAX_CHUNK_BYTES}")
        self._inbox = inbox
        self._status = status
        self._listen = listen
        self._keys = tls.load_keys(keys, ["coordinator"], time.time()) if keys is not None else None
        self._audit = audit or Audit(None)
        self._access = Access(self._keys, self._audit)
        self._lobby = Lobby(PLACES, JOIN_S)
        self._watcher: asyncio.Task[None] | None = None
        self._status_call: asyncio.Task[Mapping[str, Any]] | None = None
        self._insecure = insecure
        self._chunk_bytes = chunk_bytes
        self._stall_s = stall_s
        self._more = tuple(more)
        self._outbox = Outbox()
        self._uploads = Uploads(
            max_object_bytes, max_upload_bytes_total, max_uploads_per_worker, object_limit
        )
        self._sessions: dict[str, Session] = {}
        self._tokens: dict[bytes, Session] = {}
        self._nonces: dict[str, int] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}  # of the uploads of workers that are away
        self._counts: dict[str, Counts] = {}
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
        if self._keys is None and not self._insecure and not is_loopback(host):
            raise EnvironmentProblem(
                f"listen: {self._listen} is reachable from other machines and TLS is off: set up keys (diloco keys "
                "init) and give --keys, listen on 127.0.0.1, or allow it explicitly with --insecure"
            )
        return loop.run(self._start())

    def send(self, to: str, message: FromCoordinator) -> None:
        """Queue `message` for the worker `to`; dropped when it has no session. Never blocks on the network."""
        refs = self._outbox.put(message) if isinstance(message, Commit | Snapshot) else ()
        response = pb.SessionResponse(message=coordinator_to_proto(message, refs))
        if isinstance(message, Welcome):
            self._audit.write("joined", worker=to, incarnation=message.incarnation)
        elif isinstance(message, Refused) and message.kind not in NO_REFUSALS:
            self._audit.write("refused", worker=to, reason=f"{message.kind}: {message.reason}")
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
        server = aio.server(
            interceptors=[Gate(self._access)],
            options=[*options.SERVER_OPTIONS, (options.MAX_CONNECTIONS, max_connections())],
            maximum_concurrent_rpcs=4096,
        )
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
                *self._more,
            )
        )
        await options.add_health(server)
        try:
            if self._keys is None:
                port = server.add_insecure_port(self._listen)
            else:
                port = server.add_secure_port(self._listen, tls.server_credentials(self._keys))
        except RuntimeError as error:
            await server.stop(None)
            raise EnvironmentProblem(
                f"cannot listen on {self._listen}: the port is taken or the address is not this machine's; "
                "stop the other process, or choose another port (0: any free one)"
            ) from error
        await server.start()
        self._server = server
        if self._keys is not None:
            self._watcher = asyncio.create_task(self._watch())
        return port

    async def _stop(self, grace_s: float) -> None:
        if self._sessions and grace_s > 0:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        self._closing = True
        if self._watcher is not None:
            self._watcher.cancel()
        for expiry in self._expiries.values():
            expiry.cancel()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def _enqueue(self, to: str, raw: bytes) -> None:
        if (session := self._sessions.get(to)) is not None:
            session.put(raw)

    async def _watch(self) -> None:
        """Ends the sessions of certificates that have been revoked or have expired."""
        while True:
            await asyncio.sleep(WATCH_S)
            self._access.refresh()
            for session in list(self._sessions.values()):
                if session.identity is not None and (why := self._access.barred(session.identity)):
                    self._audit.write("ended", worker=session.worker, reason=why)
                    session.end(why, grpc.StatusCode.PERMISSION_DENIED)
                    self._uploads.drop(session.worker)

    async def _session(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        await context.send_initial_metadata(())  # tells the worker that the way is open
        async with refusals(context):
            async with self._lobby.wait(self._access.peer(context)):
                raw = options.message_or_end(await context.read())
            if raw is None:
                return
            join = read_message(raw)
            if not isinstance(join, Join):
                raise CorruptDataError("Session: the first message must be a Join")
            identity = self._admit(join, context)
            serial = f"{identity.serial:x}" if identity is not None else ""
            self._audit.write("connected", worker=join.worker, host=host_of(context), serial=serial)
            session = self._register(join, identity)
            try:
                self._inbox(Received(join.worker, join))
                await self._serve(session, context)
            finally:
                self._unregister(session)
        if session.ended.is_set():
            await context.abort(session.code, session.why)

    def _admit(self, join: Join, context: Context) -> Identity | None:
        try:
            if len(self._sessions) >= MAX_SESSIONS and join.worker not in self._sessions:
                raise TooManyError(f"{MAX_SESSIONS} workers are connected, the limit")
            return self._access.check_join(join.worker, context)
        except (ForbiddenError, TooManyError) as error:
            self._access.refused(context, str(error), join.worker)
            raise

    def _register(self, join: Join, identity: Identity | None) -> Session:
        session = Session(join.worker, join.nonce, identity)
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

    def _unregister(self, session: Session) -> None:
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
            self._audit.write("lost", worker=session.worker)
            self._inbox(Lost(session.worker))

    def _expire(self, worker: str) -> None:
        del self._expiries[worker]
        self._nonces.pop(worker, None)
        self._uploads.drop(worker)

    async def _serve(self, session: Session, context: Context) -> None:
        """Until the worker ends the session, it breaks, or `session.end` is called."""
        reader = asyncio.create_task(self._read(session, context))
        writer = asyncio.create_task(write_messages(session, context))
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

    async def _read(self, session: Session, context: Context) -> None:
        while (raw := options.message_or_end(await context.read())) is not None:
            message = read_message(raw)
            if message.worker != session.worker:
                raise ForbiddenError(f"session of {session.worker!r}: a message from {message.worker!r}")
            if self._sessions.get(session.worker) is session:
                if isinstance(message, Leave) and message.reason != FLUSHED:
                    self._audit.write("left", worker=session.worker, reason=message.reason)
                self._inbox(Received(session.worker, message))

    async def _get_status(self, raw: bytes, context: Context) -> bytes:
        async with refusals(context):
            request = parse(pb.GetStatusRequest, raw)
        if self._status_call is None or self._status_call.done():
            # Many askers at once share an answer: the machine is not slowed down by them.
            self._status_call = asyncio.create_task(asyncio.to_thread(self._status))
        status = await asyncio.shield(self._status_call)
        echo = bytes(min(request.echo, MAX_ECHO))
        return pb.GetStatusResponse(json=json.dumps(status), echo=echo, time=time.time()).SerializeToString()

    async def _begin_upload(self, raw: bytes, context: Context) -> bytes:
        async with refusals(context):
            request = parse(pb.BeginUploadRequest, raw)
            session = self._authorised(request.session, context)
            offset, generation = self._uploads.begin(session.worker, request.message)
        return pb.BeginUploadResponse(offset=offset, generation=generation).SerializeToString()

    async def _upload(self, _requests: AsyncIterator[bytes], context: Context) -> bytes:
        async with refusals(context):
            opening = read_chunk(await self._next(context) or b"")
            session = self._authorised(opening.session, context)
            upload = self._uploads.find(session.worker, opening.key, opening.generation)
            counts = self._counts.setdefault(session.worker, Counts())
            upload.streams += 1
            try:
                while (raw := await self._next(context)) is not None:
                    session.check()
                    counts.wire_up += len(raw) + GRPC_PREFIX_BYTES
                    chunk = read_chunk(raw)
                    upload.receiving.accept(opening.generation, chunk)
                    counts.frames_up += len(chunk.data)
            finally:
                upload.streams -= 1
        return pb.UploadResponse(offset=upload.receiving.offset).SerializeToString()

    async def _next(self, context: Context) -> bytes | None:
        """The next message of an upload, None at its end."""
        async with asyncio.timeout(self._stall_s):
            return options.message_or_end(await context.read())

    async def _commit_upload(self, raw: bytes, context: Context) -> bytes:
        async with refusals(context):
            request = parse(pb.CommitUploadRequest, raw)
            session = self._authorised(request.session, context)
            message = self._uploads.commit(session.worker, request.key, request.generation)
            if message is not None:
                self._inbox(Received(session.worker, message))
        return pb.CommitUploadResponse().SerializeToString()

    async def _download(self, raw: bytes, context: Context) -> None:
        async with refusals(context):
            request = parse(pb.DownloadRequest, raw)
            session = self._authorised(request.session, context)
            frame = self._outbox.get(request.key)
            if frame is None:
                raise NotOfferedError(f"{request.key!r} is not, or no longer, offered: ask for a snapshot")
            end = memoryview(frame).nbytes
            if request.offset > end:
                raise OutOfPlaceError(f"{request.key!r} has {end} bytes, not {request.offset}")
            if request.limit:
                end = min(end, request.offset + request.limit)
            counts = self._counts.setdefault(session.worker, Counts())
            for chunk in cut(frame, request.offset, end, self._chunk_bytes):
                session.check()
                message = write_chunk(chunk)
                async with asyncio.timeout(self._stall_s):
                    await context.write(message)
                counts.wire_down += len(message) + GRPC_PREFIX_BYTES
                counts.frames_down += len(chunk.data)

    def _authorised(self, token: bytes, context: Context) -> Session:
        """The session behind `token`, which counts only in the hands of whom it was given to."""
        session = self._tokens.get(token)
        if session is None:
            raise NoSessionError("no such session, or it is over: open one and join")
        identity = self._access.caller(context)
        if identity is not None and identity.name != session.worker:
            self._access.refused(context, "a transfer in the session of another worker", session.worker)
            raise ForbiddenError(f"the session is not that of the {identity}")
        return session
