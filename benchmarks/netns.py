"""The emulated link (`--link`) beside a link of real packets: the same transfers over both, goodput and round trips.

Needs root, Linux, `ip` and `tc`. Two network namespaces are joined by two TUN devices: tbf on each gives the rate and
a queue, and a relay between them carries every IP packet, later (half a round trip, jitter, never out of order) or not
at all (loss). Between them runs the kernel's own TCP. A worker's connection uploads and downloads objects, and asks for
a small answer while idle and while an upload is under way. Everything is taken down at the end, also on Ctrl+C.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diloco.comms.connect import connect
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.link import Link
from diloco.comms.machine import Connected, Connection, Event, Received
from diloco.comms.messages import Aborted, Commit, Contribution, Fetch, Join, Resend

RESULTS = Path(__file__).parent / "results"
POINTS = (
    "2Mbit,50ms",
    "10Mbit,20ms",
    "20Mbit,100ms",
    "100Mbit,50ms",
    "20Mbit,50ms,jitter=10ms",
    "20Mbit,50ms,loss=0.1%",
)
MTU = 1500
QUEUE_S = 0.1  # of the bottleneck, in time at its rate
NEAR, FAR = ("10.231.7.1", "10.231.7.2")
PING = 0  # asks for a small answer, where a fragment's number would be
PINGS = 15
WAIT_S = 120.0
SECONDS = 2.5  # a transfer takes about so long
EXIT_NO_ROOT = 4


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--points", nargs="+", default=POINTS, metavar="RATE,RTT", help="as for --link")
    parser.add_argument("--connections", type=int, default=1, metavar="K")
    parser.add_argument(
        "--congestion", default="", metavar="NAME", help="such as cubic; default: the kernel's"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "netns.json")
    parser.add_argument("--serve", metavar="HOST", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--link", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.measure:
        return measure(arguments)
    if (why := impossible()) is not None:
        print(f"netns.py: {why}", file=sys.stderr)
        return EXIT_NO_ROOT
    for number in (signal.SIGINT, signal.SIGTERM):  # in a script's background SIGINT would be ignored
        signal.signal(number, signal.default_int_handler)
    try:
        return compare(arguments)
    except KeyboardInterrupt:
        print("netns.py: interrupted, everything taken down", file=sys.stderr)
        return 130


def impossible() -> str | None:
    if sys.platform != "linux":
        return "network namespaces are there on Linux only"
    if os.geteuid() != 0:
        return f"not root: run sudo {sys.executable} {' '.join(sys.argv)}"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    return None if Path("/dev/net/tun").exists() else "/dev/net/tun does not exist: load the module tun"


# ---- the two ends ----


def serve(host: str) -> int:
    """A coordinator's end that answers what `measure` asks; it ends with its standard input."""
    frames: dict[int, bytes] = {}

    def answer(event: Event) -> None:
        if not isinstance(event, Received):
            return
        match event.message:
            case Fetch(worker=worker, fragment=fragment) if fragment == PING:
                server.send(worker, Resend(PING, 0))
            case Fetch(worker=worker, fragment=size):  # an object of so many bytes, each time a new one
                frame = frames.setdefault(size, random.Random(size).randbytes(size))
                version = server_version()
                server.send(worker, Commit(0, version, ((0, 1.0),), ((0, version),), "", ((0, frame),)))
            case Contribution(worker=worker, round=number):
                server.send(worker, Aborted(0, number, "measured"))

    versions = iter(range(1, 1 << 30))

    def server_version() -> int:
        return next(versions)

    server = GrpcServer(answer, dict, listen=f"{host}:0", insecure=True)
    print(server.start(), flush=True)
    sys.stdin.read()
    server.close()
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Prints one JSON object: bytes/s each way, round trips in seconds, idle and during an upload."""
    link = Link.parse(arguments.link) if arguments.link else None
    size, connection = arguments.bytes, connect(arguments.measure, channels=arguments.connections, link=link)
    try:
        await_event(connection, Connected)
        connection.send(Join("ada", 1, "run", "{}", "{}"))
        ping(connection)
        upload(connection, 0, max(64 << 10, size // 4))  # warm: slow start is not what is compared
        idle = [ping(connection) for _ in range(PINGS)]
        up = upload(connection, 1, size)
        down = download(connection, size)
        loaded: list[float] = []
        upload(connection, 2, size, loaded)
    finally:
        connection.close()
    found = {"up": size / up, "down": size / down, "rtt": statistics.median(idle)}
    print(json.dumps({**found, "rtt_loaded": statistics.median(loaded or [0.0])}))
    return 0


def await_event(connection: Connection, kind: type) -> Any:
    """The next event, or message, of this kind."""
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        event = connection.receive(1.0)
        found = event.message if isinstance(event, Received) else event
        if isinstance(found, kind):
            return found
    raise TimeoutError(f"no {kind.__name__} within {WAIT_S} s")


def ping(connection: Connection) -> float:
    begun = time.perf_counter()
    connection.send(Fetch("ada", 1, PING))
    await_event(connection, Resend)
    return time.perf_counter() - begun


def upload(connection: Connection, number: int, size: int, pings: list[float] | None = None) -> float:
    """Seconds until the answer is there; with `pings`, round trips meanwhile are put into it."""
    frame = random.Random(number).randbytes(size)
    begun = time.perf_counter()
    connection.send(Contribution("ada", 1, 0, number, frame))
    asked: float | None = None
    while True:
        if pings is not None and asked is None:
            asked = time.perf_counter()
            connection.send(Fetch("ada", 1, PING))
        event = connection.receive(WAIT_S)
        assert event is not None, "the transfer came to a halt"
        message = event.message if isinstance(event, Received) else None
        if isinstance(message, Aborted):
            return time.perf_counter() - begun
        if isinstance(message, Resend) and asked is not None and pings is not None:
            pings.append(time.perf_counter() - asked)
            asked = None


def download(connection: Connection, size: int) -> float:
    begun = time.perf_counter()
    connection.send(Fetch("ada", 1, size))
    await_event(connection, Commit)
    return time.perf_counter() - begun


# ---- a link of packets ----


def command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


class Packets:
    """Two namespaces and the way between them; `near` and `far` are their names. Taken down by `close`."""

    def __init__(self, link: Link, congestion: str) -> None:
        self.near, self.far = (f"diloco-{end}-{os.getpid()}" for end in ("near", "far"))
        self._link = link
        self._made: list[str] = []
        self._fds: list[int] = []
        self._closing = threading.Event()
        self._relay = threading.Thread(target=self._run, name="relay", daemon=True)
        try:
            ends = ((self.near, NEAR, FAR, link.up_bps), (self.far, FAR, NEAR, link.down_bps))
            for number, (name, address, peer, bps) in enumerate(ends):
                self._end(name, f"dl{number}p{os.getpid()}"[:15], address, peer, bps, congestion)
        except BaseException:
            self.close()
            raise
        self._relay.start()

    def _end(self, name: str, device: str, address: str, peer: str, bps: float, congestion: str) -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._fds.append(fd)
        fcntl.ioctl(
            fd, 0x400454CA, struct.pack("16sH22x", device.encode(), 0x0001 | 0x1000)
        )  # IFF_TUN, no header
        command("ip", "netns", "add", name)
        self._made.append(name)
        command("ip", "link", "set", device, "netns", name)
        command("ip", "-n", name, "link", "set", "lo", "up")
        command("ip", "-n", name, "addr", "add", address, "peer", peer, "dev", device)
        command("ip", "-n", name, "link", "set", device, "mtu", str(MTU), "txqueuelen", "5000", "up")
        # tbf is woken by the kernel's timer, at 250 Hz on many machines: its bucket holds what passes between two.
        burst = str(max(2 * MTU, int(bps / 8 / 250)))
        command(
            *("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", "tbf"),
            *("rate", f"{int(bps)}bit", "burst", burst, "latency", f"{int(QUEUE_S * 1000)}ms"),
        )
        if congestion:
            key = f"net.ipv4.tcp_congestion_control={congestion}"
            command("ip", "netns", "exec", name, "sysctl", "-qw", key)

    def _run(self) -> None:
        """Carries packets until the end: arrival = departure + rtt / 2 + jitter, in order."""
        link, chance = self._link, random.Random(1)
        queues: list[collections.deque[tuple[float, bytes]]] = [collections.deque(), collections.deque()]
        newest = [0.0, 0.0]
        while not self._closing.is_set():
            now, wait = time.monotonic(), 0.1
            for way, queue in enumerate(queues):
                while queue and queue[0][0] <= now:
                    with contextlib.suppress(OSError):
                        os.write(self._fds[1 - way], queue.popleft()[1])
                if queue:
                    wait = min(wait, queue[0][0] - now)
            # select sleeps for microseconds where poll rounds to milliseconds
            for fd in select.select(self._fds, [], [], max(wait, 0.0))[0]:
                way = self._fds.index(fd)
                for _ in range(64):
                    try:
                        packet = os.read(fd, 65536)
                    except BlockingIOError:
                        break
                    if chance.random() < link.loss:
                        continue
                    delay = link.rtt_s / 2 + chance.uniform(0, link.jitter_s)
                    newest[way] = max(newest[way], time.monotonic() + delay)
                    queues[way].append((newest[way], packet))

    def close(self) -> None:
        self._closing.set()
        if self._relay.ident is not None:
            self._relay.join()
        for name in self._made:
            subprocess.run(("ip", "netns", "del", name), capture_output=True, check=False)
        for fd in self._fds:  # the devices go with them
            os.close(fd)
        self._made, self._fds = [], []


# ---- the comparison ----


@contextlib.contextmanager
def started(namespace: str | None, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """This script again, within a namespace or without; gone when the block is left."""
    inside = ("ip", "netns", "exec", namespace) if namespace else ()
    words = (*inside, sys.executable, __file__, *arguments)
    # In a session of its own, so that Ctrl+C reaches this process alone, which then takes everything down.
    child = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def one_run(link: Link, text: str, connections: int, network: Packets | None) -> dict[str, float]:
    """One server, one client, all transfers once: over `network`, or over the emulator where there is none."""
    size = int(link.up_bps / 8 * SECONDS)
    near, far, host = (network.near, network.far, FAR) if network else (None, None, "127.0.0.1")
    with started(far, "--serve", host) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        words = ["--measure", f"{host}:{port}", "--bytes", str(size), "--connections", str(connections)]
        with started(near, *words, *(["--link", text] if network is None else [])) as client:
            said, _ = client.communicate(timeout=2 * WAIT_S)
            if client.returncode:
                raise RuntimeError(f"the transfer over {'packets' if network else 'the emulator'} failed")
    found: dict[str, float] = json.loads(said)
    return found


def compare(arguments: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for text in arguments.points:
        link = Link.parse(text)
        runs: dict[str, list[dict[str, float]]] = {"emulator": [], "packets": []}
        network = Packets(link, arguments.congestion)
        try:
            for _ in range(arguments.runs):
                runs["emulator"].append(one_run(link, text, arguments.connections, None))
                runs["packets"].append(one_run(link, text, arguments.connections, network))
        finally:
            network.close()
        row: dict[str, Any] = {"link": text, "runs": runs}
        for name, taken in runs.items():
            row[name] = {key: statistics.median(run[key] for run in taken) for key in taken[0]}
        row["ratio"] = {key: row["emulator"][key] / row["packets"][key] for key in row["emulator"]}
        rows.append(row)
        show(row, first=len(rows) == 1)
    results = {
        "kernel": os.uname().release,
        "congestion": arguments.congestion or congestion(),
        "cores": os.cpu_count(),
        "mtu": MTU,
        "queue_s": QUEUE_S,
        "connections": arguments.connections,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {arguments.out}")
    return 0


def congestion() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def show(row: dict[str, Any], *, first: bool) -> None:
    """Goodput in Mbit/s and round trips in ms: emulator / packets = ratio."""
    if first:
        heads = ("up, Mbit/s", "down, Mbit/s", "RTT, ms", "RTT while uploading, ms")
        print("| link | " + " | ".join(heads) + " |\n|---|---|---|---|---|")
    cells = []
    for key, unit in (("up", 8e-6), ("down", 8e-6), ("rtt", 1e3), ("rtt_loaded", 1e3)):
        ours, theirs = row["emulator"][key] * unit, row["packets"][key] * unit
        cells.append(f"{ours:.2f} / {theirs:.2f} = {row['ratio'][key]:.2f}")
    print(f"| {row['link']} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
