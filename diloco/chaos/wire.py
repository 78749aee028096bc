"""A worker's way to the coordinator, as chaos holds it: cut, slowed, damaged, listened to and said again.

Bytes are all it knows. Damage hits bulk data alone: control messages have no checksum of their own without TLS, as
TCP's stands guard over them; what a faulty machine does to a buffer hits the large ones.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from typing import Self

from diloco.comms.link import Link, Relay

BULK = 4096  # bytes in one piece from which on it is taken for part of an object
DAMAGED = 0.3  # of the bulk pieces, while damage is on
KEPT = 1 << 20  # bytes of each connection that are remembered, from its beginning
CONNECTIONS = 6  # newest ones that are remembered
PIECE = 4096
PAUSE_S = 0.005  # between pieces said again: the listener must be given time to take them in
SLOW = Link.parse("400kbit,200ms,jitter=50ms,loss=1%")


class Wire:
    """Forwards 127.0.0.1:`port` to `target`. The methods may be called from any thread."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self.damaged = 0  # bits so far
        self._target, self._random = target, random.Random(seed)
        self._damage = False
        self._said: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._relay = Relay(*target, Link(), seed=seed, tap=self._pass)
        self.port = self._relay.port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self, on: bool) -> None:
        self._relay.partition(on)

    def slow(self, on: bool) -> None:
        self._relay.reshape(SLOW if on else Link())

    def damage(self, on: bool) -> None:
        self._damage = on

    def forget(self) -> None:
        """The worker begins a new life: what its last one said is not its own any more."""
        with self._lock:
            self._said.clear()

    def replay(self) -> int:
        """Say again to the target, each on a connection of its own, what was said so far; returns how many bytes.

        Nobody listens to the answers. Ends when all of it is said or the target has had enough.
        """
        with self._lock:
            said = [bytes(data) for _, data in sorted(self._said.items())]
        voices = [threading.Thread(target=_say, args=(self._target, data), daemon=True) for data in said]
        for voice in voices:
            voice.start()
        for voice in voices:
            voice.join()
        return sum(map(len, said))

    def close(self) -> None:
        self._relay.close()

    def _pass(self, connection: int, up: bool, data: bytes) -> bytes:
        if up:
            with self._lock:
                kept = self._said.setdefault(connection, bytearray())
                if len(kept) < KEPT:
                    kept += data
                while len(self._said) > CONNECTIONS:
                    del self._said[min(self._said)]
        if self._damage and len(data) >= BULK and self._random.random() < DAMAGED:
            changed = bytearray(data)
            changed[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            self.damaged += 1
            return bytes(changed)
        return data


def _say(target: tuple[str, int], data: bytes) -> None:
    pause = threading.Event()
    with contextlib.suppress(OSError), socket.create_connection(target, timeout=5.0) as line:
        line.setblocking(False)
        for at in range(0, len(data), PIECE):
            rest = memoryview(data)[at : at + PIECE]
            while rest:
                try:
                    rest = rest[line.send(rest) :]
                except BlockingIOError:
                    pause.wait(PAUSE_S)
                with contextlib.suppress(BlockingIOError):
                    if not line.recv(1 << 16):
                        return
            pause.wait(PAUSE_S)
        pause.wait(0.5)
