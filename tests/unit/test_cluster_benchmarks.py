"""The benchmarks of whole clusters still run: their smallest forms, through their command lines."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def smallest(name: str, folder: Path) -> dict[str, Any]:
    """Run the smallest form of a benchmark; what it wrote."""
    out = folder / "out.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--smallest", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["machine"]["cores"] >= 1
    return found


def test_the_scale_benchmark_measures_a_coordinator_and_its_workers(tmp_path: Path) -> None:
    """Every column of the table is there and is a number; a coordinator has some memory and took some time."""
    (row,) = smallest("scale", tmp_path)["rows"]
    assert row["workers"] == 2 and row["round_ms"] > 0 and row["mb_peak"] > 10
    assert {"ms_per_contribution", "s_per_gb", "s_per_gb_moved", "cores"} <= row.keys()
    # Two frames of 4-bit values up and one down to each of two workers, of 4096 parameters and a header
    assert 4 * 4096 / 2 < 1e6 * row["mb_per_round"] < 4 * 4096


def test_the_control_plane_benchmark_sees_questions_and_heartbeats(tmp_path: Path) -> None:
    """Answers are counted, no question failed, and a round trip is no shorter than the link's."""
    found = smallest("control_plane", tmp_path)
    assert found["failures"] == [] and found["commits"] > 0
    for name in ("alone", "GetStatus", "fetch_status"):
        assert found[name]["count"] > 0 and found[name]["p50"] > 0.005, name
    assert found["heartbeat"]["count"] > 0 and found["met"].keys() >= {"nobody suspected"}


def test_the_uneven_benchmark_trains_on_the_tokens_it_says(tmp_path: Path) -> None:
    """Every contribution of a run in which nobody is left out was committed, and the loss is one of bytes."""
    (run,) = smallest("uneven", tmp_path)["runs"]
    assert run["committed"] == run["tokens"] == sum(run["own_steps"]) * 4 * 64
    assert 0 < run["loss"] < 2 * math.log(256) and run["wall_s"] > 0


def test_a_heartbeat_that_never_came_took_for_ever(module: Any) -> None:
    """The k-th that came is the k-th that was sent; one that was sent just before the end is not missed."""
    travel = module("control_plane").travel
    assert travel([1.0, 3.0, 5.0], [1.1, 3.5, 5.1], 2.0, 9.0) == pytest.approx([0.5, 0.1])
    assert travel([1.0, 3.0, 5.0], [1.1], 0.0, 9.0) == pytest.approx([0.1, math.inf, math.inf])
    assert travel([1.0, 8.5], [1.1], 0.0, 9.0) == pytest.approx([0.1])


def test_quantiles_are_values_that_were_measured(module: Any) -> None:
    """Nearest rank: of a hundred values the 50th, the 99th and the last; none of nothing."""
    quantiles = module("control_plane").quantiles
    found = quantiles([float(i) for i in range(100, 0, -1)])
    assert found == {"count": 100, "p50": 50.0, "p99": 99.0, "max": 100.0}
    assert quantiles([])["count"] == 0


def test_the_lines_through_the_scale_table_are_its_growth(module: Any) -> None:
    """CPU and memory that grow by the worker come back as what one worker adds, and a flat cost as no growth."""
    rows = [
        {"workers": m, "ms_per_contribution": 3.0 + 10.0 / m, "mb_peak": 400.0 + 2.0 * m} for m in (2, 8, 64)
    ]
    found = module("scale").fit(rows, 1_000_000)
    assert found["ms_per_contribution"] == pytest.approx(3.0) and found["ms_per_round"] == pytest.approx(10.0)
    assert found["mb_per_worker"] == pytest.approx(2.0)
    assert found["bytes_per_worker_and_parameter"] == pytest.approx(2.0)
    flat = [{"workers": m, "ms_per_contribution": 3.0, "mb_peak": 1.0} for m in (2, 64)]
    assert module("scale").fit(flat, 1)["cpu_growth"] == 1.0


def test_equal_tokens_make_longer_runs_of_smaller_rounds(module: Any) -> None:
    """With speeds 1, 1, 0.6 and 0.25 a round of dylu has 2.85 workers' tokens; every configuration is accepted."""
    from diloco.config import RunConfig

    uneven = module("uneven")
    assert uneven.longer("dylu", uneven.SPEEDS) == pytest.approx(4 / 2.85)
    totals = {}
    for way in uneven.WAYS:
        c = RunConfig.from_dict(uneven.config_of(way, 0, 400, 0.06, uneven.SPEEDS))
        totals[way] = c.run.inner_steps_total
        assert uneven.in_time(uneven.SPEEDS) == 3 and c.fault.fixed_grace_s in (300.0, pytest.approx(0.9))
        assert c.weights.dylu == (way in ("dylu", "async")) and c.topology.workers == 4
    assert totals == {"wait": 400, "dylu": 560, "async": 560, "quorum": 480}
