"""A coordinator that dies between two system calls of its journal, over and over: `python fault_points.py RUN_DIR ...`.

One process imports everything and forks a coordinator for each life, so that a death costs a fraction of a second.
Each life ends with SIGKILL at a chosen point: before, within or after the k-th call that its machine's thread makes to
open, write, fsync, truncate or unlink a file. After each death the journal is copied aside for the test to judge.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "ftruncate", "unlink", "close")
LONGEST = 45  # points of a life at most: about two commits
MACHINE = "coordinator"  # the name of the thread that the journal is written on


class Fuse:
    """Ends the process at its `left`-th point, leaving the point's name in `note`."""

    def __init__(self, left: int, note: Path) -> None:
        self.left, self.note = left, note

    def point(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.note.write_text(name, encoding="ascii")
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        """From now on the calls of the machine's thread are counted."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name != MACHINE or self.left <= 0:
                return call(*arguments, **options)
            self.point(f"before {name}")
            if name == "write" and self.left == 1:  # a torn write: half of it is there
                data = memoryview(arguments[1]).cast("B")
                call(arguments[0], data[: len(data) // 2])
            self.point(f"within {name}" if name == "write" else f"at {name}")
            done = call(*arguments, **options)
            self.point(f"after {name}")
            return done

        return counted


def live(run_dir: Path, port: int, fuse: Fuse | None, resume: bool) -> int:
    """One life of the coordinator; returns its exit code if it gets to the end of the run."""
    from diloco.config import RunConfig
    from diloco.coordinator.service import CoordinatorService

    config = RunConfig.load(run_dir / "run.toml")
    service = CoordinatorService(config, run_dir, listen=f"127.0.0.1:{port}", resume=resume)
    if fuse is not None:
        fuse.arm()
    service.start()
    while not service.wait(1.0):
        pass
    service.export()
    service.close(linger=True)
    return 0


def main(run_dir: Path, port: int, deaths: int, seed: int) -> int:
    import torch

    import diloco.comms.grpc_server
    import diloco.coordinator.service  # noqa: F401 - imported once, for all lives

    torch.set_num_threads(1)
    rng, died = random.Random(seed), 0
    kept = run_dir / "deaths"
    kept.mkdir()
    while True:
        left = rng.randint(1, LONGEST)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                fuse = Fuse(left, kept / f"{died:04d}.txt") if died < deaths else None
                code = live(run_dir, port, fuse, resume=(run_dir / "journal" / "journal.jsonl").exists())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            return os.waitstatus_to_exitcode(status)
        shutil.copy(run_dir / "journal" / "journal.jsonl", kept / f"{died:04d}.jsonl")
        died += 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
