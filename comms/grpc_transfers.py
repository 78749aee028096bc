"""A worker's uploads and downloads: in the background, in chunks, again and again until they are through.

Lives on the shared loop; not thread-safe. A `Lane` is what one session gives to transfers; they outlive it and
go on with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import grpc_options as options
from diloco.comms.chunks import Chunk, read_chunk, write_chunk
from diloco.comms.convert import parse, worker_to_proto
from diloco.comms.grpc_options import aio, grpc
from diloco.comms.link_meter import LinkMeter
from diloco.comms.messages import Buffer, Contribution, Initial
from diloco.comms.pacing import Claim
from diloco.comms.transfer import OutOfPlaceError, Receiving, Ref, TooLargeError, cut, ref_of
from diloco.comms.turns import OverError, Turns
from diloco.errors import CorruptDataError, DilocoError
from diloco.forecast import BACK_SHARE

log = logging.getLogger(__name__)

MAX_CORRUPT = 5  # attempts that may end in wrong bytes before an object is given up
STREAMS = 2  # spans under way per channel: while the answer to one is awaited the other moves
_FOR_GOOD = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)

# No answer to a call, or none that says whether it was done.
_UNANSWERED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,
)

_Call = aio.StreamUnaryCall[bytes, bytes] | aio.UnaryStreamCall[bytes, bytes]


class _FailedError(DilocoError):
    """An attempt ended early, with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


@dataclass(slots=True, eq=False)
class Lane:
    """A live session's token and channels, and the calls that must end before these close.

    Uploads and downloads have connections of their own: on a slow link a request would wait behind all bytes that go its
    way on its connection.
    """

    token: bytes = field(repr=False)
    control: aio.Channel
    up: list[aio.Channel]
    down: list[aio.Channel]
    calls: set[_Call] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Sending:
    """An upload, whatever attempts it takes. `whole`: all bytes of this generation are there, only the word is not."""

    ref: Ref
    message: Contribution | Initial
    claim: Claim
    whole: int | None = None


def backoff_s(failures: int) -> float:
    """0.1 s, doubled with each failure up to 2 s, of which a random half is taken off."""
    return min(2.0, 0.1 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)


def is_cancelled() -> bool:
    """Whether a CancelledError means this task, rather than the gRPC call it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Transfers:
    """`chunk_bytes` per chunk up; objects of at most `max_object_bytes` down; `stall_s` without progress ends
    an attempt. Whose chunk goes next, and when, is decided by two `Turns`, one per direction."""

    def __init__(self, chunk_bytes: int, max_object_bytes: int, stall_s: float) -> None:
        self.bytes_up = 0
        self.bytes_down = 0
        self.meter = LinkMeter()
        self._chunk_bytes = chunk_bytes
        self._max_object_bytes = max_object_bytes
        self._stall_s = stall_s
        self._link: Lane | None = None
        self._attached = asyncio.Event()
        self._up, self._down = Turns(), Turns()
        self._uploads: dict[str, asyncio.Task[None]] = {}
        self._downloads: dict[Ref, asyncio.Task[bytearray | None]] = {}

    def attach(self, link: Lane) -> None:
        """Transfers use `link` from now on."""
        self._link = link
        self._attached.set()

    async def detach(self, link: Lane) -> None:
        """`link` is dead: end its calls, close its data channels."""
        if self._link is link:
            self._link = None
            self._attached.clear()
        self._up.end()
        self._down.end()
        for call in list(link.calls):
            call.cancel()
        for channel in (*link.up, *link.down):
            await channel.close()

    async def close(self) -> None:
        tasks = [*self._uploads.values(), *self._downloads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def expect(self, deadlines: Mapping[int, float], share: float) -> None:
        """See `Connection.expect`."""
        self._up.expect(deadlines, share)
        # What is asked for at the last moment is here a round trip later.
        asked_by = {fragment: at - self._down.trip_s for fragment, at in deadlines.items()}
        self._down.expect(asked_by, BACK_SHARE if share else 0.0)

    def upload(
        self, message: Contribution | Initial, refused: Callable[[Contribution | Initial, str], None]
    ) -> None:
        """Bring `message` to the coordinator, unless it is under way; `refused` is called when it will not have it."""
        key = f"{message.worker}/{message.incarnation}/{message.fragment}"
        if isinstance(message, Contribution):
            key = f"contribution/{key}/{message.round}"
        else:
            key = f"initial/{key}"
        if key in self._uploads:
            return
        task = asyncio.create_task(self._upload(key, message, refused))
        self._uploads[key] = task
        task.add_done_callback(lambda _: self._uploads.pop(key))

    def download(self, ref: Ref, fragment: int, *, urgent: bool) -> asyncio.Task[bytearray | None]:
        """The object behind `ref`; None when it cannot be had. One transfer, however often it is asked for."""
        task = self._downloads.get(ref)
        if task is None:
            claim = self._down.claim(fragment, urgent=urgent)
            task = self._downloads[ref] = asyncio.create_task(self._download(ref, claim))
            task.add_done_callback(lambda _: self._downloads.pop(ref))
        return task

    async def _upload(
        self,
        key: str,
        message: Contribution | Initial,
        refused: Callable[[Contribution | Initial, str], None],
    ) -> None:
        claim = self._up.claim(message.fragment, urgent=isinstance(message, Initial))
        ref = await asyncio.to_thread(ref_of, key, message.frame)
        sending = _Sending(ref, message, claim)
        reason = await self._persist(lambda link: self._try_upload(link, sending))
        if reason is not None:
            refused(message, reason)

    async def _download(self, ref: Ref, claim: Claim) -> bytearray | None:
        try:
            receiving = Receiving(ref, self._max_object_bytes)
        except TooLargeError as error:
            log.warning("%s", error)
            return None
        reason = await self._persist(lambda link: self._try_download(link, receiving, claim))
        if reason is not None:
            log.info("download of %s: %s", ref.key, reason)
            return None
        return receiving.finish(receiving.generation)

    async def _persist(self, attempt: Callable[[Lane], Awaitable[None]]) -> str | None:
        """Repeat `attempt`, each time with the live link; None when it succeeds, or why it never will."""
        failures = corrupt = 0
        while True:
            await self._attached.wait()
            link = self._link
            if link is None:
                continue
            try:
                await attempt(link)
                return None
            except CorruptDataError as error:
                corrupt += 1
                reason = str(error)
            except _FailedError as error:
                if error.code in _FOR_GOOD:
                    return error.details
                corrupt += error.code is grpc.StatusCode.DATA_LOSS
                reason = str(error)
            except (OutOfPlaceError, OverError) as error:  # the stream, or the session, has ended early
                reason = str(error)
            if corrupt >= MAX_CORRUPT:
                return reason
            log.debug("transfer attempt failed: %s", reason)
            await asyncio.sleep(backoff_s(failures))
            failures += 1

    async def _try_upload(self, link: Lane, sending: _Sending) -> None:
        if sending.whole is None:
            sending.whole = await self._bring(link, sending)
        commit = pb.CommitUploadRequest(session=link.token, key=sending.ref.key, generation=sending.whole)
        try:
            await _unary(link.control, options.COMMIT_UPLOAD, commit.SerializeToString())
        except _FailedError as error:
            if error.code not in _UNANSWERED:
                sending.whole = None
            raise

    async def _bring(self, link: Lane, sending: _Sending) -> int:
        """All bytes that are not there yet; the generation that is then to be committed."""
        ref, message, claim = sending.ref, sending.message, sending.claim
        begin = pb.BeginUploadRequest(session=link.token, message=worker_to_proto(message, ref))
        with self.meter.round_trip():
            raw = await _unary(link.control, options.BEGIN_UPLOAD, begin.SerializeToString())
        begun = parse(pb.BeginUploadResponse, raw)
        opening = Chunk(0, 0, b"", link.token, ref.key, begun.generation)
        if begun.offset < ref.length:
            self._check_live(link)
            with self._up.held(claim, begun.offset, ref.length), self.meter.up(lambda: self.bytes_up):
                await _all(
                    [self._feed(link, way, opening, message.frame, claim) for way in link.up * STREAMS]
                )
        return begun.generation

    def _check_live(self, link: Lane) -> None:
        if link is not self._link:
            raise OverError("the session is over")

    async def _feed(
        self, link: Lane, channel: aio.Channel, opening: Chunk, frame: Buffer, claim: Claim
    ) -> None:
        """Moves spans of an upload, each with a call of its own whose answer says that it is there."""
        while True:
            async with self._up.span(claim) as (start, end):
                if start == end:
                    return
                call: aio.StreamUnaryCall[bytes, bytes] = channel.stream_unary(options.UPLOAD)()
                async with _ending(link, call):
                    async with asyncio.timeout(self._stall_s):
                        await call.write(write_chunk(opening))
                    for chunk in cut(frame, start, end, self._chunk_bytes):
                        async with asyncio.timeout(self._stall_s):
                            await call.write(write_chunk(chunk))
                        self.bytes_up += len(chunk.data)
                    async with asyncio.timeout(self._stall_s):
                        await call.done_writing()
                        await call

    async def _try_download(self, link: Lane, receiving: Receiving, claim: Claim) -> None:
        ref = receiving.ref
        offset = receiving.begin(receiving.generation + 1)
        if offset < ref.length:
            self._check_live(link)
            with self._down.held(claim, offset, ref.length), self.meter.down(lambda: self.bytes_down):
                await _all([self._fetch(link, way, receiving, claim) for way in link.down * STREAMS])
        receiving.finish(receiving.generation)

    async def _fetch(self, link: Lane, channel: aio.Channel, receiving: Receiving, claim: Claim) -> None:
        """Asks for spans of a download, one after the other."""
        generation = receiving.generation
        download: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(options.DOWNLOAD)
        while True:
            async with self._down.span(claim) as (start, end):
                if start == end:
                    return
                key, limit = receiving.ref.key, end - start
                request = pb.DownloadRequest(session=link.token, key=key, offset=start, limit=limit)
                call = download(request.SerializeToString())
                async with _ending(link, call):
                    while True:
                        async with asyncio.timeout(self._stall_s):
                            raw = options.message_or_end(await call.read())
                        if raw is None:
                            break
                        chunk = read_chunk(raw)
                        receiving.accept(generation, chunk)
                        self.bytes_down += len(chunk.data)


async def _unary(channel: aio.Channel, method: str, request: bytes) -> bytes:
    call: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
    try:
        return await call(request, timeout=options.UNARY_S)
    except aio.AioRpcError as error:
        raise _FailedError(error.code(), error.details() or "") from error
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise _FailedError(grpc.StatusCode.CANCELLED, "the channel was closed") from None


async def _all(streams: list[Awaitable[None]]) -> None:
    """Run `streams` side by side; when one fails, end the others and raise its error."""
    tasks = [asyncio.ensure_future(stream) for stream in streams]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if is_cancelled():  # gather lets a stream's error hide it
            raise asyncio.CancelledError


@contextlib.asynccontextmanager
async def _ending(link: Lane, call: _Call) -> AsyncIterator[None]:
    """Ends `call` on the way out, whatever happens, and turns every failure of it into _FailedError."""
    link.calls.add(call)
    try:
        yield
    except aio.AioRpcError as error:
        raise _FailedError(error.code(), error.details() or "") from error
    except asyncio.InvalidStateError:
        raise _FailedError(await call.code(), await call.details()) from None
    except TimeoutError:
        raise _FailedError(grpc.StatusCode.DEADLINE_EXCEEDED, "no progress for too long") from None
    except OutOfPlaceError as error:
        raise _FailedError(grpc.StatusCode.OUT_OF_RANGE, str(error)) from error
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise _FailedError(grpc.StatusCode.CANCELLED, "the channel was closed") from None
    finally:
        link.calls.discard(call)
        call.cancel()
