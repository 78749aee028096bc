"""What arrives in bulk, damaged: frames with their checksum made right again, codecs' payloads, chunks of a transfer."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from random import Random

import torch

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import frame
from diloco.comms.chunks import Chunk, crc32c, read_chunk, write_chunk
from diloco.comms.codec import NAMES, Codec, get
from diloco.comms.mixed import Mixed, Tiled
from diloco.comms.transfer import Receiving, Ref
from diloco.coordinator.gates import check_contribution
from diloco.coordinator.membership import Member
from diloco.errors import CorruptDataError, TransportError
from diloco.fragments import build_plan
from tests.fuzz.mutate import TELLING, damaged, edited, reshaped

Attempt = Callable[[Random], None]

# (offset, bytes) of each field of a header, but for the length and the checksum at its end
FIELDS = ((0, 4), (4, 1), (5, 1), (6, 2), (8, 4), (12, 8), (20, 8), (28, 8), (36, 4), (40, 4), (44, 4), (48, 8), (56, 8), (64, 4))  # fmt: skip
N_AT, NORM_AT, LENGTH_AT = 56, 64, 68
RUN = frame.run_id_hash("run")


def _codecs() -> list[tuple[Codec, int]]:
    """Every codec, and those with options, each with a number of values."""
    plain: list[tuple[Codec, int]] = [(get(name), n) for name in NAMES for n in (0, 1, 5, 300)]
    return [
        *plain,
        (get("int8", block=2), 65),
        (get("int4", block=64, stochastic=True, seed=3), 300),
        (get("stat", bits=2), 300),
        (get("stat", bits=8), 300),
        (get("stat", spans=(100, 200)), 300),
        (get("topk", k=2, chunk=64, bits=8), 300),
        (Mixed(((100, get("int8")), (200, get("topk", k=2, chunk=64)))), 300),
        (Tiled(get("topk"), 64, 64), 4096),
    ]


def _whole(codec: Codec, n: int) -> bytes:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    return frame.encode_frame(
        codec,
        values,
        fragment=0,
        round=3,
        base_version=2,
        run_id=RUN,
        worker=1,
        incarnation=1,
        steps=10,
        tokens=100,
    )


def assembled(head: bytes, payload: bytes) -> bytes:
    """A frame with the length and the checksum that fit its payload."""
    return head[:LENGTH_AT] + struct.pack("<QI", len(payload), crc32c(payload)) + payload


def frames() -> Attempt:
    """Frames, as a coordinator's gates, a worker and a resend read them."""
    codecs = _codecs()
    seeds = [(codec, n, _whole(codec, n)) for codec, n in codecs]
    plans = {n: build_plan({"w": (n,)}, 10, layout="single") for _, n in codecs if n}
    member = Member("w", 1, 1, 0.0, index=1)

    def damage(rng: Random, codec: Codec, n: int, whole: bytes) -> bytes:
        head, payload = whole[: frame.HEADER_SIZE], whole[frame.HEADER_SIZE :]
        way = rng.random()
        if way < 0.15:
            return damaged(rng, whole)
        if way < 0.6:
            payload = edited(rng, payload)
        elif way < 0.75:
            payload = reshaped(rng, payload)
        if way >= 0.6:
            for _ in range(rng.randint(1, 3)):
                at, width = rng.choice(FIELDS)
                number = rng.choice(TELLING) if rng.random() < 0.5 else rng.getrandbits(8 * width)
                new = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
                head = head[:at] + new + head[at + width :]
        elif rng.random() < 0.5:  # a norm that is right, so that what can be decoded is taken
            try:
                head = head[:NORM_AT] + struct.pack("<f", codec.norm(payload, n)) + head[NORM_AT + 4 :]
            except (CorruptDataError, OverflowError):
                pass
        return assembled(head, payload)

    def attempt(rng: Random) -> None:
        codec, n, whole = rng.choice(seeds)
        bad = damage(rng, codec, n, whole)
        limit = codec.wire_size(n)
        match rng.randrange(6):
            case 0 | 1:
                header, values = frame.decode_frame(bad, max_payload=limit, codec=codec)
                assert values.shape == (header.n,) and bool(torch.isfinite(values).all())
            case 2:
                header, values = frame.decode_frame(bad, max_payload=limit)
                assert values.shape == (header.n,) and bool(torch.isfinite(values).all())
            case 3 if n:
                checked = check_contribution(bad, plans[n], 0, RUN, codec, member, 3, 2)
                assert checked.values.shape == (n,) and bool(torch.isfinite(checked.values).all())
            case 4:
                frame.decode_frame(bad, max_payload=limit, codec=rng.choice(codecs)[0])
            case _:
                frame.is_final(bad)
                frame.relabel(bad, worker=2, incarnation=3)

    return attempt


def payloads() -> Attempt:
    """Payloads, as each codec reads them for a number of values that the reader knows; refused ones add nothing."""
    seeds = [(codec, n, _whole(codec, n)[frame.HEADER_SIZE :]) for codec, n in _codecs()]

    def attempt(rng: Random) -> None:
        codec, n, payload = rng.choice(seeds)
        bad = edited(rng, payload, 16) if rng.random() < 0.8 else damaged(rng, payload)
        out = torch.ones(n)
        try:
            codec.decode_add_all((payload, bad), (0.5, 0.5), out)
        except CorruptDataError:
            assert bool((out == 1.0).all()), "a refused payload left something"
            raise
        values = codec.decode(bad, n)
        finite = bool(torch.isfinite(values).all())
        # The largest codes times the largest scale overflow; who decodes looks at the norm, which says so.
        assert values.shape == (n,) and (finite or not math.isfinite(codec.norm(bad, n)))

    return attempt


def chunks() -> Attempt:
    """Chunks as bytes, read as protobuf reads them; and a transfer of chunks of which some are wrong."""
    whole = bytes(range(256)) * 20
    ref = Ref("k", len(whole), crc32c(whole))
    seeds = [
        write_chunk(Chunk(at, crc32c(whole[at : at + 700]), whole[at : at + 700])) for at in (0, 700, 4900)
    ]
    seeds.append(write_chunk(Chunk(0, 1, b"abc", b"session", "key", 7)))

    def reading(rng: Random) -> None:
        bad = damaged(rng, rng.choice(seeds))
        found = read_chunk(bad)
        known = pb.UploadChunk.FromString(bad)
        assert (found.offset, found.crc32c, bytes(found.data)) == (known.offset, known.crc32c, known.data)

    def receiving(rng: Random) -> None:
        side = Receiving(ref, 10_000)
        generation = side.begin(1) + 1
        for _ in range(rng.randint(1, 12)):
            at = side.offset if rng.random() < 0.7 else rng.choice((*TELLING, rng.randrange(len(whole))))
            data = whole[at : at + rng.choice((0, 1, 700, 5000))] if at < len(whole) else b"xyz"
            crc = crc32c(data) if rng.random() < 0.9 else rng.getrandbits(32)
            if rng.random() < 0.1:
                data = edited(rng, data)
                crc = crc32c(data) if rng.random() < 0.5 else crc
            try:
                if rng.random() < 0.05:
                    side.begin(generation := generation + rng.choice((0, 1, 5)))
                side.accept(generation, Chunk(at, crc, data))
            except (CorruptDataError, TransportError):
                pass
            assert side.offset <= ref.length
        assert bytes(side.finish(side.generation)) == whole

    return lambda rng: reading(rng) if rng.random() < 0.5 else receiving(rng)
