"""Rules that hold out against bad contributions, as plain functions on tensors."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diloco import sums
from diloco.config import RunConfig
from diloco.robust import (
    MEAN,
    Rule,
    agreeing,
    centered_clip,
    clip_scales,
    combine,
    coord_median,
    inliers,
    moving,
    rule_of,
    trimmed_mean,
)

torch.set_num_threads(1)

norms_of = st.lists(st.just(0.0) | st.floats(1e-6, 1e12), min_size=1, max_size=12)


def honest(count: int, numel: int = 200, seed: int = 1, noise: float = 0.5) -> list[Tensor]:
    """Updates that share a direction."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(numel, generator=generator)
    return [common + noise * torch.randn(numel, generator=generator) for _ in range(count)]


# ---- sums ----


@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), max_size=70))
def test_a_norm_is_the_norm(values: list[float]) -> None:
    """Against exact summation."""
    x = torch.tensor(values, dtype=torch.float32)
    expected = math.sqrt(math.fsum(v * v for v in x.tolist()))
    assert sums.norm(x) == pytest.approx(expected, rel=1e-12)


def test_a_dot_product_covers_every_slice_and_does_not_depend_on_threads() -> None:
    """Longer than one slice, with a rest; the same bits whatever the library's settings."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn((1 << 16) * 2 + 77, generator=generator) for _ in range(2))
    expected = sums.dot(a, b)
    assert expected == pytest.approx(float((a.double() * b.double()).sum()), rel=1e-9)
    assert sums.dot(a.clone(), b) == expected
    torch.set_num_threads(2)
    try:
        assert sums.dot(a, b) == expected
    finally:
        torch.set_num_threads(1)


# ---- who counts ----


@given(norms_of)
def test_inliers_are_never_empty_and_never_far_from_the_median(norms: list[float]) -> None:
    """Somebody always stays; fewer than three all stay."""
    kept = inliers(norms)
    assert kept
    if len(norms) < 3:
        assert kept == list(range(len(norms)))
    else:
        middle = sorted(norms)[(len(norms) - 1) // 2 : len(norms) // 2 + 1]
        assert all(norms[i] <= 4 * sum(middle) / len(middle) for i in kept)


def test_norms_four_times_off_are_outliers_both_ways() -> None:
    """Above and below; at the bound it stays."""
    assert inliers([1.0, 1.0, 1.0, 4.0, 4.1, 0.25, 0.24, 0.0]) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("norms", "left"),
    [
        ([1.0, 0.0, 2.0, 0.0], [0, 2]),
        ([0.0, 0.0, 0.0], [0, 1, 2]),
        ([1.0, 0.0], [0, 1]),
        ([1e-30, 1.0, 0.0], [0, 1]),
    ],
)
def test_zeros_among_updates_are_left_out(norms: list[float], left: list[int]) -> None:
    """Not where all are zero, nor of two; a tiny one is an update."""
    assert moving(norms) == left


@pytest.mark.parametrize("factor", [-1.0, -10.0, -1e6])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_turned_update_is_dropped_however_large(factor: float, count: int) -> None:
    """A sign flip among `count` honest ones: it goes, and none of the honest ones with it."""
    deltas = honest(count)
    bad = deltas[0] * factor
    for place in range(count + 1):
        mixed = [*deltas[:place], bad, *deltas[place:]]
        assert agreeing(mixed) == [i for i in range(count + 1) if i != place]


def test_a_minority_cannot_have_the_majority_dropped() -> None:
    """Two that point away against three; and of two nobody is dropped."""
    deltas = honest(3)
    kept = agreeing([*deltas, -deltas[0], -deltas[1]])
    assert kept == [0, 1, 2]
    assert agreeing([deltas[0], -deltas[0]]) == [0, 1]
    third = 2 * math.pi / 3  # each against the two others: one may go, not two
    star = [torch.tensor([math.cos(k * third), math.sin(k * third)]) for k in range(3)]
    assert len(agreeing(star)) == 2


def test_a_zero_update_has_no_direction_and_stays() -> None:
    """It is not an error and not an outlier by angle."""
    assert agreeing([*honest(3), torch.zeros(200)]) == [0, 1, 2, 3]


# ---- how they are combined ----


@given(norms_of)
def test_clipping_leaves_no_norm_above_the_median_and_none_longer(norms: list[float]) -> None:
    """And what is at or below the median is not touched."""
    middle = sorted(norms)[(len(norms) - 1) // 2 : len(norms) // 2 + 1]
    median = sum(middle) / len(middle)
    for norm, scale in zip(norms, clip_scales(norms), strict=True):
        assert 0.0 <= scale <= 1.0
        assert norm * scale <= median * (1 + 1e-12)
        assert norm > median or scale == 1.0


columns = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=n, max_size=n), min_size=3, max_size=3
    )
)


@given(columns, st.integers(0, 6))
def test_coordinatewise_rules_against_sorting_by_hand(rows: list[list[float]], trim: int) -> None:
    """Trimmed mean and median of three coordinates, over 1 to 9 contributions."""
    deltas = list(torch.tensor(rows, dtype=torch.float32).t().contiguous())
    drop = min(trim, (len(deltas) - 1) // 2)
    means, medians = trimmed_mean(deltas, trim), coord_median(deltas)
    for k, row in enumerate(rows):
        ordered = sorted(row)
        kept = ordered[drop : len(ordered) - drop]
        scale = max(map(abs, row)) + 1e-30
        assert float(means[k]) == pytest.approx(sum(kept) / len(kept), rel=1e-5, abs=1e-6 * scale)
        middle = ordered[(len(row) - 1) // 2 : len(row) // 2 + 1]
        assert float(medians[k]) == pytest.approx(sum(middle) / len(middle), rel=1e-5, abs=1e-6 * scale)


def test_coordinatewise_rules_do_not_see_the_order_even_of_signed_zeros() -> None:
    """Permuted contributions give the same bytes."""
    deltas = [torch.tensor([0.0, 1.0, -0.0]), torch.tensor([-0.0, 1.0, -0.0]), torch.tensor([-0.0, 2.0, 0.0])]
    found = {coord_median(p).numpy().tobytes() for p in permutations(deltas)}
    found |= {coord_median([*p, p[0] * 0.0]).numpy().tobytes()[:4] for p in permutations(deltas)}
    assert found == {torch.tensor([0.0, 1.0, 0.0]).numpy().tobytes(), torch.zeros(1).numpy().tobytes()}


def test_coordinatewise_rules_work_across_blocks_of_columns() -> None:
    """More values than one block of the computation."""
    deltas = honest(3, numel=(1 << 18) + 5)
    assert torch.equal(coord_median(deltas), torch.stack(deltas).median(dim=0).values)


def test_centered_clip_moves_towards_the_honest_whatever_one_sends() -> None:
    """One of five sends 1e6 times its update: the result stays beside the honest mean."""
    deltas = honest(5)
    mean = torch.stack(deltas[:4]).mean(0)
    found = centered_clip([*deltas[:4], deltas[4] * 1e6], [0.2] * 5, torch.zeros(200), None, 5)
    assert float((found - mean).norm() / mean.norm()) < 0.25


def test_centered_clip_stands_still_where_all_agree() -> None:
    """Started at what everybody sends, no iteration moves it, and no distance of zero divides."""
    d = honest(1)[0]
    assert torch.equal(centered_clip([d, d, d], [0.2, 0.3, 0.5], d, None, 3), d)


def test_the_start_of_centered_clip_is_left_alone() -> None:
    """It is the last round's aggregate, which may be needed again."""
    center = torch.zeros(200)
    centered_clip(honest(3), [1 / 3] * 3, center, None, 2)
    assert not center.any()


def test_below_three_contributions_every_other_rule_is_clip_median() -> None:
    """Nobody can tell which of two is wrong."""
    for kind in ("norm_outlier", "trimmed", "coord_median", "centered_clip", "cos_gate", "clip_median"):
        assert Rule(kind).clips(2) and not Rule(kind).dense(2)
    assert not MEAN.clips(2) and not Rule("trimmed").clips(3) and Rule("trimmed").dense(3)
    a, b = honest(2)
    assert torch.equal(combine(Rule("coord_median"), [a, b], [0.25, 0.75]), a * 0.25 + b * 0.75)


def test_weights_count_where_the_rule_has_a_use_for_them() -> None:
    """A contribution with all the weight is the result of a clip, and one of three in a median."""
    deltas = honest(3)
    assert torch.equal(combine(MEAN, deltas, [0.0, 1.0, 0.0]), deltas[1])
    assert torch.equal(combine(Rule("trimmed"), deltas, [0.0, 1.0, 0.0]), coord_median(deltas))


def test_the_rule_is_read_from_the_configuration() -> None:
    """Every key has its place; the default is the plain mean."""
    assert rule_of(RunConfig()) == MEAN and MEAN.plain
    c = RunConfig.from_dict(
        {
            "robust": {"kind": "centered_clip", "rho": 2.5, "iters": 7, "trim": 2},
            "weights": {"normalize": "steps"},
        }
    )
    assert rule_of(c) == Rule("centered_clip", 2, 2.5, 7, by_steps=True, by_direction=False)
    assert set(rule_of(c).state(4)) == {"center"} and MEAN.state(4) == {}
    assert not Rule(by_steps=True).plain and not Rule(by_direction=True).plain


def test_honest_directions_pull_all_rules_alike() -> None:
    """Without a bad one every rule stays near the mean: none is biased by much on updates that agree."""
    deltas = honest(5, noise=0.1)
    mean = torch.stack(deltas).mean(0)
    for kind in ("trimmed", "coord_median", "centered_clip"):
        found = combine(Rule(kind), deltas, [0.2] * 5)
        assert float((found - mean).norm() / mean.norm()) < 0.06, kind
    lengths = [float(found) for found in (deltas[0].norm(), mean.norm())]
    assert all(b / a > 0.9 for a, b in pairwise(lengths))
