"""`diloco chaos` on the command line: flags, signals, what is printed and the exit code."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from types import FrameType
from typing import Any

FAILED, INTERRUPTED = 1, 130


def add_command(commands: Any) -> None:
    """`commands` is what `ArgumentParser.add_subparsers` returned."""
    chaos = commands.add_parser(
        "chaos", help="a cluster on this machine under a seeded storm of faults; are the promises kept?"
    )
    chaos.add_argument("--minutes", type=float, default=2.0, help="of faults; default %(default)g")
    chaos.add_argument("--seed", type=int, default=0, help="of the schedule and of the run")
    chaos.add_argument("--workers", type=int, default=4)
    chaos.add_argument(
        "--compare", action="store_true", help="run again without faults, and compare the final loss"
    )
    chaos.add_argument("--json", action="store_true")
    chaos.set_defaults(run=run)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from rich.console import Console

    from diloco.chaos import director
    from diloco.chaos.report import as_json, render
    from diloco.errors import ConfigError

    if overrides:
        raise ConfigError(
            f"--{overrides[0].partition('=')[0]} cannot be set: a chaos run has its own settings"
        )
    stop, console = threading.Event(), Console()

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.set()

    def say(text: str) -> None:
        if not arguments.json:
            console.print(text, markup=False, highlight=False)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    outcome = director.run(
        minutes=arguments.minutes,
        seed=arguments.seed,
        workers=arguments.workers,
        compare=arguments.compare,
        stop=stop,
        say=say,
    )
    if outcome is None:
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(as_json(outcome), indent=2))
    else:
        console.print(render(outcome))
    return 0 if outcome.passed else FAILED
