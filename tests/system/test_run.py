"""A whole run as a user starts it: one coordinator and two workers, each a process of its own."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from diloco.comms import codec, frame
from diloco.comms.link import Link, Relay
from diloco.comms.uplink import uplink_codec
from diloco.config import RunConfig
from diloco.fragments import FragmentPlan, gather
from tests.processes import SLOW, Cluster, assert_all_identical, assert_versions_have_no_gap, wait_for

STEPS = 150  # of which the first ones are slow, while the run is looked at
REPORT_KEYS = {
    "tokens", "train_seconds", "eval_loss_start", "eval_loss_end", "commits", "workers", "global_digest", "bytes_up",
    "bytes_down", "bytes_data_parallel", "compute_utilisation", "exposed_comm_seconds", "hidden_comm_seconds",
    "versions", "config",
}  # fmt: skip


@dataclass
class Finished:
    cluster: Cluster
    codes: list[int]
    status: dict[str, Any]
    metrics: str
    up: int
    down: int


def _run(folder: Path, **sections: dict[str, Any]) -> Finished:
    """Status and metrics are read while the run is held back; then it may finish."""
    with (
        Cluster(folder, model=SLOW, **sections) as cluster,
        Relay("127.0.0.1", cluster.port, Link()) as proxy,
    ):
        cluster.slow(True)
        coordinator = cluster.coordinator()
        workers = [cluster.worker(f"w{i}", address=f"127.0.0.1:{proxy.port}") for i in range(2)]
        everyone = (coordinator, *workers)
        cluster.wait_commits(1, *everyone)
        wait_for("a heartbeat", lambda: (cluster.status() or {}).get("inner_step"), *everyone)
        asked = cluster.start("status", "status", "--coordinator", cluster.address, "--json")
        assert asked.wait() == 0, asked.text
        url = coordinator.wait_text(r"metrics (http://\S+/metrics)")[1]
        with urllib.request.urlopen(url, timeout=10) as answer:
            metrics = answer.read().decode()
        cluster.slow(False)
        codes = [process.wait() for process in (*workers, coordinator)]
        return Finished(cluster, codes, json.loads(asked.text), metrics, *proxy.traffic())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    yield _run(tmp_path_factory.mktemp("run"), run={"inner_steps_total": STEPS})


def _plan(cluster: Cluster) -> FragmentPlan:
    return FragmentPlan.from_description(next(r["plan"] for r in cluster.journal if r["type"] == "start"))


def test_every_process_of_a_complete_run_exits_with_0(finished: Finished) -> None:
    """Exit code 0 is "done", for the workers and for the coordinator, which ends by itself."""
    assert finished.codes == [0, 0, 0]


def test_the_report_has_every_documented_key_and_counts_every_token(finished: Finished) -> None:
    """report.json has the fixed keys; tokens are batch x length x steps x workers; losses fall."""
    report = finished.cluster.report
    assert report.keys() >= REPORT_KEYS
    assert all(w.keys() >= {"id", "steps", "tokens", "digest", "live"} for w in report["workers"])
    assert [w["id"] for w in report["workers"]] == ["w0", "w1"]
    assert report["tokens"] == 2 * STEPS * 4 * 32
    assert report["eval_loss_end"] < report["eval_loss_start"] - 0.5
    assert 0 < report["compute_utilisation"] <= 1
    assert report["bytes_data_parallel"] > report["bytes_up"] + report["bytes_down"]
    assert sum(report["versions"].values()) == report["commits"] == len(finished.cluster.commits)
    assert (finished.cluster.run_dir / "report.html").stat().st_size > 1000


def test_all_replicas_end_bit_identical(finished: Finished) -> None:
    """Every worker's digest is the coordinator's."""
    assert_all_identical(finished.cluster.report)


def test_the_final_checkpoint_holds_exactly_the_parameters_of_the_global_digest(finished: Finished) -> None:
    """The digest computed anew from the file, tensor by tensor along the plan, is the reported one."""
    path = finished.cluster.run_dir / "checkpoint" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plan = _plan(finished.cluster)
    found = frame.model_digest(frame.digest(gather(f, tensors)) for f in plan.fragments)
    assert found == finished.cluster.report["global_digest"]
    assert sum(t.numel() for t in tensors.values()) == plan.numel


def test_the_journal_tells_every_commit(finished: Finished) -> None:
    """Lines are JSON with a type; commits carry their fields; versions count 1..n; the end is recorded."""
    records = finished.cluster.journal
    assert all("type" in record for record in records)
    commits = finished.cluster.commits
    assert all(
        c.keys() >= {"fragment", "version", "contributors", "weights", "digest"} and sum(c["weights"]) == 1.0
        for c in commits
    )
    assert {tuple(c["contributors"]) for c in commits} == {("w0", "w1")}
    assert_versions_have_no_gap(commits)
    assert records[-1]["type"] == "complete"
    assert records[-1]["digest"] == finished.cluster.report["global_digest"]


def test_status_shows_a_run_while_it_goes_on(finished: Finished) -> None:
    """`diloco status --json` has the documented keys and knows both members."""
    status = finished.status
    assert status.keys() >= {"run_id", "commits", "inner_step", "members", "epoch"}
    assert status["run_id"] == "r" and status["epoch"] == 1 and status["commits"] >= 1
    assert 0 < status["inner_step"] < STEPS
    assert [m["id"] for m in status["members"]] == ["w0", "w1"]
    for member in status["members"]:
        assert member.keys() >= {"id", "state", "incarnation", "versions"}
        assert member["state"] == "active" and member["incarnation"] == 1


def test_the_coordinator_serves_metrics(finished: Finished) -> None:
    """The port in the log serves Prometheus text with our prefix."""
    lines = [line for line in finished.metrics.splitlines() if line.startswith("diloco_")]
    assert len(lines) > 10
    assert any("w0" in line for line in lines)


def _expected_bytes(cluster: Cluster) -> tuple[int, int]:
    """What the wire formulas say, both directions, for two workers that contributed to every commit."""
    config = RunConfig.load(cluster.folder / cluster.config)
    sizes = [f.numel for f in _plan(cluster).fragments]
    uplink, fp32 = uplink_codec(config.codec), codec.get("fp32")
    commits = [c["fragment"] for c in cluster.commits]
    answers = sum(frame.frame_size(uplink, sizes[p]) for p in commits)
    values = sum(frame.frame_size(fp32, n) for n in sizes)
    up = values + 2 * answers  # the first worker's starting values, then one frame each
    mode = config.codec.down
    begin = values  # for the second worker; both know the outer state before the first commit
    each = {
        "relay": answers,
        "q4_ef": answers,
        "g_fp32": sum(frame.frame_size(fp32, sizes[p]) for p in commits),
    }
    return up, begin + 2 * each[mode]


def _assert_bytes_match(finished: Finished) -> None:
    up, down = _expected_bytes(finished.cluster)
    report = finished.cluster.report
    assert (report["bytes_up"], report["bytes_down"]) == (up, down)
    assert up <= finished.up <= 1.03 * up
    assert down <= finished.down <= 1.03 * down


def test_reported_bytes_equal_the_formulas_and_what_passed_the_sockets(finished: Finished) -> None:
    """Frames are counted exactly; HTTP/2, gRPC and all control messages add less than 3 %."""
    _assert_bytes_match(finished)


def test_the_report_predicts_its_bytes_and_shows_every_fragments_overlap(finished: Finished) -> None:
    """The prediction's bytes are the wire formulas'; each worker's rounds are in the report, and its log compares too."""
    report = finished.cluster.report
    prediction = report["prediction"]
    assert (prediction["bytes_up"], prediction["bytes_down"]) == _expected_bytes(finished.cluster)
    assert prediction["measured"]["bytes_up"] == report["bytes_up"]
    assert 0 < prediction["compute_utilisation"] <= 1 and prediction["inputs"]["workers"] == 2
    assert prediction["inputs"]["rtt_s"] > 0
    rounds = {p: found["rounds"] for p, found in report["overlap"].items()}
    assert rounds == {p: 2 * commits for p, commits in report["versions"].items()}
    page = (finished.cluster.run_dir / "report.html").read_text(encoding="utf-8")
    assert page.count("hidden bar") + page.count('class="exposed"') > sum(rounds.values())
    for name in ("w0", "w1"):
        (log,) = finished.cluster.folder.glob(f"*-{name}.log")
        assert "predicted: compute utilisation" in log.read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("down", ["q4_ef", "g_fp32"])
def test_bytes_match_in_other_downlink_modes(tmp_path: Path, down: str) -> None:
    """One shared frame per commit comes down: requantised with q4_ef, fp32 parameters with g_fp32."""
    finished = _run(tmp_path, run={"inner_steps_total": STEPS}, codec={"down": down})
    assert finished.codes == [0, 0, 0]
    _assert_bytes_match(finished)
    assert_all_identical(finished.cluster.report)
