"""Coordinators and workers as real processes, for tests: started in one folder, watched with deadlines, always ended."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from diloco.comms.query import fetch_status

T = TypeVar("T")
WAIT_S = 60.0
POLL_S = 0.05
RUN_ID = "r"

# A model whose steps take 0.1 s for as long as the file "slow" lies in the working directory: the test decides
# when the run may hurry to its end.
SLOW_MODEL = """\
import os, time
from diloco.worker.model import Transformer, preset_config

class Slow(Transformer):
    def loss(self, tokens):
        if self.training and os.path.exists("slow"):
            time.sleep(0.1)
        return super().loss(tokens)

def make():
    return Slow(preset_config("nano", 32))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, ask: Callable[[], T | None], *processes: Process, timeout_s: float = WAIT_S) -> T:
    """The first true answer of `ask`; fails with the logs of `processes` after `timeout_s` or when one ends badly."""
    limit = time.monotonic() + timeout_s
    while not (found := ask()):
        codes = {p.name: p.popen.poll() for p in processes}
        logs = "\n".join(f"---- {p.name}\n{p.text}" for p in processes)
        assert time.monotonic() < limit, f"no {what} in {timeout_s:g} s, exit codes {codes}\n{logs}"
        assert not any(codes.values()), f"while waiting for {what}: exit codes {codes}\n{logs}"
        _tick(processes)
    return found


def _tick(processes: tuple[Process, ...]) -> None:
    running = next((p.popen for p in processes if p.popen.poll() is None), None)
    if running is None:
        time.sleep(POLL_S)
        return
    try:
        running.wait(POLL_S)
    except subprocess.TimeoutExpired:
        pass


class Process:
    """One `python -m diloco ...`, its output in a log file."""

    def __init__(self, name: str, arguments: list[str], folder: Path, log: Path) -> None:
        self.name, self.log = name, log
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parents[1]}"}
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "diloco", *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_text(self, pattern: str, timeout_s: float = WAIT_S) -> re.Match[str]:
        return wait_for(repr(pattern), lambda: re.search(pattern, self.text), self, timeout_s=timeout_s)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """The exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} has not ended within {timeout_s:g} s\n{self.text[-4000:]}"
            ) from None

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """As `kill -9`."""
        self.popen.kill()
        self.popen.wait()


class Cluster:
    """A run in a folder of its own. A context manager: whatever still runs at the end is killed."""

    def __init__(self, folder: Path, **sections: Mapping[str, Any]) -> None:
        self.folder = folder
        self.port = free_port()
        self.run_dir = folder / "runs" / RUN_ID
        self.processes: list[Process] = []
        folder.mkdir(parents=True, exist_ok=True)
        words = np.array(["alpha", "beta", "gamma", "delta", "river", "stone", "light", "house"])
        chosen = np.random.default_rng(5).choice(words, (400, 12))
        (folder / "text.txt").write_text("\n".join(" ".join(line) for line in chosen), encoding="utf-8")
        (folder / "slow_model.py").write_text(SLOW_MODEL, encoding="utf-8")
        self.config = self.write("run.toml", **sections)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def write(self, name: str, **sections: Mapping[str, Any]) -> str:
        """A configuration file; `sections` on top of a small, quick run. Returns its name."""
        raw: dict[str, dict[str, Any]] = {
            "run": {"run_id": RUN_ID, "inner_steps_total": 30},
            "model": {"preset": "nano", "sequence_length": 32},
            "data": {"source": "text.txt"},
            "train": {"batch_size": 4, "threads": 1, "eval_batches": 2},
            "stream": {"H": 10, "frag_layers": 2, "tau": 1},
            "outer": {"momentum": 0.5},
            "topology": {"workers": 2},
        }
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        lines = []
        for section, settings in raw.items():
            lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in settings.items()), ""]
        (self.folder / name).write_text("\n".join(lines), encoding="utf-8")
        return name

    def start(self, name: str, *arguments: str) -> Process:
        log = self.folder / f"{len(self.processes):02d}-{name}.log"
        process = Process(name, list(arguments), self.folder, log)
        self.processes.append(process)
        return process

    def coordinator(self, *flags: str, listen: str | None = None, config: str | None = None) -> Process:
        return self.start(
            "coordinator", "coordinator", config or self.config, "--listen", listen or self.address, *flags
        )

    def worker(
        self, name: str, *flags: str, address: str | None = None, config: str | None = None
    ) -> Process:
        address = address or self.address
        return self.start(
            name, "worker", config or self.config, "--coordinator", address, "--id", name, *flags
        )

    @property
    def journal(self) -> list[dict[str, Any]]:
        """The whole lines of the journal."""
        path = self.run_dir / "journal" / "journal.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def commits(self) -> list[dict[str, Any]]:
        return [record for record in self.journal if record["type"] == "commit"]

    def wait_commits(self, count: int, *processes: Process) -> None:
        wait_for(f"{count} commits", lambda: len(self.commits) >= count, *processes)

    def status(self) -> dict[str, Any] | None:
        return fetch_status(self.address, 2.0)

    def wait_member(
        self, name: str, fits: Callable[[dict[str, Any]], bool], *processes: Process
    ) -> dict[str, Any]:
        def ask() -> dict[str, Any] | None:
            members = (self.status() or {"members": []})["members"]
            return next((m for m in members if m["id"] == name and fits(m)), None)

        return wait_for(f"the expected state of {name}", ask, *processes)

    def slow(self, on: bool) -> None:
        if on:
            (self.folder / "slow").touch()
        else:
            (self.folder / "slow").unlink(missing_ok=True)

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "report.json").read_text(encoding="utf-8"))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.kill()


SLOW = {"factory": "slow_model:make", "sequence_length": 32}


def assert_versions_have_no_gap(commits: list[dict[str, Any]]) -> None:
    """Per fragment the journal's versions are 1, 2, ..., n."""
    by_fragment: dict[int, list[int]] = {}
    for commit in commits:
        by_fragment.setdefault(commit["fragment"], []).append(commit["version"])
    assert by_fragment
    for fragment, versions in by_fragment.items():
        assert versions == list(range(1, len(versions) + 1)), f"fragment {fragment}: {versions}"


def assert_all_identical(report: Mapping[str, Any]) -> None:
    """Every worker that stayed to the end holds the global parameters."""
    live = [w for w in report["workers"] if w["live"]]
    assert live and report["global_digest"]
    assert {w["digest"] for w in live} == {report["global_digest"]}
