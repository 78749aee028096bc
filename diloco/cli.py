"""The command line. Exit codes: 0 done, 2 bad usage or configuration, 3 refused, 4 environment, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# Forked data-loader children of a process with live channels crash otherwise; set before gRPC is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Ciphers of TLS 1.2 that need RSA keys, which a run has none of: what remains is TLS 1.3, which has its own. gRPC for
# Python has no setting for the lowest version, and reads this one when it is imported.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256")

from diloco.config import RunConfig, check_distributed, warnings
from diloco.doctor import add_command as add_doctor
from diloco.errors import ConfigError, DilocoError, EnvironmentProblem, RefusedError, TransportError
from diloco.keys import add_command as add_keys

INTERRUPTED = 130
KEYS_HELP = "certificates made by `diloco keys`: mutual TLS"


def main(argv: Sequence[str] | None = None) -> int:
    arguments, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        return int(arguments.run(arguments, overrides))
    except DilocoError as error:
        print(f"diloco {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"diloco {arguments.command}: {error}", file=sys.stderr)
        return EnvironmentProblem.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="diloco", description="Train one model across machines that can barely talk to each other."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    coordinator = commands.add_parser("coordinator", help="collect contributions and commit outer updates")
    coordinator.add_argument("config", metavar="RUN.toml")
    coordinator.add_argument("--listen", default="127.0.0.1:7700", metavar="HOST:PORT")
    coordinator.add_argument("--resume", action="store_true", help="continue the run in the journal")
    coordinator.add_argument("--metrics", metavar="HOST:PORT", help="default: a free port on 127.0.0.1")
    coordinator.add_argument("--keys", metavar="DIR", type=Path, help=KEYS_HELP)
    coordinator.add_argument("--insecure", action="store_true", help="serve other machines without TLS")
    coordinator.set_defaults(run=_coordinator)

    worker = commands.add_parser("worker", help="train on local data and contribute")
    worker.add_argument("config", metavar="RUN.toml")
    worker.add_argument("--coordinator", required=True, metavar="HOST:PORT[,HOST:PORT]")
    worker.add_argument(
        "--id", metavar="NAME", help="a lasting name; default: that of the keys, or host name and process id"
    )
    worker.add_argument("--keys", metavar="DIR", type=Path, help=KEYS_HELP)
    worker.add_argument(
        "--connections", type=int, default=1, metavar="K", help="TCP connections that share the data"
    )
    worker.add_argument("--metrics", metavar="HOST:PORT", help="default: a free port on 127.0.0.1")
    worker.add_argument("--link", metavar="RATE,RTT", help="emulate a slow link, such as 2Mbit,50ms")
    worker.set_defaults(run=_worker)

    train = commands.add_parser("train", help="train on one node, without a coordinator; under torchrun too")
    train.add_argument("config", metavar="RUN.toml")
    train.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, if there is one"
    )
    train.add_argument("--metrics", metavar="HOST:PORT", help="default: a free port on 127.0.0.1")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="a coordinator and workers on this machine, real text, a report")
    demo.add_argument("--workers", type=int, default=2)
    demo.add_argument("--minutes", type=float, default=2.0, help="about how long to train")
    demo.add_argument("--fresh", action="store_true", help="start afresh instead of resuming")
    demo.add_argument("--link", metavar="RATE,RTT", help="emulate slow links, such as 2Mbit,50ms")
    demo.set_defaults(run=_demo)

    plan = commands.add_parser("plan", help="which H, overlap and codec keep a run computing on a given link")
    plan.add_argument("--params", type=float, metavar="N")
    plan.add_argument("--step-time", type=float, metavar="SECONDS")
    plan.add_argument("--link", metavar="RATE", help="such as 200Mbit or 1Gbit")
    plan.add_argument("--workers", type=int, default=2)
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
    plan.set_defaults(run=_plan)

    params = commands.add_parser("params", help="which optimizer trains which parameter, and at which rates")
    params.add_argument("config", metavar="RUN.toml")
    params.add_argument("--json", action="store_true")
    params.set_defaults(run=_params)

    for name, text in (("status", "print a run's state once"), ("top", "watch a run")):
        view = commands.add_parser(name, help=text)
        view.add_argument("--coordinator", required=True, metavar="HOST:PORT")
        view.add_argument("--json", action="store_true")
        view.add_argument("--keys", metavar="DIR", type=Path, help=KEYS_HELP)
        view.set_defaults(run=_status if name == "status" else _top)

    add_keys(commands)
    add_doctor(commands)

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


def _run_dir(config: RunConfig) -> Path:
    folder = Path("runs") / config.run.run_id
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run's folder {str(folder)!r}: {error.strerror}") from None
    return folder


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _stop_on_signals() -> threading.Event:
    """Set by the first SIGINT or SIGTERM; a second one ends the process at once."""
    stop = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(INTERRUPTED)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return stop


def _coordinator(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.comms.metrics import CoordinatorCollector, serve
    from diloco.coordinator.service import CoordinatorService

    config = RunConfig.load(arguments.config, overrides)
    check_distributed(config)
    for text in warnings(config):
        _say(f"warning: {text}")
    folder = _run_dir(config)
    stop = _stop_on_signals()
    service = CoordinatorService(
        config,
        folder,
        listen=arguments.listen,
        resume=arguments.resume,
        insecure=arguments.insecure,
        keys=arguments.keys,
    )
    port = service.start()
    stop_metrics = None
    complete = False
    try:
        (host, metrics_port), stop_metrics = serve(
            arguments.metrics, CoordinatorCollector(service.status), arguments.keys
        )
        how = (
            f"resumed at epoch {service.machine.epoch}, {service.machine.commits} commits"
            if service.resumed
            else "new"
        )
        _say(
            f"run {config.run.run_id} ({how}): listening on port {port}, metrics {_url(host, metrics_port, arguments.keys)}"
        )
        while not (complete := service.wait(0.2)) and not stop.is_set():
            pass
        if complete:
            _finish(service, folder)
    finally:
        service.close(linger=complete)
        if stop_metrics is not None:
            stop_metrics()
    if complete:
        return 0
    _say("stopped; continue with --resume")
    return INTERRUPTED


def _finish(service: Any, folder: Path) -> None:
    from diloco.worker.report import build_report, write_report
    from diloco.worker.series import read_series

    path = service.export()
    facts = service.status()
    report = build_report(facts, parameters=service.machine.plan.numel)
    write_report(folder, report, read_series(folder / "progress.jsonl"), facts["fragments"])
    _say(f"complete: {report['commits']} commits, final parameters {path}, report {folder / 'report.html'}")


def _worker(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.comms.connect import connect
    from diloco.comms.link import Link
    from diloco.comms.metrics import WorkerCollector, serve
    from diloco.worker.loop import Trainer

    config = RunConfig.load(arguments.config, overrides)
    check_distributed(config)
    name = _worker_name(arguments)
    stop = _stop_on_signals()
    link = Link.parse(arguments.link) if arguments.link else None
    connection = connect(
        arguments.coordinator, channels=arguments.connections, link=link, keys=arguments.keys
    )
    trainer = None
    try:
        trainer = Trainer(config, connection, name=name, run_dir=_run_dir(config), stop=stop, say=_say)
        progress = trainer.optimizer
        (host, port), stop_metrics = serve(arguments.metrics, WorkerCollector(progress.facts), arguments.keys)
        _say(f"worker {name}: metrics {_url(host, port, arguments.keys)}")
        try:
            final = trainer.run()
        finally:
            stop_metrics()
        if final is None:
            _say("interrupted; the checkpoint lets it continue")
            return INTERRUPTED
        _say(
            f"complete: held-out loss {final:.4f} nats/byte, global digest {trainer.optimizer.digest()[:16]}"
        )
        return 0
    finally:
        if trainer is not None:
            trainer.optimizer.close("error")
        connection.close()


def _url(host: str, port: int, keys: Path | None) -> str:
    from diloco.comms.address import is_loopback

    scheme = "http" if keys is None or is_loopback(host) else "https"
    return f"{scheme}://{host}:{port}/metrics"


def _worker_name(arguments: argparse.Namespace) -> str:
    given: str | None = arguments.id
    if arguments.keys is None:
        return given or f"{os.uname().nodename}-{os.getpid()}"
    from diloco.comms.tls import load_keys

    mine = load_keys(arguments.keys, ["worker"], time.time()).identity.name
    if given not in (None, mine):
        raise RefusedError(f"--id {given}, but the keys in {arguments.keys} are those of worker {mine!r}")
    return mine


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.training import run

    return run(arguments.config, overrides, resume=arguments.resume, metrics=arguments.metrics, say=_say)


def _demo(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.demo import run

    return run(
        workers=arguments.workers,
        minutes=arguments.minutes,
        fresh=arguments.fresh,
        link=arguments.link,
        overrides=overrides,
    )


def _fetch(arguments: argparse.Namespace) -> dict[str, Any]:
    from diloco.comms.query import fetch_status

    found = fetch_status(arguments.coordinator, keys=arguments.keys)
    if found is None:
        raise TransportError(
            f"no coordinator answers at {arguments.coordinator}: is it running, and is this its --listen address?"
        )
    return found


def _status(arguments: argparse.Namespace, overrides: list[str]) -> int:
    facts = _fetch(arguments)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    from rich.console import Console

    from diloco.live import render

    Console().print(render(facts))
    return 0


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.planning import print_plan, print_published

    if arguments.table:
        print_published(arguments.json)
        return 0
    if arguments.schedule:
        return _plan_schedule(arguments)
    missing = [n for n in ("params", "step_time", "link") if getattr(arguments, n) is None]
    if missing:
        names = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"plan: give {names} too, or --table published")
    print_plan(arguments.params, arguments.step_time, arguments.link, arguments.workers, arguments.json)
    return 0


def _plan_schedule(arguments: argparse.Namespace) -> int:
    from diloco.plan_schedule import print_schedules

    if arguments.steps is None:
        raise ConfigError("plan --schedule: give --steps, the number of inner steps of the run")
    print_schedules(
        arguments.steps,
        warmup=arguments.warmup,
        kind=arguments.kind,
        lr=arguments.lr,
        extend_to=arguments.extend_to,
        cooldown=arguments.cooldown,
        done=arguments.done,
        as_json=arguments.json,
    )
    return 0


def _params(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from diloco.params import print_params

    print_params(RunConfig.load(arguments.config, overrides), arguments.json)
    return 0


def _top(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from rich.live import Live

    from diloco.live import render

    stop = _stop_on_signals()
    with Live(render(_fetch(arguments)), refresh_per_second=2, screen=False) as live:
        while not stop.wait(1.0):
            try:
                facts = _fetch(arguments)
            except TransportError:
                continue
            live.update(render(facts))
            if facts["phase"] == "complete":
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
