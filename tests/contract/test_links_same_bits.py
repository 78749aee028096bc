"""Promise 6 over real gRPC: the same run behind three emulated links and behind none ends with the same bits."""

from __future__ import annotations

from typing import Any

import pytest

from diloco.comms.connect import connect
from diloco.comms.driver import MachineThread
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.link import Link
from diloco.comms.machine import Action, Send
from diloco.config import RunConfig
from diloco.coordinator.state import Coordinator
from tests.contract.test_same_bits import run_workers
from tests.toy import Cluster, config

LINKS = {"none": None, "good": "64Mbit,10ms", "fair": "4Mbit,50ms", "poor": "1Mbit,100ms,jitter=40ms,loss=2%"}
RUNS: dict[str, dict[str, Any]] = {
    "overlapped": {"codec": {"down": "relay"}, "stream": {"tau": 1, "alpha": 0.5}},
    "blocking": {"codec": {"down": "q4_ef"}, "stream": {"overlap": "none", "layout": "single"}},
}


def over_grpc(c: RunConfig, link: Link | None) -> tuple[str, dict[int, str]]:
    """The coordinator's digest at the end and the workers' own, with `link` between each of them and it."""
    machine = Coordinator(c)

    def perform(action: Action) -> None:
        if isinstance(action, Send):
            server.send(action.to, action.message)  # type: ignore[arg-type]

    thread = MachineThread(machine, perform)
    server = GrpcServer(thread.post, lambda: {"config": {}})
    port = server.start()
    thread.start()
    try:
        digests = run_workers(c, lambda: connect(f"127.0.0.1:{port}", link=link))
    finally:
        server.close(1.0)
        thread.stop()
    assert thread.error is None
    return machine.global_digest(), digests


@pytest.mark.parametrize("run", RUNS)
def test_no_link_changes_a_bit(run: str) -> None:
    """Unlimited, 64 Mbit/s with 10 ms, 4 Mbit/s with 50 ms, 1 Mbit/s with 100 ms, jitter and loss: one digest, the simulator's."""
    sections = RUNS[run]
    c = config(
        stream={"H": 2, "frag_layers": 3, **sections["stream"]},
        codec={"up": "e3m0", **sections["codec"]},
        run={"inner_steps_total": 4},
        # Who takes part must not depend on how busy this machine is; what overtook another is soon sent again.
        fault={"quorum": 2, "heartbeat_s": 0.5, "suspect_s": 60.0, "dead_s": 120.0},
    )
    expected = Cluster(c).run().coordinator.global_digest()
    for name, text in LINKS.items():
        link = Link.parse(text) if text is not None else None
        assert over_grpc(c, link) == (expected, {0: expected, 1: expected}), name
