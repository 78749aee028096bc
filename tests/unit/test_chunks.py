"""Chunks by hand agree with protobuf, byte for byte, and never misread what they are given."""

from __future__ import annotations

import google_crc32c
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.chunks import Chunk, crc32c, read_chunk, write_chunk
from diloco.errors import CorruptDataError

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


@given(U64, U32, st.binary(max_size=300))
@example(0, 0, b"")
@example(2**64 - 1, 2**32 - 1, b"x" * 20_000)
def test_a_written_chunk_is_what_protobuf_writes(offset: int, crc: int, data: bytes) -> None:
    """For both messages, and for data given as bytes, bytearray or view."""
    for given_as in (data, bytearray(data), memoryview(data)):
        written = write_chunk(Chunk(offset, crc, given_as))
        assert written == pb.UploadChunk(offset=offset, crc32c=crc, data=data).SerializeToString()
        assert written == pb.DownloadChunk(offset=offset, crc32c=crc, data=data).SerializeToString()


@given(U64, U32, st.binary(max_size=300), st.binary(max_size=20), st.text(max_size=20), U64)
def test_what_protobuf_writes_is_read_with_all_its_fields(
    offset: int, crc: int, data: bytes, session: bytes, key: str, generation: int
) -> None:
    """The fields of an opening chunk included; and our own writing of them is the same bytes."""
    message = pb.UploadChunk(
        offset=offset, crc32c=crc, data=data, session=session, key=key, generation=generation
    )
    raw = message.SerializeToString()
    chunk = Chunk(offset, crc, data, session, key, generation)
    assert read_chunk(raw) == chunk
    assert write_chunk(chunk) == raw


def test_data_is_a_view_into_the_message() -> None:
    """Nothing is copied on the way in."""
    raw = write_chunk(Chunk(5, 7, b"payload"))
    data = read_chunk(raw).data
    assert isinstance(data, memoryview) and data.obj is raw


@given(st.permutations([b"\x08\x96\x01", b"\x15\x01\x02\x03\x04", b"\x7a\x03abc", b"\xa2\x06\x02hi"]))
def test_fields_in_any_order_and_unknown_ones_are_read_as_protobuf_reads_them(parts: list[bytes]) -> None:
    """The last part is field 100, which no version has defined."""
    assert read_chunk(b"".join(parts)) == Chunk(150, 0x04030201, b"abc")


@given(st.binary(max_size=40))
@example(b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x7a\x05abc")
@example(b"\x15\x01")
@example(b"\x08")
@example(b"\x08" + b"\xff" * 11)
def test_garbage_is_read_as_protobuf_reads_it_or_is_refused(raw: bytes) -> None:
    """No other exception than CorruptDataError, and never a value that protobuf would not have found."""
    try:
        chunk = read_chunk(raw)
    except CorruptDataError:
        return
    message = pb.UploadChunk.FromString(raw)
    assert (chunk.offset, chunk.crc32c, bytes(chunk.data)) == (message.offset, message.crc32c, message.data)


@given(st.binary(min_size=1, max_size=60))
def test_a_message_cut_short_is_refused_or_shorter(data: bytes) -> None:
    """No cut of a message is mistaken for the whole."""
    whole = Chunk(300, 5, data)
    raw = write_chunk(whole)
    for end in range(len(raw)):
        try:
            assert read_chunk(raw[:end]) != whole
        except CorruptDataError:
            pass


@given(st.binary(max_size=100), st.integers(1, 30))
def test_crc32c_is_the_same_for_every_buffer_and_piece(data: bytes, step: int) -> None:
    """The check value of CRC-32C ("123456789") is 0xE3069283."""
    expected = google_crc32c.value(data)
    assert (
        crc32c(data) == crc32c(bytearray(data), step=step) == crc32c(memoryview(data), step=step) == expected
    )
    assert crc32c(data[step:], crc32c(data[:step])) == expected
    assert crc32c(b"123456789") == 0xE3069283


def test_numbers_that_are_no_uint64_are_refused() -> None:
    for offset in (-1, 2**64):
        with pytest.raises(ValueError, match="uint64"):
            write_chunk(Chunk(offset, 0, b""))
