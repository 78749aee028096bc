"""Chunks on the wire: `UploadChunk` and `DownloadChunk` of diloco_v1.proto, written and read by hand.

Byte-compatible with protoc's classes, but `data` is copied once on the way out and not at all on the way in
(protobuf copies it twice each way). A message with any other field goes through protobuf. No I/O.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import google_crc32c
from google.protobuf.message import DecodeError

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.messages import Buffer
from diloco.errors import CorruptDataError

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 4 << 20
MAX_CHUNK_BYTES = MAX_MESSAGE_BYTES - 4096  # leaves room for the header

GRPC_PREFIX_BYTES = 5  # what gRPC puts before each message: a flag and a length

_OFFSET_TAG = 0x08  # field 1, varint
_CRC_TAG = 0x15  # field 2, fixed32
_DATA_TAG = 0x7A  # field 15, length-delimited


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes `[offset, offset + len(data))` of an object and their CRC32C.

    `session`, `key` and `generation` are set in the first chunk of an upload only.
    """

    offset: int
    crc32c: int
    data: Buffer = field(repr=False)
    session: bytes = b""
    key: str = ""
    generation: int = 0


def crc32c(data: Buffer, crc: int = 0, step: int = CHUNK_BYTES) -> int:
    """CRC32C (Castagnoli) of `data`, continuing from `crc`."""
    if isinstance(data, bytes):
        return int(google_crc32c.extend(crc, data))
    view = memoryview(data).cast("B")  # the library reads `bytes` only: copy piece by piece
    for start in range(0, len(view), step):
        crc = int(google_crc32c.extend(crc, bytes(view[start : start + step])))
    return crc


def write_chunk(chunk: Chunk) -> bytes:
    """The message `UploadChunk` or `DownloadChunk` (they agree) for `chunk`, as protoc's classes would write it."""
    if chunk.session or chunk.key or chunk.generation:
        message = pb.UploadChunk(
            offset=chunk.offset,
            crc32c=chunk.crc32c,
            session=chunk.session,
            key=chunk.key,
            generation=chunk.generation,
            data=bytes(chunk.data),
        )
        return message.SerializeToString()
    head = bytearray()
    if chunk.offset:
        head.append(_OFFSET_TAG)
        _write_varint(head, chunk.offset)
    if chunk.crc32c:
        head.append(_CRC_TAG)
        head += struct.pack("<I", chunk.crc32c)
    if not len(chunk.data):
        return bytes(head)
    head.append(_DATA_TAG)
    _write_varint(head, len(chunk.data))
    return b"".join((head, chunk.data))


def read_chunk(raw: bytes) -> Chunk:
    """The chunk in an `UploadChunk` or `DownloadChunk` message; its `data` is a view into `raw`.

    Raises CorruptDataError for bytes that are no such message.
    """
    offset = crc = 0
    data: Buffer = b""
    position, end = 0, len(raw)
    while position < end:
        tag = raw[position]
        if tag == _OFFSET_TAG:
            offset, position = _read_varint(raw, position + 1)
        elif tag == _CRC_TAG:
            if end - position < 5:
                raise CorruptDataError(f"chunk: cut off inside crc32c, at byte {position} of {end}")
            crc = int.from_bytes(raw[position + 1 : position + 5], "little")
            position += 5
        elif tag == _DATA_TAG:
            length, position = _read_varint(raw, position + 1)
            if length > end - position:
                raise CorruptDataError(f"chunk: data claims {length} bytes, {end - position} are there")
            data = memoryview(raw)[position : position + length]
            position += length
        else:
            return _read_any(raw)
    return Chunk(offset, crc, data)


def _read_any(raw: bytes) -> Chunk:
    """Through protobuf: other known fields, and unknown ones, which are skipped."""
    try:
        message = pb.UploadChunk.FromString(raw)
    except DecodeError as error:
        raise CorruptDataError(f"chunk: not an UploadChunk or DownloadChunk message: {error}") from error
    return Chunk(
        message.offset, message.crc32c, message.data, message.session, message.key, message.generation
    )


def _write_varint(out: bytearray, value: int) -> None:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"not a uint64: {value}")
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    """(value, position after it); values wrap at 64 bits as in protobuf."""
    value = shift = 0
    for at in range(position, min(position + 10, len(raw))):
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + 1
        shift += 7
    raise CorruptDataError(f"chunk: bad varint at byte {position} of {len(raw)}")
