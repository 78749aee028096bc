"""Training data by lease: blocks are taken from what the coordinator leased, and become windows of tokens.

For ``data.mode = "leased"`` and ``"deficit"``. `lease` and `draw` are for any training loop around `DiLoCo`; `attach` puts
them into an `InnerLoop`. The bookkeeping is in `diloco.worker.leasing`, the order of the blocks in `.sampler`.
"""

from __future__ import annotations

import time

import numpy as np

from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.ranges import Ranges
from diloco.worker import leasing
from diloco.worker.inner import InnerLoop
from diloco.worker.sampler import Indices, Sampler
from diloco.worker.session import POLL_S, DiLoCo, Interrupted

PATIENCE_S = 5.0  # of waiting for a lease before a person is told


class RunOver(Exception):
    """The run ended while this worker waited for data: it is to finish with `flush`."""


def lease(optimizer: DiLoCo, *, per_step: int, sizes: tuple[int, ...]) -> None:
    """Before `join`: this worker takes `per_step` blocks a step of data that has `sizes[s]` blocks in shard s."""
    if optimizer.config.data.mode == "static" or optimizer.replica.joined:
        raise ConfigError("a lease needs data.mode = 'leased' or 'deficit', and is begun before join()")
    optimizer.replica.lease = leasing.Leasing(per_step, sizes)


def draw(optimizer: DiLoCo, blocks: int) -> Ranges:
    """The next `blocks` blocks for the coming step; waits until they are leased to this worker.

    Raises Interrupted when `stop` is set, RunOver when the run's value is final, and what ended the worker.
    """
    replica, held = optimizer.replica, optimizer.replica.lease
    assert held is not None, "lease() comes first"
    begun = told = time.monotonic()
    with optimizer._changed:
        optimizer._perform(leasing.ask(replica))
        while not held.ready(blocks):
            optimizer._raise_if_stopped()
            if optimizer._stop.is_set():
                raise Interrupted
            if replica.end.final:
                raise RunOver
            if held.abandoned:
                optimizer._merge_when_due()
                continue
            optimizer._changed.wait(POLL_S)
            if optimizer._on_wait is not None and time.monotonic() - told > PATIENCE_S:
                told = time.monotonic()
                optimizer._on_wait("waiting for a lease of data")
        waited = time.monotonic() - begun
        optimizer.clock.exposed += waited
        if optimizer._last_step_end is not None:
            optimizer._last_step_end += waited
        return held.draw(blocks)


class Blocks:
    """Blocks of a corpus of `num_tokens` tokens as windows: the samplers of its shards, all in their first lap."""

    def __init__(self, config: RunConfig, num_tokens: int) -> None:
        d, length = config.data, config.model.sequence_length
        shards = (d.shards or config.topology.workers) if d.mode == "deficit" else 1
        self._samplers = [Sampler(num_tokens, length, config.run.seed, s, shards) for s in range(shards)]
        self.sizes = tuple(sampler.windows_per_epoch for sampler in self._samplers)

    def windows(self, ranges: Ranges) -> Indices:
        """Token positions int64 [blocks, T + 1] of the blocks, in their order."""
        return np.concatenate([self._samplers[shard].batch(lo, hi - lo) for shard, lo, hi in ranges])


def attach(optimizer: DiLoCo, inner: InnerLoop) -> None:
    """Let `inner` read what is leased to `optimizer`'s worker; a step's blocks are drawn together, at its beginning."""
    train, blocks = inner.config.train, Blocks(inner.config, len(inner.corpus.train))
    per_step = train.batch_size * train.grad_accum
    lease(optimizer, per_step=per_step, sizes=blocks.sizes)
    rest: list[Indices] = []

    def windows(count: int) -> Indices:
        if not rest:
            drawn = blocks.windows(draw(optimizer, per_step))
            rest.extend(drawn[at : at + count] for at in range(0, per_step, count))
        return rest.pop(0)

    inner.windows = windows
