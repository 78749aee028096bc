"""Prometheus metrics of a run: what the coordinator knows of all, and what one worker knows of itself.

Both are read from the status at the moment of a scrape; nothing is counted here. The coordinator's view of its
workers is `diloco_member_*`, a worker's own is `diloco_worker_*`, so that a sum over either counts each byte
once. Values that nobody knows yet have no sample. Each server has its own registry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diloco.comms.address import is_loopback
from diloco.comms.metrics_tls import start_tls_server
from diloco.errors import ConfigError, EnvironmentProblem
from diloco.readout import data_parallel_bytes, mean_bps, number, utilisation, whole

PHASES = ("gathering", "seeding", "running", "complete")
STATES = ("joining", "syncing", "active", "suspect", "dead", "gone")

Row = Mapping[str, Any]
Sample = tuple[Sequence[str], object]


class CoordinatorCollector(Collector):
    """Metrics from the coordinator's `status()`, which is called once per scrape, from the server's thread."""

    def __init__(self, status: Callable[[], Row]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        yield from _run(status)
        yield from _members(status)
        yield from _data(status.get("data"))


class WorkerCollector(Collector):
    """Metrics from a worker's `progress()`: a heartbeat's fields and `worker`, called once per scrape."""

    def __init__(self, progress: Callable[[], Row]) -> None:
        self._progress = progress

    def collect(self) -> Iterable[Metric]:
        row = self._progress()
        yield from _training("diloco_worker", [(str(row.get("worker") or ""), row)])
        yield from _overlap(str(row.get("worker") or ""), row.get("fragments") or {})
        commits = row.get("commits")
        yield _counter("diloco_worker_commits", "Commits this worker has merged.", [], [((), commits)])


def serve(
    address: str | None, collector: Collector, keys: Path | None = None
) -> tuple[tuple[str, int], Callable[[], None]]:
    """Serve `collector` over HTTP; returns the address in use and a function that stops the server.

    `address` is "HOST:PORT" (port 0: a free one); None means a free port of the loopback interface. Raises
    ConfigError for something that is no address, EnvironmentProblem if it cannot be listened on. With `keys`, whoever is
    not on this machine needs a certificate of their CA: an address beyond loopback is served over TLS.
    """
    host, port = _host_port(address) if address else ("127.0.0.1", 0)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    try:
        if keys is not None and not is_loopback(host):
            server, thread = start_tls_server(port, host, registry, keys)
        else:
            server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise EnvironmentProblem(
            f"metrics: cannot listen on {host}:{port}: {error.strerror or error}; free that port, or choose "
            "another with --metrics HOST:PORT (port 0 takes any free one)"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return (host, server.server_port), stop


def _host_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"metrics: {address!r} is no address: write HOST:PORT, for example 127.0.0.1:9400")
    return host, int(port)


def _run(status: Row) -> Iterable[Metric]:
    members, fragments = status["members"], status["fragments"]
    yield _gauge("diloco_run_info", "Always 1; names the run.", ["run_id"], [((str(status["run_id"]),), 1)])
    yield _gauge(
        "diloco_run_phase", "1 for the phase the run is in.", ["state"],
        [((phase,), int(phase == status["phase"])) for phase in PHASES],
    )  # fmt: skip
    yield _gauge("diloco_run_elapsed_seconds", "Time since the start.", [], [((), status["seconds"])])
    yield _gauge("diloco_run_epoch", "Lives of the coordinator in this run.", [], [((), status["epoch"])])
    yield _gauge(
        "diloco_run_inner_step", "Furthest inner step of any worker.", [], [((), status["inner_step"])]
    )
    yield _gauge(
        "diloco_run_target_inner_steps", "Inner steps at which the run is complete.", [],
        [((), status["inner_steps_total"])],
    )  # fmt: skip
    yield _counter(
        "diloco_accepted_tokens", "Tokens behind the contributions in commits.", [], [((), status["tokens"])]
    )
    # Commits of a fragment are its version: their sum is the number of outer steps.
    yield _counter(
        "diloco_commits", "Committed rounds (outer steps).", ["fragment"],
        [((str(f["index"]),), f["version"]) for f in fragments],
    )  # fmt: skip
    yield _counter(
        "diloco_aborted_rounds", "Rounds that ended without a quorum.", [], [((), status["aborted"])]
    )
    yield _gauge(
        "diloco_fragment_parameters", "Parameters of the fragment.", ["fragment"],
        [((str(f["index"]),), f["numel"]) for f in fragments],
    )  # fmt: skip
    yield _counter(
        "diloco_rejections", "Contributions and joins refused.", ["reason"],
        [((str(reason),), count) for reason, count in sorted(status["rejections"].items())],
    )  # fmt: skip
    parameters = sum(whole(f["numel"]) for f in fragments)
    baseline = data_parallel_bytes(parameters, [whole(m["step"]) for m in members])
    yield _counter(
        "diloco_data_parallel_bytes", "What a bf16 ring all-reduce at every step would have sent.", [],
        [((), baseline)],
    )  # fmt: skip


def _data(data: Row | None) -> Iterable[Metric]:
    """Of runs whose coordinator leases the data."""
    if data is None:
        return
    yield _gauge(
        "diloco_data_blocks", "Blocks of the data that were ever leased, by what they are now.", ["state"],
        [((state,), data[state]) for state in ("free", "leased", "committed")],
    )  # fmt: skip
    yield _counter(
        "diloco_data_returned_blocks",
        "Leased blocks that came back uncommitted.",
        [],
        [((), data["returned"])],
    )
    yield _counter(
        "diloco_data_consumed_tokens", "Tokens of committed blocks.", ["shard"],
        [((str(shard),), tokens) for shard, tokens in enumerate(data["tokens"])],
    )  # fmt: skip


def _members(status: Row) -> Iterable[Metric]:
    named = [(str(m["id"]), m) for m in status["members"]]
    counts = Counter(m["state"] for _, m in named)
    yield _gauge(
        "diloco_members", "Workers by state.", ["state"], [((state,), counts[state]) for state in STATES]
    )
    yield _gauge(
        "diloco_member_state", "1 for the state the worker is in.", ["worker", "state"],
        [((name, state), int(state == m["state"])) for name, m in named for state in STATES],
    )  # fmt: skip
    yield _gauge(
        "diloco_member_incarnation", "Lives of the worker in this run.", ["worker"],
        [((name,), m["incarnation"]) for name, m in named],
    )  # fmt: skip
    yield _gauge(
        "diloco_member_heartbeat_age_seconds", "Time since the worker was last heard, while it is live.",
        ["worker"], [((name,), m["heartbeat_age_s"]) for name, m in named if m["live"]],
    )  # fmt: skip
    yield _gauge(
        "diloco_member_quarantined", "1 while bad contributions keep the worker's others from counting.", ["worker"],
        [((name,), int(bool(m.get("quarantined")))) for name, m in named],
    )  # fmt: skip
    yield _counter(
        "diloco_member_rejections", "Contributions of the worker that were refused.", ["worker", "reason"],
        [((name, str(k)), n) for name, m in named for k, n in sorted(m.get("rejected", {}).items())],
    )  # fmt: skip
    newest = {f["index"]: f["version"] for f in status["fragments"]}
    behind = [
        ((name, str(index)), max(0, newest[index] - version))
        for name, m in named
        if m["live"]
        for index, version in enumerate(m["versions"])
        if index in newest
    ]
    yield _gauge(
        "diloco_member_staleness_commits", "Commits of the fragment that a live worker has not merged yet.",
        ["worker", "fragment"], behind,
    )  # fmt: skip
    yield _gauge(
        "diloco_member_digest_mismatch", "1 if a worker that finished holds other global parameters.", ["worker"],
        [
            ((name,), int(m["digest"] != status["global_digest"]))
            for name, m in named
            if status["phase"] == "complete" and m["finished"] and m["digest"]
        ],
    )  # fmt: skip
    yield from _training("diloco_member", named)


def _training(prefix: str, named: Sequence[tuple[str, Row]]) -> Iterable[Metric]:
    """What a heartbeat says, per worker."""

    def values(key: str) -> list[Sample]:
        return [((name,), row.get(key)) for name, row in named]

    label = ["worker"]
    yield _gauge(f"{prefix}_inner_step", "Inner step.", label, values("step"))
    yield _counter(f"{prefix}_tokens", "Tokens trained on.", label, values("tokens"))
    yield _gauge(f"{prefix}_loss_nats_per_byte", "Newest training loss.", label, values("loss"))
    yield _gauge(f"{prefix}_learning_rate", "Inner learning rate.", label, values("lr"))
    yield _gauge(f"{prefix}_tokens_per_second", "Recent training speed.", label, values("tokens_per_s"))
    yield _counter(f"{prefix}_compute_seconds", "Time in inner steps.", label, values("compute_s"))
    yield _counter(
        f"{prefix}_exposed_communication_seconds", "Time in which compute waited for communication.",
        label, values("exposed_s"),
    )  # fmt: skip
    yield _counter(
        f"{prefix}_hidden_communication_seconds", "Communication that ran while the worker computed.",
        label, values("hidden_s"),
    )  # fmt: skip
    yield _gauge(
        f"{prefix}_compute_utilisation_ratio", "compute / (compute + exposed communication).", label,
        [((n,), utilisation(number(r.get("compute_s")), number(r.get("exposed_s")))) for n, r in named],
    )  # fmt: skip
    yield _counter(
        f"{prefix}_wire_bytes", "Bytes of updates that crossed the worker's link.", ["worker", "direction"],
        [((name, way), row.get(f"bytes_{way}")) for name, row in named for way in ("up", "down")],
    )  # fmt: skip
    yield _gauge(
        f"{prefix}_peak_wire_bits_per_second", "Highest mean rate of updates over a second.", ["worker", "direction"],
        [((name, way), row.get(f"peak_{way}_bps")) for name, row in named for way in ("up", "down")],
    )  # fmt: skip
    yield _gauge(
        f"{prefix}_mean_wire_bits_per_second", "Mean rate of updates over the run.", ["worker", "direction"],
        [((name, way), mean_bps(row, way)) for name, row in named for way in ("up", "down")],
    )  # fmt: skip
    yield _gauge(
        f"{prefix}_evaluation_loss_nats_per_byte", "Loss on held-out text before and after training.",
        ["worker", "state"],
        [((name, when), row.get(f"eval_{when}")) for name, row in named for when in ("start", "end")],
    )  # fmt: skip


def _overlap(worker: str, fragments: Mapping[int, Any]) -> Iterable[Metric]:
    """Communication per fragment, of the rounds that are over; a wait for several counts for each of them."""
    for kind, words in (
        ("exposed", "Time in which compute waited for the fragment's reply."),
        ("hidden", "Time the fragment was under way while compute did not wait for it."),
    ):
        yield _counter(
            f"diloco_worker_fragment_{kind}_communication_seconds", words, ["worker", "fragment"],
            [((worker, str(index)), getattr(total, kind)) for index, total in sorted(fragments.items())],
        )  # fmt: skip


def _gauge(name: str, words: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for values, value in samples:
        if (known := number(value)) is not None:
            family.add_metric(values, known)
    return family


def _counter(name: str, words: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    """`name` without the `_total` that the exposition adds."""
    family = CounterMetricFamily(name, words, labels=labels)
    for values, value in samples:
        if (known := number(value)) is not None:
            family.add_metric(values, known)
    return family
