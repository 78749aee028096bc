"""The codecs against fixed bytes, sizes and error figures. The laws they obey on any input are in tests/laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.comms.codec import NAMES, by_id, get
from diloco.kernels.reference_topk import indices_of

X = torch.tensor([1, -0.5, 0.3, 0.1, 0, -0.02, 0.01, 0.75])

PAYLOADS = {
    "int8": "04 02 01 3c 7f c0 26 0d 00 fd 01 5f",
    "e4m3": "25 49 12 3b 7e f6 70 63 00 d1 49 7a",
    "e5m2": "25 49 92 37 7b f7 74 6e 00 e4 60 79",
    "e3m0": "00 00 80 3f e7 45 90 71",
    "e2m1": "ab aa 2a 3e d7 14 00 60",
    "nf4": "00 00 80 3f 2f 8b 77 e7",
    "int4": "25 49 12 3e d7 12 00 50",
}

SIZES: list[tuple[str, dict[str, Any], int]] = [
    ("fp32", {}, 4_000_000),
    ("fp16", {}, 2_000_000),
    ("bf16", {}, 2_000_000),
    ("int8", {}, 1_015_628),
    ("e4m3", {}, 1_015_628),
    ("e5m2", {}, 1_015_628),
    ("e3m0", {}, 515_628),
    ("e2m1", {}, 515_628),
    ("int4", {}, 515_628),
    ("e2m1", {"block": 32}, 625_000),
    ("nf4", {}, 562_500),
    ("stat", {"bits": 2}, 250_020),
    ("topk", {}, 27_460),
]

# name, options, NMSE on N(0,1), its tolerance, NMSE on Student t with 4 degrees of freedom, its tolerance
ERRORS: list[tuple[str, dict[str, Any], float, float, float, float]] = [
    ("fp16", {}, 4.3e-8, 0.03, 4.3e-8, 0.15),
    ("bf16", {}, 2.8e-6, 0.03, 2.8e-6, 0.15),
    ("int8", {}, 4.9e-5, 0.03, 1.7e-4, 0.15),
    ("e4m3", {}, 6.8e-4, 0.03, 6.1e-4, 0.15),
    ("e5m2", {}, 2.7e-3, 0.03, 2.4e-3, 0.15),
    ("e3m0", {}, 3.8e-2, 0.03, 3.4e-2, 0.15),
    ("e2m1", {}, 1.24e-2, 0.03, 2.3e-2, 0.15),
    ("e2m1", {"block": 32}, 1.0e-2, 0.03, 1.1e-2, 0.15),
    ("nf4", {}, 8.5e-3, 0.03, 1.2e-2, 0.15),
    ("int4", {}, 1.6e-2, 0.03, 5.4e-2, 0.15),
    ("stat", {"bits": 2}, 0.179, 0.10, 0.26, 0.30),
    ("stat", {"bits": 4}, 0.0124, 0.10, 0.052, 0.30),
    ("stat", {"bits": 8}, 2.6e-4, 0.10, 0.032, 0.30),
    ("topk", {}, 0.88, 0.10, 0.72, 0.30),
]


def _nmse(x: Tensor, name: str, options: dict[str, Any]) -> float:
    codec = get(name, **options)
    back = codec.decode(codec.encode(x), x.numel())
    return float((x - back).double().square().sum() / x.double().square().sum())


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_short_block_has_the_golden_bytes(name: str) -> None:
    """Scale first, then the codes, even index in the low nibble."""
    assert get(name).encode(X) == bytes.fromhex(PAYLOADS[name])


def test_e3m0_decodes_the_golden_bytes_to_powers_of_two() -> None:
    """Each value goes to the nearest power of two of the largest one."""
    values = get("e3m0").decode(bytes.fromhex(PAYLOADS["e3m0"]), 8)
    assert values.tolist() == [1, -0.5, 0.25, 0.125, 0, -0.015625, 0.015625, 1]


def test_e3m0_code_eight_decodes_to_zero() -> None:
    """The unused minus zero of the code space is a plain zero, whoever sends it."""
    values = get("e3m0").decode(bytes.fromhex("00 00 80 3f 88"), 2)
    assert values.tolist() == [0, 0] and not torch.signbit(values).any()


def test_stat2_has_the_golden_shift_table_and_codes() -> None:
    """Shift .205, bins of width .711919 and the means of their members."""
    payload = get("stat", bits=2).encode(X)
    constants = torch.frombuffer(bytearray(payload[:20]), dtype=torch.float32)
    torch.testing.assert_close(constants, torch.tensor([0.205, 0, -0.705, -0.127, 0.67]), atol=1e-6, rtol=0)
    assert payload[20:] == bytes.fromhex("a7 ea")


def test_stat_takes_the_unbiased_deviation() -> None:
    """For -1, 1 it is sqrt(2): bins of 2.12, both values in the middle one; the biased 1 would part them."""
    payload = get("stat", bits=2).encode(torch.tensor([-1.0, 1.0]))
    assert payload == bytes(20) + bytes([0b1010])


def test_the_golden_index_pair_packs_into_three_bytes() -> None:
    """Indices 0x123 and 0xabc are the bytes 23 c1 ab."""
    codec = get("topk", k=2, bits=8)
    x = torch.zeros(4096)
    x[0x123], x[0xABC] = 1.0, -2.0
    payload = codec.encode(x)
    assert payload[:3] == bytes.fromhex("23 c1 ab")
    assert indices_of(torch.tensor(list(payload), dtype=torch.uint8), 4096, 2, 4096).tolist() == [
        [0x123, 0xABC]
    ]
    torch.testing.assert_close(codec.decode(payload, 4096), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "options", "size"), SIZES)
def test_a_million_values_have_the_golden_size(name: str, options: dict[str, Any], size: int) -> None:
    """wire_size is exact, and encode keeps to it."""
    codec = get(name, **options)
    assert codec.wire_size(1_000_000) == size
    assert len(codec.encode(torch.linspace(-1, 1, 1_000_000))) == size


@pytest.mark.parametrize(("name", "options", "normal", "within", "t4", "t4_within"), ERRORS)
def test_the_error_is_the_one_in_the_table(
    name: str, options: dict[str, Any], normal: float, within: float, t4: float, t4_within: float
) -> None:
    """NMSE on normal and on heavy-tailed samples stays within the stated tolerance."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1 << 19, generator=generator)
    chi = torch.randn(4, 1 << 19, generator=generator).square_().sum(dim=0).div_(4)
    assert _nmse(x, name, options) == pytest.approx(normal, rel=within)
    assert _nmse(x / chi.sqrt(), name, options) == pytest.approx(t4, rel=t4_within)


def test_names_stand_at_their_wire_numbers() -> None:
    """The numbers are fixed: a frame written today is read the same way later."""
    names = ["fp32", "fp16", "bf16", "int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4", "stat", "topk"]
    assert list(NAMES) == names
    assert [get(name).id for name in names] == list(range(12))
    assert [by_id(i, get(name).block).name for i, name in enumerate(names)] == names


def test_e2m1_ties_go_to_the_even_code_on_both_sides() -> None:
    """Halfway values round to the neighbour with mantissa bit 0."""
    middle = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    x = torch.tensor([6.0, *middle, *(-m for m in middle)])
    codec = get("e2m1")
    want = [0, 1, 1, 2, 2, 4, 4]
    assert codec.decode(codec.encode(x), x.numel()).tolist() == [6.0, *want, *(-w for w in want)]


def test_e3m0_ties_go_to_the_larger_power_and_the_smallest_goes_to_zero() -> None:
    """1.5*2^k rounds up; 2^-7, the middle between zero and the smallest level, rounds to zero."""
    x = torch.tensor([1.0, 0.75, 0.375, -0.1875, 1.5 * 2**-6, 2**-7, -(2**-7) * 1.0001])
    codec = get("e3m0")
    assert codec.decode(codec.encode(x), 7).tolist() == [1, 1, 0.5, -0.25, 2**-5, 0, -(2**-6)]


@pytest.mark.parametrize(("name", "largest"), [("fp16", 65504.0), ("bf16", torch.finfo(torch.bfloat16).max)])
def test_narrow_floats_saturate(name: str, largest: float) -> None:
    """A value beyond the range becomes the largest finite one of its sign."""
    x = torch.tensor([3.4e38, -3.4028234e38])
    codec = get(name)
    assert codec.decode(codec.encode(x), 2).tolist() == [largest, -largest]
