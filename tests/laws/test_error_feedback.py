"""Error feedback loses nothing: what was sent and what is kept add up to what came in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diloco.comms.codec import ErrorFeedback, get
from diloco.errors import ConfigError, CorruptDataError, NonFiniteError

CODECS: list[tuple[str, dict[str, Any]]] = [
    ("e3m0", {}),
    ("int4", {"block": 64}),
    ("stat", {"bits": 2}),
    ("topk", {"k": 8, "chunk": 256}),
]


def _deltas(count: int, n: int = 1000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(n, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_with_beta_one_everything_sent_plus_the_residual_is_everything_put_in(
    name: str, options: dict[str, Any]
) -> None:
    """sum of decoded payloads + e == sum of D to 1e-6."""
    codec = get(name, **options)
    feedback = ErrorFeedback(codec, 1.0)
    sent, total = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for delta in _deltas(20):
        sent += codec.decode(feedback.encode(delta), 1000)
        total += delta
        feedback.commit()
    assert feedback.residual is not None
    assert float((sent + feedback.residual - total).norm() / total.norm()) < 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.95])
def test_payload_and_new_residual_restore_the_corrected_update_exactly(beta: float) -> None:
    """e_new + dec(c) == beta*e + D in fp32: a power of two within a factor of two is subtracted without rounding."""
    codec = get("e3m0")
    feedback = ErrorFeedback(codec, beta)
    e = torch.zeros(1000)
    for delta in _deltas(10):
        corrected = e * beta + delta
        payload = feedback.encode(delta)
        feedback.commit()
        assert feedback.residual is not None
        assert torch.equal(feedback.residual + codec.decode(payload, 1000), corrected)
        e = feedback.residual.clone()


def test_a_rejected_message_leaves_no_trace() -> None:
    """After rollback the next payload is the one a feedback that never sent the rejected update produces."""
    first, rejected, third = _deltas(3)
    feedback, never = ErrorFeedback(get("int4"), 0.95), ErrorFeedback(get("int4"), 0.95)
    for one in (feedback, never):
        one.encode(first)
        one.commit()
    feedback.encode(rejected)
    feedback.rollback()
    assert feedback.encode(third) == never.encode(third)


def test_the_first_message_rolls_back_to_zero() -> None:
    """Before any accepted message there is nothing to keep."""
    feedback = ErrorFeedback(get("int4"), 1.0)
    feedback.encode(_deltas(1)[0])
    feedback.rollback()
    assert feedback.residual is not None and not feedback.residual.any()


def test_rollback_after_commit_changes_nothing() -> None:
    """A committed message cannot be taken back."""
    feedback = ErrorFeedback(get("int4"), 1.0)
    feedback.encode(_deltas(1)[0])
    feedback.commit()
    assert feedback.residual is not None
    kept = feedback.residual.clone()
    feedback.rollback()
    assert torch.equal(feedback.residual, kept) and bool(kept.any())


def test_a_second_update_waits_for_the_fate_of_the_first() -> None:
    """Building on a message that may still be rejected is an error, and changes nothing."""
    first, second = _deltas(2)
    feedback = ErrorFeedback(get("int4"), 1.0)
    feedback.encode(first)
    with pytest.raises(RuntimeError, match="commit"):
        feedback.encode(second)
    assert feedback.pending


def test_a_lossless_codec_leaves_the_residual_zero() -> None:
    """With fp32 nothing is lost, so nothing is kept."""
    feedback = ErrorFeedback(get("fp32"), 0.95)
    for delta in _deltas(3):
        feedback.encode(delta)
        feedback.commit()
        assert feedback.residual is not None and not feedback.residual.any()


def test_a_non_finite_update_leaves_the_residual_alone() -> None:
    """The worker may skip the round and go on."""
    good, bad = _deltas(2)
    bad[3] = math.nan
    feedback = ErrorFeedback(get("int4"), 1.0)
    feedback.encode(good)
    feedback.commit()
    assert feedback.residual is not None
    kept = feedback.residual.clone()
    with pytest.raises(NonFiniteError):
        feedback.encode(bad)
    assert torch.equal(feedback.residual, kept) and not feedback.pending


def test_the_callers_update_is_not_written_to() -> None:
    """encode reads the update only."""
    delta = _deltas(1)[0]
    copy = delta.clone()
    ErrorFeedback(get("e3m0"), 1.0).encode(delta)
    assert torch.equal(delta, copy)


def test_a_restored_state_goes_on_as_the_original_even_while_a_message_is_out() -> None:
    """state_dict holds what rollback needs."""
    first, second, third = _deltas(3)
    feedback = ErrorFeedback(get("int4"), 0.9)
    feedback.encode(first)
    feedback.commit()
    feedback.encode(second)
    restored = ErrorFeedback(get("int4"), 0.9)
    restored.load_state_dict(feedback.state_dict())
    for one in (feedback, restored):
        one.rollback()
    assert feedback.encode(third) == restored.encode(third)


def test_a_fresh_state_is_empty_and_loads() -> None:
    """Before the first update there is nothing to store."""
    feedback = ErrorFeedback(get("int4"), 0.9)
    assert feedback.state_dict() == {}
    feedback.load_state_dict({})
    assert feedback.residual is None


def test_a_foreign_state_and_a_wrong_beta_are_refused() -> None:
    """The message names what is wrong."""
    feedback = ErrorFeedback(get("int4"), 0.9)
    for state in (
        {"momentum": torch.zeros(3)},
        {"before": torch.zeros(3)},
        {"residual": torch.zeros(3).double()},
    ):
        with pytest.raises(CorruptDataError, match="error feedback"):
            feedback.load_state_dict(state)
    with pytest.raises(ConfigError, match="ef_beta=1.5"):
        ErrorFeedback(get("int4"), 1.5)
