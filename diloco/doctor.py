"""`diloco doctor`: looks for what would stop or slow a run on this node, and says what to do. Nothing is changed.

The checks are in `diloco.worker.doctor` (this machine) and `diloco.worker.doctor_network` (the way to the coordinator).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from diloco.errors import ConfigError, EnvironmentProblem, RefusedError


def add_command(commands: Any) -> None:
    """`commands` is what `ArgumentParser.add_subparsers` returned."""
    doctor = commands.add_parser("doctor", help="what would stop or slow a run on this node, and what to do")
    doctor.add_argument("role", choices=["worker", "coordinator"])
    doctor.add_argument("config", metavar="RUN.toml")
    doctor.add_argument("--coordinator", metavar="HOST:PORT[,HOST:PORT]", help="also ask it")
    doctor.add_argument(
        "--listen", default="127.0.0.1:7700", metavar="HOST:PORT", help="of the coordinator to be"
    )
    doctor.add_argument("--keys", metavar="DIR", type=Path, help="the keys of this node")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.worker.doctor import examine

    findings = examine(
        arguments.role,
        arguments.config,
        overrides,
        coordinator=arguments.coordinator,
        listen=arguments.listen,
        keys=arguments.keys,
    )
    failed = [f for f in findings if f.level == "fail"]
    if arguments.json:
        rows = [{"check": f.check, "level": f.level, "words": f.words, "fix": f.fix} for f in findings]
        print(json.dumps({"role": arguments.role, "ok": not failed, "findings": rows}, indent=2))
    else:
        for f in findings:
            print(f"{f.level:<5} {f.check:<14} {f.words}")
            if f.fix:
                print(f"{'':<20} -> {f.fix}")
        counts = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "fail")}
        print(", ".join(f"{n} {level}" for level, n in counts.items()))
    # A wrong configuration may be the cause of the rest, and a refusal is nearer to it than the machine.
    order = (ConfigError.exit_code, RefusedError.exit_code, EnvironmentProblem.exit_code)
    return next((code for code in order if any(f.exit_code == code for f in failed)), 0)
