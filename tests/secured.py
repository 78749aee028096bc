"""Clusters with keys, as real processes under attack: their certificates, a hand-made TLS client, what memory they take."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diloco.comms import tls
from diloco.comms.authority import Authority
from diloco.comms.query import fetch_status
from tests.processes import Cluster, Process, assert_all_identical, assert_versions_have_no_gap

WAIT_S = 20.0


def authority(folder: Path, days_ago: float = 0) -> Authority:
    return Authority(folder, datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days_ago))


class Secured(Cluster):
    """A cluster with keys for its coordinator and `names`."""

    def __init__(self, folder: Path, names: list[str], **sections: Mapping[str, Any]) -> None:
        super().__init__(folder, **sections)
        self.keys = folder / "keys"
        made = authority(self.keys)
        made.create([], 30)
        for name in names:
            made.member("worker", name, [], 30)

    def keys_of(self, name: str) -> Path:
        return self.keys / "workers" / name

    def with_keys(self, name: str, *flags: str) -> Process:
        return self.worker(name, "--keys", str(self.keys_of(name)), *flags)

    def status(self) -> dict[str, Any] | None:
        return fetch_status(self.address, 5.0, self.keys)

    @property
    def audit(self) -> list[dict[str, Any]]:
        text = (self.run_dir / "audit.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@contextlib.contextmanager
def running(cluster: Secured, names: list[str]) -> Iterator[list[Process]]:
    """Coordinator and workers `names`, held back until the block ends; then the first two workers finish the run."""
    with cluster:
        cluster.slow(True)
        coordinator = cluster.coordinator("--keys", str(cluster.keys))
        workers = [cluster.with_keys(name) for name in names]
        cluster.wait_commits(1, coordinator, *workers)
        yield [coordinator, *workers]
        cluster.slow(False)
        honest = [coordinator, *workers[:2]]
        assert [process.wait() for process in honest] == [0, 0, 0], coordinator.text
        assert_versions_have_no_gap(cluster.commits)
        assert_all_identical(cluster.report)
        assert "Traceback" not in coordinator.text


def handshake(cluster: Secured, name: str, version: ssl.TLSVersion) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cluster.keys / "ca.crt")
    folder = cluster.keys_of(name)
    context.load_cert_chain(folder / "worker.crt", folder / "worker.key")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", cluster.port), WAIT_S)
    try:
        return context.wrap_socket(plain, server_hostname=tls.COORDINATOR_NAME)
    except BaseException:
        plain.close()
        raise


def resident(process: Process) -> float:
    text = Path(f"/proc/{process.popen.pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return 1024.0 * int(found[1])


def is_cut_off(silent: socket.socket) -> bool:
    """Within twice the time that a handshake may take."""
    silent.settimeout(20)
    try:
        while silent.recv(1000):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True
