"""Schedules against hand-computed values: the shapes, what a run's groups get, and the [schedule] section."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diloco.config import RunConfig, warnings
from diloco.errors import ConfigError
from diloco.optim import build_optimizer
from diloco.schedules import (
    KINDS,
    Peak,
    anytime_rate,
    apply,
    final_fraction,
    multiplier,
    multipliers,
    muon_momentum,
    peaks_of,
    scheduler,
    settings_at,
)


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


def test_exponential_warmup_multiplies_by_the_same_factor_each_step() -> None:
    """f(s) = r^(1-(s+1)/W): from r = 1/16 over four steps it doubles, and the last is the peak."""
    f = [
        multiplier("cosine", s, 100, 4, warmup_kind="exponential", warmup_from=1 / 16, final=0.0)
        for s in range(5)
    ]
    assert f == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1, 1])


def test_all_multipliers_at_once_are_those_of_each_step() -> None:
    """T numbers, with the same options and errors."""
    for kind in KINDS:
        assert multipliers(kind, 30, 3, final=0.2) == [
            multiplier(kind, s, 30, 3, final=0.2) for s in range(30)
        ]
    with pytest.raises(ConfigError, match="warmup is 31"):
        multipliers("linear", 30, 31)


def test_a_run_ends_at_nothing_unless_its_kind_says_otherwise() -> None:
    """0, but a tenth of the peak for cosine and for MD; a given value wins."""
    assert [final_fraction(kind, None) for kind in ("linear", "wsd", "wsd-sqrt")] == [0, 0, 0]
    assert final_fraction("cosine", None) == final_fraction("linear", None, "md") == 0.1
    assert final_fraction("cosine", 0.0) == final_fraction("linear", 0.0, "md") == 0.0


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
        ({"warmup_from": 0.0}, "warmup_from is 0.0"),
        ({"warmup_kind": "exponent"}, "warmup_kind is 'exponent'.*did you mean 'exponential'"),
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


# ---- a run's groups ----


def run(schedule: str, optim: str = 'kind = "muon"', steps: int = 100) -> RunConfig:
    return RunConfig.from_toml(
        f"[run]\ninner_steps_total = {steps}\n[optim]\n{optim}\n[schedule]\n{schedule}"
    )


MATRIX = Peak(lr=0.02, matrix=True, momentum=0.95)
REST = Peak(lr=0.001, matrix=False, betas=(0.9, 0.95))


def test_each_group_gets_its_own_peak_times_the_multiplier() -> None:
    """Nothing but learning rates is set unless it is asked for."""
    config = run('kind = "linear"\nwarmup = 10')
    for step in (0, 9, 50, 99, 100):
        f = multiplier("linear", step, 100, 10)
        assert settings_at(config, [MATRIX, REST], step) == [{"lr": 0.02 * f}, {"lr": 0.001 * f}]


def test_matrices_may_cool_down_for_longer() -> None:
    """matrix_cooldown is theirs alone; without it they follow the others, and those default to the last fifth."""
    config = run('kind = "wsd"\nmatrix_cooldown = 50')
    assert [new["lr"] for new in settings_at(config, [MATRIX, REST], 75)] == pytest.approx([0.01, 0.001])
    assert [new["lr"] for new in settings_at(config, [MATRIX, REST], 90)] == pytest.approx([0.004, 0.0005])
    same = run('kind = "wsd"\ncooldown = 50')
    assert [new["lr"] for new in settings_at(same, [MATRIX, REST], 75)] == pytest.approx([0.01, 0.0005])


def test_momentum_rises_and_falls_for_matrices_alone() -> None:
    """From momentum_low to the group's own and back; a group without momentum is left alone."""
    config = run('kind = "constant"\nmomentum_warmup = 40\nmomentum_cooldown = 10\nmomentum_low = 0.75')
    seen = {s: settings_at(config, [MATRIX, REST], s)[0]["momentum"] for s in (0, 20, 40, 90, 95, 100)}
    assert seen == pytest.approx({0: 0.75, 20: 0.85, 40: 0.95, 90: 0.95, 95: 0.85, 100: 0.75})
    assert settings_at(config, [REST], 20) == [{"lr": 0.001}]


def test_only_one_end_of_the_momentum_schedule_may_be_used() -> None:
    """A warm-up of 0 starts at the group's momentum."""
    config = run('kind = "constant"\nmomentum_cooldown = 10')
    assert settings_at(config, [MATRIX], 0)[0]["momentum"] == 0.95
    assert settings_at(config, [MATRIX], 95)[0]["momentum"] == pytest.approx(0.9)


def test_beta2_is_raised_from_the_first_step_of_the_groups_cooldown() -> None:
    """And is the group's own before it; beta1 stays."""
    config = run(
        'kind = "wsd-sqrt"\ncooldown = 30\nmatrix_cooldown = 50\ncooldown_beta2 = 0.99', 'kind = "adamw"'
    )
    adam_matrix = Peak(lr=0.001, matrix=True, betas=(0.9, 0.95))
    expected = {49: (0.95, 0.95), 50: (0.99, 0.95), 69: (0.99, 0.95), 70: (0.99, 0.99)}
    for step, (matrix, rest) in expected.items():
        got = [new["betas"] for new in settings_at(config, [adam_matrix, REST], step)]
        assert got == [(0.9, matrix), (0.9, rest)]


def test_peaks_are_read_off_real_groups_and_settings_put_on_them() -> None:
    """The matrices of Muon with their momentum, the rest with Adam's betas; applied, the optimizer has the values."""
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
    settings = {"kind": "muon", "lr": 0.001, "matrix_lr": 0.02, "momentum": 0.9, "betas": (0.8, 0.9)}
    groups = build_optimizer(model, settings).param_groups
    peaks = peaks_of(groups)
    assert sorted(peaks, key=lambda peak: -peak.lr) == [
        Peak(0.02, True, momentum=0.9),
        *2 * [Peak(0.001, False, betas=(0.8, 0.9))],
    ]
    config = run('kind = "wsd"\ncooldown_beta2 = 0.99\nmomentum_cooldown = 20')
    apply(groups, settings_at(config, peaks, 90))
    matrix, *rest = sorted(groups, key=lambda group: group["name"] != "matrix")
    assert (matrix["lr"], matrix["momentum"]) == pytest.approx((0.01, 0.875))
    assert [(g["lr"], *g["betas"]) for g in rest] == 2 * [pytest.approx((0.0005, 0.8, 0.99))]
    with pytest.raises(ValueError, match="zip"):
        apply(groups, [{}])


def test_momentum_of_groups_that_are_not_matrices_is_not_the_schedules() -> None:
    """Plain SGD's momentum stays as it is, and its group is none of Adam's kind either."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
    assert peaks_of(optimizer.param_groups) == (Peak(0.5, False),)


def test_the_sections_warmup_and_scale_reach_the_groups() -> None:
    """An exponential warm-up from its own fraction, and invsqrt's scale."""
    config = run('warmup = 4\nwarmup_kind = "exponential"\nwarmup_from = 0.0625')
    assert [settings_at(config, [REST], s)[0]["lr"] for s in range(4)] == pytest.approx(
        [0.000125, 0.00025, 0.0005, 0.001]
    )
    config = run('kind = "invsqrt"\nscale = 30.0')
    assert settings_at(config, [REST], 90)[0]["lr"] == pytest.approx(0.0005)


def test_md_ends_at_a_tenth_by_itself() -> None:
    """The optimizer's kind decides where a run ends when the configuration does not."""
    assert settings_at(run('kind = "linear"', 'kind = "md"'), [MATRIX], 100)[0]["lr"] == pytest.approx(0.002)
    assert settings_at(run('kind = "linear"', 'kind = "muon"'), [MATRIX], 100)[0]["lr"] == 0


def test_the_scheduler_factory_drives_a_loop_of_ones_own() -> None:
    """Its learning rates are the multipliers times the optimizer's; what cannot be is refused when it is made."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = scheduler(optimizer, "wsd", 10, 2, cooldown=4)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([2 * f for f in multipliers("wsd", 10, 2, cooldown=4)])
    with pytest.raises(ConfigError, match="cooldown is 9"):
        scheduler(optimizer, "wsd", 10, 2, cooldown=9)


# ---- the section ----


@pytest.mark.parametrize(
    ("schedule", "optim", "named"),
    [
        ("kind = 'cosin'", "", "'cosin'.*did you mean 'cosine'"),
        ("warmup = 101", "", "warmup is 101"),
        ("kind = 'wsd'\nwarmup = 60\ncooldown = 41", "", "schedule.cooldown is 41"),
        ("kind = 'wsd'\nwarmup = 60\nmatrix_cooldown = 41", "", "schedule.matrix_cooldown is 41"),
        ("kind = 'cosine'\nmatrix_cooldown = 5", "", "matrix_cooldown is 5, but schedule.kind = 'cosine'"),
        (
            "kind = 'linear'\ncooldown_beta2 = 0.99",
            "",
            "cooldown_beta2 is 0.99, but schedule.kind = 'linear'",
        ),
        ("kind = 'wsd'\ncooldown_beta2 = 1.0", "", "cooldown_beta2"),
        ("warmup_kind = 'exp'", "", "warmup_kind"),
        ("momentum_warmup = 5", "kind = 'adamw'", "momentum_warmup.*'adamw'"),
        ("momentum_cooldown = 5", "kind = 'scion'", "momentum_warmup.*'scion'"),
        ("momentum_warmup = 5", "kind = 'muon'\nmomentum = 0.8", "momentum_low is 0.85.*momentum = 0.8"),
        ("final = 1.5", "", "final"),
    ],
)
def test_impossible_sections_are_refused_before_anything_starts(
    schedule: str, optim: str, named: str
) -> None:
    """The message names the key and its value."""
    with pytest.raises(ConfigError, match=named):
        run(schedule, optim)


def test_a_section_that_just_fits_is_taken() -> None:
    """Warm-up and cooldown may fill the run; the limits are not off by one."""
    config = run("kind = 'wsd'\nwarmup = 60\ncooldown = 40\nmatrix_cooldown = 40\ncooldown_beta2 = 0.99")
    assert settings_at(config, [REST], 80)[0]["lr"] == pytest.approx(0.0005)
    assert settings_at(run("warmup = 100"), [REST], 99)[0]["lr"] == 0.001


def test_keys_without_effect_are_mentioned() -> None:
    """They do no harm, but were probably meant for another kind."""
    said = "\n".join(warnings(run("kind = 'constant'\nfinal = 0.2\ncooldown = 5\nscale = 3.0")))
    assert all(f"schedule.{key}" in said for key in ("final", "cooldown", "scale"))
    assert "schedule." not in "\n".join(warnings(run("kind = 'wsd'\nfinal = 0.2\ncooldown = 5")))
