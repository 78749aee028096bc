"""How does one coordinator grow with its workers? CPU, memory and time per round, from 2 to 64 workers.

One coordinator as a process of its own, and workers that do not train (`prepared_worker.py`) in a few processes, all on
this machine over loopback: every worker has its session, its codec and its uploads and downloads, only its updates are
prepared. Nobody computes between rounds, so the rounds follow one another as fast as this machine carries them; the
workers share its cores with the coordinator. Everybody is waited for, the journal is on disk with fsync.

    ms/contribution   CPU time of the coordinator's process (user and system) by contributions, over the counted rounds
    s/GB              the same by the fp32 bytes of the updates that were averaged, 4 per parameter and contribution
    s/GB moved        the same by MB/round
    MB/round          bytes of frames that a round needs, towards the coordinator and back
    MB peak           the most memory that the process ever held (VmHWM); `MB/worker`: growth from the row above by workers
    round ms          wall time of a round, with all that the workers do on the same cores
    cores             CPU time of the coordinator by wall time: near 1, and it alone sets the pace

Measurements are kept in `scale_runs.jsonl` beside the result, so that the command can be stopped and goes on where it
was; remove it to measure again. `load` is that of the machine before: on a busy one CPU times are too high as well.

The first rounds (connections, buffers, starting values) are not counted. `relay` sends every worker the contributions
of all others, which grows with the square of their number: `codec.down`.

    python benchmarks/scale.py                          the whole table, about 20 minutes
    python benchmarks/scale.py --workers 2 64 --ways fp32 --runs 1
    python benchmarks/scale.py --smallest               does it still work?
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_plot import plot
from timing import RESULTS, machine, save
from wire_cells import HERE, Children
from wire_plan import as_toml

from diloco.comms.codec import get
from diloco.comms.frame import frame_size

Row = dict[str, Any]

COUNTS = (2, 4, 8, 16, 32, 64)
WAYS = {
    "4 bit": {"up": "e3m0", "down": "q4_ef"},
    "fp32": {"up": "fp32", "down": "g_fp32"},
    "relay": {"up": "e3m0", "down": "relay"},
}
NUMEL = 1 << 20  # parameters, all in one fragment
SIZES, SIZED = (1 << 16, 1 << 22), 8  # other sizes, and for how many workers
CONTRIBUTIONS = 320  # of a measurement, so that the clock's ticks of 10 ms do not matter
LEAST, WARM = 6, 2  # rounds that count, rounds before them
PROCESSES = 4
SAMPLE_S = 0.02
LIMIT_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="parameters, for 8 workers")
    parser.add_argument("--runs", type=int, default=3, help="the table shows medians")
    parser.add_argument("--report", action="store_true", help="only the table, of what has been measured")
    parser.add_argument("--smallest", action="store_true", help="two workers, a few small rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--plot", type=Path, help="write the curves there, as SVG")
    a = parser.parse_args()
    if a.smallest:
        a.workers, a.ways, a.sizes, a.runs = [2], ["4 bit"], [], 1
    numel = 4096 if a.smallest else NUMEL
    kept = a.out.with_name(f"{a.out.stem}_runs.jsonl")
    before, rows = machine(), list[Row]()
    for way in a.ways:
        cells = [(workers, numel) for workers in a.workers]
        if way != "relay":
            cells += [(SIZED, size) for size in a.sizes]
        for workers, size in cells:
            found = [
                r for run in range(a.runs) if (r := one(kept, way, workers, size, run, a.report, a.smallest))
            ]
            if not found:
                continue
            rows.append(medians(found) | {"way": way, "workers": workers, "numel": size, "runs": len(found)})
            grown(rows)
            head(rows)
            line(rows[-1])
    same = [r for r in rows if r["numel"] == numel]
    fits = {way: fit([r for r in same if r["way"] == way], numel) for way in a.ways}
    for way, lines in fits.items():
        print(f"{way}: {', '.join(f'{name} {value:.3g}' for name, value in lines.items())}")
    save(a.out, {"machine": before, "rows": rows, "fits": fits})
    if a.plot is not None:
        plot(same, a.plot)
        print(f"wrote {a.plot}")


def one(kept: Path, way: str, workers: int, numel: int, run: int, report: bool, smallest: bool) -> Row | None:
    """A measurement, or what is kept of it; under `report` nothing is measured."""
    rounds, processes = max(LEAST, CONTRIBUTIONS // workers), PROCESSES
    if smallest:
        rounds, processes = LEAST, 1
    key = f"{way}, {workers} workers, {numel} parameters, {rounds} rounds, run {run}"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    done: dict[str, Row] = {row.pop("key"): row for row in map(json.loads, lines)}
    if key not in done and not report:
        load = os.getloadavg()[0]
        done[key] = measure(way, workers, numel, rounds, processes) | {"load": load}
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **done[key]}) + "\n")
    return done.get(key)


def config_of(way: str, workers: int, rounds: int) -> dict[str, dict[str, Any]]:
    """One fragment, a round after every inner step, everybody waited for."""
    return {
        "run": {"run_id": "scale", "inner_steps_total": rounds},
        "outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.9},
        "stream": {
            "H": 1,
            "layout": "single",
            "overlap": "none",
            "tau": 0,
            "alpha": 0.0,
            "final_flush": False,
        },
        "codec": WAYS[way],
        "topology": {"workers": workers},
        # Dozens of workers on two cores may be silent for long, and nobody is to be left out for that.
        "fault": {"suspect_s": 120.0, "dead_s": 600.0, "fixed_grace_s": 600.0},
    }


class Watch:
    """CPU seconds of a process over time, and the most memory that it held, from /proc."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stop = pid, threading.Event()
        self._ticks = os.sysconf("SC_CLK_TCK")
        self.cpu: list[tuple[float, float]] = []  # (time.monotonic(), seconds)
        self.peak = 0  # bytes
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            try:
                fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
                memory = Path(f"/proc/{self._pid}/status").read_text()
            except OSError:
                return
            self.cpu.append((time.monotonic(), (int(fields[11]) + int(fields[12])) / self._ticks))
            if (found := re.search(r"VmHWM:\s+(\d+) kB", memory)) is not None:
                self.peak = max(self.peak, 1024 * int(found[1]))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, begun: float, ended: float) -> float:
        """CPU seconds that it took from the last sample before `begun` to the last before `ended`."""
        at = [max((s for s in self.cpu if s[0] <= when), default=self.cpu[0]) for when in (begun, ended)]
        return at[1][1] - at[0][1]


def measure(way: str, workers: int, numel: int, rounds: int, processes: int) -> Row:
    """One run of `WARM` + `rounds` rounds, the workers spread over `processes`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.toml").write_text(as_toml(config_of(way, workers, WARM + rounds)))
        with Children(folder, 0.0, LIMIT_S) as children:
            children.start(
                "coordinator", "-m", "diloco", "coordinator", "run.toml", "--listen", "127.0.0.1:0"
            )
            log = children.log("coordinator")
            port = children.until(
                "the coordinator's port", lambda: re.search(r"listening on port (\d+)", log.read_text())
            )
            watch = Watch(children.running[0][1].pid)
            names = [f"w{i:02d}" for i in range(workers)]
            shares = [share for i in range(processes) if (share := names[i::processes])]
            for i, share in enumerate(shares):
                job = {"config": "run.toml", "blocks": [numel], "step_s": 0.0, "out": f"{i}.json"}
                job |= {"workers": {worker: f"127.0.0.1:{port[1]}" for worker in share}}
                children.start(f"process{i}", str(HERE / "prepared_worker.py"), json.dumps(job))
            children.until("the end of the run", children.ended)
            watch.stop()
        facts = [
            w for i in range(len(shares)) for w in json.loads((folder / f"{i}.json").read_text()).values()
        ]
    assert len({w["digest"] for w in facts}) == 1, "the workers end with different parameters"
    begun, ended = (max(w["times"][at] for w in facts) for at in (WARM - 1, -1))
    cpu, count = watch.between(begun, ended), workers * rounds
    return {
        "rounds": rounds,
        "ms_per_contribution": 1e3 * cpu / count,
        "s_per_gb": cpu / (4e-9 * numel * count),
        "s_per_gb_moved": cpu / (1e-9 * needed(way, workers, numel) * rounds),
        "mb_per_round": 1e-6 * needed(way, workers, numel),
        "mb_peak": 1e-6 * watch.peak,
        "round_ms": 1e3 * (ended - begun) / rounds,
        "cores": cpu / (ended - begun),
    }


def needed(way: str, workers: int, numel: int) -> int:
    """Bytes of frames in a round, up and down, of all workers."""
    up, plain = (frame_size(get(name), numel) for name in (WAYS[way]["up"], "fp32"))
    down = {"q4_ef": up, "g_fp32": plain, "relay": (workers - 1) * up}[WAYS[way]["down"]]
    return workers * (up + down)


def medians(rows: Sequence[Row]) -> Row:
    spread = max(r["ms_per_contribution"] for r in rows) / min(r["ms_per_contribution"] for r in rows)
    return {key: statistics.median(r[key] for r in rows) for key in rows[0]} | {"spread": spread}


def grown(rows: list[Row]) -> None:
    """Put the growth of memory since the row before, by workers, into the last row."""
    last = rows[-1]
    alike = [r for r in rows[:-1] if r["way"] == last["way"] and r["numel"] == last["numel"]]
    before = alike[-1] if alike else None
    last["mb_per_worker"] = (
        (last["mb_peak"] - before["mb_peak"]) / (last["workers"] - before["workers"])
        if before is not None and before["workers"] != last["workers"]
        else None
    )


def fit(rows: Sequence[Row], numel: int) -> dict[str, float]:
    """Lines through the rows (least squares), and what remains of a straight line: `cpu_growth` is the most costly row's
    CPU per contribution by the cheapest's."""
    if len(rows) < 2:
        return {}
    x = [r["workers"] for r in rows]
    cpu = statistics.linear_regression(x, [r["ms_per_contribution"] * r["workers"] for r in rows])
    memory = statistics.linear_regression(x, [r["mb_peak"] for r in rows])
    cost = [r["ms_per_contribution"] for r in rows]
    return {
        "ms_per_round": cpu.intercept,
        "ms_per_contribution": cpu.slope,
        "mb": memory.intercept,
        "mb_per_worker": memory.slope,
        "bytes_per_worker_and_parameter": 1e6 * memory.slope / numel,
        "cpu_growth": max(cost) / min(cost),
    }


def head(rows: Sequence[Row]) -> None:
    if sum(r["way"] == rows[-1]["way"] for r in rows) == 1:
        print(
            f"\n{'way':6s} {'workers':>7s} {'numel':>9s} {'ms/contribution':>15s} {'s/GB':>6s} {'s/GB moved':>10s} {'MB peak':>8s} "
            f"{'MB/worker':>9s} {'round ms':>8s} {'MB/round':>8s} {'cores':>5s} {'spread':>6s} {'load':>4s}"
        )


def line(r: Row) -> None:
    growth = f"{r['mb_per_worker']:.2f}" if r["mb_per_worker"] is not None else ""
    print(
        f"{r['way']:6s} {r['workers']:7d} {r['numel']:9,d} {r['ms_per_contribution']:15.2f} {r['s_per_gb']:6.2f} "
        f"{r['s_per_gb_moved']:10.2f} {r['mb_peak']:8.0f} {growth:>9s} {r['round_ms']:8.1f} "
        f"{r['mb_per_round']:8.1f} {r['cores']:5.2f} {r['spread']:6.2f} {r['load']:4.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
