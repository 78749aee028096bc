"""`diloco demo`: a coordinator and workers as real processes on this machine, watched until their report is there."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from diloco.comms.link import Link
from diloco.config import RunConfig
from diloco.errors import ConfigError, EnvironmentProblem
from diloco.live import render

RUN_DIR = Path("runs") / "demo"
STEPS_PER_MINUTE = 480  # what two workers do on two ordinary cores
GRACE_S = 2.5  # between asking a process to stop and ending it
MAX_RESTARTS = 10  # of killed processes, in one demo

# Settings for a short run: a low outer momentum suits fewer than 200 outer rounds, and "delay_corrected" keeps what
# a worker learns while its fragment travels.
TEMPLATE = """\
[run]
run_id = "demo"
seed = 0
inner_steps_total = {steps}

[model]
preset = "tiny"
sequence_length = 128

[data]
source = "stdlib"

[train]
batch_size = 8
threads = 1
checkpoint_every = 200

[optim]
lr = 0.003

[schedule]
kind = "cosine"
warmup = {warmup}

[outer]
kind = "nesterov"
lr = 0.8
momentum = 0.4

[stream]
H = 10
frag_layers = 2
tau = 2
alpha = 0.0
merge = "delay_corrected"

[codec]
up = "e3m0"
down = "{down}"

[weights]
mode = "tokens"

[topology]
workers = {workers}
"""


def config_text(workers: int, minutes: float) -> str:
    """The demo's configuration, as TOML. Relaying costs least for two workers, requantising for more."""
    steps = max(30, round(STEPS_PER_MINUTE * minutes / 30) * 30)
    down = "relay" if workers <= 2 else "q4_ef"
    return TEMPLATE.format(steps=steps, warmup=max(5, steps // 20), down=down, workers=workers)


def run(*, workers: int, minutes: float, fresh: bool, link: str | None, overrides: Sequence[str]) -> int:
    """Run or resume the demo, every worker behind an emulated `link`; returns the exit code."""
    if workers < 1 or not 0 < minutes <= 600:
        raise ConfigError(
            f"demo: --workers {workers} must be at least 1 and --minutes {minutes} between 0 and 600"
        )
    text = config_text(workers, minutes)
    if link is not None:
        Link.parse(link)
    RunConfig.from_toml(text, overrides)  # refuse before anything is started or removed
    resume = prepare(text, overrides, fresh)
    processes = _Processes(workers, overrides, resume, link)
    try:
        return _watch(processes)
    finally:
        processes.end()


def prepare(text: str, overrides: Sequence[str], fresh: bool) -> bool:
    """Make or keep the run's folder, saying which; True if an unfinished run with these settings goes on."""
    journal = RUN_DIR / "journal" / "journal.jsonl"
    same = (RUN_DIR / "run.toml").exists() and (RUN_DIR / "run.toml").read_text(encoding="utf-8") == text
    same = same and (RUN_DIR / "overrides.json").read_text(encoding="utf-8") == json.dumps(list(overrides))
    started = journal.exists() and '"type":"start"' in journal.read_text(encoding="utf-8")
    unfinished = started and '"type":"complete"' not in journal.read_text(encoding="utf-8")
    resume = unfinished and same and not fresh
    if resume:
        print(f"resuming the unfinished run in {RUN_DIR}/ (--fresh starts afresh)")
        return True
    if fresh:
        why = "asked for"
    elif not started:
        why = "the last run never began"
    else:
        why = "the last run is complete" if not unfinished else "other settings"
    print(f"starting afresh in {RUN_DIR}/" + (f" ({why})" if RUN_DIR.exists() else ""))
    try:
        shutil.rmtree(RUN_DIR, ignore_errors=True)
        (RUN_DIR / "logs").mkdir(parents=True)
        (RUN_DIR / "run.toml").write_text(text, encoding="utf-8")
        (RUN_DIR / "overrides.json").write_text(json.dumps(list(overrides)), encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"cannot write to {str(RUN_DIR)!r}: {error.strerror}") from None
    return False


class _Processes:
    """The demo's children by name, each with a log of its own in runs/demo/logs/."""

    def __init__(self, workers: int, overrides: Sequence[str], resume: bool, link: str | None) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        config, extra = str(RUN_DIR / "run.toml"), [f"--{item}" for item in overrides]
        self._commands = {"coordinator": ["coordinator", config, "--listen", self.address, *extra]}
        for i in range(workers):
            self._commands[f"w{i}"] = [
                "worker",
                config,
                "--coordinator",
                self.address,
                "--id",
                f"w{i}",
                *(["--link", link] if link else []),
                *extra,
            ]
        self._logs = {name: (RUN_DIR / "logs" / f"{name}.log").open("ab") for name in self._commands}
        self._restarts = 0
        self.running = {name: self._spawn(name, resume) for name in self._commands}

    def _spawn(self, name: str, resume: bool) -> subprocess.Popen[bytes]:
        flags = ["--resume"] if resume and name == "coordinator" else []
        # A session of its own: Ctrl+C reaches this process, which stops the others in order.
        return subprocess.Popen(
            [sys.executable, "-m", "diloco", *self._commands[name], *flags],
            stdout=self._logs[name],
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def done(self) -> bool:
        """The coordinator has ended the run."""
        return self.running["coordinator"].poll() == 0

    def tend(self) -> tuple[list[str], str | None]:
        """Start again what was killed; returns the names restarted, and that of a process that failed by itself."""
        restarted: list[str] = []
        for name, process in self.running.items():
            code = process.poll()
            if code is None or code == 0:
                continue
            if code > 0 or self._restarts >= MAX_RESTARTS:
                return restarted, name
            self._restarts += 1
            self.running[name] = self._spawn(name, resume=True)
            restarted.append(name)
        return restarted, None

    def end(self) -> None:
        """Workers first, so that they can say goodbye; then the coordinator. At most 3 seconds in all."""
        limit = time.monotonic() + GRACE_S
        workers = [process for name, process in self.running.items() if name != "coordinator"]
        for group in (workers, [self.running["coordinator"]]):
            for process in group:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            for process in group:
                try:
                    process.wait(max(0.1, limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            limit += 0.4
        for log in self._logs.values():
            log.close()


def _watch(processes: _Processes) -> int:
    from diloco.comms.query import fetch_status

    stop = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    console = Console()
    live = Live(console=console, refresh_per_second=4, transient=False)
    last_line = 0.0
    with live:
        while not processes.done and not stop.is_set():
            facts = fetch_status(processes.address, 1.0)
            if facts is not None and console.is_terminal:
                live.update(render(facts))
            elif facts is not None and time.monotonic() - last_line > 10:
                last_line = time.monotonic()
                console.print(_line(facts))
            restarted, failed = processes.tend()
            for name in restarted:
                console.print(f"{name} was killed: started again")
            if failed is not None:
                console.print(f"[red]{failed} failed[/]: see {RUN_DIR}/logs/{failed}.log")
                return 1
            stop.wait(0.5)
    if stop.is_set():
        console.print(f"stopping; `diloco demo` continues the run in {RUN_DIR}/")
        return 130
    _summary(console)
    return 0


def _line(facts: dict[str, Any]) -> str:
    losses = " ".join(f"{m['id']} loss {m['loss']:.3f}" for m in facts["members"] if m["loss"] is not None)
    return f"step {facts['inner_step']}/{facts['inner_steps_total']} commits {facts['commits']} {losses}"


def _summary(console: Console) -> None:
    report = json.loads((RUN_DIR / "report.json").read_text(encoding="utf-8"))
    sent = report["bytes_up"] + report["bytes_down"]
    digests = {w["digest"] for w in report["workers"]} | {report["global_digest"]}
    console.print(
        f"held-out loss {report['eval_loss_start']:.3f} -> [bold]{report['eval_loss_end']:.3f}[/] nats/byte, "
        f"{report['commits']} commits, compute utilisation {report['compute_utilisation']:.1%}\n"
        f"{sent / 1e6:.1f} MB sent where data parallel would have sent {report['bytes_data_parallel'] / 1e6:.0f} MB "
        f"({report['bytes_data_parallel'] / sent:.0f}x fewer); all replicas identical: {len(digests) == 1}\n"
        f"report: {RUN_DIR / 'report.html'}   parameters: {RUN_DIR / 'checkpoint' / 'model.safetensors'}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
