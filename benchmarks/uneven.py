"""Workers of unequal speed: what does it cost to wait for everybody, and what to let each do as much as it can?

Four workers with the speeds 1, 1, 0.6 and 0.25, as real processes with a coordinator. Their steps are real but last a set
time (`wire_model.py`), so that this machine's cores do not decide; there is no slow link. Same model, data, inner and
outer optimizer everywhere, fp32 both ways.

    wait     everybody makes H steps a round and waits for everybody
    dylu     `weights.dylu`: each makes as many steps as its speed allows in the same time, and counts by its tokens
    async    every arrival is an outer step of its own (`stream.overlap = "async"`, Delayed Nesterov), with dylu
    quorum   a round waits for two, and three quarters of a fast worker's round for the others (`fault.quorum`,
             `fault.fixed_grace_s`): the third is in time, the fourth is left out of two rounds of three. Over when the
             first three are: the slowest still has most of its steps to go, which by then count for nobody else

All train on the same number of tokens: a method whose rounds have fewer makes more of them, so schedules are longer in
steps and equal in tokens. `committed` are the tokens of contributions that counted, as the coordinator tells them.

    wall s     from the first worker's first step to the last's last, start and final evaluation not included
    faster     wall time of `wait` by this, of the same seed; the median over seeds
    loss       held-out, of the run's final value; of `async`, where workers end apart, the mean over workers
    against    loss by that of `wait` with the same seed; median and worst

    python benchmarks/uneven.py                     three seeds, about 15 minutes
    python benchmarks/uneven.py --seeds 0 --ways wait dylu
    python benchmarks/uneven.py --smallest          does it still work?
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import RESULTS, machine, save
from wire_cells import CellError, Children
from wire_plan import LENGTH, as_toml

Row = dict[str, Any]

SPEEDS = (1.0, 1.0, 0.6, 0.25)
STEP_S = 0.15  # of the fastest
STEPS = 200  # of each worker when everybody is waited for
H, TAU, BATCH = 20, 4, 4
GOAL_FASTER, GOAL_LOSS = 1.5, 0.01
WAYS = ("wait", "dylu", "async", "quorum")
QUORUM = 2  # the workers of speed 1
GRACE = 0.75  # of a fast worker's round: whoever has a speed of 1 / (1 + GRACE) or more is in time
EVAL_BATCHES = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--step-s", type=float, default=STEP_S)
    parser.add_argument("--set", nargs="+", default=[], metavar="WAY:KEY=VALUE", help="a setting of one way")
    parser.add_argument("--smallest", action="store_true", help="two workers, a few steps of dylu")
    parser.add_argument("--out", type=Path, default=RESULTS / "uneven.json")
    a = parser.parse_args()
    if a.smallest:
        a.seeds, a.ways, a.steps, a.step_s = [0], ["dylu"], H, 0.0
    speeds = (1.0, 0.5) if a.smallest else SPEEDS
    before, runs = machine(), []
    for seed in a.seeds:
        for way in a.ways:
            changed = [text.partition(":")[2] for text in a.set if text.startswith(f"{way}:")]
            runs.append(measure(way, seed, a.steps, a.step_s, speeds, changed))
            r = runs[-1]
            print(
                f"{way}, seed {seed}: {r['wall_s']:.1f} s, loss {r['loss']:.4f}, {r['committed']:,.0f} tokens, "
                f"ms a step {', '.join(f'{1e3 * s:.0f}' for s in r['step_s'])}",
                flush=True,
            )
        # A stopped command leaves the seeds that are done.
        settings = {"speeds": speeds, "step_s": a.step_s, "steps": a.steps, "H": H, "tau": TAU, "set": a.set}
        save(a.out, {"machine": before, "settings": settings, "rows": table(runs), "runs": runs})
    show(table(runs))


def in_time(speeds: Sequence[float]) -> int:
    """How many workers, the first ones, are awaited by every round under a quorum."""
    return sum(speed >= 1 / (1 + GRACE) for speed in speeds)


def longer(way: str, speeds: Sequence[float]) -> float:
    """Steps of the run by those of `wait`, for as many tokens that count."""
    late = len(speeds) - in_time(speeds)  # each of them is in one round of three
    shares = {"wait": float(len(speeds)), "quorum": in_time(speeds) + late / 3}
    return len(speeds) / shares.get(way, sum(speeds))


def config_of(
    way: str, seed: int, steps: int, step_s: float, speeds: Sequence[float]
) -> dict[str, dict[str, Any]]:
    total = round(steps * longer(way, speeds) / H) * H
    raw: dict[str, dict[str, Any]] = {
        "run": {"run_id": "uneven", "seed": seed, "inner_steps_total": total},
        "model": {"factory": "wire_model:make", "sequence_length": LENGTH},
        "data": {"source": "stdlib"},
        "train": {"batch_size": BATCH, "threads": 1, "eval_batches": EVAL_BATCHES},
        "optim": {"lr": 0.003},
        "schedule": {"kind": "cosine", "warmup": total // 20},
        "outer": {"kind": "nesterov", "lr": 0.8, "momentum": 0.4},
        "stream": {"H": H, "layout": "balanced", "frag_layers": 1, "overlap": "delay_corrected", "tau": TAU},
        "codec": {"up": "fp32", "down": "g_fp32"},
        "topology": {"workers": len(speeds)},
        # A slow worker is not a lost one.
        "fault": {"suspect_s": 60.0, "dead_s": 300.0, "fixed_grace_s": 300.0},
    }
    match way:
        case "dylu":
            raw["weights"] = {"dylu": True, "mode": "tokens"}
        case "async":
            raw["stream"] |= {"overlap": "async", "tau": 0}
            raw["weights"] = {"dylu": True, "dn_N": len(speeds)}
            raw["fault"]["s_max"] = 4 * len(speeds)
        case "quorum":
            # Two who wait for different fragments would wait for one another until a round is given up.
            patience_s = max(1.0, 2 * H * step_s / min(speeds))
            raw["fault"] |= {
                "quorum": QUORUM,
                "fixed_grace_s": GRACE * H * step_s,
                "round_timeout_s": patience_s,
            }
    return raw


def measure(
    way: str, seed: int, steps: int, step_s: float, speeds: Sequence[float], changed: Sequence[str]
) -> Row:
    raw = config_of(way, seed, steps, step_s, speeds)
    longest = raw["run"]["inner_steps_total"] * step_s / min(speeds)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "run.toml").write_text(as_toml(raw))
        every = [f"--{text}" for text in changed]
        lead = stack.enter_context(Children(folder, 0.0, 240 + 2 * longest))
        lead.start(
            "coordinator", "-m", "diloco", "coordinator", "run.toml", "--listen", "127.0.0.1:0", *every
        )
        log = lead.log("coordinator")
        port = lead.until(
            "the coordinator's port", lambda: re.search(r"listening on port (\d+)", log.read_text())
        )
        workers = []
        for i, speed in enumerate(speeds):
            one = stack.enter_context(Children(folder, step_s / speed, 240 + 2 * longest))
            at = ("--coordinator", f"127.0.0.1:{port[1]}", "--id", f"w{i}")
            one.start(f"w{i}", "-m", "diloco", "worker", "run.toml", *at, *every)
            workers.append(one)
        awaited = workers[: in_time(speeds)] if way == "quorum" else [*workers, lead]
        lead.until("the end of the run", lambda: _over(awaited, [*workers, lead]))
        run = folder / "runs" / "uneven"
        logs = [(run / "workers" / f"w{i}" / "steps.jsonl").read_text() for i in range(len(speeds))]
        series = [json.loads(text) for text in (run / "progress.jsonl").read_text().splitlines()]
        journal = (run / "journal" / "journal.jsonl").read_text().splitlines()
    commits = [r for r in map(json.loads, journal) if r["type"] == "commit"]
    times = [[json.loads(text)["t"] for text in one.splitlines() if '"loss"' in text] for one in logs]
    counted = range(in_time(speeds)) if way == "quorum" else range(len(speeds))
    last = [[s for s in series if s["worker"] == f"w{i}"][-1] for i in range(len(speeds))]
    return {
        "way": way,
        "seed": seed,
        "steps": raw["run"]["inner_steps_total"],
        "own_steps": [s["tokens"] // (BATCH * LENGTH) for s in last],
        "step_s": [1 / s["steps_per_s"] if s["steps_per_s"] else 0.0 for s in last],
        "tokens": sum(s["tokens"] for s in last),
        "committed": sum(sum(c["tokens"]) for c in commits) / len({c["fragment"] for c in commits}),
        "wall_s": max(times[i][-1] for i in counted) - min(t[0] for t in times if t) + step_s,
        "loss": statistics.fmean(last[i]["eval_end"] for i in counted),
        "losses": [last[i]["eval_end"] for i in counted],
    }


def _over(awaited: Sequence[Children], everybody: Sequence[Children]) -> bool:
    for one in everybody:
        for name, process in one.running:
            if process.poll() not in (None, 0):
                raise CellError(f"{name} failed:\n{one.log(name).read_text()[-3000:]}")
    return all(one.ended() for one in awaited)


def table(runs: Sequence[Row]) -> list[Row]:
    """One row for each way: medians over its seeds."""
    base = {r["seed"]: r for r in runs if r["way"] == "wait"}
    rows = []
    for way in dict.fromkeys(r["way"] for r in runs):
        mine = [r for r in runs if r["way"] == way]
        row: Row = {"way": way, "seeds": len(mine)}
        for key in ("steps", "tokens", "committed", "wall_s", "loss"):
            row[key] = statistics.median(r[key] for r in mine)
        if all(r["seed"] in base for r in mine):
            row["faster"] = statistics.median(base[r["seed"]]["wall_s"] / r["wall_s"] for r in mine)
            against = [r["loss"] / base[r["seed"]]["loss"] - 1 for r in mine]
            row |= {"against": statistics.median(against), "worst": max(against)}
            if way != "wait":
                row["met"] = row["faster"] >= GOAL_FASTER and row["against"] <= GOAL_LOSS
        rows.append(row)
    return rows


def show(rows: Sequence[Row]) -> None:
    print(
        f"\n{'way':8s} {'steps':>6s} {'tokens':>10s} {'committed':>10s} {'wall s':>7s} {'faster':>6s} {'loss':>7s} "
        f"{'against':>8s} {'worst':>7s} {'seeds':>5s} {'goal':>5s}"
    )
    for r in rows:
        compared = "faster" in r
        faster = f"{r['faster']:.2f}x" if compared else ""
        against, worst = (f"{r[k]:+.2%}" if compared else "" for k in ("against", "worst"))
        met = ("yes" if r["met"] else "NO") if "met" in r else ""
        print(
            f"{r['way']:8s} {r['steps']:6.0f} {r['tokens']:10,.0f} {r['committed']:10,.0f} {r['wall_s']:7.1f} "
            f"{faster:>6s} {r['loss']:7.4f} {against:>8s} {worst:>7s} {r['seeds']:5d} {met:>5s}"
        )


if __name__ == "__main__":
    main()
