"""One of four workers lies: which aggregation rule still ends where its three honest colleagues would have ended alone?

Each rule of `robust.kind` meets each lie in a whole run of the real workers and coordinator in one process. The reference
is the run of the three honest workers alone, on the same data with the same seed. A rule withstands a lie if its held-out
loss is within `LIMIT` of the reference. Every finished run is kept in the file of results at once, so the command can be
stopped, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diloco.comms.codec import Codec, Payload
from diloco.config import RunConfig
from diloco.coordinator.inprocess import local_hub
from diloco.errors import NonFiniteError
from diloco.worker.evaluate import evaluate
from diloco.worker.inner import InnerLoop, make_optimizer
from diloco.worker.session import DiLoCo, Interrupted

sys.path.insert(0, str(Path(__file__).parent))
from timing import RESULTS, machine

RULES = ("mean", "clip_median", "norm_outlier", "trimmed", "coord_median", "centered_clip", "cos_gate")
LIES = ("-10x", "noise", "1e6x", "nan", "zeros")
HONEST = 3  # workers; the liar comes after them and has a share of the data of its own
LIMIT = 0.03
CLEAN = "clean"

SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"inner_steps_total": 150},
    "model": {"preset": "nano", "sequence_length": 64},
    "train": {"batch_size": 2, "eval_batches": 32, "device": "cpu", "threads": 1},
    "optim": {"kind": "adamw"},
    "outer": {"lr": 0.7, "momentum": 0.5},
    "stream": {"H": 10, "layout": "single", "overlap": "none", "tau": 0, "alpha": 0.0},
    # A busy machine must not make anybody late: rounds wait for everybody who may still answer.
    "fault": {
        "quorum": HONEST,
        "heartbeat_s": 10.0,
        "suspect_s": 3600.0,
        "dead_s": 7200.0,
        "round_timeout_s": 7200.0,
    },
}  # fmt: skip


def _noise(delta: Tensor) -> Tensor:
    """Ten times as long as the update, seeded by it, so that a run is one run."""
    seed = int(delta.view(torch.int32).sum().item()) & 0xFFFFFFFF
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed))
    return noise * (10.0 * float(delta.norm()) / float(noise.norm()))


SAID: dict[str, Callable[[Tensor], Tensor]] = {
    "-10x": lambda d: d * -10.0,
    "noise": _noise,
    "1e6x": lambda d: d * 1e6,
    "zeros": torch.zeros_like,
}


class LyingCodec:
    """Encodes a lie about what it is given, and reads what others send as it is."""

    def __init__(self, inner: Codec, lie: str) -> None:
        self._inner, self._lie = inner, lie

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, delta: Tensor, key: tuple[int, ...] = ()) -> bytes:
        if self._lie == "nan":  # no codec encodes it: every scale or value is one, with all bits set
            return b"\xff" * self._inner.wire_size(delta.numel())
        return self._inner.encode(SAID[self._lie](delta), key)

    def norm(self, payload: Payload, n: int) -> float:
        return 1.0 if self._lie == "nan" else self._inner.norm(payload, n)


def run(config: RunConfig, lie: str | None) -> dict[str, Any]:
    """Train; the held-out loss of the honest workers in nats/byte (None if it diverged), and who was refused how often."""
    hub, stop = local_hub(config), threading.Event()
    found: dict[int, dict[str, Any]] = {}

    def work(i: int) -> None:
        inner = InnerLoop(config, lambda text: None)
        optimizer = DiLoCo(
            inner.model,
            make_optimizer(config, inner.model),
            hub.connect(),
            config=config,
            worker=f"w{i}",
            join=False,
            stop=stop,
        )
        if i == HONEST and lie is not None:
            lying: list[Any] = [LyingCodec(codec, lie) for codec in optimizer.replica.codecs]
            optimizer.replica.codecs = lying
        inner.attach(optimizer)
        optimizer.join()
        inner.read(i, HONEST + 1)
        while optimizer.inner_step < config.run.inner_steps_total:
            inner.step(optimizer.inner_step, lambda _: optimizer.step(), lambda: optimizer.step(tokens=0))
        optimizer.flush()
        found[i] = {"digest": optimizer.digest(), "refused": len(optimizer.replica.rejections)}
        if i == 0:
            found[i]["loss"] = evaluate(
                inner.model,
                inner.corpus,
                sequence_length=config.model.sequence_length,
                batch_size=32,
                max_batches=config.train.eval_batches,
                device="cpu",
            )
        optimizer.close("complete")

    def guarded(i: int) -> None:
        try:
            work(i)
        finally:
            if i not in found:  # the others would wait for it for ever
                stop.set()

    members = range(config.topology.workers)
    with ThreadPoolExecutor(len(members)) as pool:
        futures = [pool.submit(guarded, i) for i in members]
    hub.close()
    errors = [error for future in futures if (error := future.exception()) is not None]
    if any(isinstance(error, NonFiniteError) for error in errors):
        return {"loss": None, "refused": None}
    for error in sorted(errors, key=lambda e: isinstance(e, Interrupted)):
        raise error
    assert len({f["digest"] for f in found.values()}) == 1, "replicas differ"
    loss, liar = found[0]["loss"], found.get(HONEST, {"refused": 0})
    return {"loss": loss if math.isfinite(loss) else None, "refused": liar["refused"]}


def config_of(steps: int, rule: str, workers: int) -> RunConfig:
    sections = {
        **SETTINGS,
        "run": {"inner_steps_total": steps},
        "robust": {"kind": rule},
        "topology": {"workers": workers},
    }
    return RunConfig.from_dict(sections)


def cells(rules: tuple[str, ...], lies: tuple[str, ...]) -> list[tuple[str, str]]:
    """(rule, lie) of every run; the reference first."""
    return [("mean", CLEAN), *((rule, lie) for rule in rules for lie in lies)]


def measure(
    steps: int,
    rules: tuple[str, ...],
    lies: tuple[str, ...],
    kept: Mapping[str, Any],
    save: Callable[[Any], None],
) -> dict[str, Any]:
    """Results by "rule/lie"; those in `kept` are not run again. `save` is called after each."""
    results = dict(kept)
    for rule, lie in cells(rules, lies):
        key = f"{rule}/{lie}"
        if key in results:
            continue
        began = time.process_time()
        workers = HONEST if lie == CLEAN else HONEST + 1
        result = run(config_of(steps, rule, workers), None if lie == CLEAN else lie)
        results[key] = {**result, "seconds": round(time.process_time() - began, 1)}
        print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
        save(results)
    return results


def excess(results: Mapping[str, Any], rule: str, lie: str) -> float | None:
    """How far above (or below) the reference the loss ended, as a fraction; None: it diverged."""
    loss = results[f"{rule}/{lie}"]["loss"]
    return None if loss is None else float(loss / results[f"mean/{CLEAN}"]["loss"] - 1.0)


def withstands(results: Mapping[str, Any], rule: str, lie: str) -> bool:
    value = excess(results, rule, lie)
    return value is not None and abs(value) <= LIMIT


def table(results: Mapping[str, Any], rules: tuple[str, ...], lies: tuple[str, ...]) -> str:
    lines = [f"| `robust.kind` | {' | '.join(lies)} |", "|---" * (len(lies) + 1) + "|"]
    for rule in rules:
        row = []
        for lie in lies:
            value = excess(results, rule, lie)
            words = "diverged" if value is None else f"{100 * value:+.1f} %"
            row.append(words if withstands(results, rule, lie) else f"**{words}**")
        lines.append(f"| `{rule}` | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--steps", type=int, default=SETTINGS["run"]["inner_steps_total"], help="inner steps of a run"
    )
    parser.add_argument("--rules", default=",".join(RULES), help="some of them, with commas")
    parser.add_argument("--lies", default=",".join(LIES), help="likewise, as in --lies=-10x,nan")
    parser.add_argument("--out", type=Path, default=RESULTS / "hostile.json")
    options = parser.parse_args()
    rules, lies = tuple(options.rules.split(",")), tuple(options.lies.split(","))
    if unknown := {*rules, *lies} - {*RULES, *LIES}:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; rules are {', '.join(RULES)}, lies {', '.join(LIES)}"
        )
    torch.set_num_threads(1)
    settings = {**SETTINGS, "run": {"inner_steps_total": options.steps}}
    kept: dict[str, Any] = {}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        kept = before["results"] if before["settings"] == settings else {}

    def save(results: Mapping[str, Any]) -> None:
        whole = {"machine": machine(), "settings": settings, "limit": LIMIT, "results": results}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")

    results = measure(options.steps, rules, lies, kept, save)
    clean = results[f"mean/{CLEAN}"]["loss"]
    print(
        f"held-out loss of {HONEST} honest workers alone: {clean:.4f} nats/byte; with one liar more, against it:\n"
    )
    print(table(results, rules, lies))
    robust = [rule for rule in rules if rule != "mean"]
    failed = [f"{rule}/{lie}" for rule in robust for lie in lies if not withstands(results, rule, lie)]
    print(f"\nbeyond {LIMIT:.0%}: {', '.join(failed) or 'no robust rule'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
