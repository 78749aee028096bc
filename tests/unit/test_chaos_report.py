"""What a chaos run says at its end, and the two things it puts into workers: lies and patience."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from diloco.chaos import paced
from diloco.chaos.hostile import LyingCodec
from diloco.chaos.report import PROMISES, Outcome, as_json, render
from diloco.comms.codec import get
from diloco.errors import CorruptDataError


def good() -> Outcome:
    outcome = Outcome(seed=3, minutes=1.0, workers=4)
    outcome.faults = [{"kind": "kill", "at": 1.0, "target": "w1", "for_s": 2.0}]
    outcome.digests_equal, outcome.goodput, outcome.loss = True, 0.9, 2.0
    return outcome


def shown(outcome: Outcome) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(outcome))
    return console.export_text()


def test_a_run_without_violations_passes_and_says_what_happened() -> None:
    """In words and as JSON with the promised keys."""
    outcome = good()
    found = as_json(outcome)
    assert found["passed"] and found["violations"] == [] and found["seed"] == 3
    assert {"faults", "goodput", "digests_equal"} <= found.keys()
    assert "PASSED (seed 3)" in shown(outcome) and "kill 1" in shown(outcome)


@pytest.mark.parametrize("promise", PROMISES)
def test_one_violation_of_any_promise_fails_the_run(promise: str) -> None:
    """The promise and the words are told."""
    outcome = good()
    outcome.violations[promise].append("w1 was seen to fly")
    assert not outcome.passed and as_json(outcome)["violations"] == [f"{promise}: w1 was seen to fly"]
    assert (
        "FAILED" in shown(outcome) and "BROKEN" in shown(outcome) and "w1 was seen to fly" in shown(outcome)
    )


def test_unequal_digests_fail_the_run() -> None:
    """Also when nothing else was noticed, such as in a run that never ended."""
    outcome = good()
    outcome.digests_equal = False
    assert not outcome.passed and "FAILED" in shown(outcome)


@pytest.mark.parametrize(("loss", "passed"), [(1.9, True), (2.0, True), (2.019, True), (2.03, False)])
def test_the_loss_may_be_one_percent_worse_than_without_faults(loss: float, passed: bool) -> None:
    """Better is no fault; the difference is told."""
    outcome = good()
    outcome.loss, outcome.fault_free_loss = loss, 2.0
    assert outcome.passed is passed
    assert outcome.loss_difference == pytest.approx(loss / 2.0 - 1.0)
    assert "without faults" in shown(outcome)


@pytest.mark.parametrize("name", ["fp32", "e3m0", "int8"])
def test_a_lie_is_well_formed_and_what_it_says_it_is(name: str) -> None:
    """A flipped sign decodes to the opposite; NaN has the right size and is refused for its values."""
    codec, values = get(name), torch.linspace(-1, 1, 300)
    flipped = LyingCodec(codec, "sign_flip").encode(values)
    assert torch.equal(codec.decode(flipped, 300), -codec.decode(codec.encode(values), 300))
    payload = LyingCodec(codec, "nan").encode(values)
    assert len(payload) == codec.wire_size(300)
    with pytest.raises(CorruptDataError, match="(?i)nan"):
        codec.decode(payload, 300)


def test_training_steps_are_counted_and_evaluation_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte a step, whatever becomes of the process afterwards."""
    monkeypatch.setenv(paced.STEPS, str(tmp_path / "steps"))
    monkeypatch.setenv(paced.PACE, str(tmp_path / "no such file"))
    model = paced.make()
    model.reset_parameters(torch.Generator().manual_seed(0))
    tokens = torch.zeros(1, paced.SEQUENCE + 1, dtype=torch.int64)
    for _ in range(3):
        model.train().loss(tokens)
        model.eval().loss(tokens)
    assert (tmp_path / "steps").stat().st_size == 3
