"""The end of a run over real gRPC: a worker that is done long before another ends with the same value."""

from __future__ import annotations

import threading

import torch
from torch import nn

from diloco import DiLoCo
from diloco.comms.connect import connect
from diloco.comms.driver import MachineThread
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.machine import Action, Send
from diloco.coordinator.state import Coordinator
from tests.toy import config

torch.set_num_threads(1)


def test_a_fast_worker_waits_for_a_slow_one_and_both_leave_with_the_same_model() -> None:
    """The slow one goes on only once the fast one has nothing more to send; its last steps are in both models."""
    fault = {"quorum": 1, "fixed_grace_s": 0.0, "heartbeat_s": 0.2}
    c = config(run={"inner_steps_total": 12}, fault=fault, stream={"H": 4})
    machine = Coordinator(c)

    def perform(action: Action) -> None:
        if isinstance(action, Send):
            server.send(action.to, action.message)  # type: ignore[arg-type]

    thread = MachineThread(machine, perform)
    server = GrpcServer(thread.post, lambda: {"config": {}})
    port = server.start()
    thread.start()
    fast_waits, digests = threading.Event(), dict[int, str]()
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            model = models[number]
            connection = connect(f"127.0.0.1:{port}")
            inner = torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer = DiLoCo(model, inner, connection, config=c, worker=f"w{number}", tokens=10)
            while optimizer.inner_step < 12:
                if number == 1 and optimizer.inner_step == 6:
                    assert fast_waits.wait(100.0)
                loss = (model(torch.full((4, 3), 1.0 + number)) - number).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if number == 0:
                threading.Thread(target=announce, args=(optimizer,), daemon=True).start()
            optimizer.flush()
            digests[number] = optimizer.digest()
            optimizer.close()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)
            fast_waits.set()

    def announce(optimizer: DiLoCo) -> None:
        while not optimizer.replica.end.asked and not fast_waits.wait(0.01):
            pass
        fast_waits.set()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120.0)
    finally:
        server.close(1.0)
        thread.stop()
    if failed:
        raise failed[0]
    assert digests == {0: machine.global_digest(), 1: machine.global_digest()} and machine.complete
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert dict(machine.committed[0].weights) == {1: 1.0}, "the slow one's last steps are in no model"
