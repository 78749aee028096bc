"""Evaluation: the unit, which windows count, determinism, and that the model is left as it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diloco.errors import ConfigError
from diloco.worker.data import Corpus
from diloco.worker.evaluate import evaluate, evaluation_windows
from diloco.worker.model import build_model

torch.set_num_threads(1)


def corpus(heldout: np.ndarray[tuple[int], np.dtype[np.uint8]], bytes_per_token: float = 1.0) -> Corpus:
    return Corpus(np.zeros(10, np.uint8), heldout, 256, bytes_per_token)


def some_bytes(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.Generator(np.random.Philox(0)).integers(0, 256, count, dtype=np.uint8)


class Spy(nn.Module):
    """Uniform logits; remembers what it was shown and how."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout(0.5).eval()
        self.active = nn.Dropout(0.5)
        self.rows: list[Tensor] = []
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, tokens: Tensor) -> Tensor:
        self.rows.append(tokens)
        self.seen.add((self.active.training, torch.is_grad_enabled()))
        return torch.zeros(*tokens.shape, 256)


@pytest.mark.parametrize("bytes_per_token", [1.0, 2.5])
def test_a_uniform_guess_costs_log_vocabulary_per_token(bytes_per_token: float) -> None:
    """The unit is nats per byte: log(256) per token, over the bytes that a token stands for."""
    value = evaluate(
        Spy(), corpus(some_bytes(500), bytes_per_token),
        sequence_length=16, batch_size=4, max_batches=3, device="cpu",
    )  # fmt: skip
    assert value == pytest.approx(math.log(256) / bytes_per_token, rel=1e-6)


def test_the_value_is_the_mean_over_windows_however_they_are_batched() -> None:
    """A short last batch counts by its size: any batch size gives the value of scoring all windows at once."""
    model = build_model("nano", 16, 0)
    held = corpus(some_bytes(16 * 11 + 1))
    rows = torch.from_numpy(held.heldout.astype(np.int64)).unfold(0, 17, 16)
    with torch.no_grad():
        expected = model.loss(rows).item()
    values = [
        evaluate(model, held, sequence_length=16, batch_size=size, max_batches=100, device="cpu")
        for size in (1, 4, 11, 64)
    ]
    assert values == pytest.approx([expected] * 4, rel=1e-6)


def test_windows_are_spread_evenly_over_the_held_out_part() -> None:
    """At most `limit` windows, whole, distinct, in order, from the start into the last stretch."""
    starts = evaluation_windows(10_001, 10, 7)
    assert len(starts) == 7 and starts[0] == 0 and (starts % 10 == 0).all()
    gaps = np.diff(starts)
    assert gaps.max() - gaps.min() <= 10 and starts[-1] >= 10_000 * 6 // 7 - 10
    assert evaluation_windows(35, 10, 7).tolist() == [0, 10, 20]


def test_the_same_windows_are_scored_every_time() -> None:
    """Two evaluations show the model the same tokens and return the same bits; global randomness is not used."""
    spy, held = Spy(), corpus(some_bytes(3000))
    state = torch.get_rng_state()
    first = evaluate(spy, held, sequence_length=16, batch_size=4, max_batches=5, device="cpu")
    second = evaluate(spy, held, sequence_length=16, batch_size=4, max_batches=5, device="cpu")
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert len(spy.rows) == 10
    assert all(torch.equal(a, b) for a, b in zip(spy.rows[:5], spy.rows[5:], strict=True))


def test_the_model_is_scored_in_eval_mode_and_left_as_it_was() -> None:
    """Every module's own mode is put back, a part frozen in eval mode included; no gradients are recorded."""
    spy = Spy()
    evaluate(spy, corpus(some_bytes(100)), sequence_length=16, batch_size=4, max_batches=1, device="cpu")
    assert spy.seen == {(False, False)}
    assert spy.training and spy.active.training and not spy.frozen.training


def test_the_mode_is_put_back_after_an_error() -> None:
    """A model that fails in the middle is still in train mode afterwards."""

    class Fails(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            raise RuntimeError("no logits today")

    model = Fails()
    with pytest.raises(RuntimeError, match="no logits today"):
        evaluate(
            model, corpus(some_bytes(100)), sequence_length=16, batch_size=4, max_batches=1, device="cpu"
        )
    assert model.training


def test_training_goes_on_after_an_evaluation_in_the_middle() -> None:
    """Evaluating between two steps changes nothing in the weights that follow."""
    held = corpus(some_bytes(200))
    rows = torch.from_numpy(held.heldout[:68].astype(np.int64)).view(4, 17)
    weights = []
    for evaluations in (0, 1):
        model = build_model("nano", 16, 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for _ in range(evaluations):
                evaluate(model, held, sequence_length=16, batch_size=2, max_batches=2, device="cpu")
            optimizer.zero_grad()
            model.loss(rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        weights.append(model.embed.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sequence_length": 100}, r"model\.sequence_length = 100: longer than the 100 held-out tokens"),
        ({"batch_size": 0}, r"train\.batch_size = 0"),
        ({"max_batches": 0}, r"train\.eval_batches = 0"),
    ],
)
def test_an_evaluation_of_nothing_is_refused(sizes: dict[str, int], message: str) -> None:
    """A held-out part shorter than one window, or no batches, is an error rather than a NaN."""
    arguments: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "max_batches": 1, **sizes}
    with pytest.raises(ConfigError, match=message):
        evaluate(Spy(), corpus(some_bytes(100)), device="cpu", **arguments)
