"""The coordinator's end of the way to its standby over gRPC: one stream of records, bulk data beside it. No rules.

Everything runs on the shared loop (`diloco.comms.loop`); `send` may be called from any other thread. What is read from
disk is read on a pool thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import grpc_options as options
from diloco.comms import loop
from diloco.comms.chunks import CHUNK_BYTES, write_chunk
from diloco.comms.convert import parse
from diloco.comms.convert_following import entry_to_proto, request_from_proto, response_to_proto
from diloco.comms.following import STANDBY, Beat, Entry, Follow, FromPrimary, Parted, Turned
from diloco.comms.grpc_access import Context, NotOfferedError, TooManyError, refusals
from diloco.comms.grpc_options import grpc
from diloco.comms.machine import Event, Received
from diloco.comms.messages import Buffer
from diloco.comms.transfer import OutOfPlaceError, chunk_of, ref_of
from diloco.errors import CorruptDataError

FIRST_S = 10.0  # for the first word of a stream


@dataclass(slots=True, eq=False)
class _Stream:
    node: str
    queue: asyncio.Queue[FromPrimary] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class FollowService:
    """One standby at a time. `inbox` gets what it says, from STANDBY, and Parted when its stream ends.

    `entry(index)` returns a record's line in the journal, and the name of its bulk data or ""; `blob(name)` that bulk
    data, None when it is not there (any more).
    """

    def __init__(
        self,
        inbox: Callable[[Event], None],
        entry: Callable[[int], tuple[str, str]],
        blob: Callable[[str], Buffer | None],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        stall_s: float = options.STALL_S,
    ) -> None:
        self._inbox, self._entry, self._blob = inbox, entry, blob
        self._chunk_bytes, self._stall_s = chunk_bytes, stall_s
        self._stream: _Stream | None = None

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            options.FOLLOW_SERVICE,
            {
                "Follow": grpc.stream_stream_rpc_method_handler(self._follow),
                "FetchBlob": grpc.unary_stream_rpc_method_handler(self._fetch),
            },
        )

    def send(self, message: FromPrimary) -> None:
        """Queue `message` for the standby; dropped when there is none. An Entry's content is read from the journal."""
        loop.shared_loop().call_soon_threadsafe(self._put, message)

    # ---- on the loop ----

    def _put(self, message: FromPrimary) -> None:
        if self._stream is not None:
            self._stream.queue.put_nowait(message)

    async def _follow(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        await context.send_initial_metadata(())
        async with refusals(context):
            async with asyncio.timeout(FIRST_S):
                raw = options.message_or_end(await context.read())
            if raw is None:
                return
            first = request_from_proto(parse(pb.FollowRequest, raw))
            if not isinstance(first, Follow):
                raise CorruptDataError("Follow: the first message must be a Follow")
            old = self._stream
            if old is not None and old.node != first.node:
                raise TooManyError("another standby follows this coordinator")
            if old is not None:
                old.ended.set()
            stream = self._stream = _Stream(first.node)
            self._inbox(Received(STANDBY, first))
            try:
                await self._serve(stream, context)
            finally:
                if self._stream is stream:
                    self._stream = None
                    self._inbox(Received(STANDBY, Parted()))

    async def _serve(self, stream: _Stream, context: Context) -> None:
        tasks = [
            asyncio.create_task(self._read(stream, context)),
            asyncio.create_task(self._write(stream, context)),
            asyncio.create_task(stream.ended.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _read(self, stream: _Stream, context: Context) -> None:
        while (raw := options.message_or_end(await context.read())) is not None:
            message = request_from_proto(parse(pb.FollowRequest, raw))
            if self._stream is stream:
                self._inbox(Received(STANDBY, message))

    async def _write(self, stream: _Stream, context: Context) -> None:
        """Until the standby is turned away."""
        while True:
            message = await stream.queue.get()
            if isinstance(message, Entry):
                response = await asyncio.to_thread(self._filled, message.index)
            elif isinstance(message, Beat | Turned):
                response = response_to_proto(message)
            else:
                continue
            await context.write(response.SerializeToString())
            if isinstance(message, Turned):
                return

    def _filled(self, index: int) -> pb.FollowResponse:
        line, name = self._entry(index)
        data = self._blob(name) if name else None
        return entry_to_proto(index, line, None if data is None else ref_of(name, data))

    async def _fetch(self, raw: bytes, context: Context) -> None:
        async with refusals(context):
            request = parse(pb.BlobRequest, raw)
            data = await asyncio.to_thread(self._blob, request.name)
            if data is None:
                raise NotOfferedError(f"{request.name!r} is not, or no longer, in the journal")
            end = memoryview(data).nbytes
            if request.offset > end:
                raise OutOfPlaceError(f"{request.name!r} has {end} bytes, not {request.offset}")
            for start in range(request.offset, end, self._chunk_bytes):
                chunk = await asyncio.to_thread(chunk_of, data, start, min(start + self._chunk_bytes, end))
                async with asyncio.timeout(self._stall_s):
                    await context.write(write_chunk(chunk))
