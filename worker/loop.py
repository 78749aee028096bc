"""The training loop of `diloco worker`: data, forward, backward, clip, inner step, evaluation, checkpoints.

What happens after `optimizer.step()` is in `session`; this file knows nothing of fragments or messages.
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
from torch import Tensor, nn

from diloco.comms.machine import Connection
from diloco.config import RunConfig
from diloco.errors import NonFiniteError
from diloco.optim import build_optimizer
from diloco.schedules import multiplier
from diloco.worker import checkpoint
from diloco.worker.data import Corpus, load_corpus
from diloco.worker.evaluate import evaluate
from diloco.worker.model import build_from_factory, build_model, next_token_loss
from diloco.worker.sampler import Sampler, take
from diloco.worker.session import DiLoCo, Interrupted

PATIENCE = 20  # consecutive steps with a non-finite loss or gradient before giving up


def make_model(config: RunConfig, vocab_size: int, device: torch.device) -> nn.Module:
    """The model of the configuration: the same weights for the same seed, everywhere."""
    if config.model.factory is not None:
        return build_from_factory(config.model.factory, config.run.seed).to(device)
    return build_model(
        config.model.preset, config.model.sequence_length, config.run.seed, vocab_size, device=device
    )


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The inner optimizer of the configuration. AdamW is torch's fused one; gains and embeddings do not decay."""
    if config.optim.kind != "adamw":
        return build_optimizer(model, config.optim)
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and "embed" not in name else plain).append(parameter)
    o = config.optim
    groups = [{"params": decay, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=o.lr, betas=o.betas, eps=o.eps, fused=True
    )


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        self.config, self.name, self.stop, self.say = config, name, stop, say
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.device = pick_device(config.train.device)
        d = config.data
        self.corpus: Corpus = load_corpus(d.source, d.format, d.tokenizer, field=d.field)
        self.model = make_model(config, self.corpus.vocab_size, self.device)
        self.forward: Callable[[Tensor], Tensor] = lambda tokens: next_token_loss(self.model, tokens)
        if config.train.compile:
            self.forward = torch.compile(self.forward)
        self.folder = run_dir / "workers" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.position = 0
        self.skipped = 0
        self.eval_start = math.nan
        self.optimizer = DiLoCo(
            self.model,
            make_optimizer(config, self.model),
            connection,
            config=config,
            worker=name,
            tokens=config.train.batch_size * config.train.grad_accum * config.model.sequence_length,
            join=False,
            on_wait=say,
            stop=stop,
        )
        self.peak_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]

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
        self.sampler = Sampler.for_worker(
            len(self.corpus.train),
            self.config.model.sequence_length,
            self.config.run.seed,
            self.optimizer.replica.index,
            self.config.data.shards or self.config.topology.workers,
        )
        if not resumed:
            self.eval_start = self.evaluate()
            self.optimizer.report(eval_start=self.eval_start)
        total, every = self.config.run.inner_steps_total, self.config.train
        with (self.folder / "steps.jsonl").open("a", encoding="utf-8") as log:
            while self.optimizer.inner_step < total:
                if self.stop.is_set():
                    self._interrupted()
                    return None
                loss = self._step()
                step = self.optimizer.inner_step
                log.write(
                    json.dumps({"step": step, "loss": _finite(loss), "t": round(time.time(), 3)}) + "\n"
                )
                if every.eval_every and step % every.eval_every == 0 and step < total:
                    with self.optimizer.global_parameters():
                        log.write(json.dumps({"step": step, "eval": self.evaluate()}) + "\n")
                if every.checkpoint_every and step % every.checkpoint_every == 0:
                    self.save()
        self.optimizer.flush()
        final = self.evaluate()
        self.optimizer.report(eval_end=final)
        self.save()
        self.optimizer.close("complete")
        return final

    def _interrupted(self) -> None:
        if self.optimizer.replica.joined:
            self.save()
        self.optimizer.report()
        self.optimizer.close("interrupted")

    def _step(self) -> float:
        """One inner step; a step whose loss or gradient is not finite changes nothing but the step count."""
        t = self.config.train
        step = self.optimizer.inner_step
        s = self.config.schedule
        factor = multiplier(
            s.kind, step, self.config.run.inner_steps_total, s.warmup, final=s.final, cooldown=s.cooldown
        )
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        total_loss = 0.0
        for _ in range(t.grad_accum):
            windows = self.sampler.batch(self.position, t.batch_size)
            self.position += t.batch_size
            tokens = torch.from_numpy(take(self.corpus.train, windows)).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=t.dtype == "bfloat16"):
                loss = self.forward(tokens)
            (loss / t.grad_accum).backward()  # type: ignore[no-untyped-call]
            total_loss += loss.item() / t.grad_accum
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, t.clip if t.clip else math.inf))
        if math.isfinite(norm) and math.isfinite(total_loss):
            self.skipped = 0
            self.optimizer.step()
        else:
            self._skip(step, total_loss, norm)
        self.optimizer.zero_grad()
        self.optimizer.report(loss=total_loss / self.corpus.bytes_per_token, lr=self.peak_lrs[0] * factor)
        return total_loss / self.corpus.bytes_per_token

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        self.say(f"inner step {step + 1}: loss {loss:g}, gradient norm {norm:g}: not finite, step skipped")
        if self.skipped >= PATIENCE:
            raise NonFiniteError(
                f"{PATIENCE} inner steps in a row gave a non-finite loss or gradient: lower optim.lr = "
                f"{self.config.optim.lr}, or set train.clip"
            )
        self.optimizer.zero_grad()  # without gradients the inner optimizer leaves every parameter alone
        self.optimizer.step(tokens=0)

    def evaluate(self) -> float:
        """Held-out loss of what the model holds now, nats per byte."""
        return evaluate(
            self.model,
            self.corpus,
            sequence_length=self.config.model.sequence_length,
            batch_size=self.config.train.batch_size,
            max_batches=self.config.train.eval_batches,
            device=self.device,
        )

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
            "position": self.position,
            "eval_start": _finite(self.eval_start),
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
        self.position = int(meta["position"])
        self.eval_start = math.nan if meta["eval_start"] is None else float(meta["eval_start"])
        self.optimizer.report(eval_start=self.eval_start)
        torch.set_rng_state(tensors["rng/torch"])
        return True


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
