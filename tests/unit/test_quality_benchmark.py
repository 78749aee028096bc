"""The quality benchmark still runs: its smallest form, through its command line. What it measures is in docs/quality.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def benchmark(folder: Path) -> list[dict[str, Any]]:
    """Run the smallest plan with everything it writes below `folder`; all finished runs, in the order of their file."""
    files = ("--runs", str(folder / "runs.jsonl"), "--out", str(folder / "out.json"), "--docs", str(folder))
    command = [sys.executable, "benchmarks/quality.py", "--smallest", "--jobs", "1", *files]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_a_stopped_quality_benchmark_goes_on_and_ends_with_the_same_tables(tmp_path: Path) -> None:
    """What is missing is run again, nothing else is, and the same settings give the same losses and the same page."""
    first = benchmark(tmp_path)
    page, report = (tmp_path / "quality.md").read_text(), json.loads((tmp_path / "out.json").read_text())
    assert report["missing"] == []
    assert {row["settings"]["bench.way"] for row in first} == {"alone", "data parallel", "workers"}
    for label in ("no communication", "data parallel", "2-bit stat", "momentum warm-up"):
        assert f"| {label}" in page

    kept, lost = first[:-2], first[-2:]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    second = benchmark(tmp_path)
    assert second[: len(kept)] == kept
    again = {row["key"]: row["loss"] for row in second[len(kept) :]}
    assert again == {row["key"]: row["loss"] for row in lost}
    assert (tmp_path / "quality.md").read_text() == page
