"""Whose bytes go first over a slow link: control before data, then the fragment that is wanted first. By order alone."""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from diloco.comms.connect import connect
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.link import Link
from diloco.comms.machine import COORDINATOR, Connected, Connection, Event, Received
from diloco.comms.messages import Commit, Contribution, Fetch, Join, Message

WAIT_S = 60.0
SIZE = 400_000
SLOW = Link(8e6, 8e6, 0.02)


class Far:
    """The coordinator's end: what arrived, in order."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.server = GrpcServer(self.events.put, dict)
        self.address = f"127.0.0.1:{self.server.start()}"

    def messages(self, count: int) -> list[Message]:
        """The next `count` messages after the Join."""
        found: list[Message] = []
        while len(found) < count:
            event = self.events.get(timeout=WAIT_S)
            if isinstance(event, Received) and not isinstance(event.message, Join):
                found.append(event.message)
        return found


@pytest.fixture
def ends() -> Iterator[tuple[Far, Connection]]:
    """A server and a connection to it over the slow link, which has not joined yet."""
    with ExitStack() as stack:
        far = Far()
        stack.callback(far.server.close)
        near = connect(far.address, link=SLOW)
        stack.callback(near.close)
        assert near.receive(WAIT_S) == Connected(COORDINATOR)
        yield far, near


def enter(near: Connection) -> None:
    near.send(Join("ada", 1, "run", "{}", "{}"))


@pytest.mark.parametrize("wanted", [{0: 300.0, 1: 200.0, 2: 100.0}, {0: 200.0, 1: 300.0, 2: 100.0}])
def test_contributions_arrive_in_the_order_in_which_they_are_merged(
    ends: tuple[Far, Connection], wanted: Mapping[int, float]
) -> None:
    """Sent as 0, 1, 2; all wait for the session and then want the link at the same time."""
    far, near = ends
    now = time.monotonic()
    near.expect({fragment: now + seconds for fragment, seconds in wanted.items()}, 0.0)
    for fragment in wanted:
        near.send(Contribution("ada", 1, fragment, 1, secrets.token_bytes(SIZE)))
    enter(near)
    arrived = [m.fragment for m in far.messages(3) if isinstance(m, Contribution)]
    assert arrived == sorted(wanted, key=lambda fragment: wanted[fragment])


def test_commits_arrive_in_the_order_in_which_they_are_merged(ends: tuple[Far, Connection]) -> None:
    """Three downloads, of which the one asked for last is wanted first."""
    far, near = ends
    enter(near)
    far.events.get(timeout=WAIT_S)
    now = time.monotonic()
    near.expect({0: now + 300.0, 1: now + 200.0, 2: now + 100.0}, 0.0)
    for fragment in range(3):
        frames = ((0, secrets.token_bytes(SIZE)),)
        far.server.send("ada", Commit(fragment, 1, ((0, 1.0),), ((0, 1),), "", frames))
    arrived: list[int] = []
    while len(arrived) < 3:
        event = near.receive(WAIT_S)
        assert event is not None, "the downloads came to a halt"
        if isinstance(event, Received) and isinstance(event.message, Commit):
            arrived.append(event.message.fragment)
    assert arrived == [2, 1, 0]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_control_message_overtakes_the_upload_that_was_sent_before_it(
    ends: tuple[Far, Connection], share: float
) -> None:
    """The link is full of data, or the upload is spread over minutes: a request passes at once."""
    far, near = ends
    near.expect({0: time.monotonic() + 10.0}, share)
    near.send(Contribution("ada", 1, 0, 1, secrets.token_bytes(4 * SIZE)))
    enter(near)
    limit = time.monotonic() + WAIT_S
    while not near.traffic()[0] and time.monotonic() < limit:
        assert near.receive(0.01) is None
    near.send(Fetch("ada", 1, 7))
    assert [type(m) for m in far.messages(2)] == [Fetch, Contribution]
