"""Resumable transfer of one object, without I/O: cutting it up, and putting it together again.

An object may arrive over several streams at once, so chunks may overtake each other; `offset` is the end of
the part without gaps, and the place where a new attempt continues. Who carries the chunks is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diloco.comms.chunks import MAX_CHUNK_BYTES, Chunk, crc32c
from diloco.comms.messages import Buffer
from diloco.errors import CorruptDataError, TransportError

MAX_AHEAD = 4096  # chunks beyond a gap: bounds what a peer can make us look through


class TooLargeError(CorruptDataError):
    """The object is larger than we are willing to hold."""


class FencedError(TransportError):
    """A newer attempt has begun; this one's chunks no longer count."""


class OutOfPlaceError(TransportError):
    """The chunk does not continue what is there: begin again at the offset that is then told."""


@dataclass(frozen=True, slots=True)
class Ref:
    """An object's name, its length in bytes and the CRC32C of all of it."""

    key: str
    length: int
    crc32c: int


def ref_of(key: str, frame: Buffer) -> Ref:
    return Ref(key, memoryview(frame).nbytes, crc32c(frame))


def cut(frame: Buffer, offset: int, end: int, chunk_bytes: int) -> Iterator[Chunk]:
    """`frame[offset:end]` in chunks of `chunk_bytes` bytes, the last one shorter; one copy of each."""
    for start in range(offset, end, chunk_bytes):
        yield chunk_of(frame, start, min(start + chunk_bytes, end))


def chunk_of(frame: Buffer, start: int, end: int) -> Chunk:
    """`frame[start:end]` as one chunk; one copy."""
    data = bytes(memoryview(frame).cast("B")[start:end])
    return Chunk(start, crc32c(data), data)


class Receiving:
    """An object on its way in. Its length is checked first, every byte before it is handed out.

    Memory grows with what has arrived, not with what was announced. `limit` is the largest length allowed, in
    bytes. Raises TooLargeError.
    """

    def __init__(self, ref: Ref, limit: int) -> None:
        if ref.length > limit:
            raise TooLargeError(
                f"object {ref.key!r} has {ref.length} bytes, the limit is {limit}: "
                "check that both sides have the same model and codec, or raise max_object_bytes"
            )
        self.ref = ref
        self.generation = 0
        self._buffer = bytearray()
        self._ahead: dict[int, bytes] = {}  # chunks beyond a gap, by offset
        self._crc = 0

    @property
    def offset(self) -> int:
        """Everything before it has arrived."""
        return len(self._buffer)

    def begin(self, generation: int) -> int:
        """Start an attempt; chunks of earlier generations are refused from here on. Returns where to continue."""
        if generation <= self.generation:
            raise FencedError(f"object {self.ref.key!r}: generation {generation} is over")
        self.generation = generation
        self._ahead.clear()
        return self.offset

    def accept(self, generation: int, chunk: Chunk) -> None:
        """Take one chunk in.

        Raises FencedError (a newer attempt exists), OutOfPlaceError (already there), CorruptDataError (its
        bytes or its place are wrong).
        """
        self._check_generation(generation)
        start, length = chunk.offset, len(chunk.data)
        end = start + length
        if not 0 < length <= MAX_CHUNK_BYTES:
            raise CorruptDataError(
                f"object {self.ref.key!r}: a chunk of {length} bytes; 1 to {MAX_CHUNK_BYTES} are allowed"
            )
        if end > self.ref.length:
            raise CorruptDataError(
                f"object {self.ref.key!r}: chunk [{start}, {end}) is beyond its {self.ref.length} bytes"
            )
        if start < self.offset or any(start < s + len(d) and s < end for s, d in self._ahead.items()):
            raise OutOfPlaceError(f"object {self.ref.key!r}: chunk [{start}, {end}) is already there")
        if len(self._ahead) >= MAX_AHEAD and start != self.offset:
            raise OutOfPlaceError(
                f"object {self.ref.key!r}: {MAX_AHEAD} chunks are beyond the gap at {self.offset}"
            )
        data = bytes(chunk.data)
        if crc32c(data) != chunk.crc32c:
            raise CorruptDataError(f"object {self.ref.key!r}: CRC32C of chunk [{start}, {end}) is wrong")
        self._ahead[start] = data
        while (following := self._ahead.pop(self.offset, None)) is not None:
            self._crc = crc32c(following, self._crc)
            self._buffer += following

    def finish(self, generation: int) -> bytearray:
        """The whole object, checked.

        Raises FencedError, OutOfPlaceError (bytes are missing), CorruptDataError (the CRC32C of the whole is
        wrong; the next attempt then starts at 0).
        """
        self._check_generation(generation)
        if self.offset != self.ref.length:
            raise OutOfPlaceError(
                f"object {self.ref.key!r}: {self.offset} of {self.ref.length} bytes have arrived"
            )
        if self._crc != self.ref.crc32c:
            self._buffer, self._crc = bytearray(), 0
            raise CorruptDataError(f"object {self.ref.key!r}: CRC32C of the whole is wrong")
        return self._buffer

    def _check_generation(self, generation: int) -> None:
        if generation != self.generation:
            raise FencedError(
                f"object {self.ref.key!r}: generation {generation} is over, {self.generation} is current"
            )
