"""The tables and the document of `quality.py`, from the runs there are. Nothing is trained here."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality_plan import OUTER_RULES, ROUNDS, Entry, Plan, key_of, loss_of, with_seed

Done = Mapping[str, Mapping[str, Any]]
SHORT = {
    "optim.lr": "inner lr",
    "outer.lr": "lr",
    "outer.momentum": "mu",
    "outer.gpa_lr": "lr",
    "outer.gpa_mu_x": "mu_x",
}


@dataclass(frozen=True)
class Table:
    title: str
    names: tuple[str, ...]
    reference: str | None  # what "against" compares with, seed by seed
    also: tuple[str, ...] = ()  # entries of other tables that are shown here too


def tables_of(plan: Plan) -> list[Table]:
    """The entries there are, sorted into the questions they answer."""

    def named(*starts: str) -> tuple[str, ...]:
        return tuple(n for n in plan.entries if n.startswith(starts))

    def by_length(*starts: str) -> tuple[str, ...]:
        return tuple(sorted(named(*starts), key=lambda n: int(n.rpartition("h")[2])))

    plain = ("none", "parallel", "h10")
    return [
        Table("(c) Codecs, H 10, 100 rounds", named("c-"), "h10", plain),
        Table(
            "(a) Inner steps per round, two workers, 1000 steps",
            by_length("a-short-h"),
            "parallel",
            plain,
        ),
        Table(
            "(a) Inner steps per round, two workers, 3000 steps",
            by_length("a-h", "a-tuned-h"),
            "parallel-long",
            ("none-long", "parallel-long"),
        ),
        Table(
            "(a) Inner steps per round, four workers, 3000 steps",
            by_length("a-four-h"),
            "parallel-four",
            ("none-four", "parallel-four"),
        ),
        Table("(d) Overlap of whole rounds, H 10", named("d-"), "h10", ("h10",)),
        Table("(b) Streaming, H 10, five fragments", tuple(sorted(named("b-"))), "h10", ("h10",)),
        *(
            Table(  # exact names: f-warm-h1 begins f-warm-h10
                f"(f) Outer settings, {rounds} rounds of H {h}",
                tuple(n for n in (f"f-{rule}-h{h}" for rule, _, _ in OUTER_RULES) if n in plan.entries),
                f"f-demo-h{h}",
            )
            for h, rounds in ROUNDS.items()
        ),
        Table(
            "(f) Outer settings, 10,000 rounds of H 1",
            tuple(n for n in named("f-") if n.endswith("-10k")),
            "f-demo-10k",
        ),
        Table("(f) GPA as outer optimizer, H 10", named("f-gpa"), "h10", ("h10",)),
        Table("(e) Muon as inner optimizer, H 10", named("e-"), "e-fp32", ("none-muon", "parallel-muon")),
    ]


def by_seed(plan: Plan, entry: Entry, done: Done) -> dict[int, float]:
    """The losses of the entry's found settings, by seed; empty while its search goes on."""
    found = plan.found(entry, done)
    if found is None:
        return {}
    seeds = sorted({seed for e, seeds in plan.order if e.name == entry.name for seed in seeds})
    losses = {seed: loss_of(done, with_seed(found, seed)) for seed in seeds}
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def facts_of(plan: Plan, name: str, reference: str | None, done: Done) -> dict[str, Any] | None:
    """Everything a row says about an entry; None if nothing of it is known."""
    if name not in plan.entries:
        return None
    entry = plan.entries[name]
    losses = by_seed(plan, entry, done)
    if not losses:
        return None
    found = plan.found(entry, done)
    assert found is not None
    facts: dict[str, Any] = {"name": name, "label": entry.label, "losses": losses}
    facts["mean"] = statistics.fmean(losses.values())
    facts["grid"] = [{**trial, "loss": loss} for trial, loss in plan.grid(entry, done)]
    facts["tuned"] = {axis: found[axis] for axis, _ in entry.axes}
    facts["edge"] = [
        a for a, values in entry.axes if len(values) > 2 and found[a] in (min(values), max(values))
    ]
    row = done[key_of(with_seed(found, min(losses)))]
    facts |= {k: row[k] for k in ("rounds", "bytes_up", "start_point_loss") if k in row}
    if reference in plan.entries:
        other = by_seed(plan, plan.entries[reference], done)
        facts["against"] = [losses[s] / other[s] - 1 for s in losses if s in other]
    if {entry.none, entry.parallel} <= plan.entries.keys():
        worst = by_seed(plan, plan.entries[entry.none], done)
        ideal = by_seed(plan, plan.entries[entry.parallel], done)
        facts["gap_closed"] = [
            (worst[s] - losses[s]) / (worst[s] - ideal[s]) for s in losses if s in worst and s in ideal
        ]
    return facts


def spread(values: list[float], form: str) -> str:
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def grid_text(facts: Mapping[str, Any]) -> str:
    cells = []
    for point in facts["grid"]:
        trial = {k: v for k, v in point.items() if k != "loss"}
        text = "/".join(f"{v:g}" for v in trial.values())
        loss = "diverged" if math.isinf(point["loss"]) else f"{point['loss']:.3f}"
        cells.append(f"**{text}: {loss}**" if trial == facts["tuned"] else f"{text}: {loss}")
    edge = f" (edge: {', '.join(SHORT[a] for a in facts['edge'])})" if facts["edge"] else ""
    return ", ".join(cells) + edge if cells else ""


def lines_of(table: Table, rows: list[dict[str, Any]]) -> list[str]:
    searched = any(row["grid"] for row in rows)
    head = ["method", "seeds", "held-out nats/byte, mean (min to max)"]
    head += ["against " + (table.reference or "")] * bool(table.reference) + ["gap closed"]
    head += ["search, seed 0"] * searched
    lines = [f"### {table.title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["label"], str(len(row["losses"])), spread(list(row["losses"].values()), ".4f")]
        if table.reference:
            cells.append("" if row["name"] == table.reference else spread(row.get("against", []), "+.2%"))
        cells.append(spread(row.get("gap_closed", []), ".0%"))
        if searched:
            axes = ", ".join(SHORT[a] for a in row["tuned"])
            cells.append(f"{axes}: {grid_text(row)}" if row["grid"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def missing(plan: Plan, done: Done) -> list[str]:
    """What the plan still asks for, in words."""
    wanted: dict[str, set[int]] = {}
    for entry, seeds in plan.order:
        have = by_seed(plan, entry, done)
        lacking = {seed for seed in seeds if seed not in have}
        if lacking:
            wanted.setdefault(entry.name, set()).update(lacking)
    return [
        f"{name}: " + ("not measured" if 0 in seeds else f"seeds {', '.join(map(str, sorted(seeds)))}")
        for name, seeds in wanted.items()
    ]


def write(plan: Plan, done: Done, out: Path, folder: Path) -> None:
    """`out`: the JSON. `folder`: quality.md's tables go between its two marks, and the plot beside it."""
    text: list[str] = []
    measured: list[tuple[Table, list[dict[str, Any]]]] = []
    for table in tables_of(plan):
        found = [facts_of(plan, name, table.reference, done) for name in (*table.also, *table.names)]
        rows = [row for row in found if row is not None]
        if any(row["name"] in table.names for row in rows):
            measured.append((table, rows))
            text += lines_of(table, rows)
    lacking = missing(plan, done)
    if lacking:
        text += [
            "### Not measured yet",
            "",
            "Of the plan, `python benchmarks/quality.py` would go on with: " + "; ".join(lacking) + ".",
            "",
        ]
    print("\n".join(text))
    used = [row for row in done.values()]
    report = {
        "machine": f"{platform.machine()}, torch {torch.__version__}, one thread per worker",
        "cpu_seconds": round(sum(row["seconds"] for row in used)),
        "runs": len(used),
        "base": plan.base,
        "tables": [
            {"title": table.title, "against": table.reference, "rows": rows} for table, rows in measured
        ],
        "missing": lacking,
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page, (before, after) = folder / "quality.md", ("<!-- tables -->", "<!-- /tables -->")
    old = page.read_text(encoding="utf-8") if page.exists() else f"# Quality, measured\n\n{before}\n{after}\n"
    head, _, rest = old.partition(before)
    new = head + before + "\n" + "\n".join(text) + after + rest.partition(after)[2]
    page.write_text(new, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib, pip install 'diloco[bench]'")
        return
    from quality_plot import plot

    plot({row["name"]: row for _, rows in measured for row in rows}, folder / "quality.svg")
