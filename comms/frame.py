"""Frames: the 80-byte header before a payload, and the digests by which nodes compare what they hold.

Layout (little-endian): magic 'LC01', u8 codec, u8 flags, u16 log2 of the block, u32 fragment, u64 round, u64 base
version, u64 run id, u32 worker, u32 incarnation, u32 steps, u64 tokens, u64 n, f32 l2norm of the decoded values,
u64 payload length, u32 CRC-32C of the payload. Codecs are in `diloco.comms.codec`; nothing here touches a socket.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from diloco.comms import codec as codecs
from diloco.comms.codec import Codec, ErrorFeedback, Payload
from diloco.errors import CorruptDataError, NonFiniteError
from diloco.kernels.reference import parts

MAGIC = b"LC01"
FLAG_STOCHASTIC, FLAG_EF, FLAG_PER_ROW = 1, 2, 4
FLAG_FINAL = 8  # the distance to a worker's last parameters: the round ends its run and averages them
# Stands for the sender in the key of stochastic rounding, so that a commit draws other numbers than any worker.
COORDINATOR = 0xFFFFFFFF
# How far the norm of the decoded values may be from the one in the header, relative.
NORM_TOLERANCE = 1e-3

_HEADER = struct.Struct("<4sBBHIQQQIIIQQfQI")
HEADER_SIZE = _HEADER.size


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fields of a header. `block` is in values (0: none) and `run_id` is `run_id_hash` of the run's name."""

    codec: int
    flags: int
    block: int
    fragment: int
    round: int
    base_version: int
    run_id: int
    worker: int
    incarnation: int
    steps: int
    tokens: int
    n: int
    l2norm: float
    payload_len: int
    crc32c: int


def pack_header(header: FrameHeader) -> bytes:
    """The HEADER_SIZE bytes of `header`; ValueError naming a field that does not fit."""
    h = header
    log2 = h.block.bit_length() - 1 if h.block else 0
    if h.block and 1 << log2 != h.block:
        raise ValueError(f"frame header: block={h.block} is not a power of two")
    try:
        return _HEADER.pack(
            *(MAGIC, h.codec, h.flags, log2, h.fragment, h.round, h.base_version, h.run_id, h.worker),
            *(h.incarnation, h.steps, h.tokens, h.n, h.l2norm, h.payload_len, h.crc32c),
        )
    except (struct.error, OverflowError) as error:
        raise ValueError(f"frame header: a field is out of range ({error}): {h}") from error


def pack(header: FrameHeader, payload: Payload) -> bytes:
    """A whole frame; `payload_len` and `crc32c` are those of `payload`, whatever `header` says."""
    view = memoryview(payload).cast("B")
    sized = replace(header, payload_len=view.nbytes, crc32c=_crc(view))
    return b"".join((pack_header(sized), view))


def unpack(
    frame: Payload, *, max_payload: int | None = None, codec: Codec | None = None
) -> tuple[FrameHeader, memoryview]:
    """Header and payload (a view into `frame`) after every check that needs no decoding.

    `max_payload` bounds the payload in bytes; `codec` is the one the receiver expects, without it any known one will do.
    Memory does not depend on what the header claims. Raises CorruptDataError.
    """
    header, _, payload = _unpack(memoryview(frame).cast("B"), max_payload, codec)
    return header, payload


def read_header(frame: Payload, *, max_payload: int | None = None) -> FrameHeader:
    """The header alone, of a frame whose payload has the length that it says. Raises CorruptDataError."""
    return _split(memoryview(frame).cast("B"), max_payload)[0]


def encode_frame(
    encoder: Codec | ErrorFeedback,
    delta: Tensor,
    *,
    fragment: int,
    round: int,
    base_version: int,
    run_id: int,
    worker: int,
    incarnation: int,
    steps: int,
    tokens: int,
    flags: int = 0,
) -> bytes:
    """Frame of `delta` (fp32 [n]) as the codec, or the error feedback around one, encodes it.

    `flags`: FLAG_FINAL or nothing; the others follow from the encoder. Stochastic rounding is decided by (run, sender,
    fragment, round) and the codec's own seed; incarnation 0 is the coordinator.
    Raises NonFiniteError for NaN, infinity, or a norm beyond fp32; an error feedback is then as before.
    """
    feedback = encoder if isinstance(encoder, ErrorFeedback) else None
    codec = encoder.codec if isinstance(encoder, ErrorFeedback) else encoder
    if feedback is not None:
        flags |= FLAG_EF
    payload = encoder.encode(delta, (run_id, worker if incarnation else COORDINATOR, fragment, round))
    try:
        return frame_of(
            codec,
            payload,
            delta.numel(),
            fragment=fragment,
            round=round,
            base_version=base_version,
            run_id=run_id,
            worker=worker,
            incarnation=incarnation,
            steps=steps,
            tokens=tokens,
            flags=flags,
        )
    except NonFiniteError:
        if feedback is not None:
            feedback.rollback()
        raise


def frame_of(
    codec: Codec,
    payload: Payload,
    n: int,
    *,
    fragment: int,
    round: int,
    base_version: int,
    run_id: int,
    worker: int,
    incarnation: int,
    steps: int,
    tokens: int,
    flags: int = 0,
) -> bytes:
    """Frame of what `codec` made of `n` values. `flags`: FLAG_FINAL, FLAG_EF or nothing; the others follow from the codec.

    Raises NonFiniteError for a norm beyond fp32.
    """
    if codec.stochastic:
        flags |= FLAG_STOCHASTIC
    if _has_spans(codec):
        flags |= FLAG_PER_ROW
    norm = codec.norm(payload, n)
    if not _fits_fp32(norm):
        raise NonFiniteError(f"the norm {norm:g} of fragment {fragment} does not fit fp32")
    header = FrameHeader(
        codec=codec.id,
        flags=flags,
        block=codec.block,
        fragment=fragment,
        round=round,
        base_version=base_version,
        run_id=run_id,
        worker=worker,
        incarnation=incarnation,
        steps=steps,
        tokens=tokens,
        n=n,
        l2norm=norm,
        payload_len=len(payload),
        crc32c=_crc(payload),
    )
    return b"".join((pack_header(header), payload))


def decode_frame(
    frame: Payload, *, max_payload: int | None = None, codec: Codec | None = None
) -> tuple[FrameHeader, Tensor]:
    """Header and fp32 values [n]; on top of `unpack`, refuses values whose norm is not the header's (0.1 %).

    A receiver compares the header's own fields (run, fragment, n, ...) with what it expects. Raises CorruptDataError.
    """
    header, used, payload = _unpack(memoryview(frame).cast("B"), max_payload, codec)
    values = used.decode(payload, header.n)
    norm = _norm(values)
    if not _fits_fp32(norm) or abs(norm - header.l2norm) > NORM_TOLERANCE * max(norm, header.l2norm):
        raise CorruptDataError(f"decoded norm {norm:g} is not the header's {header.l2norm:g}")
    return header, values


def relabel(frame: Payload, *, worker: int, incarnation: int) -> bytes:
    """The same frame under another sender: for a resend after the worker has joined anew. Raises CorruptDataError."""
    header, payload = _split(memoryview(frame).cast("B"))
    return b"".join((pack_header(replace(header, worker=worker, incarnation=incarnation)), payload))


def is_final(frame: Payload) -> bool:
    """Whether the frame belongs to a worker's last round, whose values are averaged as they are."""
    return bool(_parse(memoryview(frame).cast("B")).flags & FLAG_FINAL)


def codec_of(header: FrameHeader) -> Codec:
    """The codec a header speaks of, its `bits` or `k` found from the sizes. Raises CorruptDataError."""
    if header.flags & FLAG_PER_ROW:
        raise CorruptDataError("frame is coded per group, but no codec with the groups' spans was given")
    return codecs.infer(header.codec, header.block, header.n, header.payload_len)


def frame_size(codec: Codec, n: int) -> int:
    """Bytes of a frame of `n` values."""
    return HEADER_SIZE + codec.wire_size(n)


def run_id_hash(run_id: str) -> int:
    """First 8 bytes, little-endian, of SHA-256 of the UTF-8 run id."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "little")


def digest(tensor: Tensor) -> str:
    """SHA-256 (hex) of the little-endian fp32 bytes of a contiguous tensor; its shape does not count."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"a digest is over float32, got {tensor.dtype}")
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def model_digest(digests: Iterable[str]) -> str:
    """SHA-256 (hex) of the raw bytes of the fragments' digests in plan order."""
    return hashlib.sha256(b"".join(bytes.fromhex(one) for one in digests)).hexdigest()


def _unpack(
    frame: memoryview, max_payload: int | None, expected: Codec | None
) -> tuple[FrameHeader, Codec, memoryview]:
    header, payload = _split(frame, max_payload)
    if expected is None:
        used = codec_of(header)
    else:
        used = expected
        _require_expected(header, expected)
    if _crc(payload) != header.crc32c:
        raise CorruptDataError(f"CRC-32C of the payload is not the header's {header.crc32c:#010x}")
    return header, used, payload


def _split(frame: memoryview, max_payload: int | None = None) -> tuple[FrameHeader, memoryview]:
    header = _parse(frame)
    payload = frame[HEADER_SIZE:]
    if header.payload_len != payload.nbytes:
        raise CorruptDataError(
            f"frame carries {payload.nbytes} payload bytes, its header says {header.payload_len}"
        )
    if max_payload is not None and payload.nbytes > max_payload:
        raise CorruptDataError(f"payload of {payload.nbytes} bytes is above the limit of {max_payload}")
    return header, payload


def _parse(frame: memoryview) -> FrameHeader:
    if frame.nbytes < HEADER_SIZE:
        raise CorruptDataError(f"frame of {frame.nbytes} bytes is shorter than its header of {HEADER_SIZE}")
    (
        magic,
        codec,
        flags,
        log2,
        fragment,
        round,
        base,
        run_id,
        worker,
        incarnation,
        steps,
        tokens,
        n,
        l2norm,
        payload_len,
        crc32c,
    ) = _HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise CorruptDataError(f"frame starts with {magic!r}, want {MAGIC!r}")
    if flags & ~(FLAG_STOCHASTIC | FLAG_EF | FLAG_PER_ROW | FLAG_FINAL):
        raise CorruptDataError(f"frame has unknown flags {flags:#04x}")
    if log2 > 16:
        raise CorruptDataError(f"frame has blocks of 2^{log2} values, want at most 2^16")
    if not math.isfinite(l2norm) or l2norm < 0:
        raise CorruptDataError(f"frame has l2norm {l2norm}, want finite >= 0")
    block = 1 << log2 if log2 else 0
    return FrameHeader(
        codec=codec,
        flags=flags,
        block=block,
        fragment=fragment,
        round=round,
        base_version=base,
        run_id=run_id,
        worker=worker,
        incarnation=incarnation,
        steps=steps,
        tokens=tokens,
        n=n,
        l2norm=l2norm,
        payload_len=payload_len,
        crc32c=crc32c,
    )


def _require_expected(header: FrameHeader, codec: Codec) -> None:
    if (header.codec, header.block) != (codec.id, codec.block):
        raise CorruptDataError(
            f"frame has codec {header.codec} with block {header.block}, want {codec.id} ({codec.name}) with {codec.block}"
        )
    if bool(header.flags & FLAG_PER_ROW) != _has_spans(codec):
        raise CorruptDataError(
            f"frame flags {header.flags:#04x} do not match the groups of codec {codec.name}"
        )
    if bool(header.flags & FLAG_STOCHASTIC) != codec.stochastic:
        raise CorruptDataError(
            f"frame flags {header.flags:#04x} do not match the rounding of codec {codec.name}"
        )
    spans: tuple[int, ...] = getattr(codec, "spans", ())
    if spans and sum(spans) != header.n:
        raise CorruptDataError(f"frame of {header.n} values, the groups' spans cover {sum(spans)}")
    if codec.wire_size(header.n) != header.payload_len:
        raise CorruptDataError(
            f"{codec.name} payload of {header.payload_len} bytes, want {codec.wire_size(header.n)} for n={header.n}"
        )


def _has_spans(codec: Codec) -> bool:
    return bool(getattr(codec, "spans", ()))


def _crc(payload: Payload) -> int:
    """CRC-32C without a copy: the library takes no memoryview, but the array around one."""
    return int(google_crc32c.value(np.frombuffer(payload, dtype=np.uint8)))


def _norm(values: Tensor) -> float:
    """L2 norm summed in fp64, slice by slice."""
    return math.sqrt(math.fsum(float(part.double().square_().sum()) for part in parts(values)))


def _fits_fp32(norm: float) -> bool:
    return norm <= torch.finfo(torch.float32).max
