"""A replicated run over real gRPC: the same bits as in virtual time, and as a central run that relays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diloco.comms.connect import connect
from diloco.comms.driver import MachineThread
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.machine import Action, Event, Persist, Received, Send
from diloco.comms.messages import Fetch
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from diloco.coordinator.state import Coordinator
from tests.contract.test_same_bits import run_workers
from tests.toy import Cluster, Disk, config

torch.set_num_threads(1)

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "inner": {},
    "eager": {"stream": {"overlap": "eager"}, "codec": {"ef": "on"}},
    "centered_clip": {"robust": {"kind": "centered_clip"}},
}


def of(run: str, kind: str) -> RunConfig:
    sections = {**RUNS[run], "codec": {"up": "e3m0", "down": "relay", **RUNS[run].get("codec", {})}}
    return config(**sections, topology={"kind": kind})


@pytest.mark.parametrize("run", RUNS)
def test_workers_that_step_by_themselves_agree_over_sockets(run: str) -> None:
    """Every worker ends with the coordinator's digest, none ever differed, and the journal repeats the run."""
    c = of(run, "replicated")
    expected = Cluster(of(run, "central"), seed=3, weather=Weather((0.01, 3.0))).run()
    machine, disk, differing = Coordinator(c), Disk(), list[str]()

    def perform(action: Action) -> None:
        if isinstance(action, Persist):
            disk.write(action)
        elif isinstance(action, Send):
            server.send(action.to, action.message)  # type: ignore[arg-type]

    def post(event: Event) -> None:
        if isinstance(event, Received) and isinstance(event.message, Fetch) and event.message.differs:
            differing.append(event.message.worker)
        thread.post(event)

    thread = MachineThread(machine, perform)
    server = GrpcServer(post, lambda: {"config": {}})
    port = server.start()
    thread.start()
    try:
        digests = run_workers(c, lambda: connect(f"127.0.0.1:{port}"))
    finally:
        server.close(1.0)
        thread.stop()
    result = expected.coordinator.global_digest()
    assert digests == {0: result, 1: result} and machine.global_digest() == result
    assert differing == [] and machine.complete
    again = Coordinator(c)
    again.restore(disk.records, 0.0)
    assert again.global_digest() == result and again.commits == expected.coordinator.commits
