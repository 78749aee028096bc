"""What chaos does to bytes on their way: damage in bulk data alone, and everything said again on demand."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from diloco.chaos.wire import BULK, Wire
from diloco.comms.link import Link, Relay


class Listener:
    """Takes connections and keeps what each of them says."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.server.getsockname()
        self.heard: list[bytes] = []
        self.changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(line,), daemon=True).start()

    def _listen(self, line: socket.socket) -> None:
        with line:
            data = b""
            while part := line.recv(1 << 16):
                data += part
        with self.changed:
            self.heard.append(data)
            self.changed.notify_all()

    def wait(self, count: int) -> list[bytes]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.heard) >= count, 30)
            return list(self.heard)


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.server.close()


def say(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        line.recv(1)


def test_damage_changes_bits_of_bulk_data_and_none_of_small_messages(listener: Listener) -> None:
    """Same length, a few bits; and nothing once it is over."""
    data = bytes(100 * BULK)
    with Wire(listener.address, 1) as wire:
        wire.damage(True)
        say(wire.port, data)
        changed = listener.wait(1)[0]
        assert len(changed) == len(data)
        assert 0 < sum(byte.bit_count() for byte in changed) == wire.damaged
        say(wire.port, b"small")
        assert b"small" in listener.wait(2)
        wire.damage(False)
        say(wire.port, data)
        assert listener.wait(3).count(data) == 1


def test_what_was_said_is_said_again_connection_by_connection(listener: Listener) -> None:
    """Word for word; and nothing of a life that is over."""
    with Wire(listener.address, 1) as wire:
        say(wire.port, b"first")
        say(wire.port, b"second" * 1000)
        assert wire.replay() == 5 + 6000
        assert sorted(listener.wait(4)) == sorted([b"first", b"second" * 1000] * 2)
        wire.forget()
        assert wire.replay() == 0


def test_a_relay_can_be_reshaped_while_it_works(listener: Listener) -> None:
    """The new rate holds for the next bytes."""
    with Relay(*listener.address, Link()) as relay:
        relay.reshape(Link(up_bps=8e5))
        started = time.monotonic()
        say(relay.port, bytes(50_000))
        assert listener.wait(1) and time.monotonic() - started >= 50_000 * 8 / 8e5
