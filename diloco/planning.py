"""`diloco plan`: asks the planner and prints its answer as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

from rich.console import Console
from rich.table import Table

from diloco.errors import ConfigError
from diloco.planner import Plan, published_table, recommend

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


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


def print_plan(params: float, step_time_s: float, link: str, workers: int, as_json: bool) -> None:
    """Recommend settings for a run and say what they cost."""
    plan = recommend(int(params), step_time_s, bits_per_second(link), workers)
    if as_json:
        json.dump({**dataclasses.asdict(plan), "settings": plan.settings()}, sys.stdout, indent=2)
        print()
        return
    console = Console()
    console.print(_plan_table(plan))
    flags = " ".join(f"--{key} {value}" for key, value in plan.settings().items())
    console.print(f"as flags: {flags}", soft_wrap=True)
    if not plan.reaches_target:
        console.print(
            f"[yellow]no setting keeps 95 % busy on this link; these come closest and need "
            f"{plan.needed_bits_per_s / 1e6:.0f} Mbit/s[/]",
            soft_wrap=True,
        )


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
        ("link that hides everything", f"{plan.needed_bits_per_s / 1e6:.1f} Mbit/s"),
        (
            "per worker and round",
            f"{plan.worker_bytes_up / 1e6:.1f} MB up, {plan.worker_bytes_down / 1e6:.1f} MB down",
        ),
        ("coordinator's mean rate", f"{plan.coordinator_bits_per_s / 1e6:.1f} Mbit/s"),
        ("bytes against data parallel", f"{plan.times_less:.0f}x fewer"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


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
