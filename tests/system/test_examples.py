"""The examples run as a user would run them: in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from diloco.config import RunConfig, warnings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "plain_loop.py"), *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
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


def test_the_example_configuration_is_valid_and_draws_no_warning() -> None:
    """What the README tells people to copy is what the project itself would recommend."""
    assert warnings(RunConfig.load(EXAMPLES / "two_workers.toml")) == []
