"""Weights, step normalisation and merging by direction, as plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diloco.aggregate import MODES, rda, rda_pieces, step_scales, weights
from diloco.errors import ConfigError
from diloco.fragments import build_plan

torch.set_num_threads(1)

rows = st.lists(
    st.tuples(st.integers(0, 2**50), st.integers(1, 400), st.integers(0, 5)), min_size=1, max_size=20
)


@given(st.sampled_from(MODES), rows)
def test_weights_of_every_mode_sum_to_one(mode: str, found: list[tuple[int, int, int]]) -> None:
    """I8: with or without staleness, over the accepted contributions only."""
    tokens, steps, stale = ([row[i] for row in found] for i in range(3))
    for staleness in (None, stale):
        shares = weights(mode, tokens, steps=steps, shards=tokens, staleness=staleness)
        assert sum(shares) == pytest.approx(1.0, abs=1e-12)
        assert len(shares) == len(tokens) and min(shares) >= 0


def test_tokens_rate_counts_tokens_times_tokens_per_step() -> None:
    """100 tokens in 10 steps against 100 in 20: 1000 to 500."""
    assert weights("tokens_rate", [100, 100], steps=[10, 20]) == pytest.approx([2 / 3, 1 / 3])
    assert weights("tokens_rate", [0, 0], steps=[10, 20]) == [0.5, 0.5]
    with pytest.raises(ConfigError, match="steps"):
        weights("tokens_rate", [1, 2])


def test_shard_counts_the_data_and_not_what_was_read_of_it() -> None:
    """2311.08105: proportional to the shards' sizes; nobody's size known: uniform."""
    assert weights("shard", [10, 90], shards=[300, 100]) == [0.75, 0.25]
    assert weights("shard", [10, 90], shards=[0, 0]) == [0.5, 0.5]
    with pytest.raises(ConfigError, match="size of each worker's shard"):
        weights("shard", [10, 90])


def test_a_stale_contribution_weighs_less_by_the_root_of_its_age() -> None:
    """s = 3 with the default power of one half: half the weight of a fresh one."""
    assert weights("uniform", [1, 1], staleness=[0, 3]) == pytest.approx([2 / 3, 1 / 3])
    assert weights("tokens", [10, 40], staleness=[0, 3], staleness_pow=1.0) == pytest.approx([0.5, 0.5])
    assert weights("uniform", [1, 1], staleness=[2, 2]) == [0.5, 0.5]


@given(st.integers(1, 1000), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9))
def test_i11_equal_steps_change_nothing_at_all(steps: int, raw: list[float]) -> None:
    """FedNova with equal steps is the weighted mean, to the bit: every factor is exactly 1."""
    shares = [r / sum(raw) for r in raw]
    assert step_scales([steps] * len(raw), shares) == [1.0] * len(raw)


def test_a_worker_that_does_three_times_the_steps_does_not_pull_three_times_as_hard() -> None:
    """Equal progress per step counts equally: D proportional to the steps gives equal parts."""
    shares, steps = [0.5, 0.5], [10, 30]
    parts = [w * s * d for w, s, d in zip(shares, step_scales(steps, shares), (10.0, 30.0), strict=True)]
    assert parts[0] == pytest.approx(parts[1])


def random_deltas(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, generator=generator) * (i + 1) for i in range(count)]


PIECES = [(0, 10), (15, 40)]


def test_i12_rda_of_one_and_of_equal_ones_is_the_input() -> None:
    """One contribution comes back bit for bit, equal ones to rounding."""
    (one,) = random_deltas(1)
    assert torch.equal(rda([one], [1.0], PIECES), one)
    torch.testing.assert_close(rda([one] * 3, [0.2, 0.3, 0.5], PIECES), one)


def test_i12_rda_has_the_weighted_mean_of_the_norms_and_the_direction_of_the_mean_direction() -> None:
    """On each piece; between the pieces it is the weighted mean, bit for bit."""
    deltas, shares = random_deltas(4), [0.1, 0.2, 0.3, 0.4]
    merged = rda(deltas, shares, PIECES)
    mean = rda(deltas, shares, [])
    assert torch.equal(merged[10:15], mean[10:15])
    for start, stop in PIECES:
        norms = [float(d[start:stop].norm()) for d in deltas]
        expected = sum(w * n for w, n in zip(shares, norms, strict=True))
        assert float(merged[start:stop].norm()) == pytest.approx(expected, rel=1e-5)
        directions = [w * d[start:stop] / n for w, d, n in zip(shares, deltas, norms, strict=True)]
        u = torch.stack(directions).sum(0)
        assert float(torch.cosine_similarity(merged[start:stop], u, dim=0)) == pytest.approx(1.0, abs=1e-5)
        assert float(mean[start:stop].norm()) < expected * 0.9, "averaging shortens what does not agree"


def test_rda_falls_back_to_the_mean_where_there_is_no_direction() -> None:
    """A zero contribution, directions that cancel, and norms too small to divide by."""
    a = torch.tensor([3.0, 4.0])
    for other, expected in ((torch.zeros(2), a / 2), (-a, torch.zeros(2)), (a * 1e-40, a / 2)):
        assert torch.equal(rda([a, other], [0.5, 0.5], [(0, 2)]), expected)


def test_embeddings_do_not_merge_by_direction() -> None:
    """Told by the name; the pieces of the others are theirs in the fragment's buffer."""
    shapes = {
        "embed.weight": (3, 2), "blocks.0.w": (4,), "tok_embeddings.weight": (2,), "transformer.wte.weight": (2,),
        "model.embed_tokens.weight": (2,), "norm": (5,), "members.0.remember": (3,),
    }  # fmt: skip
    plan = build_plan(shapes, 4, layout="single")
    names = {(s.offset, s.offset + s.stop - s.start): s.name for s in plan.fragments[0].spans}
    assert [names[piece] for piece in rda_pieces(plan.fragments[0])] == [
        "blocks.0.w",
        "norm",
        "members.0.remember",
    ]
