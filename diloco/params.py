"""What `diloco params` prints: every parameter of a run's model, its group, and what trains it how."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from diloco.config import RunConfig
from diloco.optim.build import Row, explain
from diloco.worker.data import load_corpus
from diloco.worker.model import build_from_factory, build_model

_GROUPS = ("matrix", "embed", "head", "router", "scalar")


def print_params(config: RunConfig, as_json: bool) -> None:
    """The table and its totals on standard output, as text or as JSON (`parameters`, `groups`, `total`).

    Raises:
        ConfigError: as building the model and its optimizer would.
    """
    rows = explain(model_of(config), config)
    groups = totals(rows)
    if as_json:
        facts: dict[str, Any] = {"parameters": [asdict(row) for row in rows], "groups": groups}
        print(json.dumps({**facts, "total": sum(row.numel for row in rows)}, indent=2))
        return
    from rich.console import Console

    console = Console()
    # Without a terminal's width the names would be cut, and a pipe has no width.
    console.width = max(console.width, 0 if console.is_terminal else 200)
    for table in tables(rows, groups):
        console.print(table)


def model_of(config: RunConfig) -> nn.Module:
    """The run's model: without memory for presets; a factory's is really made."""
    m = config.model
    if m.factory is not None:
        with torch.device("cpu"):
            return build_from_factory(m.factory, config.run.seed)
    d = config.data
    # Bytes need no corpus to be counted.
    vocabulary = (
        256
        if d.tokenizer == "bytes"
        else load_corpus(d.source, d.format, d.tokenizer, field=d.field).vocab_size
    )
    return build_model(m.preset, m.sequence_length, config.run.seed, vocabulary, device="meta")


def totals(rows: list[Row]) -> list[dict[str, Any]]:
    """Per group and algorithm: number of tensors and elements, and their share of all elements."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        entry = found.setdefault((row.group, row.algorithm), [0, 0])
        entry[0] += 1
        entry[1] += row.numel
    whole = sum(row.numel for row in rows)
    ordered = sorted(found.items(), key=lambda item: _GROUPS.index(item[0][0]))
    return [
        {"group": g, "algorithm": a, "tensors": n, "numel": size, "share": size / whole}
        for (g, a), (n, size) in ordered
    ]


def tables(rows: list[Row], groups: list[dict[str, Any]]) -> list[Any]:
    """Two rich tables: one line per parameter, one per group."""
    from rich.table import Table

    each = Table("parameter", "shape", "group", "algorithm", title="Parameters")
    for name in ("elements", "lr", "decay"):
        each.add_column(name, justify="right")
    each.add_column("why")
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        numbers = f"{row.numel:,}", f"{row.lr:g}", f"{row.weight_decay:g}"
        each.add_row(row.name, shape, row.group, row.algorithm, *numbers, row.why)
    total = Table("group", "algorithm", title="Groups")
    for name in ("tensors", "elements", "share"):
        total.add_column(name, justify="right")
    for entry in groups:
        counts = str(entry["tensors"]), f"{entry['numel']:,}", f"{entry['share']:.1%}"
        total.add_row(entry["group"], entry["algorithm"], *counts)
    whole = sum(row.numel for row in rows)
    total.add_row("all", "", str(len(rows)), f"{whole:,}", "100.0%", style="bold")
    return [each, total]
