"""Do heartbeats and questions get through while data fills a slow link?

A coordinator and workers that do not train (`prepared_worker.py`, a process each), every worker behind an emulated link
of its own. Nobody computes, so updates and values wait for the link all the time, in both directions. Through the same
links, beside the workers' own connections:

    GetStatus     round trip of a question, asked again and again over a connection that stays open: first with the link
                  to itself, then under load
    fetch_status  the same as `diloco status` does it, with a new connection each time
    heartbeat     from a worker's hands to the coordinator's, one way: when the worker's session gave it to its
                  connection, against the time in the coordinator's own record (progress.jsonl)
    silence       between two heartbeats of a worker, as they arrive. A worker is suspected after `suspect_s` without any
                  word from it, so a silence below that means no false suspicion, whatever else was said meanwhile

`load` is the share of the link's rate that was used, up and down: what the test is worth. Suspicions are also read from
the status, every half second.

    python benchmarks/control_plane.py --minutes 10
    python benchmarks/control_plane.py --minutes 1 --link 1Mbit,100ms
    python benchmarks/control_plane.py --smallest       does it still work?
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timing import RESULTS, machine, save
from wire_cells import HERE, Children
from wire_plan import as_toml

from diloco.comms.diloco_v1_pb2 import GetStatusRequest
from diloco.comms.grpc_options import GET_STATUS, grpc
from diloco.comms.link import Link, Relay
from diloco.comms.query import fetch_status

LINK, WORKERS = "2Mbit,50ms", 4
NUMEL, BLOCKS = 1 << 20, 4
ALONE_S = 10.0  # questions before there is load
PAUSE_S = 0.25  # between two questions on a link
LOOK_S = 0.5  # between two looks at who is suspected
GOAL_S = 1.0
STEPS = 1_000_000  # more than any run makes: it ends when the time is over


@dataclass(slots=True)
class Probe:
    """Asks one coordinator through one link until `stopped`; seconds of each answer, and what failed."""

    address: str
    stopped: threading.Event
    fresh: bool = False  # a new connection for each question
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        with grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            ask: Any = channel.unary_unary(GET_STATUS)
            request = GetStatusRequest().SerializeToString()
            if not self.fresh:
                ask(request, timeout=60.0)  # opens the connection
            while not self.stopped.wait(PAUSE_S):
                begun = time.monotonic()
                try:
                    if self.fresh and fetch_status(self.address, 30.0) is None:
                        self.failures.append("no answer")
                        continue
                    if not self.fresh:
                        ask(request, timeout=30.0)
                except grpc.RpcError as error:
                    self.failures.append(str(error))
                    continue
                self.seconds.append(time.monotonic() - begun)


@contextlib.contextmanager
def asking(probes: Sequence[Probe]) -> Iterator[None]:
    threads = [threading.Thread(target=probe.run) for probe in probes]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for probe in probes:
            probe.stopped.set()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--link", default=LINK)
    parser.add_argument("--numel", type=int, default=NUMEL, help="parameters, in four fragments")
    parser.add_argument("--smallest", action="store_true", help="a few seconds on a fast link")
    parser.add_argument("--out", type=Path, default=RESULTS / "control_plane.json")
    a = parser.parse_args()
    alone_s = ALONE_S
    if a.smallest:
        a.minutes, a.workers, a.link, a.numel, alone_s = 0.05, 1, "20Mbit,5ms", 65536, 0.6
    before = machine()
    found = measure(a.workers, Link.parse(a.link), 60 * a.minutes, a.numel, alone_s)
    show(found)
    save(a.out, {"machine": before, "link": a.link, "workers": a.workers, "minutes": a.minutes, **found})


def config_of(workers: int) -> dict[str, dict[str, Any]]:
    """Four fragments under way at once, 4 bit both ways; signs of life and suspicion as they are by default."""
    return {
        "run": {"run_id": "control", "inner_steps_total": STEPS},
        "outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.9},
        "stream": {"H": 8, "frag_layers": 1, "layout": "sequential", "overlap": "delay_corrected", "tau": 7},
        "codec": {"up": "e3m0", "down": "q4_ef"},
        "topology": {"workers": workers},
    }


def measure(workers: int, link: Link, seconds: float, numel: int, alone_s: float) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "run.toml").write_text(as_toml(config_of(workers)))
        children = stack.enter_context(Children(folder, 0.0, seconds + alone_s + 240))
        children.start("coordinator", "-m", "diloco", "coordinator", "run.toml", "--listen", "127.0.0.1:0")
        log = children.log("coordinator")
        port = children.until(
            "the coordinator's port", lambda: re.search(r"listening on port (\d+)", log.read_text())
        )
        coordinator = f"127.0.0.1:{port[1]}"
        relays = [stack.enter_context(Relay("127.0.0.1", int(port[1]), link, seed=i)) for i in range(workers)]
        ways = [f"127.0.0.1:{relay.port}" for relay in relays]
        quiet = [Probe(way, threading.Event()) for way in ways]
        with asking(quiet):
            time.sleep(alone_s)
        for i, way in enumerate(ways):
            job: dict[str, Any] = {"config": "run.toml", "workers": {f"w{i}": way}, "step_s": 0.0}
            job |= {"blocks": [numel // BLOCKS] * BLOCKS, "out": f"{i}.json", "beats": "."}
            children.start(f"w{i}", str(HERE / "prepared_worker.py"), json.dumps(job))
        children.until(
            "the first commit", lambda: (fetch_status(coordinator) or {"commits": 0})["commits"] > 0
        )
        before, begun = [relay.traffic() for relay in relays], time.monotonic()
        asked = [Probe(way, threading.Event()) for way in ways]
        dialled = [Probe(way, threading.Event(), fresh=True) for way in ways]
        with asking([*asked, *dialled]):
            looks = _watched(coordinator, children, begun + seconds)
        ended, after = time.monotonic(), [relay.traffic() for relay in relays]
        beats = [_lines(folder / f"w{i}.beats") for i in range(workers)]
        series = [json.loads(t) for t in _text(folder / "runs" / "control" / "progress.jsonl").splitlines()]
    rates = [
        (link.up_bps, [b[0] - a[0] for a, b in zip(before, after, strict=True)]),
        (link.down_bps, [b[1] - a[1] for a, b in zip(before, after, strict=True)]),
    ]
    arrived = [[looks["epoch"] + s["t"] for s in series if s["worker"] == f"w{i}"] for i in range(workers)]
    delays = [d for sent, came in zip(beats, arrived, strict=True) for d in travel(sent, came, begun, ended)]
    gaps = [b - a for came in arrived for a, b in itertools.pairwise(came) if begun <= b <= ended]
    return {
        "seconds": ended - begun,
        "load": [sum(8 * n for n in passed) / bps / (ended - begun) / workers for bps, passed in rates],
        "commits": looks["commits"],
        "alone": quantiles([s for probe in quiet for s in probe.seconds]),
        "GetStatus": quantiles([s for probe in asked for s in probe.seconds]),
        "fetch_status": quantiles([s for probe in dialled for s in probe.seconds]),
        "heartbeat": quantiles([d for d in delays if d < math.inf]),
        "heartbeats_lost": sum(d == math.inf for d in delays),
        "silence": quantiles(gaps),
        "failures": [why for probe in [*asked, *dialled] for why in probe.failures],
        "suspected": looks["suspected"],
        "suspect_s": looks["suspect_s"],
        "met": _met(asked, delays, looks),
    }


def _met(asked: Sequence[Probe], delays: Sequence[float], looks: dict[str, Any]) -> dict[str, bool]:
    answers = [s for probe in asked for s in probe.seconds]
    return {
        "GetStatus p99 below 1 s": (quantiles(answers)["p99"] or math.inf) < GOAL_S,
        "heartbeat p99 below 1 s": (quantiles(delays)["p99"] or math.inf)
        < GOAL_S,  # a lost one takes for ever
        "nobody suspected": not looks["suspected"],
    }


def _watched(coordinator: str, children: Children, until: float) -> dict[str, Any]:
    """Look at the members until then, past the links. `epoch`: the coordinator's start, on time.monotonic."""
    suspected: list[dict[str, Any]] = []
    first, epoch, shortest, found = None, math.nan, math.inf, {}
    while (now := time.monotonic()) < until:
        children.until("nothing", lambda: True)
        asked = fetch_status(coordinator)
        took = time.monotonic() - now
        if asked is not None:
            found, first = asked, asked["commits"] if first is None else first
            if took < shortest:  # the answer was made somewhere between
                shortest, epoch = took, now + took / 2 - asked["seconds"]
            suspected += [
                {
                    "at": asked["seconds"],
                    "worker": m["id"],
                    "state": m["state"],
                    "silent": m["heartbeat_age_s"],
                }
                for m in asked["members"]
                if m["state"] in ("suspect", "dead")
            ]
        time.sleep(max(0.0, LOOK_S - took))
    assert found and first is not None, "the coordinator never answered"
    suspect_s = found["config"]["fault"]["suspect_s"]
    return {
        "suspected": suspected,
        "epoch": epoch,
        "commits": found["commits"] - first,
        "suspect_s": suspect_s,
    }


def travel(sent: Sequence[float], came: Sequence[float], begun: float, ended: float) -> list[float]:
    """Seconds from the sending to the arrival of each heartbeat that was sent between two times; infinite if it never
    came. They travel in order on one stream, so the k-th that came is the k-th that was sent."""
    late = [math.inf] * (len(sent) - len(came))
    pairs = zip(sent, [*(c - s for s, c in zip(sent, came, strict=False)), *late], strict=False)
    return [
        delay for at, delay in pairs if begun <= at <= ended and (delay < math.inf or at < ended - GOAL_S)
    ]


def quantiles(values: Sequence[float]) -> dict[str, Any]:
    """Nearest rank, in seconds."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0, "p50": None, "p99": None, "max": None}
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {"count": len(ordered)} | {
        name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in at.items()
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _lines(path: Path) -> list[float]:
    return [float(line) for line in _text(path).splitlines()]


def show(found: dict[str, Any]) -> None:
    print(f"load up {found['load'][0]:.0%}, down {found['load'][1]:.0%}, {found['commits']} commits")
    print(f"{'ms':14s} {'count':>6s} {'p50':>7s} {'p99':>7s} {'max':>7s}")
    for name in ("alone", "GetStatus", "fetch_status", "heartbeat", "silence"):
        q = found[name]
        times = " ".join(f"{1e3 * q[at]:7.0f}" for at in ("p50", "p99", "max") if q[at] is not None)
        print(f"{name:14s} {q['count']:6d} {times}")
    print(
        f"failed questions: {len(found['failures'])}, heartbeats lost: {found['heartbeats_lost']}, "
        f"suspected: {found['suspected'] or 'nobody'}"
    )
    print(", ".join(f"{name}: {'yes' if yes else 'NO'}" for name, yes in found["met"].items()))


if __name__ == "__main__":
    main()
