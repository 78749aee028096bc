"""`diloco train`: one node, one process or several under torchrun, without a coordinator.

Here: the run from the first step to the report, its outer optimizer (SNOO, GPA, an average, or none), and checkpoints
that continue bit for bit. An inner step is in `inner`, the job's processes in `ranks`, the files in `local_files`.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diloco.comms import frame
from diloco.comms.messages import Progress
from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.optim import GPA, SNOO, AnytimeAverage, Master, build_optimizer
from diloco.worker.inner import InnerLoop, finite
from diloco.worker.local_files import Log, RunFiles
from diloco.worker.ranks import Ranks

LINE_S = 5.0  # between lines on the terminal


class LocalTrainer:
    """One run on this node. `run` returns the final held-out loss, or None if `stop` was set before the end.

    With `ranks` of several processes each reads its own shard, so that the batch is `ranks.world` times as large;
    gradients are averaged, everything after that is the same on every rank bit for bit, and rank 0 writes.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        run_dir: Path,
        resume: bool,
        stop: threading.Event,
        say: Callable[[str], None],
        ranks: Ranks | None = None,
    ) -> None:
        """Raises ConfigError for a folder that holds a run without `resume`, or one that cannot be continued."""
        if config.data.mode != "static":
            raise ConfigError(
                f"data.mode = {config.data.mode!r} needs a coordinator, which `diloco train` has not: use 'static'"
            )
        self.config, self.stop = config, stop
        self.ranks = ranks or Ranks()
        self.say = say if self.ranks.first else lambda text: None
        self.files = RunFiles(run_dir, config, self.ranks.world, resume=resume)
        self.inner = InnerLoop(config, self.say, gpu=self.ranks.gpu)
        self.ranks.connect(self.inner.device)
        self.optimizer = build_optimizer(self.inner.model, config, wrap=self._wrap)
        self.inner.attach(self.optimizer)
        self.inner.read(self.ranks.rank, config.data.shards or self.ranks.world)
        self.inner.agree = self._agree
        if self.ranks.world > 1:
            averaging = self.ranks.averaging(self.inner.loss)
            self.inner.use(averaging)
            self.inner.quiet = averaging.no_sync
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        torch.manual_seed(config.run.seed + self.ranks.rank)  # for models with dropout
        self.facts_now = Progress()
        self.applied = 0  # inner steps that were not skipped
        self.seconds_before = 0.0
        self._tokens_before = 0
        self.finished = False
        self._begun = time.monotonic()
        self._stopping = False

    def _wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        c = self.config
        match c.train.outer:
            case "snoo":
                s = c.snoo
                return SNOO(optimizer, k=s.k, lr=s.lr, momentum=s.momentum, offload=s.offload)
            case "gpa":
                return GPA(optimizer, mu_x=c.gpa.mu_x, mu_y=c.gpa.mu_y)
            case "anytime":
                return AnytimeAverage(optimizer, half_life=c.anytime.half_life)
        return optimizer

    # ---- facts ----

    @property
    def step(self) -> int:
        """Inner steps made."""
        return self.facts_now.step

    @property
    def seconds(self) -> float:
        """Wall clock of the run, over all its lives."""
        return self.seconds_before + time.monotonic() - self._begun

    def facts(self) -> dict[str, Any]:
        """A heartbeat's fields, for metrics: this rank's steps and tokens, losses of all."""
        return {"worker": f"rank{self.ranks.rank}", **dataclasses.asdict(self.facts_now)}

    def _update(self, **facts: Any) -> None:
        self.facts_now = dataclasses.replace(self.facts_now, **facts)

    # ---- the run ----

    def run(self) -> float | None:
        resumed = self._load()
        c, total = self.config, self.config.run.inner_steps_total
        size = sum(p.numel() for p in self.inner.parameters)
        ranks = f", {self.ranks.world} processes" if self.ranks.world > 1 else ""
        outer = "" if c.train.outer == "none" else f" in {c.train.outer}"
        self.say(
            f"run {c.run.run_id}: {size:,} parameters on {self.inner.device}{ranks}, {c.optim.kind}{outer}, "
            + (f"resumed at step {self.step}" if resumed else "new")
        )
        if not resumed:
            self._update(eval_start=self._evaluate())
        with self.files.log() if self.ranks.first else Log() as log:
            while self.step < total:
                if self._stopping:
                    self._save()
                    return None
                self._inner_step()
                log.step(self.facts(), self.seconds)
                if log.line_due(LINE_S) or self.step == total:
                    f = self.facts_now
                    self.say(
                        f"step {f.step}/{total}  loss {f.loss:.4f}  {f.tokens_per_s * self.ranks.world:,.0f} tokens/s"
                    )
                every = c.train.eval_every
                if every and self.step % every == 0 and self.step < total:
                    loss = self._evaluate()
                    log.evaluation(self.step, loss)
                    self.say(f"step {self.step}/{total}  held-out loss {loss:.4f} nats/byte")
                every = c.train.checkpoint_every
                if every and self.step % every == 0 and self.step < total:
                    self._save()
            return self._finish(log)

    def _inner_step(self) -> None:
        begun, before = time.monotonic(), self.applied
        # A step that is skipped is no step of any optimizer, the outer one included.
        loss = self.inner.step(self.step, self._advance, lambda: None)
        t, f = self.config.train, self.facts_now
        size = t.batch_size * t.grad_accum * self.config.model.sequence_length
        tokens = f.tokens + size * (self.applied - before)
        compute = f.compute_s + time.monotonic() - begun
        self.facts_now = dataclasses.replace(
            f,
            step=f.step + 1,
            tokens=tokens,
            loss=loss,
            lr=self.inner.lr,
            compute_s=compute,
            tokens_per_s=(tokens - self._tokens_before) / compute if compute else 0.0,
        )

    def _advance(self, loss: float) -> None:
        if getattr(self.optimizer, "needs_loss", False):
            self.optimizer.step(loss=loss)  # type: ignore[call-overload]
        else:
            self.optimizer.step()
        self.applied += 1

    def _agree(self, loss: float) -> float:
        """The mean loss of all ranks; on the way they agree on whether to stop after this step."""
        total, stopping = self.ranks.sum(loss, float(self.stop.is_set()))
        self._stopping = stopping > 0
        return total / self.ranks.world

    def _finish(self, log: Log) -> float:
        close_round = getattr(self.optimizer, "outer_step", None)
        if close_round is not None and not self.finished and self.applied % self.config.snoo.k:
            close_round()  # what was learnt since the last outer step counts too
        self.finished = True
        self._save()
        with self.evaluation_point():
            final = self._held_out()
            digest = self.digest()
            digests = self.ranks.gather(torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8))
            self._update(eval_end=final)
            if self.ranks.first:
                self.files.export(self.inner.model, digest)
        log.step(self.facts(), self.seconds, force=True)
        if self.ranks.first:
            hexes = [bytes(row.tolist()).hex() for row in digests]
            self.files.report(self.facts(), hexes, self.seconds)
        return final

    # ---- evaluation ----

    @contextmanager
    def evaluation_point(self) -> Iterator[None]:
        """Inside, the model holds the weights to evaluate; afterwards the same bits as before.

        Going back from an average is exact only up to rounding, and evaluating must not change the run. Not under
        `Master`, where the parameters are only a part of the weights.
        """
        optimizer: Any = self.optimizer
        if not hasattr(optimizer, "eval"):
            yield
            return
        parameters: list[Tensor] = list(self.inner.parameters)
        kept = [] if isinstance(optimizer, Master) else [p.detach().clone() for p in parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            if kept:
                with torch.no_grad():
                    torch._foreach_copy_(parameters, kept)

    def _evaluate(self) -> float:
        """Held-out loss at the point of evaluation, nats per byte; every rank scores a part of the windows."""
        with self.evaluation_point():
            return self._held_out()

    def _held_out(self) -> float:
        return self.ranks.sum(self.inner.evaluate((self.ranks.rank, self.ranks.world)))[0]

    def digest(self) -> str:
        """SHA-256 over the parameters as they are, hex."""
        return frame.model_digest(frame.digest(p.detach().float()) for p in self.inner.parameters)

    # ---- checkpoint ----

    def _save(self) -> None:
        generator = self.ranks.gather(torch.get_rng_state())
        tensors = {"rng": {"cpu": generator}}
        if self.inner.device.type == "cuda":
            tensors["rng"]["cuda"] = self.ranks.gather(torch.cuda.get_rng_state(self.inner.device))
        if not self.ranks.first:
            return
        f = self.facts_now
        meta = {
            "position": self.inner.position,
            "skipped": self.inner.skipped,
            "applied": self.applied,
            "tokens": f.tokens,
            "eval_start": finite(f.eval_start),
            "seconds": self.seconds,
            "finished": self.finished,
        }
        self.files.save(self.step, self.inner.model, self.optimizer, tensors, meta)

    def _load(self) -> bool:
        found = self.files.load(self.inner.model, self.optimizer)
        if found is None:
            return False
        step, tensors, meta = found
        start = meta["eval_start"]
        self._update(
            step=step, tokens=int(meta["tokens"]), eval_start=math.nan if start is None else float(start)
        )
        self._tokens_before = self.facts_now.tokens
        self.inner.position, self.inner.skipped = int(meta["position"]), int(meta["skipped"])
        self.applied = int(meta["applied"])
        self.seconds_before = float(meta["seconds"])
        self.finished = bool(meta["finished"]) and step >= self.config.run.inner_steps_total
        torch.set_rng_state(tensors["rng/cpu"][self.ranks.rank].clone())
        if "rng/cuda" in tensors and self.inner.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng/cuda"][self.ranks.rank].clone(), self.inner.device)
        return True
