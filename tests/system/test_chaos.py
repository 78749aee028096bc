"""`diloco chaos` end to end: real processes under real faults, and all promises kept."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diloco.chaos.director import run
from diloco.chaos.schedule import schedule
from diloco.cli import main
from diloco.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SEED = 1


def chaos(folder: Path, *arguments: str, timeout_s: float = 280.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "diloco", "chaos", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_under_every_kind_of_fault_keeps_its_promises(tmp_path: Path) -> None:
    """Two minutes: what was scheduled has happened, nothing is violated, all end alike, most work is committed."""
    done = chaos(tmp_path, "--minutes", "2", "--seed", str(SEED), "--workers", "3", "--json", timeout_s=800)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["passed"] and found["violations"] == [], done.stdout + done.stderr
    assert found["digests_equal"] and found["digests_compared"] > 0 and found["seed"] == SEED
    planned = schedule(SEED, 2, 3)
    assert sorted((f["kind"], f["target"]) for f in found["faults"]) == sorted(
        (f.kind, f.target) for f in planned
    )
    assert all(f["at"] >= 0 for f in found["faults"])
    assert 0.5 < found["goodput"] <= 1.0


@pytest.mark.parametrize(("minutes", "workers", "seed"), [(0.0, 4, 0), (2.0, 0, 0), (2.0, 4, -1)])
def test_what_cannot_be_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, workers: int, seed: int
) -> None:
    """The values are named, and no process or folder is left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--minutes {minutes:g} .*--workers {workers} .*--seed {seed} "):
        run(minutes=minutes, seed=seed, workers=workers, compare=False, stop=threading.Event(), say=print)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_the_run_cannot_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2: a chaos run has its own."""
    assert main(["chaos", "--stream.H", "5"]) == 2
    assert "--stream.H cannot be set" in capsys.readouterr().err
