"""`diloco plan`: asks the planner, for figures that were given or that a run measured, and prints its answer."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diloco.errors import ConfigError
from diloco.planner import Plan, published_table, recommend
from diloco.readout import number, whole

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NEEDED = {"params": "--params", "step_time_s": "--step-time", "link_bits_per_s": "--link"}


def bits_per_second(text: str) -> float:
    """``200Mbit``, ``1.5Gbit/s`` or a plain number of bits per second; ConfigError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(?:bit(?:/s|ps)?|bps)?\s*", text.lower())
    try:
        rate = float(found.group(1)) * _UNITS[found.group(2)] if found else 0.0
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise ConfigError(f"--link {text!r} is not a rate; write for example 200Mbit or 1Gbit")
    return rate


def link_of(text: str) -> tuple[float, float]:
    """``200Mbit`` or ``200Mbit,50ms``: bit/s, and seconds there and back (0 if not given). Raises ConfigError."""
    rate, comma, trip = text.partition(",")
    found = re.fullmatch(r"\s*([0-9.]+)\s*(us|ms|s)\s*", trip.lower())
    try:
        rtt_s = float(found.group(1)) * _TIMES[found.group(2)] if found else -1.0 if comma else 0.0
    except ValueError:
        rtt_s = -1.0
    if rtt_s < 0:
        raise ConfigError(f"--link {text!r}: {trip!r} is not a round trip; write for example 200Mbit,50ms")
    return bits_per_second(rate), rtt_s


def read_profile(path: Path) -> dict[str, Any]:
    """What a finished run measured, as arguments of `recommend`; None for what it could not measure.

    `path` is a run's folder or its report.json. The two directions of a link become the one rate at which as much
    went up as down takes as long; the coordinator's link is no other limit, for it was on the way when the workers
    measured theirs. Raises ConfigError.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--profile {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(
            f"--profile {str(path)!r} is not JSON: give a run's folder or its report.json"
        ) from None
    prediction = report.get("prediction") if isinstance(report, dict) else None
    inputs = prediction.get("inputs") if isinstance(prediction, dict) else None
    if not isinstance(inputs, dict):
        raise ConfigError(
            f"--profile {str(path)!r} has no measurements: it needs the report of a finished run with a coordinator"
        )
    up, down = (number(inputs.get(key)) for key in ("up_bits_per_s", "down_bits_per_s"))
    both = 2 / (1 / up + 1 / down) if up and down else up or down
    return {
        "params": number(inputs.get("parameters")),
        "step_time_s": number(inputs.get("step_time_s")),
        "link_bits_per_s": both,
        "workers": whole(inputs.get("workers")) or None,
        "layers": whole(inputs.get("layers")) or None,
        "rtt_s": number(inputs.get("rtt_s")) or 0.0,
        "coordinator_bits_per_s": math.inf,
    }


def print_plan(
    params: float | None,
    step_time_s: float | None,
    link: str | None,
    workers: int | None,
    as_json: bool,
    *,
    coordinator_link: str | None = None,
    profile: Path | None = None,
) -> None:
    """Recommend settings for a run and say what they cost. What is given takes the place of what `profile` has."""
    asked: dict[str, Any] = read_profile(profile) if profile is not None else {}
    given: dict[str, Any] = {"params": params, "step_time_s": step_time_s, "workers": workers}
    if link is not None:
        given["link_bits_per_s"], given["rtt_s"] = link_of(link)
        asked.pop("coordinator_bits_per_s", None)
    if coordinator_link is not None:
        given["coordinator_bits_per_s"] = bits_per_second(coordinator_link)
    asked |= {key: value for key, value in given.items() if value is not None}
    if params is not None:
        asked["layers"] = None  # those of another model
    asked["workers"] = asked.get("workers") or 2
    lacking = [flag for key, flag in _NEEDED.items() if asked.get(key) is None]
    if lacking:
        more = (
            "the run did not measure it" if profile is not None else "or --profile RUN, or --table published"
        )
        raise ConfigError(f"give {', '.join(lacking)} too ({more})")
    plan = recommend(**asked)
    if as_json:
        found = {"asked": asked, **dataclasses.asdict(plan), "settings": plan.settings()}
        json.dump(_finite(found), sys.stdout, indent=2)
        print()
        return
    console = Console()
    if profile is not None:
        console.print(_asked_line(asked), soft_wrap=True)
    console.print(_plan_table(plan))
    for line in _loss_lines(plan):
        console.print(line, soft_wrap=True, highlight=False)
    flags = " ".join(f"--{key} {value}" for key, value in plan.settings().items())
    console.print(f"as flags: {flags}", soft_wrap=True)
    if not plan.reaches_target:
        console.print(
            f"[yellow]no setting keeps 95 % busy on this link; these come closest and need "
            f"{_rate(plan.needed_bits_per_s)}[/]",
            soft_wrap=True,
        )


def _asked_line(asked: dict[str, Any]) -> str:
    return (
        f"measured: {asked['params']:,.0f} parameters, {asked['workers']} workers, "
        f"{1e3 * asked['step_time_s']:.1f} ms per step, link {_rate(asked['link_bits_per_s'])}, "
        f"round trip {1e3 * asked.get('rtt_s', 0.0):.1f} ms"
    )


def _rate(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e6:.1f} Mbit/s" if math.isfinite(bits_per_s) else "a shorter round trip"


def _finite(value: Any) -> Any:
    """JSON has no infinity: it becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return number(value) if isinstance(value, float) else value


def _plan_table(plan: Plan) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = [
        ("inner steps between syncs (H)", str(plan.H)),
        ("overlap in inner steps (tau)", str(plan.tau)),
        ("fragments", f"{plan.fragments} of {plan.frag_layers} layers (about {plan.layers} layers in all)"),
        ("codec up / down", f"{plan.codec} / {plan.down}"),
        (
            "predicted compute utilisation",
            f"{plan.utilisation:.1%} (star), {plan.ring_utilisation:.1%} (ring)",
        ),
        ("link that hides everything", _rate(plan.needed_bits_per_s)),
        (
            "per worker and round",
            f"{plan.worker_bytes_up / 1e6:.1f} MB up, {plan.worker_bytes_down / 1e6:.1f} MB down",
        ),
        (
            "a worker's rate, both ways",
            f"{_rate(plan.worker_bits_per_s)} mean, {_rate(plan.worker_peak_bits_per_s)} peak",
        ),
        (
            "coordinator's rate, both ways",
            f"{_rate(plan.coordinator_bits_per_s)} mean, {_rate(plan.coordinator_peak_bits_per_s)} peak",
        ),
        ("bytes against data parallel", f"{plan.times_less:.0f}x fewer"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _loss_lines(plan: Plan) -> list[str]:
    lines = ["loss to expect, as far as it is known:"]
    for cost in plan.loss:
        percent = "no number" if cost.percent is None else f"{cost.percent:.2g} % more"
        source = f" ({cost.source})" if cost.source else ""
        lines.append(f"  {cost.setting} {cost.value}: {percent}; {cost.note}{source}")
    return lines


def print_published(as_json: bool) -> None:
    """The bandwidth that the papers say a utilisation needs, beside what this model computes."""
    cells = published_table()
    if as_json:
        json.dump(cells, sys.stdout, indent=1)
        print()
        return
    table = Table("model", "method", "target %", "published Gbit/s", "ours Gbit/s", "grid steps")
    for cell in cells:
        published, ours = ("-" if cell[k] is None else str(cell[k]) for k in ("published", "ours"))
        table.add_row(
            cell["model"], cell["method"], str(cell["target"]), published, ours, str(cell["grid_steps"])
        )
    console = Console()
    console.print(table)
    near = sum(abs(cell["grid_steps"]) <= 1 for cell in cells)
    console.print(f"{near} of {len(cells)} cells within one grid step")
