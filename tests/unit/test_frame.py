"""Frames survive the trip, and damaged ones are refused with CorruptDataError and nothing else."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.comms import frame as frames
from diloco.comms.codec import Codec, ErrorFeedback, get
from diloco.comms.frame import HEADER_SIZE, decode_frame, encode_frame, pack, pack_header, unpack
from diloco.errors import CorruptDataError, NonFiniteError

X = torch.tensor([1, -0.5, 0.3, 0.1, 0, -0.02, 0.01, 0.75, 0.2])
CODECS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("fp32", "fp16", "bf16", "int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4")),
    ("stat", {"bits": 2}),
    ("topk", {"k": 2, "chunk": 8}),
]


def _frame(encoder: Codec | ErrorFeedback, x: Tensor = X) -> bytes:
    return encode_frame(
        encoder,
        x,
        fragment=3,
        round=17,
        base_version=16,
        run_id=frames.run_id_hash("demo"),
        worker=2,
        incarnation=1,
        steps=30,
        tokens=123_456,
    )


@pytest.mark.parametrize(("name", "options"), CODECS)
@pytest.mark.parametrize("n", [0, 1, 9])
def test_a_frame_carries_its_header_and_its_values(name: str, options: dict[str, Any], n: int) -> None:
    """decode(encode) is the codec's own round trip, and every field arrives."""
    codec = get(name, **options)
    data = _frame(codec, X[:n])
    header, values = decode_frame(data)
    assert len(data) == frames.frame_size(codec, n) == HEADER_SIZE + header.payload_len
    assert torch.equal(values, codec.decode(codec.encode(X[:n]), n))
    assert (header.codec, header.block, header.flags, header.n) == (codec.id, codec.block, 0, n)
    assert (header.fragment, header.round, header.base_version, header.worker) == (3, 17, 16, 2)
    assert (header.incarnation, header.steps, header.tokens) == (1, 30, 123_456)
    assert header.run_id == frames.run_id_hash("demo")
    assert header.l2norm == pytest.approx(float(values.double().norm()), rel=1e-6)


def test_the_header_has_the_documented_layout() -> None:
    """80 bytes, little-endian, fields in order."""
    data = _frame(get("e3m0"))
    assert HEADER_SIZE == 80 and data[:8] == b"LC01" + bytes((6, 0, 8, 0))
    assert struct.unpack_from("<IQQQIIIQQ", data, 8) == (
        3,
        17,
        16,
        frames.run_id_hash("demo"),
        2,
        1,
        30,
        123_456,
        9,
    )
    assert struct.unpack_from("<Q", data, 68) == (9,)


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_every_truncation_and_extension_is_refused(name: str, options: dict[str, Any]) -> None:
    """No prefix of a frame is a frame, nor is a frame with a byte more."""
    data = _frame(get(name, **options))
    for length in range(len(data)):
        with pytest.raises(CorruptDataError):
            decode_frame(data[:length])
    with pytest.raises(CorruptDataError):
        decode_frame(data + b"\0")


@pytest.mark.parametrize(("name", "options"), CODECS)
@pytest.mark.parametrize("flip", [0x01, 0x10, 0x80, 0xFF])
def test_every_changed_byte_is_refused_or_shows_in_the_header(
    name: str, options: dict[str, Any], flip: int
) -> None:
    """A receiver that knows codec and size never gets other values than were sent."""
    codec = get(name, **options)
    data = _frame(codec)
    sent, values = decode_frame(data)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= flip
        try:
            header, got = decode_frame(damaged, codec=codec)
        except CorruptDataError:
            continue
        assert at < HEADER_SIZE and header != sent
        assert header.n != sent.n or torch.equal(got, values)


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_damage_raises_nothing_but_corrupt_data(name: str, options: dict[str, Any]) -> None:
    """Also for a receiver without expectations."""
    data = _frame(get(name, **options))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        try:
            header, got = decode_frame(damaged)
        except CorruptDataError:
            continue
        assert at < HEADER_SIZE and got.numel() == header.n


def test_a_frame_for_another_codec_is_refused() -> None:
    """Same size, other meaning: the receiver's own codec decides."""
    with pytest.raises(CorruptDataError, match="codec 7 .* want 6"):
        unpack(_frame(get("e2m1")), codec=get("e3m0"))
    with pytest.raises(CorruptDataError, match="23 bytes, want 73 for n=9"):
        unpack(_frame(get("stat", bits=2)), codec=get("stat", bits=4))


def test_a_huge_count_is_refused_before_any_memory_is_taken() -> None:
    """n is held against the payload length, not believed."""
    header, payload = unpack(_frame(get("e3m0")))
    for name in ("fp32", "e3m0", "stat", "topk"):
        codec = get(name)
        liar = replace(header, codec=codec.id, block=codec.block, n=2**63)
        with pytest.raises(CorruptDataError, match="want"):
            decode_frame(pack(liar, payload))


def test_a_payload_above_the_limit_is_refused() -> None:
    """The limit is in payload bytes."""
    data = _frame(get("e3m0"))
    assert unpack(data, max_payload=9)[0].n == 9
    with pytest.raises(CorruptDataError, match="above the limit of 8"):
        unpack(data, max_payload=8)


def test_the_payload_is_a_view_of_the_frame() -> None:
    """Unpacking copies nothing."""
    data = bytearray(_frame(get("fp32")))
    _, payload = unpack(data)
    data[-1] ^= 1
    assert payload[-1] == data[-1]


def test_a_norm_that_is_not_the_values_norm_is_refused() -> None:
    """More than 0.1 % off is another tensor."""
    header, payload = unpack(_frame(get("e3m0")))
    assert decode_frame(pack(replace(header, l2norm=header.l2norm * 1.0005), payload))[0].n == 9
    for factor in (0.99, 1.01, 0.0):
        with pytest.raises(CorruptDataError, match="norm"):
            decode_frame(pack(replace(header, l2norm=header.l2norm * factor), payload))


def test_a_norm_beyond_fp32_is_not_sent_and_the_feedback_forgets_it() -> None:
    """Such an update could only be refused on the other side."""
    codec = get("fp32")
    feedback = ErrorFeedback(codec, 1.0)
    with pytest.raises(NonFiniteError, match="does not fit"):
        _frame(feedback, torch.full((4,), 3e38))
    assert not feedback.pending


def test_a_frame_through_error_feedback_says_so_and_corrects_the_next() -> None:
    """The flag is set, and the payload is the feedback's."""
    codec = get("int4")
    feedback, twin = ErrorFeedback(codec, 1.0), ErrorFeedback(codec, 1.0)
    for _ in range(2):
        data = _frame(feedback)
        assert bytes(unpack(data)[1]) == twin.encode(X)
        assert decode_frame(data)[0].flags == frames.FLAG_EF
        feedback.commit()
        twin.commit()


def test_a_relabelled_frame_differs_in_its_sender_alone() -> None:
    """Worker and incarnation change; everything else, the payload included, stays."""
    data = _frame(get("e3m0"))
    header, values = decode_frame(frames.relabel(data, worker=5, incarnation=9))
    assert header == replace(unpack(data)[0], worker=5, incarnation=9)
    assert torch.equal(values, decode_frame(data)[1])
    for wrong in (data + b"\0", data[:-1], data[:20]):
        with pytest.raises(CorruptDataError):
            frames.relabel(wrong, worker=5, incarnation=9)


def test_grouped_values_need_the_receivers_groups() -> None:
    """The sizes of groups are not in the frame: without them it is refused, with them it decodes."""
    codec = get("stat", bits=2, spans=(4, 5))
    data = _frame(codec)
    assert torch.equal(decode_frame(data, codec=codec)[1], codec.decode(codec.encode(X), 9))
    with pytest.raises(CorruptDataError, match="spans"):
        decode_frame(data)
    with pytest.raises(CorruptDataError, match="groups"):
        decode_frame(data, codec=get("stat", bits=2))


def test_a_field_out_of_range_is_named_as_such() -> None:
    """A header that does not fit its fields is a mistake of the caller."""
    header, _ = unpack(_frame(get("e3m0")))
    for wrong in (replace(header, worker=-1), replace(header, fragment=2**32), replace(header, block=48)):
        with pytest.raises(ValueError, match="frame header"):
            pack_header(wrong)


def test_digests_are_sha256_of_little_endian_bytes() -> None:
    """A fragment's digest is over its values, a model's over its fragments' in order."""
    x = torch.tensor([1.0, -2.5, 3.25])
    want = hashlib.sha256(struct.pack("<3f", 1.0, -2.5, 3.25))
    assert frames.digest(x) == want.hexdigest() == frames.digest(x.view(3, 1))
    other = hashlib.sha256(b"").hexdigest()
    assert frames.digest(torch.empty(0)) == other
    both = hashlib.sha256(want.digest() + bytes.fromhex(other)).hexdigest()
    assert (
        frames.model_digest([want.hexdigest(), other])
        == both
        != frames.model_digest([other, want.hexdigest()])
    )


def test_the_run_hash_is_the_first_eight_bytes() -> None:
    """Little-endian, of the UTF-8 name."""
    assert frames.run_id_hash("dé").to_bytes(8, "little") == hashlib.sha256("dé".encode()).digest()[:8]
