"""The training loop of `diloco worker`: from admission to farewell, with evaluation and checkpoints.

An inner step is in `inner`, what happens after `optimizer.step()` in `session`; this file knows nothing of fragments
or messages. Training on one node, without a coordinator, is in `train`.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diloco.comms.machine import Connection
from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.optim.build import check_composition
from diloco.stream_checks import plan_warnings
from diloco.worker import checkpoint, drawing
from diloco.worker.inner import InnerLoop, finite, make_model, make_optimizer
from diloco.worker.prediction import predict, sentence
from diloco.worker.session import DiLoCo, Interrupted

__all__ = ["Trainer", "make_model", "make_optimizer"]


class Trainer:
    """One worker's run from admission to farewell. `run` returns the final held-out loss, or None if interrupted."""

    def __init__(
        self,
        config: RunConfig,
        connection: Connection,
        *,
        name: str,
        run_dir: Path,
        stop: threading.Event,
        say: Callable[[str], None],
    ) -> None:
        if config.train.outer != "none":
            raise ConfigError(
                f"train.outer = {config.train.outer!r} is for `diloco train`: a worker's outer optimizer is [outer]"
            )
        check_composition(config.optim.kind, "diloco")
        self.config, self.name, self.stop, self.say = config, name, stop, say
        self.inner = InnerLoop(config, say)
        self.folder = run_dir / "workers" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.eval_start = math.nan
        self.optimizer = DiLoCo(
            self.inner.model,
            make_optimizer(config, self.inner.model),
            connection,
            config=config,
            worker=name,
            tokens=config.train.batch_size * config.train.grad_accum * config.model.sequence_length,
            join=False,
            on_wait=say,
            stop=stop,
        )
        for text in plan_warnings(config, len(self.optimizer.parameters.plan.fragments)):
            say(f"warning: {text}")
        self.inner.attach(self.optimizer)
        if config.data.mode != "static":
            self.inner.read(0, 1)
            drawing.attach(self.optimizer, self.inner)

    # ---- the run ----

    def run(self) -> float | None:
        try:
            return self._run()
        except Interrupted:
            self._interrupted()
            return None

    def _run(self) -> float | None:
        resumed = self._load()
        self.optimizer.join()
        say_from = "resumed" if resumed else "started"
        self.say(
            f"{say_from} at inner step {self.optimizer.inner_step} as member {self.optimizer.replica.index}"
        )
        if self.config.data.mode == "static":
            shards = self.config.data.shards or self.config.topology.workers
            self.inner.read(self.optimizer.replica.index, shards)
        if self.config.weights.mode == "shard":
            self.optimizer.replica.shard = self.inner.shard_tokens
        if not resumed:
            self.eval_start = self.inner.evaluate()
            self.optimizer.report(eval_start=self.eval_start)
        total, every = self.config.run.inner_steps_total, self.config.train
        with (self.folder / "steps.jsonl").open("a", encoding="utf-8") as log:
            while self.optimizer.inner_step < total:
                if self.stop.is_set():
                    self._interrupted()
                    return None
                before = self.optimizer.inner_step
                try:
                    loss = self._step()
                except drawing.RunOver:
                    break
                step = self.optimizer.inner_step  # under weights.dylu a step may be several of the run's
                log.write(json.dumps({"step": step, "loss": finite(loss), "t": round(time.time(), 3)}) + "\n")
                if _passed(every.eval_every, before, step) and step < total:
                    with self.optimizer.global_parameters():
                        log.write(json.dumps({"step": step, "eval": self.inner.evaluate()}) + "\n")
                if _passed(every.checkpoint_every, before, step):
                    self.save()
        self.optimizer.flush()
        final = self.inner.evaluate()
        self.optimizer.report(eval_end=final)
        self._compare()
        self.save()
        self.optimizer.close("complete")
        return final

    def _compare(self) -> None:
        """Log what the model of the link predicts for this worker, beside what it measured."""
        workers = max(1, self.optimizer.replica.members)
        plan, facts = self.optimizer.parameters.plan, self.optimizer.facts()
        found = predict(self.config, plan, [facts], workers=workers)
        if found is not None:
            self.say(sentence(found))

    def _interrupted(self) -> None:
        if self.optimizer.replica.joined:
            self.save()
        self.optimizer.report()
        self.optimizer.close("interrupted")

    def _step(self) -> float:
        """One inner step; a step whose loss or gradient is not finite changes nothing but the step count."""
        loss = self.inner.step(
            self.optimizer.inner_step,
            lambda _: self.optimizer.step(),
            # Without gradients the inner optimizer leaves every parameter alone.
            lambda: self.optimizer.step(tokens=0),
        )
        self.optimizer.report(loss=loss, lr=self.inner.lr)
        return loss

    # ---- checkpoint ----

    def save(self) -> None:
        saved = self.optimizer.state_dict()
        inner, inner_meta = checkpoint.flatten_optimizer(saved["inner"])
        tensors = checkpoint.pack(
            {
                "model": dict(self.optimizer.parameters.tensors),
                "inner": inner,
                "replica": saved["replica"]["tensors"],
                "rng": {"torch": torch.get_rng_state()},
            }
        )
        meta = {
            "inner": inner_meta,
            "replica": saved["replica"]["meta"],
            "position": self.inner.position,
            "eval_start": finite(self.eval_start),
            "plan": self.optimizer.parameters.plan.digest(),
        }
        checkpoint.save(self.folder / "checkpoint", self.optimizer.inner_step, tensors, meta)

    def _load(self) -> bool:
        found = checkpoint.load(self.folder / "checkpoint")
        if found is None or found[1]["plan"] != self.optimizer.parameters.plan.digest():
            return False
        tensors, meta = found
        with torch.no_grad():
            for name, value in checkpoint.unpack(tensors, "model").items():
                self.optimizer.parameters.tensors[name].copy_(value)
        replica: dict[str, Any] = {"meta": meta["replica"], "tensors": checkpoint.unpack(tensors, "replica")}
        inner = checkpoint.unflatten_optimizer(checkpoint.unpack(tensors, "inner"), meta["inner"])
        self.optimizer.load_state_dict({"inner": inner, "replica": replica})
        self.inner.position = int(meta["position"])
        self.eval_start = math.nan if meta["eval_start"] is None else float(meta["eval_start"])
        self.optimizer.report(eval_start=self.eval_start)
        torch.set_rng_state(tensors["rng/torch"])
        return True


def _passed(every: int, before: int, step: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]; never for 0."""
    return bool(every) and step // every > before // every
