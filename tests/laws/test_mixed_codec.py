"""Codecs made of codecs: the whole is its parts, byte for byte; tiles; and which codec a fragment gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.codec_section import BLOCK_CODECS
from diloco.comms.codec import Codec, ErrorFeedback, get, infer
from diloco.comms.frame import decode_frame, encode_frame, frame_size, read_header, relabel, unpack
from diloco.comms.mixed import MIXED, Mixed, Tiled
from diloco.comms.uplink import codec_for, codecs_for, uplink_codec
from diloco.config import RunConfig
from diloco.errors import ConfigError, CorruptDataError, NonFiniteError
from diloco.fragments import Fragment, FragmentPlan, Span, build_plan

torch.set_num_threads(1)

quick = settings(max_examples=40, deadline=None)
MESSAGE: dict[str, int] = {
    "fragment": 0,
    "round": 1,
    "base_version": 0,
    "run_id": 5,
    "worker": 1,
    "incarnation": 1,
    "steps": 1,
    "tokens": 0,
}
PARTS: tuple[Codec, ...] = (
    get("fp32"),
    get("bf16"),
    *(get(name, block=32) for name in BLOCK_CODECS),
    get("int4", block=32, stochastic=True, seed=3),
    get("stat", bits=2),
    get("topk", k=4, chunk=64, bits=8),
)
mixtures = st.lists(st.tuples(st.integers(1, 150), st.sampled_from(PARTS)), min_size=1, max_size=6)
SHAPES = {
    "embed": (64, 32),
    "blocks.0.w": (128, 64),
    "blocks.0.g": (64,),
    "blocks.0.v": (64, 64),
    "head": (3, 5),
}
ROLES = {
    "embed": "embed",
    "blocks.0.w": "matrix",
    "blocks.0.g": "scalar",
    "blocks.0.v": "matrix",
    "head": "head",
}


def values(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def config(**codec: Any) -> RunConfig:
    return RunConfig.from_dict({"codec": codec, "stream": {"layout": "single"}})


def whole() -> FragmentPlan:
    return build_plan(SHAPES, 30, layout="single", roles=ROLES)


@quick
@given(mixtures, st.integers(0, 1000))
def test_a_mixture_is_its_parts_one_after_another(parts: list[tuple[int, Codec]], seed: int) -> None:
    """Sizes add up, payloads follow each other, values are those of the parts."""
    mixed, n = Mixed(tuple(parts)), sum(count for count, _ in parts)
    x = values(n, seed)
    payload, pieces = mixed.encode(x, (seed,)), torch.split(x, [count for count, _ in parts])
    alone = [c.encode(piece, (seed, i)) for i, (piece, (_, c)) in enumerate(zip(pieces, parts, strict=True))]
    assert payload == b"".join(alone) and len(payload) == mixed.wire_size(n)
    decoded = [c.decode(p, count) for p, (count, c) in zip(alone, parts, strict=True)]
    assert torch.equal(mixed.decode(payload, n), torch.cat(decoded))
    assert mixed.norm(payload, n) == pytest.approx(float(torch.cat(decoded).double().norm()), rel=1e-6)


@quick
@given(mixtures, st.integers(0, 1000))
def test_accumulating_and_feeding_back_a_mixture_are_those_of_its_parts(
    parts: list[tuple[int, Codec]], seed: int
) -> None:
    """out += w*dec, two payloads in order; e_new == beta*e + D - dec(c), all bit for bit."""
    mixed, n = Mixed(tuple(parts)), sum(count for count, _ in parts)
    payloads = [mixed.encode(values(n, seed + i), (i,)) for i in range(2)]
    out, want = values(n, seed + 9), values(n, seed + 9)
    mixed.decode_add_all(payloads, [0.25, 0.75], out)
    for payload, weight in zip(payloads, (0.25, 0.75), strict=True):
        want += mixed.decode(payload, n) * weight
    assert torch.equal(out, want)
    feedback = ErrorFeedback(mixed, 0.9)
    before = torch.zeros(n)
    for i in range(2):
        delta = values(n, seed + i)
        sent = mixed.decode(feedback.encode(delta, (i,)), n)
        feedback.commit()
        assert feedback.residual is not None
        assert torch.equal(feedback.residual, (before * 0.9 + delta) - sent)
        before = feedback.residual.clone()


@quick
@given(mixtures)
def test_a_wrong_length_is_refused_with_both_sizes(parts: list[tuple[int, Codec]]) -> None:
    """One byte less or more, and another number of values, are not taken."""
    mixed, n = Mixed(tuple(parts)), sum(count for count, _ in parts)
    payload = mixed.encode(values(n))
    for wrong in (payload[:-1], payload + b"\0"):
        with pytest.raises(CorruptDataError, match=f"{len(wrong)} bytes, want {len(payload)}"):
            mixed.decode(wrong, n)
    with pytest.raises(ConfigError, match=f"cover {n} values"):
        mixed.encode(values(n + 1))


def test_one_bad_part_adds_nothing_of_the_others() -> None:
    """The last scale is NaN: the first part, which is sound, is not added either."""
    mixed = Mixed(((4, get("fp32")), (32, get("int8", block=32))))
    payload = bytearray(mixed.encode(torch.ones(36)))
    payload[16:20] = b"\xff\xff\xff\x7f"
    out = torch.zeros(36)
    with pytest.raises(CorruptDataError, match="scale of block 0"):
        mixed.decode_add_all([mixed.encode(torch.ones(36)), bytes(payload)], [1.0, 1.0], out)
    assert not out.any()


@pytest.mark.parametrize("at", [0, 5])
def test_a_non_finite_value_in_any_part_refuses_the_whole(at: int) -> None:
    """And an error feedback is as before."""
    mixed = Mixed(((4, get("fp32")), (32, get("int8", block=32))))
    x = torch.ones(36)
    x[at] = math.inf
    feedback = ErrorFeedback(mixed, 1.0)
    feedback.encode(torch.ones(36))
    feedback.commit()
    assert feedback.residual is not None
    kept = feedback.residual.clone()
    with pytest.raises(NonFiniteError):
        feedback.encode(x)
    assert torch.equal(feedback.residual, kept) and not feedback.pending


def test_equal_parts_draw_different_numbers() -> None:
    """Two stochastic parts with the same values are rounded independently."""
    codec = get("e3m0", block=32, stochastic=True, seed=1)
    x = values(64)
    mixed = Mixed(((64, codec), (64, codec)))
    first, second = torch.split(mixed.decode(mixed.encode(torch.cat((x, x)), (1,)), 128), 64)
    assert not torch.equal(first, second)


def test_a_frame_of_parts_is_read_by_who_knows_them_and_nobody_else() -> None:
    """Number 255 and the flag of groups; other spans are refused by size, no codec at all by the flag."""
    mixed = Mixed(((40, get("int8", block=32)), (7, get("fp32"))))
    x = values(47)
    framed = encode_frame(mixed, x, **MESSAGE)
    header, got = decode_frame(framed, codec=mixed)
    assert (header.codec, header.block, header.flags) == (MIXED, 0, 4)
    assert len(framed) == frame_size(mixed, 47) and torch.equal(got, mixed.decode(mixed.encode(x), 47))
    with pytest.raises(CorruptDataError, match="no codec with the groups' spans"):
        decode_frame(framed)
    with pytest.raises(CorruptDataError, match="want 3"):
        unpack(framed, codec=get("int8"))
    with pytest.raises(CorruptDataError, match="spans cover 48"):
        unpack(framed, codec=Mixed(((40, get("int8", block=32)), (8, get("fp32")))))
    with pytest.raises(CorruptDataError, match="mixed payload of"):
        unpack(framed, codec=Mixed(((39, get("int8", block=32)), (8, get("fp32")))))
    with pytest.raises(CorruptDataError, match="unknown codec id 255"):
        infer(MIXED, 0, 47, len(framed))
    assert read_header(relabel(framed, worker=9, incarnation=4)).worker == 9


# ---- tiles ----


@quick
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_a_tile_keeps_its_largest_values_where_they_stand(down: int, across: int, seed: int) -> None:
    """Of every 8x8 tile of a matrix the 4 largest, found with a loop over the tiles."""
    rows, columns = 8 * down, 8 * across
    codec = Tiled(get("topk", k=4, chunk=64, bits=8), rows, columns)
    x = values(rows * columns, seed)
    kept = codec.decode(codec.encode(x), x.numel()).view(rows, columns) != 0
    matrix = x.view(rows, columns)
    for top in range(0, rows, 8):
        for left in range(0, columns, 8):
            tile = matrix[top : top + 8, left : left + 8].abs()
            chosen = kept[top : top + 8, left : left + 8]
            assert int(chosen.sum()) <= 4
            assert not chosen.any() or float(tile[chosen].min()) >= float(tile.flatten().topk(4).values.min())
            assert bool(chosen.flatten()[tile.flatten().argmax()])


@quick
@given(st.integers(0, 1000))
def test_tiles_accumulate_and_feed_back_like_any_codec(seed: int) -> None:
    """out += w*dec and e_new == beta*e + D - dec(c), in the matrix's own order."""
    codec = Tiled(get("topk", k=4, chunk=64, bits=8), 16, 24)
    x, out = values(384, seed), values(384, seed + 1)
    payload = codec.encode(x)
    want = out + codec.decode(payload, 384) * 0.5
    codec.decode_add(payload, 0.5, out)
    assert torch.equal(out, want) and len(payload) == codec.wire_size(384)
    feedback = ErrorFeedback(codec, 0.9)
    sent = codec.decode(feedback.encode(x), 384)
    assert feedback.residual is not None and torch.equal(feedback.residual, x - sent)


# ---- which codec a fragment gets ----


def test_roles_choose_codecs_and_neighbours_of_one_codec_share_a_part() -> None:
    """Embeddings int8, vectors fp32, the rest e3m0; the payload has exactly the bytes of the spans' codecs."""
    c = config(up="e3m0", roles={"embed": "int8", "scalar": "fp32"})
    (codec,) = codecs_for(c, whole())
    assert isinstance(codec, Mixed)
    assert [(n, part.name) for n, part in codec.parts] == [
        *((2048, "int8"), (8192, "e3m0"), (64, "fp32")),
        (4096 + 15, "e3m0"),
    ]
    size = (4 * 8 + 2048) + (4 * 32 + 4096) + 4 * 64 + (4 * 17 + 2056)
    assert codec.wire_size(2048 + 8192 + 64 + 4111) == size


def test_without_roles_or_groups_a_fragment_has_the_plain_codec() -> None:
    """The same frames as ever; so has a fragment whose spans are all of one role."""
    for name in ("fp32", "e3m0", "stat", "topk"):
        (codec,) = codecs_for(config(up=name, ef="on"), build_plan(SHAPES, 30, layout="single"))
        assert codec == uplink_codec(config(up=name).codec)
    matrices = build_plan(
        {"w": (4, 4), "v": (2, 2)}, 30, layout="single", roles={"w": "matrix", "v": "matrix"}
    )
    assert codecs_for(config(roles={"embed": "int8"}), matrices) == [get("e3m0")]
    assert codecs_for(config(roles={"matrix": "int8"}), matrices) == [get("int8")]


def test_stochastic_rounding_reaches_the_parts_that_have_it() -> None:
    """fp32 beside a block codec has nothing to round; the seed is the run's."""
    c = RunConfig.from_dict(
        {"run": {"seed": 7}, "codec": {"stochastic": True, "block": 32, "roles": {"scalar": "fp32"}}}
    )
    codec = codec_for(c, whole().fragments[0])
    assert codec.stochastic and isinstance(codec, Mixed)
    assert codec.parts[0][1] == get("e3m0", block=32, stochastic=True, seed=7)
    assert not codec.parts[1][1].stochastic


def test_stat_takes_tensors_or_rows_as_groups() -> None:
    """Section 4: group = tensor, or row; constants 4*(1 + 2^b) bytes per group, codes of a group whole bytes."""
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 4, 3)}
    (fragment,) = build_plan(shapes, 30, layout="single").fragments
    tensors = codec_for(config(up="stat", groups="tensor"), fragment)
    rows = codec_for(config(up="stat", groups="row"), fragment)
    assert tensors == get("stat", spans=(15, 7, 24)) and rows == get("stat", spans=(5, 5, 5, 7, *[3] * 8))
    assert tensors.wire_size(46) == 3 * 4 * 17 + 8 + 4 + 12
    assert rows.wire_size(46) == 12 * 4 * 17 + 3 * 3 + 4 + 8 * 2


def test_a_span_that_begins_amid_a_row_keeps_to_the_rows() -> None:
    """Fragments may cut a tensor anywhere; each group holds what the span has of one row."""
    fragment = Fragment(0, (Span("a", (4, 5), 3, 17, 0),), 0)
    assert codec_for(config(up="stat", groups="row"), fragment) == get("stat", spans=(2, 5, 5, 2))


def test_topk_takes_tiles_of_matrices_and_flat_chunks_of_the_rest() -> None:
    """4.3: both sides divisible by 64 and the whole matrix: 64x64 tiles; each tensor has its own table."""
    (codec,) = codecs_for(config(up="topk", groups="tensor", ef="on"), whole())
    assert isinstance(codec, Mixed)
    assert [type(part) is Tiled for _, part in codec.parts] == [False, True, False, True, False]
    assert codec.parts[1][1] == Tiled(get("topk"), 128, 64)
    chunk = 96 + 16  # 64 indices of 12 bits, 64 values of 2 bits
    assert codec.wire_size(2048 + 8192 + 64 + 4096 + 15) == 6 * chunk + 5 * 20
    half = Fragment(0, (Span("w", (128, 64), 0, 4096, 0),), 0)
    assert codec_for(config(up="topk", groups="tensor", ef="on"), half) == get("topk")


def test_one_tensor_in_tiles_is_no_plain_topk_frame() -> None:
    """Its order differs: who does not know the plan must not read it as flat chunks."""
    (fragment,) = build_plan({"w": (64, 64)}, 30, layout="single").fragments
    codec = codec_for(config(up="topk", groups="tensor", ef="on"), fragment)
    assert codec.id == MIXED


# ---- roles in the plan ----


def test_roles_are_part_of_the_plan_and_its_digest() -> None:
    """Read back as told; another role is another plan, and the refusal names the tensor."""
    plan = whole()
    assert FragmentPlan.from_description(plan.describe()) == plan
    other = build_plan(SHAPES, 30, layout="single", roles={**ROLES, "head": "matrix"})
    assert plan.digest() != other.digest() != build_plan(SHAPES, 30, layout="single").digest()
    said = "tensor 'head' has role 'matrix' in the worker's model and 'head' in the run"
    assert said in plan.difference(other)


def test_an_unknown_role_is_no_plan() -> None:
    """What comes from outside is checked before a codec is looked up by it."""
    with pytest.raises(ConfigError, match="unknown role 'up'"):
        FragmentPlan.from_description(whole().describe().replace('"embed"]', '"up"]'))


def test_a_plan_of_absurdly_many_rows_costs_no_memory() -> None:
    """2^40 rows are one group: the plan comes from outside, before any value does."""
    fragment = Fragment(0, (Span("a", (2**40, 3), 0, 3 * 2**40, 0),), 0)
    assert codec_for(config(up="stat", groups="row"), fragment) == get("stat", spans=(3 * 2**40,))
