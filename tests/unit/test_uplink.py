"""From the [codec] section to codecs: bits and blocks, in whole fragments, groups and roles."""

from __future__ import annotations

import pytest
import torch

from diloco.comms.codec import Codec, get
from diloco.comms.frame import decode_frame, encode_frame
from diloco.comms.mixed import Mixed
from diloco.comms.uplink import codecs_for, uplink_codec
from diloco.config import RunConfig
from diloco.errors import CorruptDataError
from diloco.fragments import build_plan
from tests.toy import ROLES, SHAPES

N = 9000
LABEL = {
    "fragment": 0,
    "round": 1,
    "base_version": 0,
    "run_id": 7,
    "worker": 0,
    "incarnation": 1,
    "steps": 1,
    "tokens": 1,
}


def made(*overrides: str) -> Codec:
    return uplink_codec(RunConfig.from_toml("", list(overrides)).codec)


def whole(*overrides: str) -> Codec:
    c = RunConfig.from_toml("", ["stream.layout=single", *overrides])
    (found,) = codecs_for(c, build_plan(SHAPES, 5, layout="single", roles=ROLES))
    return found


@pytest.mark.parametrize(("name", "block"), [("nf4", 64), ("e3m0", 256), ("int8", 256), ("e2m1", 256)])
def test_the_block_is_the_codecs_own_unless_it_is_given(name: str, block: int) -> None:
    """nf4 was published with 64 values to a scale, the others take 256; a given number holds for all."""
    assert made(f"codec.up={name}") == get(name, block=block)
    for given in (64, 128, 256):
        assert made(f"codec.up={name}", f"codec.block={given}") == get(name, block=given)


def test_each_role_has_the_block_of_its_own_codec() -> None:
    """nf4 beside int8: 64 and 256, unless codec.block says one for both."""
    roles = ["codec.up=int8", "codec.roles.matrix=nf4", "codec.roles.head=fp32"]
    found = whole(*roles)
    assert isinstance(found, Mixed)
    assert {(part.name, part.block) for _, part in found.parts} == {("int8", 256), ("nf4", 64), ("fp32", 0)}
    found = whole(*roles, "codec.block=32")
    assert isinstance(found, Mixed)
    assert {(part.name, part.block) for _, part in found.parts} == {("int8", 32), ("nf4", 32), ("fp32", 0)}


@pytest.mark.parametrize(("bits", "size", "nmse"), [(2, 2270, 0.179), (4, 4568, 0.0124), (8, 10028, 2.6e-4)])
def test_the_statistical_codec_has_2_4_or_8_bits(bits: int, size: int, nmse: float) -> None:
    """Bytes 4 (1 + 2^b) + ceil(n b / 8), and the error that goes with each on normal values."""
    codec = made("codec.up=stat", f"codec.bits={bits}")
    x = torch.randn(N, generator=torch.Generator().manual_seed(1))
    payload = codec.encode(x)
    assert len(payload) == codec.wire_size(N) == size
    lost = (codec.decode(payload, N) - x).square().sum() / x.square().sum()
    assert 0.8 * nmse < float(lost) < 1.2 * nmse


def test_bits_left_out_are_4_for_stat_and_2_for_the_values_of_topk() -> None:
    """The same bytes as before there was a setting."""
    assert made("codec.up=stat") == get("stat", bits=4)
    assert made("codec.up=topk") == get("topk", bits=2)
    assert made("codec.up=topk", "codec.bits=8") == get("topk", bits=8)


@pytest.mark.parametrize("groups", ["tensor", "row"])
def test_bits_hold_for_the_statistics_of_every_group(groups: str) -> None:
    """A table of four entries per tensor or row, at two bits."""
    two, four = (
        whole("codec.up=stat", f"codec.groups={groups}", "codec.bits=2"),
        whole("codec.up=stat", f"codec.groups={groups}"),
    )
    n = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    spans = getattr(two, "spans", ())
    assert two == get("stat", spans=spans, bits=2) and four == get("stat", spans=spans)
    assert sum(spans) == n and len(spans) > 4


@pytest.mark.parametrize("name", ["stat", "topk"])
def test_a_frame_with_other_bits_than_the_runs_is_refused(name: str) -> None:
    """Its payload has another length, so it never reaches the decoder."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(2))
    sent = encode_frame(made(f"codec.up={name}", "codec.bits=8"), x, **LABEL)
    header, values = decode_frame(sent, codec=get(name, bits=8))
    assert header.n == N and values.numel() == N
    with pytest.raises(CorruptDataError, match=rf"{name} payload of .* bytes, want"):
        decode_frame(sent, codec=made(f"codec.up={name}"))
