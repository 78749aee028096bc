"""Weights of contributions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.aggregate import weights
from diloco.errors import ConfigError

counts = st.lists(st.integers(0, 2**50), min_size=1, max_size=40)


@given(st.sampled_from(["uniform", "tokens"]), counts)
def test_weights_sum_to_one_over_who_contributed(mode: str, tokens: list[int]) -> None:
    """I8: the divisor is the accepted set, never the configured number of workers."""
    shares = weights(mode, tokens)
    assert len(shares) == len(tokens)
    assert sum(shares) == pytest.approx(1.0, abs=1e-12)
    assert all(share >= 0 for share in shares)


def test_uniform_counts_heads_and_tokens_counts_tokens() -> None:
    """Two modes, by example."""
    assert weights("uniform", [10, 30]) == [0.5, 0.5]
    assert weights("tokens", [10, 30]) == [0.25, 0.75]


def test_no_tokens_at_all_means_uniform() -> None:
    """Zero counts must not divide by zero."""
    assert weights("tokens", [0, 0, 0, 0]) == [0.25] * 4


def test_an_unknown_mode_is_refused() -> None:
    """The key and its value are named."""
    with pytest.raises(ConfigError, match=r"weights.mode = 'rank'"):
        weights("rank", [1])
