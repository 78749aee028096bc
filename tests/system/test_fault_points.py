"""A coordinator killed between any two system calls of a commit loses no round and counts none twice.

Real processes and gRPC; the workers are threads of the test with a model of a few numbers. Because timing must not
change results, a run with many deaths ends with the very bits of a run without any.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diloco
from diloco.chaos import checks
from diloco.comms.local import LocalHub
from diloco.comms.machine import Connection
from diloco.config import RunConfig
from diloco.coordinator.state import Coordinator
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
H = 2

CONFIG = """\
[run]
run_id = "r"
inner_steps_total = {steps}
[outer]
momentum = 0.5
[stream]
H = 2
frag_layers = 1
tau = 1
[codec]
down = "{down}"
[fault]
heartbeat_s = 0.5
suspect_s = 60.0
dead_s = 120.0
fixed_grace_s = 60.0
[topology]
workers = 2
checkpoint_every_commits = 3
"""


class Model(nn.Module):
    """Two fragments of a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        generator = torch.Generator().manual_seed(0)  # of its own: the workers are threads
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


def work(
    number: int,
    connection: Connection,
    config: RunConfig,
    digests: dict[int, str],
    failed: list[BaseException],
) -> None:
    """A worker from its joining to its goodbye; its gradients follow from its number and the step alone."""
    try:
        model = Model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = diloco.DiLoCo(model, inner, connection, config=config, worker=f"w{number}", tokens=1)
        while optimizer.inner_step < config.run.inner_steps_total:
            generator = torch.Generator().manual_seed(1000 * number + optimizer.inner_step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        optimizer.flush()
        digests[number] = optimizer.digest()
        optimizer.close()
    except BaseException as error:  # noqa: BLE001 - the test's thread raises it
        failed.append(error)


def work_all(connections: list[Connection], config: RunConfig, limit_s: float = 60.0) -> set[str]:
    """Every worker's whole run, which takes at most `limit_s` each; the digests they ended with."""
    digests: dict[int, str] = {}
    failed: list[BaseException] = []
    threads = [
        threading.Thread(target=work, args=(i, connection, config, digests, failed), daemon=True)
        for i, connection in enumerate(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s)
    assert not failed and not any(t.is_alive() for t in threads), failed
    return set(digests.values())


def run_calm(down: str, steps: int) -> tuple[list[dict[str, Any]], str]:
    """The run without deaths and without a network; its journal and its digest."""
    config, records = RunConfig.from_toml(CONFIG.format(steps=steps, down=down)), list[dict[str, Any]]()
    hub = LocalHub(
        Coordinator(config),
        config.model_dump(mode="json"),
        lambda action: records.append(dict(action.record)),
    )
    (digest,) = work_all([hub.connect(), hub.connect()], config)
    hub.close()
    return records, digest


def run_deadly(
    run_dir: Path, down: str, steps: int, deaths: int, seed: int
) -> tuple[list[dict[str, Any]], str]:
    """The run with so many deaths; its journal and its digest."""
    run_dir.mkdir(parents=True)
    (run_dir / "run.toml").write_text(CONFIG.format(steps=steps, down=down), encoding="utf-8")
    config, port = RunConfig.load(run_dir / "run.toml"), free_port()
    log = (run_dir / "coordinator.log").open("wb")
    script = [sys.executable, str(ROOT / "tests" / "fault_points.py")]
    coordinator = subprocess.Popen(
        [*script, str(run_dir), str(port), str(deaths), str(seed)],
        env={"PYTHONPATH": str(ROOT), "GRPC_ENABLE_FORK_SUPPORT": "0"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    connections: list[Connection] = [diloco.connect(f"127.0.0.1:{port}") for _ in range(2)]
    try:
        digests = work_all(connections, config, 120.0 + 15.0 * deaths)
        text = (run_dir / "coordinator.log").read_text(encoding="utf-8")
        assert coordinator.wait(60) == 0, text
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(coordinator.pid, signal.SIGKILL)  # the life that it has forked, too
        coordinator.wait()
        log.close()
    assert len(list((run_dir / "deaths").glob("*.jsonl"))) == deaths, "the run was over before all deaths"
    records = lines(run_dir / "journal" / "journal.jsonl")
    (complete,) = [r for r in records if r["type"] == "complete"]
    assert digests == {complete["digest"]}
    return records, complete["digest"]


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rounds_of(records: list[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    """(fragment, worker) -> its rounds in the order in which they counted."""
    found: dict[tuple[int, int], list[int]] = {}
    for record in checks.commits_of(records):
        for index, number in zip(record["indices"], record["rounds"], strict=True):
            found.setdefault((record["fragment"], index), []).append(number)
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("deaths", "down", "seed"),
    [
        (4, "relay", 1),
        pytest.param(50, "relay", 2, marks=pytest.mark.long),
        pytest.param(50, "q4_ef", 3, marks=pytest.mark.long),
    ],
)
def test_no_round_is_lost_or_doubled_wherever_the_coordinator_dies(
    tmp_path: Path, deaths: int, down: str, seed: int
) -> None:
    """Every round of every worker is in exactly one commit, and the run ends as it does without deaths."""
    steps = 4 * H * max(3, deaths // 2)
    undisturbed, wanted = run_calm(down, steps)
    records, digest = run_deadly(tmp_path / "r", down, steps, deaths, seed)
    kept = tmp_path / "r" / "deaths"
    for before, after in zip(
        journals := sorted(kept.glob("*.jsonl")),
        [*journals[1:], kept.parent / "journal" / "journal.jsonl"],
        strict=True,
    ):
        assert checks.lost(lines(before), lines(after)) == []
    assert checks.gaps(records) == [] and checks.counted_twice(records) == []
    assert rounds_of(records) == rounds_of(undisturbed)
    assert all(len(c["contributors"]) == 2 for c in checks.commits_of(records))
    assert digest == wanted
    if deaths >= 50:
        points = {path.read_text(encoding="ascii") for path in kept.glob("*.txt")}
        assert len(points) >= 8, points
