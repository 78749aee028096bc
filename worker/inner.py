"""One inner step, whoever makes the outer ones: model, data, schedule, backward, clip, and what to do with NaN.

`loop` drives it in a worker of a distributed run, `train` on one node. Nothing here knows of coordinators, fragments,
checkpoints or other processes; those who do set `agree` and `quiet`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diloco.config import RunConfig
from diloco.errors import ConfigError, NonFiniteError
from diloco.optim import build_optimizer
from diloco.schedules import apply, peaks_of, settings_at
from diloco.worker.data import Corpus, load_corpus
from diloco.worker.evaluate import evaluate
from diloco.worker.model import build_from_factory, build_model, next_token_loss
from diloco.worker.sampler import Indices, Sampler, take

PATIENCE = 20  # consecutive steps with a non-finite loss or gradient before giving up


def make_model(config: RunConfig, vocab_size: int, device: torch.device) -> nn.Module:
    """The model of the configuration: the same weights for the same seed, everywhere."""
    if config.model.factory is not None:
        return build_from_factory(config.model.factory, config.run.seed).to(device)
    return build_model(
        config.model.preset, config.model.sequence_length, config.run.seed, vocab_size, device=device
    )


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The inner optimizer of the configuration's [optim] section."""
    return build_optimizer(model, config)


def pick_device(name: str, index: int | None = None) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one. `index` chooses among a machine's GPUs."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device = {name!r} is no device: use 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and device.index is None and index is not None:
        device = torch.device("cuda", index)
    return device


class NextTokenLoss(nn.Module):
    """A model as a module whose forward is the training loss, so that wrappers around it see the whole pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self.model, tokens)


class InnerLoop:
    """Model, corpus and the inner steps of one process. `attach` an optimizer and `read` a shard, then `step`.

    `position` counts the windows taken from the shard and is the whole state beside model and optimizer. `agree`
    turns this process's loss into the one that all processes of a job act on; `quiet` makes the context of every
    backward pass of an accumulated step but the last; `windows` gives the token positions of the next windows.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None], *, gpu: int | None = None) -> None:
        self.config, self.say = config, say
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.device = pick_device(config.train.device, gpu)
        d = config.data
        self.corpus: Corpus = load_corpus(d.source, d.format, d.tokenizer, field=d.field)
        self.model = make_model(config, self.corpus.vocab_size, self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.loss = NextTokenLoss(self.model)
        self.use(self.loss)
        self.agree: Callable[[float], float] = lambda loss: loss
        self.quiet: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.windows: Callable[[int], Indices] = self._in_order
        self.position = 0
        self.skipped = 0

    def use(self, loss: nn.Module) -> None:
        """Take `loss`, a `NextTokenLoss` or a wrapper of one, as what is trained."""
        self._loss: Callable[[Tensor], Tensor] = torch.compile(loss) if self.config.train.compile else loss

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Step `optimizer`, whose learning rates are now the peaks: before any state is loaded into it."""
        self.optimizer = optimizer
        self._peaks = peaks_of(optimizer.param_groups)

    def read(self, index: int, shards: int) -> None:
        """Read the data that is worker `index`'s among `shards`."""
        length, seed = self.config.model.sequence_length, self.config.run.seed
        self._sampler = Sampler.for_worker(len(self.corpus.train), length, seed, index, shards)

    def _in_order(self, count: int) -> Indices:
        self.position += count
        return self._sampler.batch(self.position - count, count)

    @property
    def shard_tokens(self) -> int:
        """Tokens of the data that this process reads, each once."""
        return self._sampler.windows_per_epoch * self._sampler.sequence_length

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, step: int, advance: Callable[[float], object], skip: Callable[[], object]) -> float:
        """Inner step number `step`, from 0; returns the training loss, nats/byte.

        With gradients in place and clipped, calls ``advance(loss)``, which is to step the optimizer (loss in
        nats/token), or ``skip()`` where loss or gradient is not finite and nothing may change. Raises NonFiniteError
        after PATIENCE such steps in a row.
        """
        apply(self.optimizer.param_groups, settings_at(self.config, self._peaks, step))
        loss = self.agree(self._backward())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip or math.inf))
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped = 0
            advance(loss)
        else:
            self._not_finite(step, loss, norm)
            self.optimizer.zero_grad()
            skip()
        self.optimizer.zero_grad()
        return loss / self.corpus.bytes_per_token

    def _backward(self) -> float:
        t = self.config.train
        total = torch.zeros((), device=self.device)
        for part in range(t.grad_accum):
            tokens = torch.from_numpy(take(self.corpus.train, self.windows(t.batch_size))).to(self.device)
            with self.quiet() if part + 1 < t.grad_accum else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=t.dtype == "bfloat16"):
                    loss = self._loss(tokens)
                (loss / t.grad_accum).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / t.grad_accum
        return float(total)  # the GPU is waited for once a step

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        self.say(f"inner step {step + 1}: loss {loss:g}, gradient norm {norm:g}: not finite, step skipped")
        if self.skipped >= PATIENCE:
            raise NonFiniteError(
                f"{PATIENCE} inner steps in a row gave a non-finite loss or gradient: lower optim.lr = "
                f"{self.config.optim.lr}, or set train.clip"
            )

    def evaluate(self, share: tuple[int, int] = (0, 1)) -> float:
        """Held-out loss of what the model holds now, nats per byte; `share` as in `evaluate.evaluate`."""
        return evaluate(
            self.model,
            self.corpus,
            sequence_length=self.config.model.sequence_length,
            batch_size=self.config.train.batch_size,
            max_batches=self.config.train.eval_batches,
            device=self.device,
            share=share,
        )


def finite(value: float) -> float | None:
    """`value` for JSON, which has no NaN."""
    return value if math.isfinite(value) else None
