"""A worker's end of the gRPC transport: `Connection` over a session that mends itself. No protocol logic.

Everything runs on the shared loop (`diloco.comms.loop`); the public methods may be called from any other thread.
Transfers are in `diloco.comms.grpc_transfers`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import logging
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import grpc_options as options
from diloco.comms import loop, tls, tls_probe
from diloco.comms.chunks import CHUNK_BYTES, MAX_CHUNK_BYTES
from diloco.comms.convert import coordinator_from_proto, coordinator_refs, parse, worker_to_proto
from diloco.comms.grpc_options import aio, grpc
from diloco.comms.grpc_transfers import Lane, Transfers, backoff_s, is_cancelled
from diloco.comms.link_meter import LinkRates
from diloco.comms.machine import COORDINATOR, Connected, Event, Lost, Received
from diloco.comms.messages import (
    Contribution,
    Fetch,
    FromCoordinator,
    FromWorker,
    Initial,
    Join,
    Message,
    Refused,
    Rejected,
)
from diloco.errors import ConfigError, CorruptDataError, EnvironmentProblem, RefusedError

log = logging.getLogger(__name__)

CONNECT_S = 10.0  # for the server's first sign of life
SETTINGS_S = 5.0  # per address
ROLES = ("worker", "operator", "coordinator")  # the last two can ask for settings, never join
FLUSH_S = 2.0  # for the last words on close

_BY_FRAGMENT = ("commit", "rejected", "aborted", "resend", "snapshot")


class GrpcConnection:
    """Connects to the first of `addresses` ("host:port") that answers, for ever, from construction to `close`.

    `channels` is the number of TCP connections each way that share the chunks of an object; more than one pays on lossy
    paths with cubic congestion control. `chunk_bytes`: 1 MiB, 256 KiB below about 200 Mbit/s. Frames larger than
    `max_object_bytes` are not fetched. `on_close` is called at the end, for what was set up on the way.

    `keys` is a folder made by `diloco keys worker`; renewed files in it are used from the next session on. A
    coordinator that will not have us for good, or is none of ours, is reported as a Refused message.
    Raises RefusedError and EnvironmentProblem for keys that nobody would accept.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        channels: int = 1,
        chunk_bytes: int = CHUNK_BYTES,
        keys: Path | None = None,
        max_object_bytes: int = 4 << 30,
        stall_s: float = options.STALL_S,
        on_close: Sequence[Callable[[], None]] = (),
    ) -> None:
        if not addresses:
            raise ConfigError("coordinator: no address given; write grpc://host:port")
        if channels < 1:
            raise ConfigError(f"channels: {channels} is less than 1")
        if not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(f"chunk_bytes: {chunk_bytes} is not between 1 and {MAX_CHUNK_BYTES}")
        self._addresses = tuple(addresses)
        self._channels = channels
        self._folder = keys
        self._keys = tls.load_keys(keys, ROLES, time.time()) if keys is not None else None
        self._complaint = ""
        self._opened = False  # whether any session ever was
        self._on_close = tuple(on_close)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._transfers = Transfers(chunk_bytes, max_object_bytes, stall_s)
        self._outgoing: asyncio.Queue[bytes] | None = None  # of the open session
        self._joined = False  # whether the open session has had its Join
        self._call: aio.StreamStreamCall[bytes, bytes] | None = None
        self._latest: dict[int, asyncio.Task[None]] = {}  # per fragment, the last delivery
        self._deliveries: set[asyncio.Task[None]] = set()
        self._snapshots: collections.Counter[int] = collections.Counter()  # per fragment, on their way here
        self._closed = False
        self._main: asyncio.Task[None] | None = None
        loop.run(self._start())

    @property
    def name(self) -> str | None:
        """The worker that the keys are made for; None without keys."""
        return self._keys.identity.name or None if self._keys is not None else None

    def send(self, message: Message) -> None:
        """Queue `message`. Frames are uploaded until they have arrived; other messages are dropped while offline."""
        if not isinstance(message, FromWorker):
            raise TypeError(f"a worker does not send {type(message).__name__}")
        if not self._closed:
            loop.shared_loop().call_soon_threadsafe(self._send, message)

    def receive(self, timeout_s: float | None) -> Event | None:
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def settings(self) -> Mapping[str, Any] | None:
        """The coordinator's "config"; None when no address answers within 5 s. Raises RefusedError."""
        if (reason := self._why_refused()) is not None:
            raise RefusedError(reason)
        return loop.run(self._settings())

    def traffic(self) -> tuple[int, int]:
        return self._transfers.bytes_up, self._transfers.bytes_down

    def rates(self) -> LinkRates:
        return self._transfers.meter.read()

    def expect(self, deadlines: Mapping[int, float], share: float) -> None:
        if not self._closed:
            loop.shared_loop().call_soon_threadsafe(self._transfers.expect, deadlines, share)

    def close(self) -> None:
        """Let queued control messages out (at most 2 s), then end everything. May be called twice."""
        if not self._closed:
            self._closed = True
            loop.run(self._close())
            for end in self._on_close:
                end()

    # ---- on the loop ----

    async def _start(self) -> None:
        self._main = asyncio.create_task(self._run())
        self._main.add_done_callback(_report)

    async def _run(self) -> None:
        failures, suspicion = 0, None
        for address in itertools.cycle(self._addresses):
            joined = await self._session(address)
            failures = 0 if joined else failures + 1
            self._opened |= joined
            if failures and failures % (2 * len(self._addresses)) == 0 and not self._opened:
                reason = await asyncio.to_thread(self._why_refused)
                # Twice the same: not a coordinator that was just going down.
                if reason is not None and reason == suspicion:
                    self._deliver(Refused("identity", reason))
                suspicion = reason
            await asyncio.sleep(backoff_s(failures))

    async def _session(self, address: str) -> bool:
        """One session, from dialling to its end. Whether the coordinator let us open it."""
        self._renew()
        control = self._channel(address)
        link: Lane | None = None
        writer: asyncio.Task[None] | None = None
        connected = False
        call: aio.StreamStreamCall[bytes, bytes] = control.stream_stream(options.SESSION)()
        self._call = call
        try:
            async with asyncio.timeout(CONNECT_S):
                await call.initial_metadata()
            if call.done():
                await self._tell_refusal(call)
                return False
            self._outgoing, self._joined = asyncio.Queue(), False
            writer = asyncio.create_task(_write(self._outgoing, call))
            connected = True
            self._events.put(Connected(COORDINATOR))
            while (raw := options.message_or_end(await call.read())) is not None:
                response = parse(pb.SessionResponse, raw)
                if response.WhichOneof("response") == "opened":
                    up, down = ([self._channel(address) for _ in range(self._channels)] for _ in range(2))
                    link = Lane(response.opened.session, control, up, down)
                    self._transfers.attach(link)
                elif response.message.refused.kind == "standby":
                    return False  # the next address may be that of the coordinator
                else:
                    self._dispatch(response.message)
            await self._tell_refusal(call)
        except (aio.AioRpcError, CorruptDataError, TimeoutError) as error:
            log.debug("session with %s: %s", address, error)
            if isinstance(error, aio.AioRpcError):
                self._if_refused(error.code(), error.details())
        except asyncio.CancelledError:
            if is_cancelled():
                raise
        finally:
            self._outgoing = self._call = None
            if connected:
                self._events.put(Lost(COORDINATOR))
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            if link is not None:
                await self._transfers.detach(link)
            await control.close()
        return link is not None

    def _channel(self, address: str) -> aio.Channel:
        credentials = tls.channel_credentials(self._keys) if self._keys is not None else None
        return options.open_channel(address, credentials, tls.channel_options(self._keys))

    def _renew(self) -> None:
        """Take the keys as they are on disk now, if they are good."""
        if self._folder is None:
            return
        try:
            self._keys = tls.load_keys(self._folder, ROLES, time.time())
        except (EnvironmentProblem, RefusedError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("%s; going on with the keys as they were", error)

    async def _tell_refusal(self, call: aio.StreamStreamCall[bytes, bytes]) -> None:
        self._if_refused(await call.code(), await call.details())

    def _if_refused(self, code: grpc.StatusCode, details: str | None) -> None:
        if code is grpc.StatusCode.PERMISSION_DENIED:
            self._deliver(Refused("identity", details or "no reason given"))

    def _why_refused(self) -> str | None:
        """What a handshake of our own says, where every address that answers has something against us."""
        found = [(address, tls_probe.probe(address, self._keys)) for address in self._addresses]
        if any(answer.outcome == "ok" for _, answer in found):
            return None
        refusals = [f"{address}: {answer.words}" for address, answer in found if answer.outcome == "refused"]
        return "; ".join(refusals) or None

    def _send(self, message: FromWorker) -> None:
        if isinstance(message, Contribution | Initial):
            self._transfers.upload(message, self._give_up)
            return
        if self._outgoing is None or not (self._joined or isinstance(message, Join)):
            return  # offline, or meant for a session that is over
        if isinstance(message, Fetch) and not message.differs and self._snapshots[message.fragment]:
            return  # what it asks for is on its way, however long the link takes
        self._joined = True
        request = pb.SessionRequest(message=worker_to_proto(message))
        self._outgoing.put_nowait(request.SerializeToString())

    def _give_up(self, message: Contribution | Initial, reason: str) -> None:
        """The coordinator will not take `message`, whatever we do: say so as it would itself."""
        log.warning("fragment %d was not accepted: %s", message.fragment, reason)
        if isinstance(message, Contribution):
            self._deliver(Rejected(message.fragment, message.round, reason))

    def _deliver(self, message: FromCoordinator) -> None:
        self._events.put(Received(COORDINATOR, message))

    def _dispatch(self, proto: pb.CoordinatorMessage) -> None:
        """Deliver at once, or, what concerns a fragment, after everything earlier about the same fragment."""
        kind = proto.WhichOneof("message")
        if kind not in _BY_FRAGMENT:
            self._deliver(coordinator_from_proto(proto))
            return
        fragment: int = getattr(proto, kind).fragment
        before = self._latest.get(fragment)
        refs = coordinator_refs(proto)
        if before is None and not refs:
            self._deliver(coordinator_from_proto(proto))
            return
        is_snapshot = kind == "snapshot"
        frames = [self._transfers.download(ref, fragment, urgent=is_snapshot) for ref in refs]
        task = asyncio.create_task(self._deliver_in_order(proto, frames, before))
        self._latest[fragment] = task
        self._deliveries.add(task)
        self._snapshots[fragment] += is_snapshot
        task.add_done_callback(lambda done: self._forget(fragment, done, is_snapshot))

    def _forget(self, fragment: int, done: asyncio.Task[None], was_snapshot: bool) -> None:
        self._deliveries.discard(done)
        self._snapshots[fragment] -= was_snapshot
        if self._latest.get(fragment) is done:
            del self._latest[fragment]

    async def _deliver_in_order(
        self,
        proto: pb.CoordinatorMessage,
        frames: Sequence[asyncio.Future[bytearray | None]],
        before: asyncio.Task[None] | None,
    ) -> None:
        """A frame that is no longer offered takes its message with it: the machine then asks for a snapshot."""
        found = [frame for task in frames if (frame := await asyncio.shield(task)) is not None]
        if before is not None:
            await asyncio.wait((before,))
        if len(found) < len(frames):
            return
        try:
            self._deliver(coordinator_from_proto(proto, found))
        except CorruptDataError as error:
            log.warning("dropped a message from the coordinator: %s", error)

    async def _settings(self) -> Mapping[str, Any] | None:
        for address in self._addresses:
            channel = self._channel(address)
            try:
                get_status: aio.UnaryUnaryMultiCallable[bytes, bytes]
                get_status = channel.unary_unary(options.GET_STATUS)
                raw = await get_status(b"", timeout=SETTINGS_S, wait_for_ready=True)
                config = json.loads(parse(pb.GetStatusResponse, raw).json)["config"]
                if isinstance(config, dict):
                    return config
            except (aio.AioRpcError, CorruptDataError, ValueError, KeyError, TypeError) as error:
                log.debug("settings from %s: %s", address, error)
                if isinstance(error, aio.AioRpcError) and error.code() is grpc.StatusCode.PERMISSION_DENIED:
                    raise RefusedError(f"refused by the coordinator: {error.details()}") from None
            finally:
                await channel.close()
        return None

    async def _close(self) -> None:
        if self._call is not None and self._outgoing is not None:
            with contextlib.suppress(TimeoutError, aio.AioRpcError, asyncio.InvalidStateError):
                async with asyncio.timeout(FLUSH_S):
                    await self._outgoing.join()
                    call = self._call
                    if call is not None:
                        await call.done_writing()
                        await call.code()
        tasks = [task for task in (self._main, *self._deliveries) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transfers.close()


def _report(main: asyncio.Task[None]) -> None:
    """A connection that dies of a defect must not look like a quiet network."""
    if not main.cancelled() and (error := main.exception()) is not None:
        log.error("the connection to the coordinator has ended", exc_info=error)


async def _write(outgoing: asyncio.Queue[bytes], call: aio.StreamStreamCall[bytes, bytes]) -> None:
    """When a write fails the reader of the session sees why."""
    with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await outgoing.get())
            outgoing.task_done()
