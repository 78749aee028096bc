"""What holds for every codec on every input: sizes, zeros, symmetry, scaling, order, bounds and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.comms.codec import NAMES, Codec, get, infer
from diloco.errors import ConfigError, CorruptDataError, NonFiniteError
from diloco.kernels.reference_blocks import levels as block_levels

BLOCKS = ["int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4"]
SYMMETRIC = ["int8", "e4m3", "e5m2", "e3m0", "e2m1", "int4"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("fp32", "fp16", "bf16", "stat")),
    *((name, {"block": 32}) for name in BLOCKS),
    *(("stat", {"bits": bits}) for bits in (2, 8)),
    ("topk", {"k": 4, "chunk": 64}),
]
EDGE_SIZES = (0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 255, 257)

sizes = st.sampled_from(EDGE_SIZES)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def _sample(n: int, seed: int) -> Tensor:
    """Values over many magnitudes, with zeros and ties among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp(3 * torch.randn(n, generator=generator))
    x[torch.rand(n, generator=generator) < 0.1] = 0.0
    # Few mantissa bits make exact ties frequent.
    return torch.where(torch.rand(n, generator=generator) < 0.3, (x * 4).round() / 4, x)


def _again(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.numel())


def _blockwise_max(x: Tensor, block: int) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)
    return padded.abs().amax(1).repeat_interleave(block)[: x.numel()]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@quick
@given(n=sizes, seed=seeds)
def test_the_payload_has_the_announced_size_and_decodes_to_as_many_values(
    name: str, options: dict[str, Any], n: int, seed: int
) -> None:
    """len(encode(x)) == wire_size(n), and decode gives n finite fp32 values back, for any n."""
    codec = get(name, **options)
    x = _sample(n, seed)
    payload = codec.encode(x)
    values = codec.decode(payload, n)
    assert len(payload) == codec.wire_size(n)
    assert values.shape == (n,) and values.dtype == torch.float32 and bool(torch.isfinite(values).all())


@pytest.mark.parametrize("n", [200_000, 131_072, 262_145])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_cutting_a_tensor_into_blocks_changes_nothing(name: str, options: dict[str, Any], n: int) -> None:
    """A large tensor has the bytes of its blocks: how the work is sliced inside is not visible."""
    codec = get(name, **options)
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    values = _again(codec, x)
    if name in BLOCKS:
        tail = n - n % 32 - 64
        assert torch.equal(values[:64], _again(codec, x[:64]))
        assert torch.equal(values[tail:], _again(codec, x[tail:]))
        middle = slice(131_072 - 64, min(131_072 + 64, n))
        assert torch.equal(values[middle], _again(codec, x[middle].clone()))
    elif name == "topk":
        assert int(values.count_nonzero()) <= 4 * math.ceil(n / 64)
    else:
        assert bool(((values - x).abs() <= 4.0 * x.abs().max()).all())
        assert float((values - x).square().mean()) < 0.3


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("n", [1, 31, 32, 65])
def test_a_zero_block_is_all_zero_bytes_and_decodes_to_zeros(name: str, n: int) -> None:
    """Scale 0, codes 0; minus zero is zero."""
    codec = get(name, block=32)
    x = torch.zeros(n)
    x[::2] = -0.0
    assert codec.encode(x) == bytes(codec.wire_size(n))
    assert torch.equal(codec.decode(bytes(codec.wire_size(n)), n), torch.zeros(n))


@pytest.mark.parametrize("name", ["int8", "e4m3", "e5m2", "e2m1", "int4"])
def test_a_block_too_small_for_a_scale_is_a_zero_block(name: str) -> None:
    """Where the fp32 scale underflows to 0, zeros are sent, not infinities."""
    codec = get(name, block=32)
    assert codec.encode(torch.full((32,), 1.4e-45)) == bytes(codec.wire_size(32))


@pytest.mark.parametrize("name", SYMMETRIC)
@quick
@given(n=sizes, seed=seeds)
def test_the_opposite_input_decodes_to_the_opposite(name: str, n: int, seed: int) -> None:
    """dec(enc(-x)) == -dec(enc(x)), bit for bit up to the sign of zero."""
    codec = get(name, block=32)
    x = _sample(n, seed)
    assert torch.equal(_again(codec, -x), -_again(codec, x))


@pytest.mark.parametrize("name", BLOCKS)
@quick
@given(n=sizes, seed=seeds, power=st.integers(-30, 30))
def test_scaling_by_a_power_of_two_scales_the_decode_exactly(
    name: str, n: int, seed: int, power: int
) -> None:
    """dec(enc(2^j x)) == 2^j dec(enc(x))."""
    codec = get(name, block=32)
    x = _sample(n, seed)
    assert torch.equal(_again(codec, x * 2.0**power), _again(codec, x) * 2.0**power)


@pytest.mark.parametrize("name", BLOCKS)
@quick
@given(seed=seeds)
def test_order_within_a_block_is_kept(name: str, seed: int) -> None:
    """x_i <= x_j implies dec_i <= dec_j."""
    codec = get(name, block=256)
    x = _sample(256, seed).sort().values
    values = _again(codec, x)
    assert bool((values[1:] >= values[:-1]).all())


@pytest.mark.parametrize("name", BLOCKS)
@quick
@given(n=sizes, seed=seeds)
def test_no_value_grows_beyond_the_largest_of_its_block(name: str, n: int, seed: int) -> None:
    """|dec| <= absmax*(1 + 2^-22), and the largest value itself is exact for e3m0 and nf4."""
    codec = get(name, block=32)
    x = _sample(n, seed)
    values = _again(codec, x)
    largest = _blockwise_max(x, 32)
    assert bool((values.abs().double() <= largest.double() * (1 + 2**-22)).all())
    if name in ("e3m0", "nf4"):
        at = x.abs() == largest
        assert torch.equal(values[at], x[at])


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", *BLOCKS])
@quick
@given(n=sizes, seed=seeds)
def test_coding_twice_is_coding_once(name: str, n: int, seed: int) -> None:
    """dec(enc(.)) is idempotent, for fp8 up to the last bit of the scale."""
    codec = get(name, **({"block": 32} if name in BLOCKS else {}))
    once = _again(codec, _sample(n, seed))
    fp8 = name in ("e4m3", "e5m2")
    torch.testing.assert_close(_again(codec, once), once, rtol=2**-22 if fp8 else 0, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
@quick
@given(n=sizes, codes=st.randoms(use_true_random=False), scale=st.floats(0, 2.0**100, width=32))
def test_any_codes_decode_to_finite_values(name: str, n: int, codes: Any, scale: float) -> None:
    """Random codes under finite scales never raise and never yield NaN; the NaN codes of fp8 are refused."""
    codec = get(name, block=32)
    count = math.ceil(n / 32)
    body = bytes(codes.randrange(256) for _ in range(codec.wire_size(n) - 4 * count))
    payload = np.full(count, scale, dtype="<f4").tobytes() + body
    limit = {"e4m3": 0x7E, "e5m2": 0x7B}.get(name)
    if limit is not None and any(byte & 0x7F > limit for byte in body):
        with pytest.raises(CorruptDataError, match="code"):
            codec.decode(payload, n)
    else:
        assert bool(torch.isfinite(codec.decode(payload, n)).all())


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@quick
@given(n=st.sampled_from((1, 33, 64)), data=st.binary(min_size=1300, max_size=1400))
def test_arbitrary_bytes_decode_to_finite_values_or_are_refused(
    name: str, options: dict[str, Any], n: int, data: bytes
) -> None:
    """No byte string makes decode fail in another way, or yields NaN."""
    codec = get(name, **options)
    try:
        values = codec.decode(data[: codec.wire_size(n)], n)
    except CorruptDataError:
        return
    assert values.shape == (n,) and not bool(torch.isnan(values).any())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_nan_and_infinity_are_not_encoded(name: str, options: dict[str, Any], bad: float) -> None:
    """One non-finite value anywhere refuses the whole tensor."""
    codec = get(name, **options)
    for at in (0, 40, 69):
        x = torch.ones(70)
        x[at] = bad
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            codec.encode(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_bad_scale_is_refused_by_name(name: str, bad: float) -> None:
    """Non-finite and negative scales say which block they spoil, and decode_add then adds nothing."""
    codec = get(name, block=32)
    payload = bytearray(codec.encode(torch.ones(64)))
    payload[4:8] = np.float32(bad).tobytes()
    out = torch.zeros(64)
    with pytest.raises(CorruptDataError, match="scale of block 1"):
        codec.decode_add(payload, 1.0, out)
    assert not out.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_a_received_non_finite_number_is_refused(name: str, bad: float) -> None:
    """Plain floats get no further than coded ones."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    payload = torch.tensor([1.0, bad]).to(dtype).view(torch.uint8).numpy().tobytes()
    with pytest.raises(CorruptDataError, match="NaN or infinity"):
        get(name).decode(payload, 2)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_wrong_length_is_refused_with_both_sizes(name: str, options: dict[str, Any]) -> None:
    """One byte less or more is no payload."""
    codec = get(name, **options)
    payload = codec.encode(torch.ones(65))
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(CorruptDataError, match=f"{len(wrong)} bytes, want {len(payload)}"):
            codec.decode(wrong, 65)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_decode_add_is_scale_then_add(name: str, options: dict[str, Any], wrap: Any) -> None:
    """out + (weight*decoded), each rounded once, from any kind of buffer, even at an odd address."""
    codec = get(name, **options)
    x = _sample(257, 3)
    payload = codec.encode(x)
    shifted = memoryview(b"?" + payload)[1:] if wrap is memoryview else wrap(payload)
    out = torch.linspace(-1, 1, 257)
    want = out.clone().add_(codec.decode(payload, 257).mul_(0.3))
    codec.decode_add(shifted, 0.3, out)
    assert torch.equal(out, want)


def test_a_decoded_tensor_has_its_own_memory() -> None:
    """Writing into it changes neither the payload nor the encoded tensor."""
    x = torch.ones(4)
    payload = get("fp32").encode(x)
    get("fp32").decode(payload, 4).zero_()
    assert x.tolist() == [1, 1, 1, 1] and get("fp32").decode(payload, 4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e-39, 3.4e38])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_stat_keeps_a_constant_exactly(bits: int, value: float, n: int) -> None:
    """No deviation: middle code, empty table, the mean as shift."""
    x = torch.full((n,), value)
    codec = get("stat", bits=bits)
    payload = codec.encode(x)
    assert torch.equal(codec.decode(payload, n), x)
    assert payload[4 : 4 + 4 * 2**bits] == bytes(4 * 2**bits)


def test_stat_groups_are_coded_one_by_one() -> None:
    """With spans the values are those of separately coded tensors, each group's codes on its own bytes."""
    x = _sample(40, 5)
    codec = get("stat", bits=2, spans=(7, 32, 1))
    parts = [get("stat", bits=2).encode(part) for part in (x[:7], x[7:39], x[39:])]
    payload = codec.encode(x)
    assert len(payload) == codec.wire_size(40) == sum(map(len, parts))
    want = b"".join((*(p[:4] for p in parts), *(p[4:20] for p in parts), *(p[20:] for p in parts)))
    assert payload == want
    alone = [get("stat", bits=2).decode(p, n) for p, n in zip(parts, (7, 32, 1), strict=True)]
    assert torch.equal(codec.decode(payload, 40), torch.cat(alone))


@quick
@given(n=sizes, seed=seeds)
def test_topk_keeps_the_largest_and_lower_index_wins_ties(n: int, seed: int) -> None:
    """The kept places are those of a stable descending sort by size, for each chunk."""
    x = _sample(n, seed)
    codec = get("topk", k=4, chunk=64, bits=8)
    values = _again(codec, x + 0.0)
    for lo in range(0, n, 64):
        part = x[lo : lo + 64]
        kept = torch.sort(part.abs(), descending=True, stable=True).indices[:4].tolist()
        left = set(range(part.numel())) - set(kept)
        assert not values[lo : lo + 64][sorted(left)].any()


def test_topk_refuses_indices_that_repeat_or_leave_the_chunk() -> None:
    """Two values for one place would make the result depend on the order of writing."""
    codec = get("topk", k=2, chunk=64)
    payload = bytearray(codec.encode(torch.ones(64)))
    for first_three in (bytes.fromhex("01 10 00"), bytes.fromhex("02 10 00"), bytes.fromhex("00 00 04")):
        payload[:3] = first_three
        with pytest.raises(CorruptDataError, match="not ascending below the chunk of 64"):
            codec.decode(payload, 64)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("e3mo", {}, "did you mean 'e3m0'"),
        ("int8", {"blok": 64}, "did you mean 'block'"),
        ("int8", {"block": 48}, "block=48 must be a power of two"),
        ("fp32", {"block": 64}, "unknown option 'block'"),
        ("stat", {"bits": 3}, "bits=3 must be 2, 4 or 8"),
        ("topk", {"k": 3}, "k=3 must be an even"),
        ("topk", {"k": 66, "chunk": 64}, "k=66 must be an even"),
        ("stat", {"stochastic": True}, "leave codec.stochastic false"),
    ],
)
def test_a_wrong_name_or_option_says_what_is_right(name: str, options: dict[str, Any], message: str) -> None:
    """The message names the value and the way out."""
    with pytest.raises(ConfigError, match=message):
        get(name, **options)


def test_stochastic_false_is_accepted_everywhere() -> None:
    """The default of the configuration fits every codec."""
    assert all(get(name, stochastic=False) == get(name) for name in NAMES)


@pytest.mark.parametrize(
    ("name", "options"), [("stat", {"bits": 2}), ("stat", {"bits": 8}), ("topk", {"k": 10, "chunk": 64})]
)
@pytest.mark.parametrize("n", [1, 64, 1001])
def test_the_settings_of_a_codec_follow_from_the_payload_size(
    name: str, options: dict[str, Any], n: int
) -> None:
    """bits and k are not in the header, but no two of them have the same size."""
    codec = get(name, **options)
    assert infer(codec.id, codec.block, n, codec.wire_size(n)) == codec


@pytest.mark.parametrize("name", ["e2m1", "nf4", "int4", "int8"])
@quick
@given(n=sizes, seed=seeds)
def test_every_value_goes_to_the_nearest_level(name: str, n: int, seed: int) -> None:
    """No level of the code lies closer to the quotient than the chosen one."""
    codec = get(name, block=32)
    x = _sample(n, seed)
    levels = torch.tensor(range(-127, 128) if name == "int8" else block_levels(name)).double()
    divisor = {"e2m1": 6.0, "nf4": 1.0, "int4": 7.0, "int8": 127.0}[name]
    scale = (_blockwise_max(x, 32) / torch.tensor(divisor)).double()
    scale[scale == 0] = 1.0
    error = (_again(codec, x).double() - x.double()).abs() / scale
    best = (levels[None, :] - (x.double() / scale)[:, None]).abs().amin(dim=1)
    assert bool((error <= best + 1e-5).all())


def test_a_tensor_that_is_not_flat_float32_is_refused() -> None:
    """The message says how to make it so."""
    for wrong in (torch.ones(2, 2), torch.ones(2, dtype=torch.float64), torch.ones(4)[::2]):
        with pytest.raises(TypeError, match="reshape"):
            get("e3m0").encode(wrong)
