"""One run, three drivers: the simulator, the in-process hub and real gRPC give bit-identical parameters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from diloco.comms.connect import connect
from diloco.comms.driver import MachineThread
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.link import Link
from diloco.comms.local import LocalHub
from diloco.comms.machine import Action, Compute, Computed, Connection, Lost, Send, Tick
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from diloco.coordinator.state import Coordinator
from diloco.worker.replica import Replica
from tests.toy import Cluster, ToyModel, config, plan_of


def settle(replica: Replica, connection: Connection, actions: list[Action]) -> None:
    """Perform actions and wait, on one thread, until nothing holds the replica; then merge."""
    pending = list(actions)
    while True:
        while pending:
            action = pending.pop(0)
            if isinstance(action, Send):
                connection.send(action.message)
            elif isinstance(action, Compute):
                pending = [*replica.handle(Computed(action.job()), time.monotonic()), *pending]
        if replica.blocked:
            event = connection.receive(0.05) or Tick()
            pending = replica.handle(event, time.monotonic())
        elif not (pending := replica.merge()) and not replica.blocked:
            return


def work(c: RunConfig, connection: Connection, flavour: int, digests: dict[int, str]) -> None:
    """The toy worker's whole run over any connection."""
    plan = plan_of(c)
    model = ToyModel(plan, flavour)
    replica = Replica(plan, c, model, worker=f"w{flavour}", nonce=100 + flavour)
    settle(replica, connection, [])
    while replica.step < c.run.inner_steps_total:
        model.train_step(replica.step + 1)
        settle(replica, connection, replica.after_step(10, time.monotonic()))
    replica.drain()
    settle(replica, connection, [])
    settle(replica, connection, replica.flush(time.monotonic()))
    digests[flavour] = replica.digest()
    for action in replica.leave("complete"):
        if isinstance(action, Send):
            connection.send(action.message)
    limit = time.monotonic() + 20.0
    while replica.stopped is None and time.monotonic() < limit:
        event = connection.receive(0.2)
        if isinstance(event, Lost):
            break  # and with it the goodbye: nobody answers it
        if event is not None:
            replica.handle(event, time.monotonic())
    connection.close()


def run_workers(c: RunConfig, connecting: Callable[[], Connection]) -> dict[int, str]:
    digests: dict[int, str] = {}
    threads = [threading.Thread(target=work, args=(c, connecting(), i, digests)) for i in range(2)]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + 120.0
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a worker has not come to its end in two minutes"
    return digests


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


RUNS: dict[str, dict[str, Any]] = {
    "relay": {"codec": {"down": "relay"}},
    "q4_ef": {"codec": {"down": "q4_ef"}},
    "g_bf16": {"codec": {"down": "g_bf16"}},
    "delayed": {"codec": {"down": "q4_ef"}, "stream": {"overlap": "delayed"}},
    "eager": {"codec": {"down": "mean_q", "ef": "on"}, "stream": {"overlap": "eager"}},
    "roles": {
        "codec": {
            "down": "q4_ef",
            "ef": "on",
            "stochastic": True,
            "block": 16,
            "roles": {"embed": "int8", "scalar": "fp32"},
        },
        "stream": {"layout": "single"},
    },
}


@pytest.mark.parametrize("run", RUNS)
def test_the_driver_does_not_change_a_bit(run: str) -> None:
    """Promise 6: delays and duplicates in virtual time, threads, or sockets: the same seed gives the same result."""
    sections = RUNS[run]
    c = config(**{**sections, "codec": {"up": "e3m0", **sections["codec"]}})
    expected = (
        Cluster(c, seed=3, weather=Weather((0.01, 3.0), duplicate=0.2)).run().coordinator.global_digest()
    )

    hub = LocalHub(Coordinator(c), {}, lambda action: None)
    local = run_workers(c, hub.connect)
    hub.close()

    digest, remote = over_grpc(c, None)
    assert local == {0: expected, 1: expected}
    assert remote == {0: expected, 1: expected}
    assert digest == expected
