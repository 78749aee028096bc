"""Laws of sample order: shards partition each epoch, batches are pure, a run resumes at any position."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.errors import ConfigError
from diloco.worker.sampler import Sampler, permutation, take

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 50)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(num_tokens, sequence_length, num_shards) with at least one window per shard."""
    shards = draw(st.integers(1, 6))
    length = draw(st.integers(1, 9))
    windows = draw(st.integers(shards, 60))
    return windows * length + 1 + draw(st.integers(0, length - 1)), length, shards


@given(layouts(), seeds, epochs)
def test_the_shards_of_an_epoch_are_disjoint_and_cover_every_window_once(
    layout: tuple[int, int, int], seed: int, epoch: int
) -> None:
    """All shards' windows of one epoch, put together, are each window exactly once; sizes differ by at most 1."""
    num_tokens, length, shards = layout
    samplers = [Sampler(num_tokens, length, seed, shard, shards) for shard in range(shards)]
    orders = [sampler.order(epoch) for sampler in samplers]
    assert np.array_equal(np.sort(np.concatenate(orders)), np.arange((num_tokens - 1) // length))
    sizes = [len(order) for order in orders]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [sampler.windows_per_epoch for sampler in samplers]


@given(layouts(), seeds)
def test_one_epoch_predicts_every_token_but_the_first_and_the_tail_once(
    layout: tuple[int, int, int], seed: int
) -> None:
    """Targets of all shards are tokens 1..windows*T, each once; no index leaves the stream."""
    num_tokens, length, shards = layout
    targets = []
    for shard in range(shards):
        sampler = Sampler(num_tokens, length, seed, shard, shards)
        rows = sampler.batch(0, sampler.windows_per_epoch)
        assert rows.shape == (sampler.windows_per_epoch, length + 1) and rows.dtype == np.int64
        targets.append(rows[:, 1:].ravel())
    covered = np.sort(np.concatenate(targets))
    assert np.array_equal(covered, np.arange(1, (num_tokens - 1) // length * length + 1))
    assert covered[-1] < num_tokens


@given(layouts(), seeds, st.integers(0, 200), st.lists(st.integers(1, 7), min_size=1, max_size=8), st.data())
def test_a_reader_resumes_at_any_position_with_the_position_alone(
    layout: tuple[int, int, int], seed: int, start: int, sizes: list[int], data: st.DataObject
) -> None:
    """However a stretch is cut in batches, and whatever was read before, a fresh sampler gives the same rows."""
    num_tokens, length, shards = layout
    shard = data.draw(st.integers(0, shards - 1))
    lap = data.draw(st.integers(0, 2))
    used = Sampler(num_tokens, length, seed, shard, shards, lap=lap)
    used.batch(data.draw(st.integers(0, 500)), 3)
    position, pieces = start, []
    for size in sizes:
        pieces.append(used.batch(position, size))
        position += size
    whole = Sampler(num_tokens, length, seed, shard, shards, lap=lap).batch(start, sum(sizes))
    assert np.array_equal(np.concatenate(pieces), whole)


@given(layouts(), seeds, epochs, st.integers(1, 4))
def test_a_later_lap_reads_the_same_windows_of_each_epoch(
    layout: tuple[int, int, int], seed: int, epoch: int, lap: int
) -> None:
    """Worker index num_shards * lap + s shares the windows of shard s, epoch by epoch."""
    num_tokens, length, shards = layout
    for shard in range(shards):
        first = Sampler.for_worker(num_tokens, length, seed, shard, shards)
        later = Sampler.for_worker(num_tokens, length, seed, shard + lap * shards, shards)
        assert (later.shard, later.lap) == (shard, lap)
        assert np.array_equal(np.sort(first.order(epoch)), np.sort(later.order(epoch)))


@settings(max_examples=25)
@given(seeds)
def test_seed_epoch_and_lap_each_change_the_order(seed: int) -> None:
    """Two hundred windows never come in the same order by chance."""
    base = Sampler(2001, 10, seed, 0, 1).order(0)
    assert not np.array_equal(base, np.arange(200))
    assert not np.array_equal(base, Sampler(2001, 10, seed, 0, 1).order(1))
    assert not np.array_equal(base, Sampler(2001, 10, (seed + 1) % 2**63, 0, 1).order(0))
    assert not np.array_equal(base, Sampler(2001, 10, seed, 0, 1, lap=1).order(0))


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """Golden value: workers with other numpy versions must cut the same shards, so this may never change."""
    order = permutation(10_000, 7, 3)
    assert order[:6].tolist() == [1146, 2064, 1780, 8857, 899, 5542]
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "26f8c3c96d7e7ae5"


def test_every_window_is_equally_likely_to_come_first() -> None:
    """Over 4,000 epochs each of 8 windows leads about 500 times (5 standard deviations are 105)."""
    firsts = np.bincount([permutation(8, 1, epoch)[0] for epoch in range(4000)], minlength=8)
    assert np.abs(firsts - 500).max() < 105


def test_taken_tokens_are_int64_whatever_the_corpus_holds() -> None:
    """`take` follows the indices and widens the dtype."""
    tokens = np.arange(200, dtype=np.uint8)
    rows = take(tokens, Sampler(200, 9, 0, 0, 1).batch(4, 3))
    assert rows.dtype == np.int64 and rows.shape == (3, 10)
    assert (np.diff(rows, axis=1) == 1).all() and (rows[:, 0] % 9 == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 10, 0, 0, 10), r"data\.shards = 10: 100 tokens make only 9 windows of 10"),
        ((0, 10, 0, 0, 1), "0 tokens make only 0 windows"),
        ((100, 0, 0, 0, 1), r"model\.sequence_length = 0"),
        ((100, 10, -1, 0, 1), r"run\.seed = -1"),
        ((100, 10, 0, 2, 2), "shard = 2"),
        ((100, 10, 0, 0, 0), r"data\.shards = 0"),
    ],
)
def test_impossible_layouts_are_refused(arguments: tuple[int, int, int, int, int], message: str) -> None:
    """An empty shard would starve a worker without a word; it is an error with the numbers in it."""
    with pytest.raises(ConfigError, match=message):
        Sampler(*arguments)


def test_impossible_requests_are_refused() -> None:
    """Positions count from 0, batches hold at least one window, worker indices count from 0."""
    sampler = Sampler(100, 10, 0, 0, 1)
    for position, size in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="must be at least"):
            sampler.batch(position, size)
    with pytest.raises(ConfigError, match="worker index -1"):
        Sampler.for_worker(100, 10, 0, -1, 2)
