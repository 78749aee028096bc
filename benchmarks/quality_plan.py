"""What `quality.py` compares: every method with the grid its free settings are searched on, in order of importance.

A search goes along one axis after the other with seed 0: all values of the first axis, with the others at their first
value; then, at the best of these, the next axis. The best settings are run with the further seeds. Nothing is trained
here and nothing is read but the results so far.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

Settings = dict[str, Any]
Done = Mapping[str, Mapping[str, Any]]  # results by key
Axes = tuple[tuple[str, tuple[Any, ...]], ...]

SEEDS = (0, 1, 2)
BASE: Settings = {
    "bench.way": "workers",
    "run.inner_steps_total": 1000,
    "model.preset": "tiny",
    "model.sequence_length": 64,
    "data.source": "stdlib",
    "train.batch_size": 1,
    "train.clip": 1.0,
    "train.eval_batches": 32,
    "train.device": "cpu",
    "train.dtype": "float32",
    "train.threads": 1,
    "optim.kind": "adamw",
    "schedule.kind": "cosine",
    "schedule.warmup": 50,
    "stream.layout": "single",
    "stream.overlap": "none",
    "stream.tau": 0,
    "stream.alpha": 0.0,
    "stream.H": 10,
    "codec.up": "fp32",
    "codec.down": "relay",
    "codec.ef": "off",
    "topology.workers": 2,
    # A busy machine must not make anybody late: rounds wait for everybody.
    "fault.quorum": 2,
    "fault.heartbeat_s": 10.0,
    "fault.suspect_s": 3600.0,
    "fault.dead_s": 7200.0,
    "fault.round_timeout_s": 7200.0,
}


@dataclass(frozen=True)
class Entry:
    """One method: what is set over BASE, whose tuned settings it takes over (`like`), and what is searched (`axes`)."""

    name: str
    label: str
    over: Settings
    like: tuple[str, ...] = ()
    axes: Axes = ()
    none: str = "none"  # the entries that "gap closed" is measured with
    parallel: str = "parallel"


def key_of(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def loss_of(done: Done, settings: Settings) -> float | None:
    """None if it has not been run, infinity if it diverged."""
    row = done.get(key_of(settings))
    if row is None:
        return None
    return math.inf if row["loss"] is None else float(row["loss"])


def with_seed(settings: Settings, seed: int) -> Settings:
    return {**settings, "run.seed": seed}


class Plan:
    """Entries by name, and in which order with how many seeds they are run."""

    def __init__(self, base: Settings, order: list[tuple[Entry, tuple[int, ...]]]) -> None:
        self.base, self.order = base, order
        self.entries: dict[str, Entry] = {}
        for entry, _ in order:
            assert self.entries.setdefault(entry.name, entry) == entry, entry.name

    def found(self, entry: Entry, done: Done) -> Settings | None:
        """The entry's settings after its search, without a seed; None while runs of the search are missing."""
        return self._search(entry, done)[1]

    def grid(self, entry: Entry, done: Done) -> list[tuple[Settings, float]]:
        """What has been run of the entry's search: the values of its axes, and the loss with seed 0."""
        names = [name for name, _ in entry.axes]
        trials, _ = self._search(entry, done)
        losses = [(trial, loss_of(done, trial)) for trial in trials]
        return [({n: trial[n] for n in names}, loss) for trial, loss in losses if loss is not None]

    def _search(self, entry: Entry, done: Done) -> tuple[list[Settings], Settings | None]:
        """Trials so far, those still missing among them, and the settings found, if none is missing."""
        fixed = {**self.base}
        for name in entry.like:
            parent = self.entries[name]
            chosen = self.found(parent, done)
            if chosen is None:
                return [], None
            axes = [axis for axis, _ in self._axes(parent)]
            fixed.update({axis: chosen[axis] for axis in axes})
        fixed.update({axis: values[0] for axis, values in entry.axes})
        fixed.update(entry.over)
        trials: list[Settings] = []
        for axis, values in entry.axes:
            row = [with_seed({**fixed, axis: value}, SEEDS[0]) for value in values]
            trials += [trial for trial in row if trial not in trials]
            losses = [loss_of(done, trial) for trial in row]
            if any(loss is None for loss in losses):
                return trials, None
            best = min(range(len(row)), key=lambda i: losses[i] or math.inf)
            fixed[axis] = values[best]
        return trials, fixed

    def _axes(self, entry: Entry) -> Axes:
        inherited = [axis for name in entry.like for axis in self._axes(self.entries[name])]
        return (*inherited, *entry.axes)

    def wanted(self, done: Done, only: list[str] | None = None) -> Iterator[tuple[str, Settings]]:
        """Missing runs, the most important first, of those whose settings are known already."""
        for entry, seeds in self.order:
            if only and not any(entry.name.startswith(start) for start in only):
                continue
            trials, found = self._search(entry, done)
            runs = trials if found is None else [with_seed(found, seed) for seed in seeds]
            for settings in runs:
                if loss_of(done, settings) is None:
                    yield entry.name, settings


INNER: Axes = (("optim.lr", (0.001, 0.0005, 0.002)),)
OUTER: Axes = (("outer.lr", (0.75, 0.5, 1.0)), ("outer.momentum", (0.4, 0.1, 0.7)))
LONG = {"run.inner_steps_total": 3000, "schedule.warmup": 150}
CODECS = ("e3m0", "stat2", "int4", "int8", "nf4", "e2m1")
STREAM = {"stream.layout": "strided", "stream.frag_layers": 1, "stream.overlap": "inner"}
OVERLAPPED: Settings = {**STREAM, "stream.tau": 1, "stream.alpha": 0.5}
LONGEST = {"run.inner_steps_total": 10_000, "schedule.warmup": 500, "stream.H": 1}
MUON = {"optim.kind": "muon"}
MUON_LR: Axes = (("optim.lr", (0.008, 0.004, 0.016)),)
OUTER_RULES: tuple[tuple[str, str, Settings], ...] = (
    ("demo", "Nesterov 0.8/0.4, the demo's", {"outer.lr": 0.8, "outer.momentum": 0.4}),
    ("default", "Nesterov 0.4/0.9 in whole rounds", {"outer.lr": 0.4, "outer.momentum": 0.9}),
    (
        "warm",
        "momentum warm-up: lr 0.75, mu = min(0.9, n/(n+50))",
        {"bench.outer": "warm", "bench.every": 50.0, "outer.lr": 0.75, "outer.momentum": 0.9},
    ),
    (
        "gain",
        "constant gain: mu as above, lr = min(1, 1.25 (1-mu))",
        {"bench.outer": "gain", "bench.every": 50.0, "outer.lr": 1.25, "outer.momentum": 0.9},
    ),
    ("mean", "plain averaging (SGD, lr 1)", {"outer.kind": "sgd", "outer.lr": 1.0, "outer.momentum": 0.0}),
    ("published", "Nesterov 0.7/0.9, as published", {"outer.lr": 0.7, "outer.momentum": 0.9}),
    (
        "streamdemo",
        "0.8/0.4, streaming, tau 1, alpha 0.5",
        {**OVERLAPPED, "outer.lr": 0.8, "outer.momentum": 0.4},
    ),
    (
        "streamdefault",
        "0.4/0.9, streaming, tau 1, alpha 0.5: the whole default",
        {**OVERLAPPED, "outer.lr": 0.4, "outer.momentum": 0.9},
    ),
)
CLEAR = ("warm", "published")  # far off with the first seed, so no others
ROUNDS = {20: 50, 1: 1000, 10: 100, 4: 250}


TOPK: Axes = (("outer.lr", (1.3, 1.0, 0.65, 1.7, 2.4, 3.4)),)
EAGER: Axes = (("outer.lr", (0.75, 0.5, 1.0)), ("outer.momentum", (0.4, 0.1, 0.7)))
DELAYED: Axes = (("outer.lr", (0.4, 0.2, 0.75, 1.0, 1.3)), ("outer.momentum", (0.1, 0.0, 0.4)))


def codec(name: str, ef: bool) -> Entry:
    over: Settings = {"codec.up": name, "codec.ef": "on" if ef else "off"}
    if name == "nf4":
        over |= {"codec.block": 64}
    if name == "stat2":
        over |= {"codec.up": "stat", "codec.bits": 2}
    label = {"stat2": "2-bit stat"}.get(name, name) + (" + EF" if ef else "")
    return Entry(f"c-{name}{'-ef' if ef else ''}", label, over, ("h10",))


def comparisons() -> list[tuple[Entry, tuple[int, ...]]]:
    first = SEEDS[:1]
    none = Entry("none", "no communication", {"bench.way": "alone"}, axes=INNER)
    parallel = Entry("parallel", "data parallel", {"bench.way": "data parallel"}, axes=INNER)
    h10 = Entry("h10", "DiLoCo, H 10, fp32", {}, ("parallel",), OUTER)
    flat: Settings = {"codec.up": "topk", "codec.ef": "on", "outer.kind": "sgd", "outer.momentum": 0.0}
    tiles: Settings = {**flat, "codec.groups": "tensor"}
    topk = Entry("c-topk-ef", "top-k 1.6 % of flat chunks + EF", flat, ("h10",), TOPK)
    topk_tiles = Entry("c-topk-tiles-ef", "top-k 1.6 % of tiles + EF", tiles, ("h10",), TOPK)
    tables: Settings = {"codec.up": "stat", "codec.bits": 2, "codec.groups": "tensor", "codec.ef": "off"}
    stat_tensor = Entry("c-stat2-tensor", "2-bit stat per tensor", tables, ("h10",))
    codecs = [codec(name, False) for name in CODECS]
    with_ef = [codec(name, True) for name in CODECS]
    ends = {"none": "none-long", "parallel": "parallel-long"}
    none_long = replace(none, name="none-long", over={**none.over, **LONG}, like=("none",), axes=(), **ends)
    parallel_long = replace(
        parallel, name="parallel-long", over={**parallel.over, **LONG}, like=("parallel",), axes=(), **ends
    )

    def lengths(start: str, axes: Axes) -> list[Entry]:
        return [
            Entry(
                f"{start}{h}",
                f"H {h}, {3000 // h} rounds" + (", outer settings of its own" if axes else ""),
                {**LONG, "stream.H": h},
                ("h10",),
                axes,
                none="none-long",
                parallel="parallel-long",
            )
            for h in (30, 5, 100, 10)
        ]

    short = [
        Entry(f"a-short-h{h}", f"H {h}, {1000 // h} rounds, 1000 steps", {"stream.H": h}, ("h10",))
        for h in (30, 5, 100)
    ]
    by_h, by_h_tuned = lengths("a-h", ()), lengths("a-tuned-h", OUTER)
    inner = {"stream.overlap": "inner", "stream.tau": 1, "stream.alpha": 0.5}
    overlaps = [
        Entry("d-inner", "inner, tau 1, alpha 0.5", inner, ("h10",)),
        Entry("d-eager", "eager", {"stream.overlap": "eager"}, ("h10",), EAGER),
        Entry("d-delayed", "delayed", {"stream.overlap": "delayed"}, ("h10",), DELAYED),
    ]
    streams = [
        Entry(
            f"b-tau{tau}-alpha{alpha:g}",
            f"streaming, tau {tau}, alpha {alpha:g}",
            {**STREAM, "stream.tau": tau, "stream.alpha": alpha},
            ("h10",),
        )
        for tau, alpha in ((0, 0.0), (1, 0.5), (1, 0.0), (5, 0.5), (5, 0.0), (2, 0.5), (2, 0.0), (0, 0.5))
    ]
    rules = [
        Entry(f"f-{name}-h{h}", f"{label}; {rounds} rounds", {**over, "stream.H": h}, ("h10",))
        for h, rounds in ROUNDS.items()
        for name, label, over in OUTER_RULES
        if h > over.get("stream.tau", 0)
    ]
    longest = [
        Entry(f"f-{name}-10k", f"{label}; 10,000 rounds", {**over, **LONGEST}, ("h10",))
        for name, label, over in OUTER_RULES
        if name in ("demo", "default")
    ]
    gpa = Entry(
        "f-gpa",
        "GPA, tuned; 100 rounds",
        {"outer.kind": "gpa", "outer.gpa_mu_y": 0.9},
        ("h10",),
        (("outer.gpa_mu_x", (0.4, 0.1, 0.7)), ("outer.gpa_lr", (1.25, 0.9, 1.8))),
    )

    def on_muon(name: str, label: str, over: Settings, like: tuple[str, ...], axes: Axes) -> Entry:
        return Entry(name, f"Muon, {label}", {**MUON, **over}, like, axes, "none-muon", "parallel-muon")

    muon = [
        on_muon("none-muon", "no communication", none.over, (), MUON_LR),
        on_muon("parallel-muon", "data parallel", parallel.over, (), MUON_LR),
        on_muon("e-fp32", "DiLoCo, fp32", {}, (), (*MUON_LR, *OUTER)),
        on_muon("e-e3m0", "DiLoCo, e3m0", {"codec.up": "e3m0"}, ("e-fp32",), ()),
        on_muon("e-int4", "DiLoCo, int4", {"codec.up": "int4"}, ("e-fp32",), ()),
    ]
    four = {"topology.workers": 4, "fault.quorum": 4, **LONG}

    def on_four(name: str, label: str, over: Settings, like: str) -> Entry:
        return Entry(name, label, {**over, **four}, (like,), (), "none-four", "parallel-four")

    fours = [
        on_four("none-four", "no communication", none.over, "none"),
        on_four("parallel-four", "data parallel", parallel.over, "parallel"),
        *(
            on_four(f"a-four-h{h}", f"H {h}, {3000 // h} rounds", {"stream.H": h}, "h10")
            for h in (30, 5, 100, 10)
        ),
    ]
    return [
        *((e, SEEDS) for e in (none, parallel, h10)),
        *((e, first) for e in (*codecs[:2], with_ef[1], *codecs[2:4], topk)),
        *((e, first) for e in short),
        *((e, SEEDS) for e in (*codecs[:2], with_ef[1], *codecs[2:4], topk, *short)),
        *((e, first) for e in (none_long, parallel_long, *by_h)),
        *((e, first) for e in (*overlaps, *codecs[4:], topk_tiles, stat_tensor, *streams)),
        *((e, first) for e in rules if e.name.endswith(("h20", "h1"))),
        *((e, SEEDS) for e in (*overlaps, *codecs[4:], topk_tiles, stat_tensor)),
        *((e, SEEDS) for e in (none_long, parallel_long, *by_h)),
        *((e, first) for e in (*rules, gpa)),
        *((e, SEEDS) for e in (*with_ef[:1], *with_ef[2:])),
        *((e, first) for e in muon),
        *((e, SEEDS) for e in (*streams, *muon)),
        *((e, first) for e in fours),
        *((e, SEEDS) for e in (*(e for e in rules if e.name.split("-")[1] not in CLEAR), gpa)),
        *((e, SEEDS) for e in fours),
        *((e, first) for e in longest),
        *((e, SEEDS) for e in by_h_tuned),
    ]


SMALLEST: Settings = {
    "run.inner_steps_total": 4,
    "schedule.warmup": 1,
    "model.preset": "nano",
    "model.sequence_length": 16,
    "train.eval_batches": 1,
    "stream.H": 2,
    "data.source": __file__,  # small and there
}


def smallest() -> Plan:
    """Every kind of run once, in a second or two: that the benchmark still works, no more."""
    keep = ("none", "parallel", "h10", "c-stat2", "f-warm-h10")
    small: Axes = (("optim.lr", (0.001,)), ("outer.lr", (0.75, 0.5)), ("outer.momentum", (0.4,)))
    order: list[tuple[Entry, tuple[int, ...]]] = []
    for entry, _ in comparisons():
        if entry.name in keep and all(entry.name != e.name for e, _ in order):
            axes = tuple(a for a in small if a[0] in dict(entry.axes))
            over = {k: v for k, v in entry.over.items() if k != "stream.H"}
            order.append((Entry(entry.name, entry.label, over, entry.like, axes), SEEDS[:2]))
    return Plan({**BASE, **SMALLEST}, order)


def full() -> Plan:
    return Plan(BASE, comparisons())
