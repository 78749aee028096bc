"""The processes of a chaos run: a coordinator, workers behind wires, liars; killed, started again, and missed.

Who dies without having been killed is lost, which is a violation; who was killed comes back when it is due.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diloco.chaos.paced import PACE, STEPS
from diloco.chaos.schedule import COORDINATOR
from diloco.chaos.wire import Wire
from diloco.errors import StorageError

HOST = "127.0.0.1"
GOODBYE_S = 2.5
CAN_FILL = hasattr(resource, "prlimit")  # Linux: a limit on file sizes for a process that runs already


@dataclass(slots=True)
class Child:
    """A process that is to be there. `back_at`: when to start it again, if somebody killed it on purpose."""

    popen: subprocess.Popen[bytes]
    command: list[str]
    back_at: float | None = None
    filled: bool = False  # it finds no space on its disk now
    was_filled: bool = False  # or found none once
    ended: bool = False  # and not to be waited for any more


class Cluster:
    """Started at once; `tend` it often, and `end` it in any case."""

    def __init__(self, folder: Path, config: Path, workers: int, seed: int, overrides: Sequence[str]) -> None:
        self.folder, self._config = folder, config
        self._extra = [f"--{item}" for item in overrides]
        self.port = _free_port()
        self.address = f"{HOST}:{self.port}"
        self.restarts = 0
        self.names = [f"w{i}" for i in range(workers)]
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "steps").mkdir(exist_ok=True)
        self.wires = {name: Wire((HOST, self.port), seed + i) for i, name in enumerate(self.names)}
        self.children: dict[str, Child] = {}
        coordinator = ["diloco", "coordinator", str(config), "--listen", self.address, *self._extra]
        self._start(COORDINATOR, coordinator)
        for name, wire in self.wires.items():
            self._start(name, ["diloco", *self._worker(name, f"{HOST}:{wire.port}")])

    # ---- what a fault does ----

    def kill(self, name: str, down_s: float) -> None:
        """As `kill -9`; started again `down_s` seconds later."""
        child = self.children[name]
        child.popen.kill()
        child.back_at = time.monotonic() + down_s

    def signal(self, name: str, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.children[name].popen.send_signal(number)

    def fill(self, on: bool) -> None:
        """The coordinator finds no space for another whole record, or finds some again."""
        child = self.children[COORDINATOR]
        child.filled, child.was_filled = on, True
        if child.popen.poll() is None:
            size = (self.folder / "journal" / "journal.jsonl").stat().st_size
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            limit = size + 40 if on else hard
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(child.popen.pid, resource.RLIMIT_FSIZE, (limit, hard))

    def liar(self, name: str, lie: str) -> None:
        """Another worker joins, and lies."""
        self._start(name, ["diloco.chaos.hostile", lie, *self._worker(name, self.address)])

    def remove(self, name: str) -> None:
        """A liar says goodbye, or goes without a word if it takes its time."""
        child = self.children[name]
        child.ended = True
        self.signal(name, signal.SIGINT)
        try:
            child.popen.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            child.popen.kill()
            child.popen.wait()

    # ---- what is looked at ----

    def tend(self) -> list[str]:
        """Start what is due to come back; returns, in words, who has ended and was not killed."""
        found, now = [], time.monotonic()
        for name, child in self.children.items():
            code = child.popen.poll()
            if code is None or child.ended:
                continue
            if code == 0:  # for it the run is complete; whether it really is, the journal tells
                child.ended = True
            elif child.back_at is not None:
                if now >= child.back_at:
                    self._start(name, child.command)
                    self.restarts += 1
            elif name == COORDINATOR and child.filled:
                continue  # nothing to be done before there is space again
            elif name == COORDINATOR and code == StorageError.exit_code and child.was_filled:
                child.back_at = now
            else:
                child.ended = True
                found.append(f"{name} ended by itself with {code}: see {self.log(name)}")
        return found

    @property
    def complete(self) -> bool:
        """The coordinator has ended the run, and written its report."""
        return self.children[COORDINATOR].popen.poll() == 0

    @property
    def over(self) -> bool:
        """The coordinator is gone and does not come back."""
        return self.children[COORDINATOR].ended

    @property
    def all_ended(self) -> bool:
        return self.complete and all(child.popen.poll() is not None for child in self.children.values())

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def end(self) -> None:
        """Kill what still runs."""
        for child in self.children.values():
            if child.popen.poll() is None:
                child.popen.kill()
            child.popen.wait()
        for wire in self.wires.values():
            wire.close()

    # ---- processes ----

    def _worker(self, name: str, address: str) -> list[str]:
        return ["worker", str(self._config), "--coordinator", address, "--id", name, *self._extra]

    def _start(self, name: str, command: list[str]) -> None:
        again = name in self.children
        flags = ["--resume"] if again and name == COORDINATOR else []
        if name in self.wires:
            self.wires[name].forget()
        environment = {
            **os.environ,
            PACE: str(self.folder / "pace"),
            STEPS: str(self.folder / "steps" / name),
        }
        with self.log(name).open("ab") as output:
            # A session of its own: Ctrl+C reaches this process alone, which ends the others.
            popen = subprocess.Popen(
                [sys.executable, "-m", *command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.children[name] = Child(popen, command)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
