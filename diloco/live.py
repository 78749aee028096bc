"""A run at a glance in a terminal: what the live views and the status command draw. Draws once; loops elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diloco.readout import (
    UNKNOWN,
    bytes_text,
    count_text,
    data_parallel_bytes,
    duration_text,
    loss_text,
    number,
    percent_text,
    printable,
    total,
    utilisation,
    versus_text,
    whole,
)

STYLES = {
    "active": "green", "complete": "green", "running": "green", "joining": "cyan", "syncing": "cyan",
    "gathering": "cyan", "seeding": "cyan", "suspect": "yellow", "dead": "bold red", "gone": "dim",
    "finished": "green",
}  # fmt: skip


def render(status: Mapping[str, Any]) -> RenderableType:
    """A run's status: title and progress, one row per worker, traffic and rejections. Made for 100 columns."""
    parts: list[RenderableType] = [_title(status), _progress(status), Text()]
    parts.append(_workers(status) if status["members"] else Text("No worker has joined yet.", style="dim"))
    parts.append(_traffic(status))
    if status.get("data"):
        parts.append(_data(status["data"]))
    if status["rejections"]:
        reasons = ", ".join(f"{printable(k)} {v}" for k, v in sorted(status["rejections"].items()))
        parts.append(Text(f"Rejected: {reasons}", style="yellow"))
    return Group(*parts)


def eta_s(status: Mapping[str, Any]) -> float | None:
    """Seconds to the last inner step at the mean speed so far; None before the first step and after the last."""
    step, steps, seconds = (
        whole(status["inner_step"]),
        whole(status["inner_steps_total"]),
        number(status["seconds"]),
    )
    if step <= 0 or step >= steps or not seconds or status["phase"] == "complete":
        return None
    return seconds * (steps - step) / step


def _title(status: Mapping[str, Any]) -> Text:
    phase = printable(status["phase"])
    text = Text(overflow="ellipsis", no_wrap=True)
    text.append(printable(status["run_id"]), style="bold")
    text.append("  ")
    text.append(phase, style=STYLES.get(phase, ""))
    text.append(f"  {whole(status['commits'])} commits", style="")
    if whole(status["aborted"]):
        text.append(f", {whole(status['aborted'])} aborted", style="yellow")
    text.append(f" · epoch {whole(status['epoch'])} · {duration_text(status['seconds'])}", style="dim")
    return text


def _progress(status: Mapping[str, Any]) -> Table:
    step, steps = whole(status["inner_step"]), whole(status["inner_steps_total"])
    left = eta_s(status)
    words = f"step {step:,}/{steps:,}"
    if left is not None:
        words += f"  {duration_text(left)} left"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(steps, 1), completed=min(step, max(steps, 1)), width=48), Text(words))
    return grid


def _workers(status: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("worker", max_width=24)  # the one that may shrink: figures cut short would mislead
    table.add_column("state", no_wrap=True)
    for head in ("step", "loss", "tokens/s", "util.", "up", "down", "heard"):
        table.add_column(head, justify="right", no_wrap=True)
    for m in status["members"]:
        state = "finished" if m["finished"] else printable(m["state"])
        style = "" if m["live"] or m["finished"] else "dim"
        age = duration_text(m["heartbeat_age_s"]) if m["live"] else UNKNOWN
        cells = (
            f"{whole(m['step']):,}",
            loss_text(m["loss"]),
            count_text(m["tokens_per_s"]),
            percent_text(utilisation(number(m["compute_s"]), number(m["exposed_s"]))),
            bytes_text(m["bytes_up"]),
            bytes_text(m["bytes_down"]),
            age,
        )
        table.add_row(
            Text(printable(m["id"]), no_wrap=True, overflow="ellipsis"),
            Text(state, style=STYLES.get(state, "")),
            *map(Text, cells),
            style=style,
        )
    return table


def _data(data: Mapping[str, Any]) -> Text:
    """Where the leased blocks of the data are."""
    states = ", ".join(
        f"{whole(data[state])} {state}" for state in ("committed", "leased", "free", "returned")
    )
    return Text(f"Blocks of data: {states} · {count_text(sum(map(whole, data['tokens'])))} tokens committed")


def _traffic(status: Mapping[str, Any]) -> Text:
    members = status["members"]
    sent = whole(total(members, "bytes_up")) + whole(total(members, "bytes_down"))
    parameters = sum(whole(f["numel"]) for f in status["fragments"])
    baseline = data_parallel_bytes(parameters, [whole(m["step"]) for m in members])
    text = Text(f"\nSent and received {bytes_text(sent)}")
    if baseline:
        text.append(f" · data parallel would have sent {bytes_text(baseline)}")
    if baseline and sent:
        text.append(" · ")
        text.append(versus_text(sent, baseline), style="bold green" if baseline >= sent else "bold yellow")
    return text
