"""The order in which a worker reads its corpus: a pure function of (seed, epoch, shard, position).

Here: windows, permutations, shards. A sampler holds no data and no progress: the whole state of a reader is one
integer, the number of windows it has taken. Not here: the tokens themselves (data.py), who leases what (the
coordinator).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diloco.errors import ConfigError

Indices = npt.NDArray[np.int64]


def permutation(size: int, *key: int) -> Indices:
    """A permutation of range(size), int64, that depends on (size, key) alone.

    Sorting raw Philox words rather than calling Generator.permutation: numpy promises that the words stay the
    same from version to version, and workers with different numpy must agree or their shards would overlap.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class Sampler:
    """Windows of `sequence_length` + 1 tokens out of a stream of `num_tokens`, for one shard of `num_shards`.

    Window w covers tokens [w * T, w * T + T]: inputs never overlap, the last token is only a target. Per epoch
    all windows are permuted with the key (seed, epoch) and shard s takes permuted[s::num_shards], so shards are
    disjoint and together cover each epoch exactly once. Positions count windows of this shard and run on
    through epochs; a batch may straddle two.

    `lap` serves more workers than shards (see `for_worker`): lap 0 reads the shard in the order above, lap k > 0
    reads the same windows of each epoch in another order, keyed by (seed, epoch, shard, lap).

    Raises ConfigError when a shard would be empty or a number is out of range.
    """

    def __init__(
        self, num_tokens: int, sequence_length: int, seed: int, shard: int, num_shards: int, *, lap: int = 0
    ) -> None:
        if sequence_length < 1:
            raise ConfigError(f"model.sequence_length = {sequence_length}: must be at least 1")
        if seed < 0:
            raise ConfigError(f"run.seed = {seed}: must not be negative")
        if num_shards < 1:
            raise ConfigError(f"data.shards = {num_shards}: must be at least 1")
        if not 0 <= shard < num_shards or lap < 0:
            raise ConfigError(f"shard = {shard}, lap = {lap}: must be 0..{num_shards - 1} and at least 0")
        self.num_windows = (num_tokens - 1) // sequence_length
        if self.num_windows < num_shards:
            raise ConfigError(
                f"data.shards = {num_shards}: {num_tokens} tokens make only {max(0, self.num_windows)} windows of "
                f"{sequence_length}; use more text, fewer shards or a shorter model.sequence_length"
            )
        self.sequence_length = sequence_length
        self.seed, self.shard, self.num_shards, self.lap = seed, shard, num_shards, lap
        self.windows_per_epoch = (self.num_windows - shard + num_shards - 1) // num_shards
        self._cached: tuple[int, Indices] | None = None

    @classmethod
    def for_worker(
        cls, num_tokens: int, sequence_length: int, seed: int, index: int, num_shards: int
    ) -> Sampler:
        """The sampler of worker `index` (0, 1, ...): shard index % num_shards, lap index // num_shards.

        Workers beyond the number of shards, such as late joiners, thus share a shard but do not follow each
        other through it; nobody needs to know how many workers there are.
        """
        if index < 0 or num_shards < 1:
            raise ConfigError(
                f"worker index {index}, data.shards = {num_shards}: must be at least 0 and at least 1"
            )
        return cls(num_tokens, sequence_length, seed, index % num_shards, num_shards, lap=index // num_shards)

    def order(self, epoch: int) -> Indices:
        """The windows of this shard in `epoch`, in reading order, int64 [windows_per_epoch]; do not write to it."""
        if self._cached is None or self._cached[0] != epoch:
            windows = permutation(self.num_windows, self.seed, epoch)[self.shard :: self.num_shards]
            if self.lap:
                windows = windows[permutation(len(windows), self.seed, epoch, self.shard, self.lap)]
            self._cached = (epoch, windows)
        return self._cached[1]

    def windows(self, position: int, count: int) -> Indices:
        """Window numbers at positions [position, position + count), int64 [count]."""
        if position < 0 or count < 1:
            raise ValueError(f"position {position} and count {count} must be at least 0 and at least 1")
        out = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, at = divmod(position + filled, self.windows_per_epoch)
            piece = self.order(epoch)[at : at + count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out

    def batch(self, position: int, batch_size: int) -> Indices:
        """Token positions int64 [batch_size, T + 1]: `tokens[sampler.batch(position, batch_size)]` is the batch.

        Pure: the same position always gives the same batch. The next batch starts at position + batch_size.
        """
        starts = self.windows(position, batch_size) * self.sequence_length
        return starts[:, None] + np.arange(self.sequence_length + 1, dtype=np.int64)


def take(tokens: npt.NDArray[np.unsignedinteger[Any]], indices: Indices) -> Indices:
    """tokens[indices] as int64, the dtype that models read; copies, so a memmap stays untouched."""
    return tokens[indices].astype(np.int64)
