"""Wrong settings, wrong peers, full disks, broken numbers: each ends or is refused with a message that helps."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from diloco.comms import frame, uplink
from diloco.comms.connect import connect
from diloco.comms.machine import Connection, Received
from diloco.comms.messages import Contribution, Join, Leave, Progress, Rejected, Welcome
from diloco.config import RunConfig
from diloco.settings import settings_json
from diloco.worker import checkpoint
from diloco.worker.model import build_model
from diloco.worker.session import ModelParameters
from tests.processes import SLOW, Cluster, assert_all_identical, assert_versions_have_no_gap, wait_for

M = TypeVar("M")
LENGTH = 300  # inner steps: half a minute while the model is slow

POISON = """\
import torch
from diloco.worker.model import Transformer, preset_config

class Poisoned(Transformer):
    calls = 0

    def loss(self, tokens):
        value = super().loss(tokens)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            if self.calls == 7:
                return value * float("nan")
        return value

def make():
    return Poisoned(preset_config("nano", 32))
"""


# ---- refused before anything starts ----


def test_what_cannot_start_says_why_and_exits_with_its_code(tmp_path: Path) -> None:
    """2 for usage and configuration, 4 for the environment; the message names the key or address and what to do."""
    with Cluster(tmp_path) as cluster, socket.create_server(("127.0.0.1", 0)) as taken:
        # gRPC shares a port with listeners that allow it; this one does not.
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        typo = cluster.write("typo.toml", stream={"alhpa": 0.5})
        cases = {
            2: [
                (cluster.coordinator(config=typo), "stream.alhpa", "'alpha'"),
                (cluster.worker("w0", "--train.batchsize", "3"), "train.batchsize", "'batch_size'"),
                (cluster.worker("w1", config="none.toml"), "none.toml", "No such file"),
                (cluster.worker("w2", address="127.0.0.1"), "coordinator", "port"),
            ],
            4: [
                (cluster.coordinator("--run.run_id", "busy", listen=busy), busy, "another port"),
                (
                    cluster.coordinator("--run.run_id", "open", listen="0.0.0.0:0"),
                    "0.0.0.0",
                    "reachable from other machines",
                ),
                (
                    cluster.start("status", "status", "--coordinator", cluster.address),
                    cluster.address,
                    "running",
                ),
            ],
        }
        for code, processes in cases.items():
            for process, *words in processes:
                assert process.wait() == code, process.text
                assert all(word in process.text for word in words), process.text
                assert "Traceback" not in process.text


# ---- peers that do not fit, while a run goes on ----


@contextmanager
def _running(folder: Path, **sections: dict[str, Any]) -> Iterator[Cluster]:
    """A run of two workers, held back until the block ends; then it must complete as if nothing had happened."""
    with Cluster(folder, model=SLOW, run={"inner_steps_total": LENGTH}, **sections) as cluster:
        cluster.slow(True)
        coordinator = cluster.coordinator()
        everyone = (coordinator, *(cluster.worker(f"w{i}") for i in range(2)))
        cluster.wait_commits(1, *everyone)
        yield cluster
        cluster.slow(False)
        assert [process.wait() for process in everyone] == [0, 0, 0], coordinator.text
        assert_versions_have_no_gap(cluster.commits)
        assert_all_identical(cluster.report)
        assert {name for c in cluster.commits for name in c["contributors"]} == {"w0", "w1"}


def _receive(connection: Connection, kind: type[M]) -> M:
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        event = connection.receive(1.0)
        if isinstance(event, Received) and isinstance(event.message, kind):
            return event.message
    raise AssertionError(f"no {kind.__name__} came")


def test_strangers_are_refused_with_a_reason_and_do_not_disturb_the_run(tmp_path: Path) -> None:
    """Another model, other settings, another run, a second coordinator on the journal, broken frames.

    A refused worker ends with 3 within 60 s and names the difference; a bad frame is rejected with its reason; the
    run completes with contributions of its own workers alone.
    """
    with _running(tmp_path) as cluster:
        model = {"preset": "tiny", "sequence_length": 32}
        other_model = cluster.write("tiny.toml", model=model, run={"inner_steps_total": LENGTH})
        begun = time.monotonic()
        refused = [
            (cluster.worker("big", config=other_model), ["blocks.0.attn_norm.weight", "[128]", "[64]"]),
            (cluster.worker("other", "--outer.lr", "0.11"), ["outer.lr", "0.11", "0.4"]),
            (cluster.worker("lost", "--run.run_id", "elsewhere"), ["run_id", "'elsewhere'", "'r'"]),
        ]
        second = cluster.coordinator("--resume", listen="127.0.0.1:0")
        fresh = cluster.coordinator(listen="127.0.0.1:0")
        same_port = cluster.coordinator("--run.run_id", "another")
        _send_bad_frames(cluster)
        for process, words in refused:
            assert process.wait() == 3, process.text
            assert all(word in process.text for word in words), process.text
            assert "Traceback" not in process.text
        assert time.monotonic() - begun < 60
        for process in (second, fresh):
            assert process.wait() == 4, process.text
            assert "another coordinator" in process.text
        assert same_port.wait() == 4 and "port is taken" in same_port.text, same_port.text
        status = wait_for("an answer", cluster.status)
        assert status["rejections"]["corrupt"] == 3 and status["rejections"]["join_plan"] == 1
    again = cluster.coordinator()
    assert again.wait() == 2 and "--resume" in again.text


def _send_bad_frames(cluster: Cluster) -> None:
    """As a worker that speaks the protocol and sends three damaged contributions."""
    config = RunConfig.load(cluster.folder / cluster.config)
    plan = ModelParameters(build_model("nano", 32, 0, 256), config).plan
    connection = connect(f"grpc://{cluster.address}")
    try:
        connection.receive(10)
        connection.send(Join("liar", 77, "r", plan.describe(), settings_json(config)))
        welcome = _receive(connection, Welcome)
        good = frame.encode_frame(
            uplink.uplink_codec(config.codec),
            torch.randn(plan.fragments[0].numel, generator=torch.Generator().manual_seed(1)),
            fragment=0,
            round=1,
            base_version=welcome.versions[0],
            run_id=frame.run_id_hash("r"),
            worker=welcome.index,
            incarnation=welcome.incarnation,
            steps=10,
            tokens=1280,
        )
        flipped = bytearray(good)
        flipped[-1] ^= 1
        foreign = frame.relabel(good, worker=0, incarnation=1)
        for number, (bad, why) in enumerate(
            [(bytes(flipped), "crc"), (good[:-100], "bytes"), (foreign, "worker")], start=1
        ):
            connection.send(Contribution("liar", welcome.incarnation, 0, number, bad))
            rejected = _receive(connection, Rejected)
            assert (rejected.fragment, rejected.round) == (0, number)
            assert re.search(why, rejected.reason, re.IGNORECASE), rejected.reason
        connection.send(Leave("liar", welcome.incarnation, "caught", Progress(), ""))
    finally:
        connection.close()


def test_a_gradient_that_is_not_a_number_costs_one_step_of_one_worker(tmp_path: Path) -> None:
    """The step is skipped and said so; the run completes with identical replicas and finite losses."""
    with Cluster(tmp_path) as cluster:
        (tmp_path / "poison.py").write_text(POISON, encoding="utf-8")
        coordinator, w0 = cluster.coordinator(), cluster.worker("w0")
        w1 = cluster.worker("w1", "--model.factory", "poison:make")
        assert [p.wait() for p in (w0, w1, coordinator)] == [0, 0, 0], w1.text
        assert len(re.findall(r"inner step 7: loss nan.*step skipped", w1.text)) == 1
        assert "skipped" not in w0.text
        report = cluster.report
        assert_all_identical(report)
        assert report["eval_loss_end"] < report["eval_loss_start"]
        tokens = {w["id"]: w["tokens"] for w in report["workers"]}
        assert tokens["w0"] - tokens["w1"] == 4 * 32


# ---- full disks ----


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of `size` at `folder`; skips where it cannot be made."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_under_the_journal_ends_the_coordinator_and_more_space_continues_the_run(
    tmp_path: Path,
) -> None:
    """Exit 4 with what to do; the workers wait; after the disk has grown, --resume completes with every commit once."""
    journal = tmp_path / "runs" / "r" / "journal"
    with _small_disk(journal, "1400k"), Cluster(tmp_path) as cluster:
        first = cluster.coordinator()
        workers = [cluster.worker(f"w{i}") for i in range(2)]
        assert first.wait() == 4, first.text
        assert "No space left" in first.text and "--resume" in first.text and "Traceback" not in first.text
        assert [w.popen.poll() for w in workers] == [None, None]
        before = len(cluster.commits)
        still_full = cluster.coordinator("--resume")
        assert still_full.wait() == 4, still_full.text
        assert len(cluster.commits) == before
        subprocess.run(["mount", "-o", "remount,size=50m", str(journal)], check=True)
        last = cluster.coordinator("--resume")
        assert [p.wait() for p in (*workers, last)] == [0, 0, 0], last.text
        assert_versions_have_no_gap(cluster.commits)
        assert_all_identical(cluster.report)


def test_a_full_disk_under_a_workers_checkpoint_ends_it_with_the_old_one_intact(tmp_path: Path) -> None:
    """The second checkpoint does not fit: exit 4 with what to do, and the first one still loads."""
    folder = tmp_path / "runs" / "r" / "workers" / "w0" / "checkpoint"
    train = {"batch_size": 4, "threads": 1, "checkpoint_every": 5}
    with _small_disk(folder, "6m"), Cluster(tmp_path, train=train, topology={"workers": 1}) as cluster:
        cluster.coordinator()
        worker = cluster.worker("w0")
        assert worker.wait() == 4, worker.text
        assert "cannot write a checkpoint" in worker.text and "free space" in worker.text
        assert "Traceback" not in worker.text
        found = checkpoint.load(folder)
        assert found is not None and found[1]["replica"]["step"] == 5
