"""The command line. Exit codes: 0 done, 2 bad usage or configuration, 3 refused, 4 environment, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# Forked data-loader children of a process with live channels crash otherwise; set before gRPC is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Ciphers of TLS 1.2 that need RSA keys, which a run has none of: what remains is TLS 1.3, which has its own. gRPC for
# Python has no setting for the lowest version, and reads this one when it is imported.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256")

from diloco.arguments import parse
from diloco.config import RunConfig, check_distributed, warnings
from diloco.errors import ConfigError, DilocoError, EnvironmentProblem, RefusedError, TransportError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    arguments, overrides = parse(list(sys.argv[1:] if argv is None else argv))
    run = _COMMANDS.get(arguments.command) or arguments.run
    try:
        return int(run(arguments, overrides))
    except DilocoError as error:
        print(f"diloco {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"diloco {arguments.command}: {error}", file=sys.stderr)
        return EnvironmentProblem.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


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
    from diloco.coordinator.rebuild import remember
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
        standby=arguments.standby,
    )
    port = service.start()
    stop_metrics = None
    complete = False
    try:
        remember(config, folder)
        (host, metrics_port), stop_metrics = serve(
            arguments.metrics, CoordinatorCollector(service.status), arguments.keys
        )
        how = (
            f"resumed at epoch {service.machine.epoch}, {service.machine.commits} commits"
            if service.resumed
            else "new"
        )
        if arguments.standby is not None:
            how = f"standby of {arguments.standby}"
        _say(
            f"run {config.run.run_id} ({how}): listening on port {port}, metrics {_url(host, metrics_port, arguments.keys)}"
        )
        while not (complete := service.wait(0.2)) and not stop.is_set():
            pass
        if complete and service.leads:
            _finish(service, folder)
    finally:
        service.close(linger=complete)
        if stop_metrics is not None:
            stop_metrics()
    if complete:
        return 0
    _say(f"stopped; continue with {'--resume' if service.leads else '--standby'}")
    return INTERRUPTED


def _finish(service: Any, folder: Path) -> None:
    from diloco.worker.report import build_report, write_report
    from diloco.worker.series import read_series

    path = service.export()
    facts = service.status()
    plan, series = service.machine.plan, read_series(folder / "progress.jsonl")
    report = build_report(facts, parameters=plan.numel, plan=plan, series=series)
    write_report(folder, report, series, facts["fragments"])
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
    print_plan(
        arguments.params,
        arguments.step_time,
        arguments.link,
        arguments.workers,
        arguments.json,
        coordinator_link=arguments.coordinator_link,
        profile=arguments.profile,
    )
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


# What is not here lives in a module of its own, which says so to the parser.
_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "coordinator": _coordinator,
    "worker": _worker,
    "train": _train,
    "demo": _demo,
    "plan": _plan,
    "params": _params,
    "status": _status,
    "top": _top,
}

if __name__ == "__main__":
    sys.exit(main())
