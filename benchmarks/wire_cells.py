"""One measurement of `wire.py`: its processes, the links between them, and what passed through these."""

from __future__ import annotations

import bisect
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wire_plan import LENGTH, PARALLEL, PRESET, RTT, STEP_S, STEPS, H, as_toml, raw_config

from diloco.comms.link import Link, Relay

HERE = Path(__file__).parent
SAMPLE_S = 0.05
PEAK_S = 1.0  # a peak rate is a mean over so long


class CellError(Exception):
    """A measurement that did not come to its end."""


class Children:
    """Processes with a log each; whatever still runs is ended on the way out."""

    def __init__(self, folder: Path, step_s: float, limit_s: float) -> None:
        self.folder, self._limit = folder, time.monotonic() + limit_s
        self.running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "WIRE_STEP_S": str(step_s),
            "WIRE_PRESET": PRESET,
            "WIRE_LENGTH": str(LENGTH),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *arguments: str) -> None:
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running.append((name, process))

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def until(self, what: str, done: Callable[[], Any]) -> Any:
        """The first true answer; CellError with the logs when a process failed or the time is up."""
        while not (found := done()):
            failed = [name for name, process in self.running if process.poll() not in (None, 0)]
            if failed or time.monotonic() > self._limit:
                logs = "".join(f"---- {n}\n{self.log(n).read_text()[-3000:]}\n" for n, _ in self.running)
                raise CellError(f"waiting for {what}: {failed or 'too long'}\n{logs}")
            time.sleep(0.05)
        return found

    def ended(self) -> bool:
        return all(process.poll() is not None for _, process in self.running)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()


class Meter:
    """Bytes on the workers' links over time: (time.time(), [(up, down) of each relay])."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays, self._stop = relays, threading.Event()
        self.times: list[float] = []
        self.bytes: list[list[tuple[int, int]]] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.times.append(time.time())
            self.bytes.append([relay.traffic() for relay in self._relays])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _between(self, begun: float, ended: float) -> tuple[int, int]:
        return bisect.bisect_left(self.times, begun), bisect.bisect_right(self.times, ended) - 1

    def passed(self, begun: float, ended: float) -> int:
        """Bytes over all links in both directions between two times."""
        first, last = self._between(begun, ended)
        return sum(map(sum, self.bytes[last])) - sum(map(sum, self.bytes[first]))

    def peak_over_mean(self, begun: float, ended: float) -> list[float]:
        """Towards the coordinator and back: the highest mean rate over PEAK_S by the mean, the most of all workers."""
        first, last = self._between(begun, ended)
        found = []
        for way in (0, 1):
            worst = 0.0
            for worker in range(len(self._relays)):
                passed = [sample[worker][way] for sample in self.bytes]
                mean = (passed[last] - passed[first]) / (self.times[last] - self.times[first])
                peak = 0.0
                for i in range(first, last):
                    j = bisect.bisect_left(self.times, self.times[i] + PEAK_S)
                    if j <= last:
                        peak = max(peak, (passed[j] - passed[i]) / (self.times[j] - self.times[i]))
                worst = max(worst, peak / mean) if mean else worst
            found.append(worst)
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_parallel(workers: int, link: str, steps: int, limit_s: float) -> dict[str, Any]:
    """Data parallel: `steps` paced steps over `link`; without a link all STEPS, unpaced, for the final loss."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        (folder / "run.toml").write_text(as_toml(raw_config(PARALLEL, workers, STEPS)))
        job = {"world": workers, "port": port, "config": "run.toml", "steps": steps}
        job |= {"link": f"{link},{RTT}" if link else None, "evaluate": not link}
        with Children(folder, STEP_S if link else 0.0, limit_s) as children:
            for rank in range(workers):
                mine = json.dumps({**job, "rank": rank, "out": f"{rank}.json"})
                children.start(f"rank{rank}", str(HERE / "wire_parallel.py"), mine)
            children.until("the ranks", children.ended)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(workers)]
    assert len({r["sum"] for r in ranks}) == 1, "the ranks hold different parameters"
    alone, step = max(r["alone_s"] for r in ranks), ranks[0]["seconds"] / steps
    return {
        "steps": steps,
        "step_s": alone,
        "utilisation": min(1.0, alone / step) if link else 1.0,
        # Every byte between two ranks is one sent and one received.
        "bytes_per_worker_step": 2 * sum(r["bytes"] for r in ranks) / workers / steps,
        "loss": ranks[0]["loss"],
    }


def run_diloco(method: str, workers: int, link: str, steps: int, limit_s: float) -> dict[str, Any]:
    """A coordinator and workers, each worker behind an emulated link of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.toml").write_text(as_toml(raw_config(method, workers, steps)))
        with Children(folder, STEP_S, limit_s) as children:
            children.start(
                "coordinator", "-m", "diloco", "coordinator", "run.toml", "--listen", "127.0.0.1:0"
            )
            log = children.log("coordinator")
            port = children.until(
                "the coordinator's port", lambda: re.search(r"listening on port (\d+)", log.read_text())
            )
            emulated = Link.parse(f"{link},{RTT}")
            relays = [Relay("127.0.0.1", int(port[1]), emulated, seed=i) for i in range(workers)]
            meter = Meter(relays)
            for i, relay in enumerate(relays):
                address = f"127.0.0.1:{relay.port}"
                children.start(
                    f"w{i}", "-m", "diloco", "worker", "run.toml", "--coordinator", address, "--id", f"w{i}"
                )
            try:
                children.until("the end of the run", children.ended)
            finally:
                meter.stop()
                wire = [relay.traffic() for relay in relays]
                for relay in relays:
                    relay.close()
        run = folder / "runs" / "wire"
        report = json.loads((run / "report.json").read_text())
        logs = [(run / "workers" / f"w{i}" / "steps.jsonl").read_text() for i in range(workers)]
    times = [[json.loads(line)["t"] for line in text.splitlines() if '"loss"' in text] for text in logs]
    # From the end of one round to the end of the last, nothing of start and farewell, and whole rounds of traffic.
    begun, ended = max(t[H - 1] for t in times), min(t[-1] for t in times)
    step_s = report["prediction"]["inputs"]["step_time_s"]
    steady = (steps - H) * step_s / max(t[-1] - t[H - 1] for t in times)
    peaks = meter.peak_over_mean(begun, ended)
    digests = {w["digest"] for w in report["workers"]} | {report["global_digest"]}
    assert len(digests) == 1, f"the workers end with different parameters: {digests}"
    return {
        "steps": steps,
        "step_s": step_s,
        "utilisation": min(1.0, steady),
        "utilisation_whole": report["compute_utilisation"],
        "bytes_per_worker_step": meter.passed(begun, ended) / workers / (steps - H),
        "bytes_per_worker_step_whole": sum(map(sum, wire)) / workers / steps,
        "frames_share": (report["bytes_up"] + report["bytes_down"]) / sum(map(sum, wire)),
        "peak_over_mean": peaks,
        "loss": report["eval_loss_end"],
        "digest": report["global_digest"],
    }
