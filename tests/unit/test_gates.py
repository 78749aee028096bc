"""What a contribution must satisfy before it may count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diloco.comms import codec as codecs
from diloco.comms.frame import encode_frame, pack, unpack
from diloco.coordinator.gates import CAUSES, MAX_NORM, Unfit, check_contribution
from diloco.coordinator.membership import Member
from diloco.errors import CorruptDataError
from diloco.fragments import build_plan

PLAN = build_plan({"blocks.0.w": (6, 5), "embed": (7,)}, 10)
CODEC = codecs.get("e3m0", block=16)
MEMBER = Member("w", 1, 3, 0.0, index=2)
GOOD: dict[str, Any] = {
    "fragment": 0, "round": 4, "base_version": 1, "run_id": 99, "worker": 2, "incarnation": 3, "steps": 10, "tokens": 80,
}  # fmt: skip


def framed(codec: codecs.Codec = CODEC, numel: int = 30, **changes: int) -> bytes:
    values = torch.linspace(-1, 1, numel)
    return encode_frame(codec, values, **{**GOOD, **changes})


def check(frame: bytes, fragment: int = 0) -> Any:
    return check_contribution(frame, PLAN, fragment, 99, CODEC, MEMBER, 4)


def test_a_good_contribution_is_decoded() -> None:
    """Header and values come back as they were sent."""
    checked = check(framed())
    assert checked.header.tokens == 80
    assert torch.equal(checked.values, CODEC.decode(CODEC.encode(torch.linspace(-1, 1, 30)), 30))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"fragment": 1}, "fragment"),
        ({"run_id": 98}, "run_id"),
        ({"worker": 1}, "worker"),
        ({"incarnation": 2}, "incarnation"),
        ({"round": 5}, "round"),
        ({"steps": 0}, "steps"),
        ({"steps": 41}, "steps"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(changes: dict[str, int], name: str) -> None:
    """Another run, life, round or fragment, or impossible steps: the field is named."""
    with pytest.raises(CorruptDataError, match=name):
        check(framed(CODEC, 30, **changes))


def test_another_codec_block_or_size_is_refused() -> None:
    """Only what the run's settings say is decoded at all."""
    for wrong in (
        framed(codecs.get("fp32")),
        framed(codecs.get("e3m0", block=32)),
        framed(numel=29),
        framed(numel=500),
    ):
        with pytest.raises(CorruptDataError):
            check(wrong)


@pytest.mark.parametrize("fragment", [-1, 2, 10**9])
def test_a_fragment_that_does_not_exist_is_refused(fragment: int) -> None:
    """The number is named; nothing is allocated for it."""
    with pytest.raises(CorruptDataError, match="does not exist"):
        check(framed(), fragment)


def test_any_flipped_bit_and_any_cut_is_refused() -> None:
    """A damaged frame never passes: header fields are compared and the payload has a checksum."""
    good = framed()
    checked = check(good)
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        try:
            found = check(bytes(damaged))
        except CorruptDataError:
            continue
        assert torch.equal(found.values, checked.values), f"byte {position} changed the values unseen"
    for length in range(len(good)):
        with pytest.raises(CorruptDataError):
            check(good[:length])
    with pytest.raises(CorruptDataError):
        check(good + b"\x00")


# ---- causes ----

PLAIN = codecs.get("fp32")


def cause_of(frame: bytes, *, codec: codecs.Codec = PLAIN, member: Member = MEMBER, version: int = 1) -> str:
    with pytest.raises(Unfit) as caught:
        check_contribution(frame, PLAN, 0, 99, codec, member, 4, version)
    assert caught.value.cause in CAUSES
    return caught.value.cause


def raw(values: torch.Tensor, l2norm: float | None = None, **changes: int) -> bytes:
    """A frame of fp32 values as they are, with any norm in its header."""
    header, _ = unpack(encode_frame(PLAIN, torch.ones(30), **{**GOOD, **changes}))
    norm = float(values.double().norm()) if l2norm is None else l2norm
    return pack(replace(header, l2norm=norm), values.numpy().tobytes())


def test_values_that_are_not_numbers_are_refused_as_such() -> None:
    """NaN, infinity, and a code that stands for one; counted apart from damaged frames."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = torch.ones(30)
        values[17] = bad
        assert cause_of(raw(values, 5.0)) == "values"
    e4m3 = codecs.get("e4m3", block=16)
    header, payload = unpack(encode_frame(e4m3, torch.ones(30), **GOOD))
    assert cause_of(pack(header, bytes(payload)[:-1] + b"\x7f"), codec=e4m3) == "values"


@pytest.mark.parametrize("factor", [0.0, 0.99, 1.0011, 1e6])
def test_a_norm_that_is_not_the_headers_is_refused(factor: float) -> None:
    """More than 0.1 % apart; half of that is let through."""
    values = torch.linspace(-1, 1, 30)
    norm = float(values.double().norm())
    assert cause_of(raw(values, norm * factor)) == "norm"
    check_contribution(raw(values, norm * 1.0005), PLAN, 0, 99, PLAIN, MEMBER, 4, 1)


def test_a_norm_whose_square_is_no_fp32_number_is_refused() -> None:
    """The header tells it truly, and an outer optimizer would overflow on it."""
    assert cause_of(raw(torch.full((30,), MAX_NORM))) == "norm"
    check_contribution(raw(torch.full((30,), MAX_NORM / 10)), PLAN, 0, 99, PLAIN, MEMBER, 4, 1)


@pytest.mark.parametrize(("version", "cause"), [(0, "ahead"), (2, "stale"), (9, "stale")])
def test_the_base_is_judged_before_the_values(version: int, cause: str) -> None:
    """A late contribution is late, whatever it holds."""
    assert cause_of(raw(torch.full((30,), float("nan")), 1.0), version=version) == cause


@pytest.mark.parametrize(("steps", "tokens"), [(10, 9), (10, 700), (1, 65), (40, 39)])
def test_tokens_that_the_steps_cannot_have_are_refused(steps: int, tokens: int) -> None:
    """More than eight times off what this worker has had per step so far, either way."""
    member = replace(MEMBER, steps=100, tokens=800)
    frame = raw(torch.ones(30), steps=steps, tokens=tokens)
    assert cause_of(frame, member=member) == "tokens"
    check_contribution(frame, PLAN, 0, 99, PLAIN, MEMBER, 4, 1)  # nothing is known of a newcomer


@pytest.mark.parametrize(("steps", "tokens"), [(10, 0), (10, 10), (10, 640), (1, 64), (40, 320)])
def test_tokens_that_the_steps_can_have_pass(steps: int, tokens: int) -> None:
    """No tokens at all too: a flush right after a round has none."""
    member = replace(MEMBER, steps=100, tokens=800)
    frame = raw(torch.ones(30), steps=steps, tokens=tokens)
    assert check_contribution(frame, PLAN, 0, 99, PLAIN, member, 4, 1).header.tokens == tokens


def test_more_tokens_than_any_step_can_have_are_refused_from_a_newcomer_too() -> None:
    """Nobody may take over a token-weighted mean with one number."""
    assert cause_of(raw(torch.ones(30), steps=1, tokens=(1 << 32) + 1)) == "tokens"


def test_other_causes_are_the_fields_they_name() -> None:
    """Steps have their own; everything about the frame itself is corrupt."""
    assert cause_of(framed(PLAIN, steps=41)) == "steps"
    assert cause_of(framed(PLAIN, run_id=98)) == "corrupt"
    assert cause_of(framed(PLAIN)[:-1]) == "corrupt"
    assert cause_of(framed(PLAIN)[:-1] + b"\x01") == "corrupt"
    assert cause_of(b"") == "corrupt"
