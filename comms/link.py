"""An emulated slow link: a relay on loopback that shapes the bytes of every connection passing through it.

It needs no root and knows nothing of gRPC: whatever speaks TCP can be pointed at its port. What it emulates is the
bottleneck that all connections of one site share (rate), the way's length (latency, jitter), loss as what TCP makes of
it (the bytes come a round trip later, and everything behind them on that connection waits), and partitions. It does
not emulate congestion control: a sender fills the link at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from diloco.errors import ConfigError

T = TypeVar("T")
Tap = Callable[[int, bool, bytes], bytes]

PIECE = 8688  # bytes that hold the link at a time, six packets: others get their turn after each
PACKET = 1448  # bytes of payload per packet, the unit of loss
HEADERS = 52  # bytes of IP and TCP around it, which hold the link too
# A sender whose next bytes were waiting goes on from where its last ones left, however late its timer woke it, but for
# more than this.
CATCH_UP_S = 0.05
# What may be on its way on one connection: a bound on memory, and on how far a sender can run ahead of the link.
WINDOW_S = 0.5
MIN_WINDOW = 4 * PIECE
# What may wait before the link on one connection, beside what its sender holds.
KERNEL_S = 0.05
MIN_KERNEL, MAX_KERNEL = 32 << 10, 4 << 20
_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Link:
    """`up_bps`, `down_bps` in bit/s (0: unlimited); `rtt_s` there and back; `jitter_s` on top, uniform, each way;
    `loss` per packet, 0..1."""

    up_bps: float = 0.0
    down_bps: float = 0.0
    rtt_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Link:
        """ "2Mbit,50ms", "2Mbit/8Mbit,50ms,jitter=5ms,loss=0.1%": rate (or up/down), round trip, the rest optional.

        Raises ConfigError.
        """
        rate, *rest = re.sub(r"bit/s|bps", "bit", text.replace(" ", "").lower()).split(",")
        up, _, down = rate.partition("/")
        values = {"up_bps": _bits(up, text), "down_bps": _bits(down or up, text)}
        for item in rest:
            name, equals, value = item.partition("=")
            if not equals:
                values["rtt_s"] = _seconds(item, text)
            elif name == "jitter":
                values["jitter_s"] = _seconds(value, text)
            elif name == "loss":
                values["loss"] = _share(value, text)
            else:
                raise _malformed(text, f"unknown part {name!r}")
        return cls(**values)


def _malformed(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"link {text!r}: {why}; write rate,round trip such as 2Mbit,50ms or 2Mbit/8Mbit,50ms,jitter=5ms,loss=0.1%"
    )


def _quantity(text: str, units: dict[str, float], whole: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if match is None or match[2] not in units:
        raise _malformed(whole, f"{text!r} is not a number with one of {', '.join(units)}")
    return float(match[1]) * units[match[2]]


def _bits(text: str, whole: str) -> float:
    return _quantity(text, _UNITS, whole)


def _seconds(text: str, whole: str) -> float:
    return _quantity(text, _TIMES, whole)


def _share(text: str, whole: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise _malformed(whole, f"loss {text!r} is not between 0 and 100%")
    return value


class _Direction:
    """The bottleneck in one direction: one piece at a time, in the order in which they came."""

    def __init__(self, bps: float) -> None:
        self.bps = bps
        self.bytes = 0
        self._free_at = 0.0

    async def take(self, size: int, since: float) -> float:
        """Occupy the link for `size` bytes that wait `since` then; returns when the last of them has left (loop time)."""
        loop = asyncio.get_running_loop()
        wire = size + HEADERS * -(-size // PACKET)
        self._free_at = max(self._free_at, since) + (wire * 8 / self.bps if self.bps else 0.0)
        leaves = self._free_at
        self.bytes += size
        if (early := leaves - loop.time()) > 0.001:  # what a timer can resolve
            await asyncio.sleep(early)
        return leaves


def _kernel_bytes(bps: float) -> int | None:
    """How much may wait in the kernel to be read from one end; None: as the system likes.

    The kernel believes in a fast way to the relay and would take megabytes. On a slow link everything behind them on
    that connection, gRPC's pings too, would come seconds late. It is told before the connection opens: who has once
    been offered a large window sends pieces that never fit into a small one later.
    """
    return min(max(int(bps / 8 * KERNEL_S), MIN_KERNEL), MAX_KERNEL) if bps else None


def _socket(bps: float) -> socket.socket:
    """One end of the link, which may hold back `bps` of what its peer sends. Packets are as large as in the model."""
    made = socket.socket()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, PACKET)
    if (size := _kernel_bytes(bps)) is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    return made


class Relay:
    """Listens on a free port of 127.0.0.1 and forwards to `host:port` over an emulated `link`.

    "up" is towards the target. Runs on a thread of its own; the methods may be called from any other thread.
    `tap` is called on that thread with (connection, whether up, bytes) for every piece on its way; what it returns,
    of the same length, goes on instead.
    """

    def __init__(self, host: str, port: int, link: Link, *, seed: int = 0, tap: Tap | None = None) -> None:
        self.link, self._tap = link, tap
        self._connections = 0
        self._target = (host, port)
        self._random = random.Random(seed)
        self._up, self._down = _Direction(link.up_bps), _Direction(link.down_bps)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="diloco-link", daemon=True)
        self._thread.start()
        self._closed = False
        self._pumps: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._loop.call_soon_threadsafe(self._open.set)
        self.port: int = self._call(self._listen())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def traffic(self) -> tuple[int, int]:
        """Bytes that have entered the link: (up, down)."""
        return self._up.bytes, self._down.bytes

    def partition(self, cut: bool) -> None:
        """While `cut`, nothing passes in either direction; connections stay open, as in a black hole."""
        self._loop.call_soon_threadsafe(self._open.clear if cut else self._open.set)

    def reshape(self, link: Link) -> None:
        """From now on the link is `link`, for open connections too."""

        def change() -> None:
            self.link, self._up.bps, self._down.bps = link, link.up_bps, link.down_bps

        self._loop.call_soon_threadsafe(change)

    def reset(self) -> None:
        """Break every connection."""
        self._call(self._reset())

    def close(self) -> None:
        """Break every connection and stop listening. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    # ---- on the relay's loop ----

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> int:
        near = _socket(self._up.bps)
        near.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._connected, sock=near, limit=2 * PIECE)
        return int(self._server.sockets[0].getsockname()[1])

    async def _reset(self) -> None:
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _end(self) -> None:
        self._server.close()
        await self._reset()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        self._connections += 1
        number = self._connections
        far_writer: asyncio.StreamWriter | None = None
        try:
            await self._open.wait()
            await asyncio.sleep(self.link.rtt_s)  # the handshake
            far = _socket(self._down.bps)
            try:
                far.setblocking(False)
                await asyncio.get_running_loop().sock_connect(far, self._target)
            except BaseException:
                far.close()
                raise
            far_reader, far_writer = await asyncio.open_connection(sock=far, limit=2 * PIECE)
            async with asyncio.TaskGroup() as both:  # what breaks one way breaks the connection
                self._carry(both, number, reader, far_writer, self._up)
                self._carry(both, number, far_reader, writer, self._down)
        except* (OSError, asyncio.CancelledError):  # nobody listens there yet, or the other end is gone
            pass
        finally:
            self._pumps.discard(task)
            for end in (writer, far_writer):
                if end is not None:
                    end.transport.abort()

    def _carry(
        self,
        tasks: asyncio.TaskGroup,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: _Direction,
    ) -> None:
        """From the link's near end to its far end; ends with the stream, and then closes it at the far end."""
        window = max(MIN_WINDOW, int(way.bps / 8 * (WINDOW_S + self.link.rtt_s)))
        travelling: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        room = asyncio.Semaphore(max(1, window // PIECE))
        tasks.create_task(self._pump(number, reader, way, travelling, room))
        tasks.create_task(self._deliver(travelling, room, writer))

    async def _pump(
        self,
        number: int,
        reader: asyncio.StreamReader,
        way: _Direction,
        travelling: asyncio.Queue[tuple[float, bytes]],
        room: asyncio.Semaphore,
    ) -> None:
        loop = asyncio.get_running_loop()
        arrives, left = 0.0, math.inf
        while True:
            asked = loop.time()
            data = await reader.read(PIECE)
            if not data:
                break
            waiting = loop.time() - asked < 0.001  # it was there already
            if self._tap is not None:
                data = self._tap(number, way is self._up, data)
            await room.acquire()
            await self._open.wait()
            now = loop.time()
            since = max(min(left, now), now - CATCH_UP_S) if waiting else now
            leaves = left = await way.take(len(data), since)
            delay = self.link.rtt_s / 2 + self._random.uniform(0, self.link.jitter_s)
            packets = -(-len(data) // PACKET)
            if self.link.loss and self._random.random() < 1 - (1 - self.link.loss) ** packets:
                delay += max(self.link.rtt_s, 0.01)
            arrives = max(arrives, leaves + delay)
            travelling.put_nowait((arrives, data))
        travelling.put_nowait((max(arrives, loop.time()), b""))

    async def _deliver(
        self,
        travelling: asyncio.Queue[tuple[float, bytes]],
        room: asyncio.Semaphore,
        writer: asyncio.StreamWriter,
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            arrives, data = await travelling.get()
            if arrives > loop.time():
                await asyncio.sleep(arrives - loop.time())
            await self._open.wait()
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            room.release()
