"""Stochastic rounding: unbiased, between the two neighbours, and a function of the seed and the message alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.codec_section import BLOCK_CODECS, CODECS
from diloco.comms import frame as frames
from diloco.comms.codec import NAMES, Codec, ErrorFeedback, get
from diloco.comms.frame import FLAG_EF, FLAG_STOCHASTIC, decode_frame, encode_frame, unpack
from diloco.errors import ConfigError, CorruptDataError
from diloco.kernels.reference_blocks import DIVISOR

torch.set_num_threads(1)

quick = settings(max_examples=25, deadline=None)
MESSAGE = {"fragment": 3, "round": 7, "run_id": 5, "worker": 1, "incarnation": 2}
REST = {"base_version": 0, "steps": 1, "tokens": 0}


def rounding(name: str, seed: int = 1) -> Codec:
    return get(name, block=32, stochastic=True, seed=seed)


def values(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def payload(codec: Codec, x: Tensor, **changes: int) -> bytes:
    return bytes(unpack(encode_frame(codec, x, **{**MESSAGE, **REST, **changes}), codec=codec)[1])


def test_the_configuration_names_the_codecs_that_there_are() -> None:
    """Its lists stand apart from the kernels, so that reading a configuration needs no torch."""
    assert CODECS == NAMES and set(BLOCK_CODECS) == set(DIVISOR)


@pytest.mark.parametrize("name", BLOCK_CODECS)
def test_the_mean_over_many_messages_is_the_value(name: str) -> None:
    """Unbiased: the mean of 600 draws is within five standard errors of the value, where nearest is not.

    A draw lies within one gap between levels of the value, so its deviation is at most half a gap.
    """
    codec, x, count = rounding(name), values(256), 600
    total, squares = torch.zeros(256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64)
    for i in range(count):
        drawn = codec.decode(codec.encode(x, (i,)), 256).double()
        total, squares = total + drawn, squares + drawn.square()
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    # A value next to a level may never have been drawn away from it: one draw of 600 is the least that can be seen.
    bound = 5 * deviation / count**0.5 + x.abs().max() / count
    assert bool(((mean - x.double()).abs() <= bound).all())
    nearest = get(name, block=32)
    error = (nearest.decode(nearest.encode(x), 256) - x).double()
    assert float((mean - x.double()).norm()) < 0.35 * float(error.norm())


@pytest.mark.parametrize("name", BLOCK_CODECS)
@quick
@given(n=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), key=st.integers(0, 2**64 - 1))
def test_the_same_seed_and_message_give_the_same_bytes(name: str, n: int, seed: int, key: int) -> None:
    """Stateless: another codec object, or other messages in between, change nothing."""
    x, codec = values(n, n), rounding(name, seed)
    first = codec.encode(x, (key, 1))
    codec.encode(x, (key, 2))
    assert rounding(name, seed).encode(x, (key, 1)) == first
    assert len(first) == codec.wire_size(n)
    assert bool(torch.isfinite(codec.decode(first, n)).all())


@pytest.mark.parametrize(
    "changes", [{"fragment": 4}, {"round": 8}, {"run_id": 6}, {"worker": 2}, {"incarnation": 0}]
)
def test_every_message_draws_numbers_of_its_own(changes: dict[str, int]) -> None:
    """Run, worker, fragment, round and the run's seed each decide; the coordinator (incarnation 0) is no worker."""
    x, codec = values(400), rounding("e3m0")
    assert payload(codec, x, **changes) != payload(codec, x) != payload(rounding("e3m0", 2), x)


def test_a_new_life_and_another_base_draw_the_same_numbers() -> None:
    """What differs between a run and its resumption does not count: promise 6 and resumption stay bit for bit."""
    x, codec = values(400), rounding("e3m0")
    assert payload(codec, x, incarnation=9, base_version=4, steps=8, tokens=3) == payload(codec, x)


def test_the_coordinator_draws_independently_of_every_worker() -> None:
    """A commit of round r is rounded with other numbers than worker 0's contribution to round r."""
    codec, x = rounding("int8"), torch.full((125, 32), 3.5)
    x[:, 0] = 127.0  # the scale is 1: all others lie halfway between two levels
    halves = x.view(-1)
    down = codec.decode(payload(codec, halves, worker=0, incarnation=0), 4000).view(125, 32)[:, 1:]
    up = codec.decode(payload(codec, halves, worker=0, incarnation=1), 4000).view(125, 32)[:, 1:]
    assert set(down.flatten().tolist()) == set(up.flatten().tolist()) == {3.0, 4.0}
    assert 0.45 < float((down == up).float().mean()) < 0.55


@pytest.mark.parametrize("name", BLOCK_CODECS)
@quick
@given(n=st.integers(1, 200), seed=st.integers(0, 1000))
def test_what_error_feedback_keeps_is_what_was_not_sent(name: str, n: int, seed: int) -> None:
    """e_new == beta*e + D - dec(c), bit for bit, with the draws of the message."""
    feedback, codec = ErrorFeedback(rounding(name), 0.9), rounding(name)
    e = torch.zeros(n)
    for i in range(3):
        corrected = e * 0.9 + values(n, seed + i)
        sent = codec.decode(feedback.encode(values(n, seed + i), (i,)), n)
        assert feedback.residual is not None and torch.equal(feedback.residual, corrected - sent)
        feedback.commit()
        e = feedback.residual.clone()


def test_a_frame_says_how_it_was_rounded_and_its_reader_insists() -> None:
    """Flag 1 of the header; a run with stochastic rounding takes no frame without it, and the other way round."""
    x, codec, plain = values(64), rounding("int4"), get("int4", block=32)
    framed = encode_frame(ErrorFeedback(codec, 1.0), x, **MESSAGE, **REST)
    assert decode_frame(framed, codec=codec)[0].flags == FLAG_STOCHASTIC | FLAG_EF
    with pytest.raises(CorruptDataError, match="do not match the rounding"):
        unpack(framed, codec=plain)
    with pytest.raises(CorruptDataError, match="do not match the rounding"):
        unpack(encode_frame(plain, x, **MESSAGE, **REST), codec=codec)
    assert frames.is_final(framed) is False


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BLOCK_CODECS])
def test_a_codec_without_it_says_which_have_it(name: str) -> None:
    """fp32 rounds nothing; the casts, stat and topk round to nearest only."""
    with pytest.raises(ConfigError, match=f"codec {name}: stochastic=True is for int8"):
        get(name, stochastic=True)
