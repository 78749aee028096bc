"""The examples run as a user would run them: in a process of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diloco.config import RunConfig, warnings
from diloco.training import doubts

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def start(folder: Path, *arguments: str, example: str = "plain_loop.py") -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        # Such small models only lose by threads, and several processes run at once.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def test_the_plain_loop_learns_without_a_network(tmp_path: Path) -> None:
    """A few steps lower the held-out loss; another --seed reads other data and ends with other parameters."""
    processes = [start(tmp_path, "--steps", "40", "--seed", seed) for seed in ("0", "1")]
    digests = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        before, after = (float(x) for x in re.findall(r"held-out loss .*: +([0-9.]+)", out))
        assert after < before - 0.5
        digests += re.findall(r"global parameters: +([0-9a-f]{64})", out)
    assert len(set(digests)) == 2


def test_the_plain_loop_says_when_no_coordinator_answers(tmp_path: Path) -> None:
    """A wrong address ends in an error that names the cause, not in a hang."""
    process = start(tmp_path, "--coordinator", "127.0.0.1:1")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the coordinator does not answer" in err


def test_snoo_around_muon_learns(tmp_path: Path) -> None:
    """The held-out loss falls; SNOO changes where the same steps lead. 30 steps end between two outer steps."""
    ends = []
    processes = [start(tmp_path, "--steps", "30", "--k", k, example="snoo_muon.py") for k in ("14", "0")]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        before, after = (float(x) for x in re.findall(r"held-out loss .*: +([0-9.]+)", out))
        assert after < before - 1
        ends.append(after)
    assert ends[0] != ends[1]


def test_the_hugging_face_trainer_evaluates_the_average_and_resumes(tmp_path: Path) -> None:
    """What it saves after evaluating are averaged weights, other than those it trains; resumed, the same bits."""
    pytest.importorskip("transformers")
    arguments = ("--steps", "16", "--checkpoint-every", "8")
    hf = tmp_path / "hf-run"

    def run(*more: str) -> tuple[list[float], bytes]:
        process = start(tmp_path, *arguments, *more, example="hf_trainer.py")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        losses = [float(x) for x in re.findall(r": +([0-9.]+) nats/token", out)]
        return losses, (hf / "final" / "model.safetensors").read_bytes()

    (before, after, trained), saved = run()
    assert after < before and abs(after - trained) > 1e-3
    shutil.rmtree(hf / "checkpoint-16")
    shutil.rmtree(hf / "final")
    assert run("--resume")[1] == saved


def test_the_example_configuration_is_valid_and_draws_no_warning() -> None:
    """What the README tells people to copy is what the project itself would recommend."""
    assert warnings(RunConfig.load(EXAMPLES / "two_workers.toml")) == []
    assert doubts(RunConfig.load(EXAMPLES / "one_node.toml")) == []
