"""One training run of `quality.py`: settings in, held-out loss out. What is compared with what is in `quality_plan`.

Settings are the configuration's own keys ("stream.H": 30) and a few of the benchmark's ("bench.way"), for what the
product does not offer or does not need:

    bench.way        "workers": the product's workers and coordinator, in one process; "data parallel": one process sees
                     every worker's batch in each step; "alone": one worker on its share, never talking to anybody
    bench.outer      a rule for outer lr and momentum by the number of the round, see `Scheduled`
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from diloco import outer, schedules
from diloco.config import RunConfig
from diloco.coordinator.inprocess import local_hub
from diloco.errors import NonFiniteError
from diloco.worker.evaluate import evaluate
from diloco.worker.inner import InnerLoop, make_optimizer
from diloco.worker.model import next_token_loss
from diloco.worker.sampler import Sampler, take
from diloco.worker.session import DiLoCo, Interrupted

Settings = dict[str, Any]
EVAL_BATCH = 32


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Nesterov whose outer lr and momentum depend on the number n of the round, from 0: a candidate, not the product's.

        "warm"   mu = min(momentum, n / (n + every)), lr as given: the memory 1 / (1 - mu) = 1 + n/every rounds grows
                 with the run and the gain lr / (1 - mu) with it
        "gain"   the same mu, and lr = min(1, gain * (1 - mu)): the gain of a constant gradient stays what it is

    State: ``momentum`` [n], ``round`` [1].
    """

    rule: str
    lr: float
    momentum: float
    every: float

    def init(self, params: Tensor) -> outer.State:
        return {"momentum": torch.zeros_like(params), "round": torch.zeros(1)}

    def update(self, params: Tensor, mean: Tensor, state: outer.State) -> Tensor:
        n = float(state["round"].item())
        state["round"].add_(1)
        mu = min(self.momentum, n / (n + self.every))
        lr = self.lr if self.rule == "warm" else min(1.0, self.lr * (1.0 - mu))
        buffer = state["momentum"].mul_(mu).add_(mean)
        return buffer.mul(mu).add_(mean).mul_(lr)

    def step(self, params: Tensor, mean: Tensor, state: outer.State) -> None:
        params.sub_(self.update(params, mean, state))


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    raw: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, key = name.split(".")
        if section != "bench":
            raw.setdefault(section, {})[key] = value
    return RunConfig.from_dict(raw)


@contextmanager
def candidates(settings: Mapping[str, Any]) -> Iterator[None]:
    """What the product does not offer takes the place of what it does, inside this block and for the whole process."""
    rule = settings.get("bench.outer")
    if rule is None:
        yield
        return
    chosen = Scheduled(rule, settings["outer.lr"], settings["outer.momentum"], settings["bench.every"])
    with mock.patch.object(outer, "make", lambda kind, **options: chosen):
        yield


def held_out(inner: InnerLoop) -> float:
    config = inner.config
    return evaluate(
        inner.model,
        inner.corpus,
        sequence_length=config.model.sequence_length,
        batch_size=EVAL_BATCH,
        max_batches=config.train.eval_batches,
        device="cpu",
    )


def alone(config: RunConfig, shards: range) -> dict[str, Any]:
    """Plain training, a batch of each of these workers' shares in every step."""
    inner = InnerLoop(config, lambda text: None)
    optimizer = make_optimizer(config, inner.model)
    peaks = schedules.peaks_of(optimizer.param_groups)
    length, size = config.model.sequence_length, config.train.batch_size
    train = inner.corpus.train
    samplers = [
        Sampler.for_worker(len(train), length, config.run.seed, i, config.topology.workers) for i in shards
    ]
    for step in range(config.run.inner_steps_total):
        schedules.apply(optimizer.param_groups, schedules.settings_at(config, peaks, step))
        rows = np.concatenate([sampler.batch(step * size, size) for sampler in samplers])
        loss = next_token_loss(inner.model, torch.from_numpy(take(train, rows)))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(inner.parameters, config.train.clip)
        if not math.isfinite(float(norm)):
            return {"loss": None}
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": held_out(inner)}


def together(config: RunConfig) -> dict[str, Any]:
    """The real workers and coordinator, in one process; every worker ends with the same parameters, bit for bit."""
    hub, stop = local_hub(config), threading.Event()
    members = range(config.topology.workers)
    found: dict[int, dict[str, Any]] = {}

    def work(i: int) -> None:
        connection = hub.connect()
        inner = InnerLoop(config, lambda text: None)
        optimizer = DiLoCo(
            inner.model,
            make_optimizer(config, inner.model),
            connection,
            config=config,
            worker=f"w{i}",
            tokens=config.train.batch_size * config.model.sequence_length,
            join=False,
            stop=stop,
        )
        inner.attach(optimizer)
        optimizer.join()
        inner.read(optimizer.replica.index, config.topology.workers)
        while optimizer.inner_step < config.run.inner_steps_total:
            inner.step(optimizer.inner_step, lambda _: optimizer.step(), lambda: optimizer.step(tokens=0))
        optimizer.flush()
        up, down = connection.traffic()
        rounds = sum(slot.shard.version for slot in optimizer.replica.slots if slot.shard is not None)
        facts = {"digest": optimizer.digest(), "bytes_up": up, "bytes_down": down, "rounds": rounds}
        if i == 0:
            facts["loss"] = held_out(inner)
        if i == 0 and config.outer.kind == "gpa":
            for (
                slot
            ) in optimizer.replica.slots:  # the product ships the average, not the workers' start point
                assert slot.shard is not None
                optimizer.parameters.write(slot.index, slot.shard.state["x"])
            facts["start_point_loss"], facts["loss"] = facts["loss"], held_out(inner)
        found[i] = facts
        optimizer.close("complete")

    def guarded(i: int) -> None:
        try:
            work(i)
        finally:
            if i not in found:  # the others would wait for it for ever
                stop.set()

    with ThreadPoolExecutor(len(members)) as pool:
        futures = [pool.submit(guarded, i) for i in members]
    hub.close()
    errors = [error for future in futures if (error := future.exception()) is not None]
    if any(isinstance(error, NonFiniteError) for error in errors):
        return {"loss": None}
    for error in sorted(errors, key=lambda e: isinstance(e, Interrupted)):
        raise error
    assert len({f["digest"] for f in found.values()}) == 1, "replicas differ"
    return found[0]


def train(settings: Settings) -> dict[str, Any]:
    """Run these settings; the final held-out loss in nats/byte (None if it diverged) and what it cost."""
    torch.set_num_threads(1)
    started = time.process_time()
    config = config_of(settings)
    match settings["bench.way"]:
        case "workers":
            with candidates(settings):
                result = together(config)
        case "data parallel":
            result = alone(config, range(config.topology.workers))
        case _:
            result = alone(config, range(1))
    if result["loss"] is not None and not math.isfinite(result["loss"]):
        result["loss"] = None
    return {**result, "seconds": round(time.process_time() - started, 1)}
