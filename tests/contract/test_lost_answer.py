"""An upload whose last word is lost: the coordinator has the frame, and its sender does not know."""

from __future__ import annotations

import queue
import secrets
from contextlib import ExitStack, suppress

from diloco.comms.grpc_client import GrpcConnection
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.link import Link, Relay
from diloco.comms.machine import COORDINATOR, Connected, Event, Lost, Received
from diloco.comms.messages import Buffer, Contribution, Join

WAIT_S = 60.0
SIZE = 1 << 20


def test_a_frame_whose_receipt_was_lost_is_not_sent_again() -> None:
    """The connections break after the coordinator has taken it and before it has said so."""
    taken: queue.SimpleQueue[Buffer] = queue.SimpleQueue()

    def inbox(event: Event) -> None:
        if isinstance(event, Received) and isinstance(event.message, Contribution):
            if not server.traffic().get("ada", (0, 0))[0] > SIZE:
                relay.reset()
            taken.put(event.message.frame)

    with ExitStack() as stack:
        server = GrpcServer(inbox, dict)
        stack.callback(server.close)
        relay = stack.enter_context(Relay("127.0.0.1", server.start(), Link()))
        worker = GrpcConnection([f"127.0.0.1:{relay.port}"])
        stack.callback(worker.close)

        def join() -> None:
            assert worker.receive(WAIT_S) == Connected(COORDINATOR)
            worker.send(Join("ada", 1, "run", "{}", "{}"))

        join()
        first, second = secrets.token_bytes(SIZE), b"second"
        worker.send(Contribution("ada", 1, 0, 1, first))
        assert worker.receive(WAIT_S) == Lost(COORDINATOR)
        join()
        assert taken.get(timeout=WAIT_S) == first
        frame: Buffer | None = None
        for _ in range(600):
            # Ignored as long as the first one is under way.
            worker.send(Contribution("ada", 1, 0, 1, second))
            with suppress(queue.Empty):
                frame = taken.get(timeout=0.1)
                break
        assert frame == second
        assert worker.traffic()[0] == server.traffic()["ada"][0] == SIZE + len(second)
