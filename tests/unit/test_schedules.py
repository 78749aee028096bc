"""Learning-rate multipliers against hand-computed values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diloco.errors import ConfigError
from diloco.schedules import KINDS, anytime_rate, multiplier, muon_momentum


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_warms_up_as_s_plus_one_over_w(kind: str) -> None:
    """f(s) = (s+1)/W for s < W: the first step is 1/W, the last warm-up step is the peak."""
    assert [multiplier(kind, s, 100, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("kind", "final", "expected"),
    [
        ("constant", None, {2: 1.0, 9: 1.0, 10: 1.0}),
        ("linear", None, {2: 1.0, 6: 0.5, 9: 1 / 8, 10: 0.0, 11: 0.0}),
        ("linear", 0.2, {2: 1.0, 6: 0.6, 9: 0.2 + 0.8 / 8, 10: 0.2}),
        ("wsd", None, {2: 1.0, 5: 1.0, 6: 1.0, 7: 0.75, 8: 0.5, 9: 0.25, 10: 0.0}),
        ("wsd", 0.2, {6: 1.0, 8: 0.6, 9: 0.4, 10: 0.2}),
        ("wsd-sqrt", None, {5: 1.0, 6: 1.0, 7: 0.5, 8: 1 - math.sqrt(0.5), 9: 1 - math.sqrt(0.75), 10: 0.0}),
        ("wsd-sqrt", 0.2, {7: 0.6, 10: 0.2}),
        ("cosine", 0.0, {2: 1.0, 4: (1 + math.sqrt(0.5)) / 2, 6: 0.5, 10: 0.0}),
        ("cosine", None, {2: 1.0, 6: 0.55, 10: 0.1, 50: 0.1}),
        ("invsqrt", None, {2: math.sqrt(0.5), 6: 0.5, 30: 0.25}),
    ],
)
def test_each_kind_follows_its_formula(kind: str, final: float | None, expected: dict[int, float]) -> None:
    """With T = 10, W = 2, C = 4 the multipliers are those of the stated formulas."""
    got = {s: multiplier(kind, s, 10, 2, final=final, cooldown=4) for s in expected}
    assert got == pytest.approx(expected, abs=1e-12)


def test_the_default_cooldown_is_the_last_fifth() -> None:
    """wsd without a cooldown holds the peak until 80 % of the run."""
    assert multiplier("wsd", 80, 100, 10) == 1.0
    assert multiplier("wsd", 90, 100, 10) == pytest.approx(0.5)
    assert multiplier("wsd", 99, 100, 10) == pytest.approx(0.05)


def test_invsqrt_without_warmup_uses_one_percent_of_the_run() -> None:
    """a = T/100 when W = 0, and an explicit scale wins."""
    assert multiplier("invsqrt", 30, 1000, 0) == pytest.approx(0.5)
    assert multiplier("invsqrt", 30, 1000, 0, scale=90) == pytest.approx(math.sqrt(0.75))


def test_no_warmup_and_no_cooldown_are_allowed() -> None:
    """W = 0 starts at the peak; C = 0 stays there."""
    assert [multiplier("wsd", s, 3, 0, cooldown=0) for s in range(4)] == [1.0] * 4
    assert multiplier("cosine", 5, 5, 5) == 0.1


def test_an_unknown_kind_suggests_the_nearest() -> None:
    """A typo is answered with the kind that was probably meant."""
    with pytest.raises(ConfigError, match="'cosin'.*did you mean 'cosine'"):
        multiplier("cosin", 0, 10, 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": -1}, "step is -1"),
        ({"total": 0}, "total is 0"),
        ({"warmup": 11}, "warmup is 11"),
        ({"warmup": 5, "cooldown": 6}, "cooldown is 6"),
        ({"cooldown": -1}, "cooldown is -1"),
        ({"final": 1.5}, "final is 1.5"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    """The error names the field and its value."""
    with pytest.raises(ConfigError, match=named):
        multiplier(**{"kind": "wsd", "step": 0, "total": 10, "warmup": 2, **change})


def test_it_drives_a_torch_scheduler_past_the_last_step() -> None:
    """LambdaLR asks for f(T) after the last step; the learning rates seen are peak * f(s)."""
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: multiplier("linear", s, 4, 1))
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([2.0, 2.0, 4 / 3, 2 / 3])
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_muon_momentum_rises_then_falls() -> None:
    """0.85 -> 0.95 over 300 steps, back to 0.85 over the last 50."""
    expected = {0: 0.85, 150: 0.9, 300: 0.95, 950: 0.95, 975: 0.9, 1000: 0.85}
    assert {s: muon_momentum(s, 1000) for s in expected} == pytest.approx(expected)


def test_anytime_average_forgets_half_over_its_half_life() -> None:
    """A constant rate tau_t applied for h t steps leaves weight 1/2; early steps copy theta."""
    assert (1 - anytime_rate(1000, 0.1)) ** 100 == pytest.approx(0.5)
    assert anytime_rate(9, 0.1) == 1.0
    with pytest.raises(ConfigError, match="step is 0"):
        anytime_rate(0)
