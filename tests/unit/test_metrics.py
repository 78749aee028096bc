"""Metrics as Prometheus sees them: scraped over HTTP and parsed."""

from __future__ import annotations

import math
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from diloco.comms.metrics import CoordinatorCollector, WorkerCollector, serve
from diloco.errors import ConfigError, EnvironmentProblem
from diloco.worker.timeline import Total

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
LABELS = {"worker", "fragment", "direction", "state", "reason", "run_id"}
UNITS = ("_total", "_seconds", "_per_second", "_nats_per_byte", "_ratio", "_info")
# Plain counts of things that go up and down, or positions, have no unit.
UNITLESS = (
    "phase", "epoch", "inner_step", "target_inner_steps", "parameters", "members", "state", "incarnation",
    "staleness_commits", "mismatch", "quarantined", "learning_rate",
)  # fmt: skip


def member(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name, "index": 0, "state": "active", "incarnation": 1, "versions": [3, 1], "step": 100, "tokens": 5000,
        "loss": 2.0, "lr": 1e-3, "tokens_per_s": 50.0, "compute_s": 90.0, "exposed_s": 10.0, "hidden_s": 4.0,
        "bytes_up": 1000, "bytes_down": 3000, "heartbeat_age_s": 0.25, "eval_start": 5.5, "eval_end": None,
        "digest": "", "finished": "", "live": True,
    } | changes  # fmt: skip


def status(*members: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": "demo", "phase": "running", "epoch": 2, "commits": 5, "aborted": 1, "inner_step": 100,
        "inner_steps_total": 400, "tokens": 8000, "fragments": [
            {"index": 0, "numel": 600, "version": 3}, {"index": 1, "numel": 400, "version": 2},
        ],
        "members": list(members), "rejections": {"late": 2}, "global_digest": "ab", "seconds": 60.0, "config": {},
    }  # fmt: skip


@contextmanager
def scraped(collector: Collector) -> Iterator[str]:
    (host, port), stop = serve(None, collector)
    try:
        assert host == "127.0.0.1"
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            yield answer.read().decode()
    finally:
        stop()


def samples(collector: Collector) -> Samples:
    with scraped(collector) as text:
        found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    keys = [(s.name, frozenset(s.labels.items())) for s in found]
    assert len(keys) == len(set(keys)), "a sample is exported twice"
    return {key: s.value for key, s in zip(keys, found, strict=True)}


def at(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def test_scrape_shows_the_run_and_its_workers() -> None:
    """Progress, rounds, wire, time split and membership are there, with the values of the status."""
    state = status(member("a"), member("b", state="suspect", compute_s=30.0))
    found = samples(CoordinatorCollector(lambda: state))
    assert at(found, "diloco_run_info", run_id="demo") == 1
    assert at(found, "diloco_run_phase", state="running") == 1
    assert at(found, "diloco_run_phase", state="complete") == 0
    assert at(found, "diloco_commits_total", fragment="0") == 3
    assert at(found, "diloco_aborted_rounds_total") == 1
    assert at(found, "diloco_accepted_tokens_total") == 8000
    assert at(found, "diloco_rejections_total", reason="late") == 2
    assert at(found, "diloco_data_parallel_bytes_total") == 200 * 2 * 1000
    assert at(found, "diloco_member_wire_bytes_total", worker="a", direction="up") == 1000
    assert at(found, "diloco_member_wire_bytes_total", worker="a", direction="down") == 3000
    assert at(found, "diloco_member_exposed_communication_seconds_total", worker="a") == 10
    assert at(found, "diloco_member_hidden_communication_seconds_total", worker="a") == 4
    assert at(found, "diloco_member_compute_utilisation_ratio", worker="b") == 0.75
    assert at(found, "diloco_member_heartbeat_age_seconds", worker="a") == 0.25
    assert at(found, "diloco_member_state", worker="b", state="suspect") == 1
    assert at(found, "diloco_members", state="active") == 1 == at(found, "diloco_members", state="suspect")
    assert at(found, "diloco_members", state="dead") == 0
    assert at(found, "diloco_member_staleness_commits", worker="a", fragment="1") == 1


def test_names_follow_the_conventions() -> None:
    """Prefix, snake case, base units, `_total` on counters and only there, help texts, and few labels."""
    state = status(member("a"))
    texts = []
    for collector in (
        CoordinatorCollector(lambda: state),
        WorkerCollector(lambda: member("a") | {"worker": "a"}),
    ):
        with scraped(collector) as text:
            texts.append(text)
    families = [
        f for t in texts for f in text_string_to_metric_families(t) if not f.name.startswith("process_")
    ]
    assert len(families) > 30
    for family in families:
        assert re.fullmatch(r"diloco_[a-z]+(_[a-z]+)*", family.name), family.name
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge"), family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert sample.name.endswith(UNITS) or sample.name.endswith(UNITLESS), sample.name
            assert set(sample.labels) <= LABELS


def test_unknown_values_have_no_sample() -> None:
    """A loss that nobody knows is absent, not 0 and not NaN."""
    state = status(member("a", loss=None, lr=float("nan"), compute_s=None, exposed_s=None))
    found = samples(CoordinatorCollector(lambda: state))
    for name in ("loss_nats_per_byte", "learning_rate", "compute_utilisation_ratio", "compute_seconds_total"):
        assert at(found, f"diloco_member_{name}", worker="a") is None
    assert at(found, "diloco_member_evaluation_loss_nats_per_byte", worker="a", state="end") is None
    assert at(found, "diloco_member_evaluation_loss_nats_per_byte", worker="a", state="start") == 5.5
    assert not any(math.isnan(value) for value in found.values())


def test_departed_workers_have_no_heartbeat_age_and_finished_ones_are_compared() -> None:
    """Alerts on silence must not fire for workers that left; a digest that differs must be seen."""
    done = {"live": False, "state": "gone", "finished": "complete"}
    state = status(member("a", digest="ab", **done), member("b", digest="cd", **done)) | {"phase": "complete"}
    found = samples(CoordinatorCollector(lambda: state))
    assert at(found, "diloco_member_heartbeat_age_seconds", worker="a") is None
    assert at(found, "diloco_member_digest_mismatch", worker="a") == 0
    assert at(found, "diloco_member_digest_mismatch", worker="b") == 1
    state["phase"] = "running"
    assert (
        at(samples(CoordinatorCollector(lambda: state)), "diloco_member_digest_mismatch", worker="b") is None
    )


def test_worker_exports_its_own_progress_at_each_scrape() -> None:
    """Values are read when asked for, never cached; names with odd characters survive."""
    row = {
        "worker": 'a"\\b',
        "step": 1,
        "tokens": 10,
        "loss": 3.5,
        "bytes_up": 7,
        "bytes_down": 9,
        "commits": 2,
        "fragments": {0: Total(3, 1.5, 4.0), 1: Total(3, 0.0, 2.0)},
    }
    collector = WorkerCollector(lambda: row)
    found = samples(collector)
    assert at(found, "diloco_worker_tokens_total", worker='a"\\b') == 10
    assert at(found, "diloco_worker_wire_bytes_total", worker='a"\\b', direction="up") == 7
    assert at(found, "diloco_worker_commits_total") == 2
    overlap = "diloco_worker_fragment_{}_communication_seconds_total"
    assert at(found, overlap.format("exposed"), worker='a"\\b', fragment="0") == 1.5
    assert at(found, overlap.format("hidden"), worker='a"\\b', fragment="1") == 2.0
    row["tokens"] = 20
    assert at(samples(collector), "diloco_worker_tokens_total", worker='a"\\b') == 20


def test_nothing_is_registered_globally() -> None:
    """Two servers in one process do not see each other, and the library's global registry stays untouched."""
    first, second = status(member("a")), status(member("b"))
    assert at(samples(CoordinatorCollector(lambda: first)), "diloco_member_tokens_total", worker="b") is None
    assert at(samples(CoordinatorCollector(lambda: second)), "diloco_member_tokens_total", worker="b") == 5000
    assert not [f.name for f in REGISTRY.collect() if f.name.startswith("diloco_")]


def test_taken_port_is_named_with_the_fix() -> None:
    """The operator learns which address and which option."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EnvironmentProblem, match=f"{re.escape(address)}: .*in use.*--metrics HOST:PORT"):
            serve(address, WorkerCollector(dict))


def test_stopped_server_frees_its_port() -> None:
    """The same address can be served again at once."""
    (host, port), stop = serve("127.0.0.1:0", WorkerCollector(dict))
    stop()
    again, stop = serve(f"{host}:{port}", WorkerCollector(dict))
    stop()
    assert again == (host, port)


@pytest.mark.parametrize("address", ["9400", "localhost", ":9400", "host:", "host:99999", "host:-1"])
def test_malformed_address_is_a_configuration_error(address: str) -> None:
    """HOST:PORT and nothing else."""
    with pytest.raises(ConfigError, match="HOST:PORT"):
        serve(address, WorkerCollector(dict))
