"""Weights and robust aggregation against the published numbers (section 11), and what I18 bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.aggregate import rda, step_scales
from diloco.comms import codec as codecs
from diloco.comms import downlink, frame
from diloco.robust import MEAN, Rule, centered_clip, clip_scales

torch.set_num_threads(1)

CODEC = codecs.get("fp32")


def through_frames(
    rule: Rule, deltas: list[Tensor], steps: list[int] | None = None, state: dict[str, Tensor] | None = None
) -> Tensor:
    """The way contributions really take: framed, with norms and steps in their headers."""
    parts = []
    for index, delta in enumerate(deltas):
        label: dict[str, Any] = {
            "fragment": 0,
            "round": 1,
            "base_version": 0,
            "run_id": 1,
            "incarnation": 1,
            "tokens": 1,
        }
        count = steps[index] if steps else 1
        framed = frame.encode_frame(CODEC, delta, **label, worker=index, steps=count)
        parts.append(downlink.Part(index, 1.0 / len(deltas), framed))
    n = deltas[0].numel()
    return downlink.combined(rule, parts, n, CODEC, {} if state is None else state, [(0, n)])


def along_x(*norms: float) -> list[Tensor]:
    return [torch.tensor([n, 0.0]) for n in norms]


def test_rda_gives_the_golden_numbers() -> None:
    """v1 = (3,0), v2 = (0,4): norm 3.5 along (1,1), where the mean would be (1.5, 2)."""
    deltas = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    expected = torch.tensor([2.4748737, 2.4748737])
    torch.testing.assert_close(rda(deltas, [0.5, 0.5], [(0, 2)]), expected)
    torch.testing.assert_close(through_frames(Rule(by_direction=True), deltas), expected)
    assert through_frames(MEAN, deltas).tolist() == [1.5, 2.0]


def test_clip_median_gives_the_golden_numbers() -> None:
    """Norms 1, 1, 10 along x: each 1, mean 1."""
    assert clip_scales([1.0, 1.0, 10.0]) == pytest.approx([1.0, 1.0, 0.1])
    found = through_frames(Rule("clip_median"), along_x(1.0, 1.0, 10.0))
    assert found.tolist() == pytest.approx([1.0, 0.0])


def test_centered_clip_gives_the_golden_numbers() -> None:
    """From v = 0 with rho = 1 the same input gives 1 after one iteration."""
    found = centered_clip(along_x(1.0, 1.0, 10.0), [1 / 3] * 3, torch.zeros(2), 1.0, 1)
    assert found.tolist() == pytest.approx([1.0, 0.0])
    rule = Rule("centered_clip", rho=1.0, iters=1)
    assert through_frames(rule, along_x(1.0, 1.0, 10.0)).tolist() == pytest.approx([1.0, 0.0])


def test_centered_clip_starts_each_round_at_the_last_rounds_aggregate() -> None:
    """With a radius of 1 and one iteration it walks towards 5 in steps of 1, and its state walks with it."""
    rule = Rule("centered_clip", rho=1.0, iters=1)
    state, way = rule.state(2), []
    for _ in range(6):
        update = through_frames(rule, along_x(5.0, 5.0, 5.0), state=state)
        assert torch.equal(update, state["center"])
        way.append(float(update[0]))
    assert way == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0, 5.0])
    pair = through_frames(
        rule, along_x(2.0, 2.0), state=state
    )  # too few: clipped to the median, and remembered
    assert pair.tolist() == [2.0, 0.0] and torch.equal(pair, state["center"])


@pytest.mark.parametrize(("values", "expected"), [((1.0, 3.0), 2.0), ((1.0, 1.0), 4 / 3)])
def test_fednova_gives_the_golden_numbers(values: tuple[float, float], expected: float) -> None:
    """Steps 10 and 30, equal weights: a_eff is 20."""
    assert step_scales([10, 30], [0.5, 0.5]) == pytest.approx([2.0, 2 / 3])
    found = through_frames(Rule(by_steps=True), [torch.tensor([v]) for v in values], [10, 30])
    assert found.tolist() == pytest.approx([expected], rel=1e-6)


def test_i11_equal_steps_are_the_weighted_mean_bit_for_bit() -> None:
    """Through frames too."""
    generator = torch.Generator().manual_seed(4)
    deltas = [torch.randn(33, generator=generator) for _ in range(3)]
    expected = through_frames(MEAN, deltas)
    assert torch.equal(through_frames(Rule(by_steps=True), deltas, [7, 7, 7]), expected)


def test_i18_equal_norms_make_clip_median_the_mean_bit_for_bit() -> None:
    """Permutations of the same values have equal norms."""
    base = torch.arange(1.0, 9.0)
    deltas = [base, base.flip(0), -base, base.roll(4)]
    assert torch.equal(through_frames(Rule("clip_median"), deltas), through_frames(MEAN, deltas))


@pytest.mark.parametrize("count", [3, 4, 7])
def test_i18_one_worker_moves_clip_median_by_no_more_than_its_share_of_an_honest_norm(count: int) -> None:
    """Scaled by a million, against the run in which it sends its honest update or nothing."""
    generator = torch.Generator().manual_seed(5)
    deltas = [torch.randn(50, generator=generator) for _ in range(count)]
    attacked = [*deltas[:-1], deltas[-1] * 1e6]
    norms = sorted(float(d.norm()) for d in attacked)
    median = (norms[(count - 1) // 2] + norms[count // 2]) / 2
    honest_part = through_frames(Rule("clip_median"), attacked) - sum(
        d * min(1.0, median / float(d.norm())) / count for d in deltas[:-1]
    )
    assert float(honest_part.norm()) == pytest.approx(median / count, rel=1e-4)
    assert float((through_frames(MEAN, attacked)).norm()) > 1e4 * median
