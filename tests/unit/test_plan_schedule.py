"""`diloco plan --schedule` through the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diloco.cli import main
from diloco.schedules import multipliers
from diloco.schedules_bound import best_factor, bound


def asked(capsys: pytest.CaptureFixture[str], flags: str) -> Any:
    assert main(["plan", "--schedule", "--json", *flags.split()]) == 0
    return json.loads(capsys.readouterr().out)


def test_schedules_are_compared_without_the_links_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is the bound of its schedule, relative to the best, and its peak relative to linear's."""
    found = asked(capsys, "--steps 1000 --warmup 50")
    assert (found["steps"], found["warmup"]) == (1000, 50)
    linear, linear_peak = bound(multipliers("linear", 1000, 50))
    assert {r["kind"] for r in found["schedules"]} == {
        *("constant", "linear", "wsd", "wsd-sqrt", "cosine", "invsqrt")
    }
    for row in found["schedules"]:
        value, peak = bound(multipliers(row["kind"], 1000, 50, cooldown=row["cooldown"]))
        assert (row["bound"], row["relative"]) == pytest.approx((value, value / linear))
        assert row["peak_relative"] == pytest.approx(peak / linear_peak)
        assert row["lr"] is None
    assert [r["cooldown"] for r in found["schedules"] if r["kind"] == "wsd"] == [100, 200, 400]


def test_a_learning_rate_is_carried_to_the_other_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    """With --kind and --lr, that schedule keeps the learning rate and the others get theirs in proportion."""
    rows = asked(capsys, "--steps 1000 --kind wsd --lr 0.002")["schedules"]
    lr = {r["name"]: r["lr"] for r in rows}
    assert lr["wsd 20 %"] == pytest.approx(0.002)
    assert lr["linear"] == pytest.approx(
        0.002 * bound(multipliers("linear", 1000))[1] / bound(multipliers("wsd", 1000, cooldown=200))[1]
    )


def test_a_longer_run_gets_a_lower_peak(capsys: pytest.CaptureFixture[str]) -> None:
    """Three times the steps: about 1/sqrt(3) of it anew; and the constant phase that was run can be kept."""
    e = asked(capsys, "--steps 10000 --extend-to 30000 --lr 1e-3 --kind wsd")["extension"]
    ratio = bound(multipliers("wsd", 30000))[1] / bound(multipliers("wsd", 10000))[1]
    assert e["fresh_lr"] == pytest.approx(1e-3 * ratio) and ratio == pytest.approx(3**-0.5, abs=0.01)
    assert e["done"] == 8000
    assert e["rest_lr"] == pytest.approx(1e-3 * e["rest_factor"]) and 0.3 < e["rest_factor"] < ratio
    assert 18000 <= e["same_lr_cooldown"] <= 22000
    assert e["same_lr_excess"] < 0.1 and e["rest_excess"] < 0.1


def test_a_constant_phase_that_ran_to_the_end_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """--done says how far the learning rate was constant; past the long run's cooldown, it cools from there."""
    flags = "--steps 100 --extend-to 120 --lr 1 --done"
    kept = asked(capsys, f"{flags} 110")["extension"]
    assert (kept["done"], kept["same_lr_cooldown"] <= 10) == (110, True)
    lr = bound(multipliers("wsd", 100))[1]
    steps = multipliers("wsd", 120, cooldown=10)
    factor, value = best_factor(steps[:110], steps[110:], lr)
    assert kept["rest_factor"] == pytest.approx(factor)
    assert kept["rest_excess"] == pytest.approx(value / bound(multipliers("wsd", 120))[0] - 1)
    assert asked(capsys, f"{flags} 90")["extension"]["same_lr_cooldown"] > 10


def test_kinds_without_a_constant_phase_start_anew(capsys: pytest.CaptureFixture[str]) -> None:
    """Cosine has no part that a longer run could keep."""
    e = asked(capsys, "--steps 1000 --extend-to 2000 --lr 1e-3 --kind cosine")["extension"]
    assert e["fresh_lr"] == pytest.approx(1e-3 * 2**-0.5, rel=0.02)
    assert (e["done"], e["rest_lr"], e["same_lr_cooldown"]) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("--steps 1000 --lr 1e-3", ["linear", "wsd 40 %", "1.000", "0.001", "predicts no loss"]),
        ("--steps 1000 --extend-to 2000 --lr 1e-3", ["wsd, 1000 -> 2000", "anew", "step 800", "cooldown of"]),
    ],
)
def test_people_get_a_table(flags: str, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json the same numbers come as text."""
    assert main(["plan", "--schedule", *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert [part for part in shown if part not in printed] == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--steps"),
        ("--steps 1", "--steps 1"),
        ("--steps 10 --warmup 11", "warmup is 11"),
        ("--steps 10 --kind lineer", "did you mean 'linear'"),
        ("--steps 10 --lr -1", "--lr -1"),
        ("--steps 10 --extend-to 20", "--lr"),
        ("--steps 10 --extend-to 10 --lr 1", "--extend-to 10"),
        ("--steps 10 --extend-to 20 --lr 1 --cooldown 11", "cooldown is 11"),
        ("--steps 10 --extend-to 20 --lr 1 --done 20", "--done 20"),
        ("--steps 10 --done 5", "--done"),
    ],
)
def test_mistakes_are_named(flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a message with the flag and its value."""
    assert main(["plan", "--schedule", *flags.split()]) == 2
    assert named in capsys.readouterr().err
