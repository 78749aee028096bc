"""The standby's end of the way to the coordinator over gRPC: it connects, and connects again, by itself. No rules.

Everything runs on the shared loop (`diloco.comms.loop`); `send` and `close` may be called from any other thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import grpc_options as options
from diloco.comms import loop, tls, tls_probe
from diloco.comms.chunks import read_chunk
from diloco.comms.convert import parse
from diloco.comms.convert_following import entry_from_proto, entry_ref, request_to_proto, response_from_proto
from diloco.comms.following import PRIMARY, Ack, Beat, Follow, FromPrimary, Parted, Reached, Turned
from diloco.comms.grpc_options import aio, grpc
from diloco.comms.grpc_transfers import backoff_s, is_cancelled
from diloco.comms.machine import Event, Received
from diloco.comms.transfer import Receiving, Ref
from diloco.errors import CorruptDataError, TransportError

log = logging.getLogger(__name__)

CONNECT_S = 5.0
MAX_PAUSE_S = (
    0.5  # between two attempts: a coordinator that is back shall be found before its standby takes over
)
SIGN_S = 0.25  # while bulk data arrives the coordinator is there
PROBED = 4  # failures before the first success, after which a handshake of our own says why


class FollowClient:
    """Follows the coordinator at `address`. `inbox` gets what it says, from PRIMARY: Reached when the way is open.

    `keys` is a folder with a coordinator's certificate. Bulk data of a record larger than `max_blob_bytes` is refused
    before anything is allocated, and memory grows with what arrives; a transfer that broke goes on where it was.
    """

    def __init__(
        self,
        address: str,
        inbox: Callable[[Event], None],
        *,
        keys: Path | None = None,
        max_blob_bytes: int = 64 << 30,
        stall_s: float = options.STALL_S,
    ) -> None:
        self._address, self._inbox = address, inbox
        self._keys = tls.load_keys(keys, ["coordinator"], time.time()) if keys is not None else None
        self._max_blob_bytes, self._stall_s = max_blob_bytes, stall_s
        self._outgoing: asyncio.Queue[bytes] | None = None
        self._receiving: Receiving | None = None
        self._signed = 0.0
        self._main: asyncio.Task[None] | None = None

    def start(self) -> None:
        loop.run(self._start())

    def send(self, message: Follow | Ack) -> None:
        """Queue `message`; dropped while there is no way to the coordinator."""
        raw = request_to_proto(message).SerializeToString()
        loop.shared_loop().call_soon_threadsafe(self._put, raw)

    def close(self) -> None:
        loop.run(self._close())

    # ---- on the loop ----

    async def _start(self) -> None:
        self._main = asyncio.create_task(self._run())

    async def _close(self) -> None:
        if self._main is not None:
            self._main.cancel()
            await asyncio.gather(self._main, return_exceptions=True)

    def _put(self, raw: bytes) -> None:
        if self._outgoing is not None:
            self._outgoing.put_nowait(raw)

    def _deliver(self, message: FromPrimary | Parted) -> None:
        self._inbox(Received(PRIMARY, message))

    async def _run(self) -> None:
        failures, reached = 0, False
        while True:
            opened = await self._stream()
            failures, reached = (0, True) if opened else (failures + 1, reached)
            if failures and failures % PROBED == 0 and not reached:
                found = await asyncio.to_thread(tls_probe.probe, self._address, self._keys)
                if found.outcome == "refused":
                    self._deliver(Turned("identity", f"{self._address}: {found.words}"))
            await asyncio.sleep(min(MAX_PAUSE_S, backoff_s(failures)))

    def _channel(self) -> aio.Channel:
        credentials = tls.channel_credentials(self._keys) if self._keys is not None else None
        return options.open_channel(self._address, credentials, tls.channel_options(self._keys))

    async def _stream(self) -> bool:
        """One stream, from dialling to its end. Whether it was open."""
        control, data = self._channel(), self._channel()
        call: aio.StreamStreamCall[bytes, bytes] = control.stream_stream(options.FOLLOW)()
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                await call.initial_metadata()
            if call.done():
                self._if_denied(await call.code(), await call.details())
                return False
            self._outgoing = asyncio.Queue()
            writer = asyncio.create_task(_write(self._outgoing, call))
            self._deliver(Reached())
            while (raw := options.message_or_end(await call.read())) is not None:
                await self._take(parse(pb.FollowResponse, raw), data)
            self._if_denied(await call.code(), await call.details())
        except aio.AioRpcError as error:
            log.debug("following %s: %s", self._address, error)
            self._if_denied(error.code(), error.details())
        except TimeoutError:
            log.debug("following %s: no answer", self._address)
        except (CorruptDataError, TransportError) as error:
            log.warning("following %s: %s; trying again", self._address, error)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
        finally:
            self._outgoing = None
            if writer is not None:
                self._deliver(Parted())
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            call.cancel()
            await control.close()
            await data.close()
        return writer is not None

    def _if_denied(self, code: grpc.StatusCode, details: str | None) -> None:
        if code is grpc.StatusCode.PERMISSION_DENIED:
            self._deliver(Turned("identity", details or "no reason given"))
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            self._deliver(Turned("off", "it does not serve a standby: install the same version there"))

    async def _take(self, proto: pb.FollowResponse, data: aio.Channel) -> None:
        if proto.WhichOneof("response") != "entry":
            self._deliver(response_from_proto(proto))
            return
        ref = entry_ref(proto.entry)
        blob = None if ref is None else await self._fetch(ref, data)
        self._deliver(entry_from_proto(proto.entry, blob))

    async def _fetch(self, ref: Ref, channel: aio.Channel) -> bytearray | None:
        """The object behind `ref`, from where the last attempt ended; None when the journal no longer has it."""
        if self._receiving is None or self._receiving.ref != ref:
            self._receiving = Receiving(ref, self._max_blob_bytes)
        receiving = self._receiving
        offset = receiving.begin(receiving.generation + 1)
        if offset < ref.length:
            request = pb.BlobRequest(name=ref.key, offset=offset).SerializeToString()
            fetch: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(options.FETCH_BLOB)
            call = fetch(request)
            try:
                while True:
                    async with asyncio.timeout(self._stall_s):
                        raw = options.message_or_end(await call.read())
                    if raw is None:
                        break
                    receiving.accept(receiving.generation, read_chunk(raw))
                    self._sign()
                if await call.code() is grpc.StatusCode.NOT_FOUND:
                    return None
            except aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return None
                raise
            finally:
                call.cancel()
        whole = receiving.finish(receiving.generation)
        self._receiving = None
        return whole

    def _sign(self) -> None:
        """A Beat for the machine: more is on its way."""
        now = time.monotonic()
        if now - self._signed > SIGN_S:
            self._signed = now
            self._deliver(Beat(-1))


async def _write(outgoing: asyncio.Queue[bytes], call: aio.StreamStreamCall[bytes, bytes]) -> None:
    """When a write fails the reader of the stream sees why."""
    with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await outgoing.get())
