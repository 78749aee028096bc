"""The emulated link: what passes, how fast at most, and in which order."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from diloco.comms.link import Link, Relay
from diloco.errors import ConfigError


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(answer, "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    yield int(server.sockets[0].getsockname()[1])

    async def stop() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run_coroutine_threadsafe(stop(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def exchange(port: int, data: bytes) -> tuple[bytes, float]:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        threading.Thread(target=send_all, args=(sock, data), daemon=True).start()
        got = b""
        while part := sock.recv(1 << 16):
            got += part
    return got, time.monotonic() - started


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("2Mbit,50ms", Link(2e6, 2e6, 0.05)),
        ("2Mbit/8Mbit,50ms,jitter=5ms,loss=0.1%", Link(2e6, 8e6, 0.05, 0.005, 0.001)),
        ("500kbit", Link(5e5, 5e5)),
        ("1gbit/s, 1s", Link(1e9, 1e9, 1.0)),
    ],
)
def test_a_link_is_written_as_rate_and_round_trip(text: str, link: Link) -> None:
    assert Link.parse(text) == link


@pytest.mark.parametrize(
    "text", ["", "fast", "2Mbit,50", "2Mbit,loss=150%", "2Mbit,colour=red", "2Mbit/,50ms,1"]
)
def test_a_malformed_link_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="2Mbit,50ms"):
        Link.parse(text)


@pytest.mark.parametrize("link", [Link(), Link(8e6, 8e6, 0.02, 0.01, 0.05)])
def test_every_byte_arrives_in_order_whatever_the_weather(echo: int, link: Link) -> None:
    data = bytes(i * 7919 % 251 for i in range(200_000))
    with Relay("127.0.0.1", echo, link) as relay:
        got, _ = exchange(relay.port, data)
        assert got == data
        assert relay.traffic() == (len(data), len(data))


def test_nothing_passes_faster_than_rate_and_latency_allow(echo: int) -> None:
    """A lower bound on the time, so that a slow machine cannot make it fail; packets' headers take their part."""
    data = b"x" * 100_000
    with Relay("127.0.0.1", echo, Link(4e6, 4e6, 0.1)) as relay:
        _, seconds = exchange(relay.port, data)
    assert seconds >= len(data) * 1500 / 1448 * 8 / 4e6 + 0.1


def test_connections_share_one_bottleneck(echo: int) -> None:
    data = b"x" * 50_000
    with Relay("127.0.0.1", echo, Link(4e6, 4e6)) as relay:
        started = time.monotonic()
        threads = [threading.Thread(target=exchange, args=(relay.port, data)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started >= 3 * len(data) * 8 / 4e6


def test_a_partition_holds_everything_back_and_loses_nothing(echo: int) -> None:
    with (
        Relay("127.0.0.1", echo, Link()) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as sock,
    ):
        sock.sendall(b"before")
        assert sock.recv(100) == b"before"
        relay.partition(True)
        sock.sendall(b"during")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(100)
        relay.partition(False)
        sock.settimeout(10)
        assert sock.recv(100) == b"during"


def test_a_far_end_that_resets_after_it_has_finished_breaks_the_connection() -> None:
    """Its way down has ended in order before; a sender must learn that nobody takes what it sends."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def finish_and_reset() -> None:
            far, _ = server.accept()
            far.shutdown(socket.SHUT_WR)
            far.recv(1)  # the near end has seen the end of the stream
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()

        thread = threading.Thread(target=finish_and_reset)
        thread.start()
        with (
            Relay("127.0.0.1", server.getsockname()[1], Link()) as relay,
            socket.create_connection(("127.0.0.1", relay.port), timeout=20) as sock,
        ):
            assert sock.recv(1) == b""
            with pytest.raises(ConnectionError):
                while True:
                    sock.sendall(bytes(1 << 16))
        thread.join(20)


def test_a_reset_breaks_connections_and_new_ones_work(echo: int) -> None:
    with Relay("127.0.0.1", echo, Link()) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as sock:
            sock.sendall(b"a")
            assert sock.recv(1) == b"a"
            relay.reset()
            with pytest.raises(ConnectionError):
                while sock.recv(1):
                    pass
                raise ConnectionResetError  # an orderly end says the same
        assert exchange(relay.port, b"again")[0] == b"again"
