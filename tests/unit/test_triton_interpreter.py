"""Runs the Triton kernels' own tests in a process whose Triton interprets: the choice is made when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' interpreter needs the gpu extra")

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_agrees_with_its_definition_in_the_interpreter() -> None:
    """All of `triton_interpreted.py`: codecs to the bit, products no less exact than torch's."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/unit/triton_interpreted.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
