"""The command line's grammar: every command, flag and help text. What a command does is in `diloco.cli`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diloco.chaos.command import add_command as add_chaos
from diloco.doctor import add_command as add_doctor
from diloco.export import add_command as add_export
from diloco.keys import add_command as add_keys

KEYS_HELP = "certificates made by `diloco keys`: mutual TLS"


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its flags, and every ``--section.key value`` as ``section.key=value``.

    Exits with 2 on bad usage, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="diloco", description="Train one model across machines that can barely talk to each other."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    coordinator = commands.add_parser("coordinator", help="collect contributions and commit outer updates")
    coordinator.add_argument("config", metavar="RUN.toml")
    coordinator.add_argument("--listen", default="127.0.0.1:7700", metavar="HOST:PORT")
    coordinator.add_argument("--resume", action="store_true", help="continue the run in the journal")
    coordinator.add_argument(
        "--standby", metavar="HOST:PORT", help="follow the coordinator there, and take over when it is gone"
    )
    coordinator.add_argument("--metrics", metavar="HOST:PORT", help="default: a free port on 127.0.0.1")
    coordinator.add_argument("--keys", metavar="DIR", type=Path, help=KEYS_HELP)
    coordinator.add_argument("--insecure", action="store_true", help="serve other machines without TLS")

    worker = commands.add_parser("worker", help="train on local data and contribute")
    worker.add_argument("config", metavar="RUN.toml")
    worker.add_argument("--coordinator", required=True, metavar="HOST:PORT[,HOST:PORT]")
    worker.add_argument(
        "--id", metavar="NAME", help="a lasting name; default: that of the keys, or host name and process id"
    )
    worker.add_argument("--keys", metavar="DIR", type=Path, help=KEYS_HELP)
    worker.add_argument(
        "--connections", type=int, default=1, metavar="K", help="TCP connections each way that share the data"
    )
    worker.add_argument("--metrics", metavar="HOST:PORT", help="default: a free port on 127.0.0.1")
    worker.add_argument("--link", metavar="RATE,RTT", help="emulate a slow link, such as 2Mbit,50ms")

    train = commands.add_parser("train", help="train on one node, without a coordinator; under torchrun too")
    train.add_argument("config", metavar="RUN.toml")
    train.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, if there is one"
    )
    train.add_argument("--metrics", metavar="HOST:PORT", help="default: a free port on 127.0.0.1")

    demo = commands.add_parser("demo", help="a coordinator and workers on this machine, real text, a report")
    demo.add_argument("--workers", type=int, default=2)
    demo.add_argument("--minutes", type=float, default=2.0, help="about how long to train")
    demo.add_argument("--fresh", action="store_true", help="start afresh instead of resuming")
    demo.add_argument("--link", metavar="RATE,RTT", help="emulate slow links, such as 2Mbit,50ms")

    plan = commands.add_parser("plan", help="which H, overlap and codec keep a run computing on a given link")
    plan.add_argument("--params", type=float, metavar="N")
    plan.add_argument("--step-time", type=float, metavar="SECONDS")
    plan.add_argument("--link", metavar="RATE[,RTT]", help="each worker's: 200Mbit, 1Gbit, 200Mbit,50ms")
    plan.add_argument("--workers", type=int, metavar="M", help="default 2")
    plan.add_argument(
        "--coordinator-link",
        metavar="RATE",
        help="the coordinator's own, which all share; default: as --link",
    )
    plan.add_argument(
        "--profile", metavar="RUN", type=Path, help="take what is not given from a finished run's report.json"
    )
    plan.add_argument(
        "--table", choices=["published"], help="the papers' bandwidth tables beside this model's"
    )
    plan.add_argument("--schedule", action="store_true", help="compare learning-rate schedules instead")
    plan.add_argument("--steps", type=int, metavar="N", help="of the run, with --schedule")
    plan.add_argument("--warmup", type=int, default=0, metavar="N", help="steps, with --schedule")
    plan.add_argument("--kind", metavar="KIND", help="the schedule that --lr is the best peak of")
    plan.add_argument("--lr", type=float, metavar="LR", help="best peak learning rate so far")
    plan.add_argument(
        "--extend-to", type=int, metavar="N", help="steps of the longer run to rescale --lr for"
    )
    plan.add_argument(
        "--cooldown", type=int, metavar="N", help="steps, of the run of --steps; default a fifth"
    )
    plan.add_argument(
        "--done",
        type=int,
        metavar="N",
        help="constant steps the longer run keeps; default: up to the cooldown",
    )
    plan.add_argument("--json", action="store_true")

    params = commands.add_parser("params", help="which optimizer trains which parameter, and at which rates")
    params.add_argument("config", metavar="RUN.toml")
    params.add_argument("--json", action="store_true")

    for name, text in (("status", "print a run's state once"), ("top", "watch a run")):
        view = commands.add_parser(name, help=text)
        view.add_argument("--coordinator", required=True, metavar="HOST:PORT")
        view.add_argument("--json", action="store_true")
        view.add_argument("--keys", metavar="DIR", type=Path, help=KEYS_HELP)

    add_keys(commands)
    add_doctor(commands)
    add_export(commands)
    add_chaos(commands)

    known, rest = parser.parse_known_args(argv)
    return known, _overrides(parser, rest)


def _overrides(parser: argparse.ArgumentParser, rest: list[str]) -> list[str]:
    """``--stream.H 100`` or ``--stream.H=100`` as ``stream.H=100``."""
    found, index = [], 0
    while index < len(rest):
        key, equals, value = rest[index].partition("=")
        if not key.startswith("--") or "." not in key:
            parser.error(f"unrecognized argument: {rest[index]}")
        if not equals:
            index += 1
            if index == len(rest):
                parser.error(f"{key} needs a value")
            value = rest[index]
        found.append(f"{key[2:]}={value}")
        index += 1
    return found
