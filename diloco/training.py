"""`diloco train`: the process around a `LocalTrainer`, alone or one of several under torchrun."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from diloco.comms.metrics import WorkerCollector, serve
from diloco.config import Anytime, Gpa, RunConfig, Snoo
from diloco.schedules_section import schedule_warnings
from diloco.worker.ranks import Ranks
from diloco.worker.train import LocalTrainer

INTERRUPTED = 130


def run(
    path: str, overrides: Sequence[str], *, resume: bool, metrics: str | None, say: Callable[[str], None]
) -> int:
    """Train as the configuration at `path` says, below the working directory; returns the exit code."""
    config = RunConfig.load(path, overrides)
    folder = Path("runs") / config.run.run_id
    with Ranks() as ranks:
        stop = _stop_on_signals(ranks)
        if ranks.first:
            for text in doubts(config):
                say(f"warning: {text}")
        folder.mkdir(parents=True, exist_ok=True)
        trainer = LocalTrainer(config, run_dir=folder, resume=resume, stop=stop, say=say, ranks=ranks)
        # Every rank has metrics of its own; only the first one's are announced and may have a fixed port.
        (host, port), stop_metrics = serve(metrics if ranks.first else None, WorkerCollector(trainer.facts))
        if ranks.first:
            say(f"metrics http://{host}:{port}/metrics")
        try:
            final = trainer.run()
        finally:
            stop_metrics()
    if not ranks.first:
        return 0 if final is not None else INTERRUPTED
    if final is None:
        say(f"interrupted at step {trainer.step}; continue with --resume")
        return INTERRUPTED
    say(
        f"complete: held-out loss {final:.4f} nats/byte, final parameters "
        f"{folder / 'checkpoint' / 'model.safetensors'}, report {folder / 'report.html'}"
    )
    return 0


def doubts(config: RunConfig) -> list[str]:
    """Settings that work on one node but are probably not meant, each with what to do instead."""
    found = schedule_warnings(config.schedule)
    outer, steps = config.train.outer, config.run.inner_steps_total
    for name, default in (("snoo", Snoo()), ("gpa", Gpa()), ("anytime", Anytime())):
        if outer != name and getattr(config, name) != default:
            found.append(f"[{name}] has no effect with train.outer = {outer!r}; use train.outer = {name!r}")
    if outer == "gpa" and config.gpa.mu_x < 1 and 4 / (1 - config.gpa.mu_x) > steps:
        found.append(
            f"gpa.mu_x = {config.gpa.mu_x} averages over about {1 / (1 - config.gpa.mu_x):.0f} steps of a run of {steps}: "
            f"the average will lag behind; try {1 - 10 / max(steps, 20):.2f}"
        )
    if outer == "snoo" and config.snoo.k > steps:
        found.append(
            f"snoo.k = {config.snoo.k} is more than the {steps} steps of the run: there is one outer step"
        )
    return found


def _stop_on_signals(ranks: Ranks) -> threading.Event:
    """Set by SIGINT and SIGTERM. A second one ends a process that is alone at once.

    Under torchrun a Ctrl+C arrives twice, from the terminal and from torchrun, which kills after 30 seconds anyway.
    """
    stop = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and ranks.world == 1:
            os._exit(INTERRUPTED)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return stop
