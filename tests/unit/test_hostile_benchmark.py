"""The benchmark of the hostile worker still runs: its smallest form, through its command line, stopped and gone on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def benchmark(out: Path) -> tuple[str, dict[str, Any]]:
    """What it prints, and its results."""
    small = ("--steps", "20", "--rules", "norm_outlier", "--lies=-10x,nan", "--out", str(out))
    command = [sys.executable, "benchmarks/hostile.py", *small]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())["results"]


def test_a_stopped_benchmark_goes_on_and_a_rule_that_drops_the_liar_ends_like_the_honest(
    tmp_path: Path,
) -> None:
    """Who lies is told so in every round; what is missing is run again, nothing else, to the same loss."""
    page, first = benchmark(tmp_path / "out.json")
    assert set(first) == {"mean/clean", "norm_outlier/-10x", "norm_outlier/nan"}
    assert first["norm_outlier/-10x"]["loss"] == first["mean/clean"]["loss"]
    assert first["norm_outlier/-10x"]["refused"] >= 2 and first["mean/clean"]["refused"] == 0
    assert "| `norm_outlier` | +0.0 % | +0.0 % |" in page

    whole = json.loads((tmp_path / "out.json").read_text())
    del whole["results"]["norm_outlier/nan"]
    whole["results"]["mean/clean"]["seconds"] = -1.0
    (tmp_path / "out.json").write_text(json.dumps(whole))
    again, second = benchmark(tmp_path / "out.json")
    assert second["mean/clean"]["seconds"] == -1.0, "it was there"
    assert second["norm_outlier/nan"]["loss"] == first["norm_outlier/nan"]["loss"] and again == page
