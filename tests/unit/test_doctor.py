"""`diloco doctor`: what it finds on a healthy node, on a sick one, and on the way to a coordinator."""

from __future__ import annotations

import datetime
import json
import shutil
import socket
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diloco.cli import main
from diloco.comms.authority import Authority
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.messages import PROTOCOL
from diloco.config import RunConfig
from diloco.worker import doctor
from diloco.worker.doctor import examine, kernel_settings
from diloco.worker.finding import Finding
from diloco.worker.model import build_model
from diloco.worker.session import ModelParameters

CONFIG = """
[run]
run_id = "r"
[model]
preset = "nano"
sequence_length = 32
[data]
source = "text.txt"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRPC_ENABLE_FORK_SUPPORT", raising=False)
    (tmp_path / "run.toml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "text.txt").write_text("some words", encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Authority(tmp_path_factory.mktemp("made") / "keys", datetime.datetime.now(datetime.UTC))
    made.create([], 90)
    made.member("worker", "w", [], 90)
    made.member("worker", "brief", [], 3)
    return made.folder


def levels(findings: list[Finding], check: str) -> list[str]:
    return [f.level for f in findings if f.check == check]


def only(findings: list[Finding], check: str, level: str) -> Finding:
    found = [f for f in findings if f.check == check and f.level == level]
    assert len(found) == 1, findings
    return found[0]


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["doctor", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_healthy_worker_has_no_failure(capsys: pytest.CaptureFixture[str], keys: Path) -> None:
    """Exit 0; every check has a word; every warning says what to do; ok needs no fix."""
    code, found = report(capsys, "worker", "run.toml", "--keys", str(keys / "workers" / "w"))
    assert code == 0 and found["ok"] and found["role"] == "worker"
    checks = {row["check"]: row for row in found["findings"] if row["level"] == "ok"}
    assert {"configuration", "keys", "device", "data", "disk", "libraries", "fork"} <= set(checks)
    assert "worker 'w'" in checks["keys"]["words"]
    for row in found["findings"]:
        assert row["words"] and bool(row["fix"]) == (row["level"] != "ok"), row


def test_the_text_for_people_has_the_fix_below_the_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "worker", "run.toml", "--data.source", "none.txt"]) == 2
    lines = capsys.readouterr().out.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("fail  data"))
    assert "none.txt" in lines[index] and lines[index + 1].strip() == "-> correct data.source"
    assert lines[-1].endswith("1 fail")


@pytest.mark.parametrize(
    ("arguments", "code", "check", "words"),
    [
        (("worker", "run.toml", "--stream.alhpa", "1"), 2, "configuration", "'alpha'"),
        (("worker", "none.toml"), 2, "configuration", "No such file"),
        (("worker", "run.toml", "--train.device", "cuda:97"), 4, "device", "cuda:97"),
        (("worker", "run.toml", "--keys", "nowhere"), 4, "keys", "no worker.crt"),
        (("worker", "run.toml", "--coordinator", "127.0.0.1"), 2, "coordinator", "host:port"),
        (("worker", "run.toml", "--coordinator", "no-such-host.invalid:1"), 4, "coordinator", "be resolved"),
        (("coordinator", "run.toml", "--listen", "0.0.0.0:0"), 4, "listen", "no keys"),
        (("coordinator", "run.toml", "--listen", "7700"), 2, "listen", "host:port"),
    ],
)
def test_each_fault_is_found_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, check: str, words: str
) -> None:
    """2 for usage and configuration, 4 for the machine; the others are still examined."""
    got, found = report(capsys, *arguments)
    assert got == code and not found["ok"]
    bad = [row for row in found["findings"] if row["level"] == "fail"]
    assert [row["check"] for row in bad] == [check] and words in bad[0]["words"] and bad[0]["fix"]
    assert any(row["check"] == "disk" for row in found["findings"])


def test_keys_are_judged_by_date_and_place(keys: Path, tmp_path: Path) -> None:
    """Three days left is a warning; ca.key on the coordinator's machine too; an unreadable revocation list a failure."""
    brief = examine("worker", "run.toml", keys=keys / "workers" / "brief")
    assert "3 days" in only(brief, "keys", "warn").words
    assert "ca.key" in only(examine("coordinator", "run.toml", keys=keys), "keys", "warn").words
    bare = tmp_path / "bare"
    shutil.copytree(keys, bare)
    (bare / "ca.key").unlink()
    assert levels(examine("coordinator", "run.toml", keys=bare), "keys") == ["ok"]
    (bare / "revoked.json").unlink()
    assert only(examine("coordinator", "run.toml", keys=bare), "keys", "fail").exit_code == 4
    (bare / "coordinator.key").chmod(0o604)
    assert only(examine("coordinator", "run.toml", keys=bare), "keys", "fail").exit_code == 3


def test_a_taken_port_is_found_and_a_free_one_is_left_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        busy = examine("coordinator", "run.toml", listen=f"127.0.0.1:{port}")
        assert "ss -ltnp" in only(busy, "listen", "fail").fix
    free = examine("coordinator", "run.toml", listen=f"127.0.0.1:{port}")
    assert levels(free, "listen") == ["warn", "ok"]  # reachable from this machine alone
    socket.create_server(("127.0.0.1", port)).close()


def test_a_folder_that_cannot_be_made_is_found(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in its place")
    assert "runs" in only(examine("worker", "run.toml"), "disk", "fail").words


def test_little_space_and_a_slow_disk_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 1 GiB fails, below 10 warns; a median fsync of 80 ms warns by itself."""
    for free, level in ((0.9, "fail"), (5.0, "warn"), (11.0, "ok")):
        usage = shutil.disk_usage(".")._replace(free=int(free * 2**30))
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert levels(examine("worker", "run.toml"), "disk") == [level]
    monkeypatch.setattr(doctor, "_synced", lambda descriptor: 0.08)
    assert "80.0 ms" in only(examine("worker", "run.toml"), "fsync", "warn").words


def test_fork_support_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", "1")
    assert levels(examine("worker", "run.toml"), "fork") == ["fail"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tcp_congestion_control": "bbr", "tcp_slow_start_after_idle": "0"}, ["ok"]),
        ({"tcp_congestion_control": "cubic", "tcp_slow_start_after_idle": "1"}, ["warn", "warn"]),
        ({"tcp_wmem": "4096\t16384\t65536"}, ["warn"]),
        ({"tcp_wmem": "4096\t16384\t4194304"}, []),
        ({}, []),
    ],
)
def test_kernel_settings_are_read_where_there_are_any(
    tmp_path: Path, settings: dict[str, str], expected: list[str]
) -> None:
    for name, value in settings.items():
        (tmp_path / name).write_text(value + "\n")
    assert levels(kernel_settings(tmp_path), "tcp") == expected


# ---- with a coordinator ----


@pytest.fixture
def served(keys: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A coordinator's port, and the status it tells, which a test may change."""
    config = RunConfig.from_toml(CONFIG)
    plan = ModelParameters(build_model("nano", 32, 0, 256), config).plan
    status: dict[str, Any] = {
        "run_id": "r", "phase": "running", "commits": 3, "config": config.model_dump(mode="json"),
        "plan": plan.digest(), "protocol": PROTOCOL,
    }  # fmt: skip
    server = GrpcServer(lambda event: None, lambda: status, keys=keys)
    yield f"127.0.0.1:{server.start()}", status
    server.close()


def test_a_worker_that_fits_learns_the_links_figures(served: tuple[str, dict[str, Any]], keys: Path) -> None:
    """Reachable, both certificates good, clocks together, same run, settings and fragments; rates in words."""
    found = examine("worker", "run.toml", coordinator=served[0], keys=keys / "workers" / "w")
    assert not [f for f in found if f.level == "fail"]
    for check in ("coordinator", "identity", "clock", "link", "run", "plan"):
        assert levels(found, check) == ["ok"], check
    assert "TLSv1.3" in only(found, "coordinator", "ok").words
    assert "Mbit/s" in only(found, "link", "ok").words


@pytest.mark.parametrize(
    ("change", "flags", "check", "words"),
    [
        ({"protocol": 99}, [], "run", "protocol 99"),
        ({"run_id": "other"}, [], "run", "'other'"),
        ({"plan": "0" * 64}, [], "plan", "other fragments"),
        ({}, ["stream.H=17"], "run", "stream.H = 17"),
        ({"config": {"unknown": {}}}, [], "run", "not one of this version"),
    ],
)
def test_what_a_join_would_be_refused_for_is_found_before(
    served: tuple[str, dict[str, Any]],
    keys: Path,
    change: dict[str, Any],
    flags: list[str],
    check: str,
    words: str,
) -> None:
    """With exit code 3, as the worker itself would have ended."""
    served[1].update(change)
    found = examine("worker", "run.toml", flags, coordinator=served[0], keys=keys / "workers" / "w")
    bad = only(found, check, "fail")
    assert words in bad.words and bad.exit_code == 3


def test_trouble_with_identity_is_named(served: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """No keys, keys of another run: exit code 3; nobody there: 4."""
    assert "--keys" in only(examine("worker", "run.toml", coordinator=served[0]), "identity", "fail").words
    foreign = Authority(tmp_path / "foreign", datetime.datetime.now(datetime.UTC))
    foreign.create([], 90)
    stranger = foreign.member("worker", "w", [], 90)
    found = examine("worker", "run.toml", coordinator=served[0], keys=stranger)
    assert only(found, "identity", "fail").exit_code == 3
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{silent.getsockname()[1]}"
        gone = only(examine("worker", "run.toml", coordinator=nobody), "coordinator", "fail")
    assert gone.exit_code == 4 and "firewall" in gone.fix


def test_clocks_that_differ_are_found(
    served: tuple[str, dict[str, Any]], keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = types.SimpleNamespace(time=lambda: time.time() - 100)
    monkeypatch.setattr("diloco.comms.grpc_server.time", late)
    found = examine("worker", "run.toml", coordinator=served[0], keys=keys / "workers" / "w")
    assert "-100" in only(found, "clock", "warn").words or "-99" in only(found, "clock", "warn").words
