"""`diloco train` as people start it: in a process of its own, killed, interrupted, resumed, and under torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diloco.config import RunConfig
from diloco.worker import checkpoint
from diloco.worker.inner import make_model
from tests.processes import SLOW, Cluster, free_port, wait_for

KEYS = {
    "tokens", "train_seconds", "eval_loss_start", "eval_loss_end", "commits", "workers", "global_digest", "bytes_up",
    "bytes_down", "bytes_data_parallel", "compute_utilisation", "exposed_comm_seconds", "hidden_comm_seconds",
    "versions", "config", "overlap", "prediction", "wire_bits_per_second",
}  # fmt: skip


def results(run: Path) -> dict[str, Tensor]:
    """The exported parameters and everything in the newest checkpoint."""
    found = checkpoint.load(run / "state")
    assert found is not None
    return {**found[0], **load_file(run / "checkpoint" / "model.safetensors")}


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return found


def assert_same_bits(one: Path, two: Path) -> None:
    a, b = results(one), results(two)
    assert a.keys() == b.keys()
    assert [name for name, value in a.items() if not torch.equal(value, b[name])] == []


def test_killed_and_interrupted_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """kill -9, --resume, SIGINT (exit 130), --resume: parameters, optimizers and report as without any of it.

    Without --resume the folder is refused (exit 2) and left as it is.
    """
    sections: dict[str, dict[str, Any]] = {
        "run": {"run_id": "broken", "inner_steps_total": 30},
        "model": SLOW,
        "train": {"outer": "snoo", "checkpoint_every": 2, "eval_every": 10},
        "snoo": {"k": 7, "momentum": 0.5},
        "optim": {"kind": "muon", "iteration_dtype": "float32"},
        "schedule": {"warmup": 3},
    }
    runs = tmp_path / "runs"
    with Cluster(tmp_path, **sections) as cluster:
        cluster.slow(True)
        first = cluster.start("first", "train", cluster.config)
        wait_for("a checkpoint", lambda: (runs / "broken" / "state" / "latest").exists(), first)
        first.kill()
        refused = cluster.start("refused", "train", cluster.config)
        second = cluster.start("second", "train", cluster.config, "--resume")
        resumed = second.wait_text(r"resumed at step (\d+)")
        assert 0 < int(resumed[1]) < 30 and int(resumed[1]) % 2 == 0
        second.wait_text(r"step \d+/30  loss")
        second.signal(signal.SIGINT)
        assert second.wait() == 130, second.text
        assert "continue with --resume" in second.text
        assert refused.wait() == 2 and "continue it with --resume" in refused.text
        cluster.slow(False)
        third = cluster.start("third", "train", cluster.config, "--resume")
        straight = cluster.start("straight", "train", cluster.config, "--run.run_id", "straight")
        for process in (third, straight):
            assert process.wait() == 0, process.text
        assert "held-out loss" in third.text.splitlines()[-1]
    assert_same_bits(runs / "broken", runs / "straight")
    one, two = report(runs / "broken"), report(runs / "straight")
    assert one.keys() == two.keys() == KEYS
    assert one["workers"] == two["workers"] and one["global_digest"] == two["global_digest"]
    for key in ("tokens", "eval_loss_start", "eval_loss_end"):
        assert one[key] == two[key], key
    assert (runs / "broken" / "report.html").exists()


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "diloco", "train", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    """To 1e-5 of the displacement, over accumulated gradients; both ranks hold the same bits; a resumed job too.

    GPA around AdamW, 12 steps of 2 x 2 windows on two ranks against 2 x 4 windows in one process, and 6 + 6 steps.
    """
    sections: dict[str, dict[str, Any]] = {
        "run": {"inner_steps_total": 12},
        "train": {"outer": "gpa", "grad_accum": 2, "batch_size": 2},
        "gpa": {"mu_x": 0.8},
        "schedule": {"kind": "constant"},
    }
    runs = tmp_path / "runs"
    with Cluster(tmp_path, **sections) as cluster:
        config = cluster.config
        jobs = [
            torchrun(tmp_path, config, "--run.run_id", "two"),
            torchrun(tmp_path, config, "--run.run_id", "halves", "--run.inner_steps_total", "6"),
        ]
        one = cluster.start("one", "train", config, "--run.run_id", "one", "--train.batch_size", "4")
        try:
            finish(jobs[1])
            jobs.append(torchrun(tmp_path, config, "--run.run_id", "halves", "--resume"))
            for job in (jobs[0], jobs[2]):
                finish(job)
            assert one.wait() == 0, one.text
        finally:
            for job in jobs:
                job.kill()
    assert_same_bits(runs / "two", runs / "halves")
    single, both = (load_file(runs / name / "checkpoint" / "model.safetensors") for name in ("one", "two"))
    begun = make_model(RunConfig.load(tmp_path / config), 256, torch.device("cpu")).state_dict()
    moved = sum(float((single[k] - begun[k]).square().sum()) for k in single) ** 0.5
    apart = sum(float((single[k] - both[k]).square().sum()) for k in single) ** 0.5
    assert 0 < apart < 1e-5 * moved
    facts, alone = report(runs / "two"), report(runs / "one")
    assert [w["id"] for w in facts["workers"]] == ["rank0", "rank1"]
    assert {w["digest"] for w in facts["workers"]} == {facts["global_digest"]}
    assert facts["tokens"] == alone["tokens"] == 12 * 8 * 32
    assert abs(facts["eval_loss_end"] - alone["eval_loss_end"]) < 1e-5
    assert facts["bytes_up"] == 0
