"""What a contribution must satisfy before it may count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diloco.comms import codec as codecs
from diloco.comms.frame import encode_frame
from diloco.coordinator.gates import check_contribution
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
