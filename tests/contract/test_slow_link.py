"""A worker's end of the gRPC transport over a link so slow that a frame is on its way for a while."""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterator

import pytest

from diloco.comms.grpc_client import GrpcConnection
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.link import Link, Relay
from diloco.comms.machine import COORDINATOR, Connected, Event, Received
from diloco.comms.messages import Commit, Contribution, Fetch, Heartbeat, Join, Progress, Snapshot

WAIT_S = 120.0
SIZE = 4 << 20  # eight seconds: whatever keeps this machine busy, a test is in the middle of it for long
SNAPSHOT = Snapshot(0, 3, "d", ((0, bytes(SIZE)),))


class Pair:
    """A server and a worker that has joined, 4 Mbit/s apart."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.server = GrpcServer(self.events.put, dict, listen="127.0.0.1:0", chunk_bytes=16 << 10)
        self.relay = Relay("127.0.0.1", self.server.start(), Link(up_bps=4e6, down_bps=4e6))
        self.worker = GrpcConnection([f"127.0.0.1:{self.relay.port}"], chunk_bytes=16 << 10)
        assert self.worker.receive(WAIT_S) == Connected(COORDINATOR)
        self.worker.send(Join("ada", 1, "run", "{}", "{}"))
        assert self.next() == Connected("ada")
        assert isinstance(self.next(), Received)

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_S)

    def in_the_middle(self, direction: int) -> None:
        """Wait until a part of a frame has gone up (0) or come down (1)."""
        deadline = time.monotonic() + WAIT_S
        while not 0 < self.worker.traffic()[direction] < SIZE:
            assert time.monotonic() < deadline, "the transfer did not begin"
            time.sleep(0.005)

    def hurry(self) -> None:
        """What has to be in the middle of a transfer is done: let the rest come at once."""
        self.relay.reshape(Link())


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.worker.close()
    made.server.close()
    made.relay.close()


def test_a_value_that_is_on_its_way_is_not_asked_for_again(pair: Pair) -> None:
    """Requests made while a snapshot arrives go no further, those after it do, and others are not held back."""
    pair.server.send("ada", SNAPSHOT)
    pair.in_the_middle(1)
    for fragment in (0, 0, 1):
        pair.worker.send(Fetch("ada", 1, fragment))
    pair.worker.send(Heartbeat("ada", 1, Progress(), (0,)))
    seen = [pair.next() for _ in range(2)]
    pair.hurry()
    assert [type(e.message) for e in seen if isinstance(e, Received)] == [Fetch, Heartbeat]
    assert pair.worker.receive(WAIT_S) == Received(COORDINATOR, SNAPSHOT)
    pair.worker.send(Fetch("ada", 1, 0))
    assert pair.next() == Received("ada", Fetch("ada", 1, 0))


def test_a_commit_that_is_on_its_way_arrives_though_newer_ones_are_made(pair: Pair) -> None:
    """The run goes on without the slow worker; what it has a part of is not taken from it."""
    commits = [
        Commit(0, version, ((0, 1.0),), ((0, version),), "d", ((0, secrets.token_bytes(SIZE)),))
        for version in (1, 2, 3)
    ]
    pair.server.send("ada", commits[0])
    pair.in_the_middle(1)
    for commit in commits[1:]:
        pair.server.send("ada", commit)
    pair.worker.send(Heartbeat("ada", 1, Progress(), (0,)))
    pair.next()
    pair.hurry()
    assert [pair.worker.receive(WAIT_S) for _ in commits] == [Received(COORDINATOR, c) for c in commits]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_paced_download_is_spread_over_most_of_the_time_that_is_left(pair: Pair, share: float) -> None:
    """Whatever share the way up has taken: nothing but the merge comes after it."""
    pair.hurry()
    began = time.monotonic()
    pair.worker.expect({0: began + 3.0}, share)
    pair.server.send("ada", Commit(0, 1, ((0, 1.0),), ((0, 1),), "d", ((0, bytes(SIZE)),)))
    event = pair.worker.receive(WAIT_S)
    assert isinstance(event, Received) and isinstance(event.message, Commit)
    assert time.monotonic() - began > 1.8


@pytest.mark.timeout(120)
@pytest.mark.parametrize("direction", [0, 1])
def test_a_connection_closes_in_the_middle_of_a_transfer(pair: Pair, direction: int) -> None:
    """Neither an upload nor a download keeps `close` from returning."""
    if direction:
        pair.server.send("ada", SNAPSHOT)
    else:
        pair.worker.send(Contribution("ada", 1, 0, 1, bytes(SIZE)))
    pair.in_the_middle(direction)
    pair.worker.close()
