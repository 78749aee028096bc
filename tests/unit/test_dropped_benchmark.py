"""The benchmark of dropped exchanges still runs: its smallest form, through its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_dropped_benchmark_drops_and_holds_both_policies_against_nothing_dropped(tmp_path: Path) -> None:
    """Some exchanges of two workers are dropped, the runs end, and what that costs is a number beside the reference."""
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/dropped.py", "--smallest", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, isolate, skip = json.loads(out.read_text())["rows"]
    assert (whole["policy"], whole["dropped"], whole["worse"]) == ("none dropped", 0.0, 0.0)
    assert isolate["dropped"] == skip["dropped"] > 0.0
    assert {whole["perplexity"], isolate["perplexity"], skip["perplexity"]} > {whole["perplexity"]}
