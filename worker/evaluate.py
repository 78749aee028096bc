"""The held-out loss of a model: one number, comparable between models, tokenizers and runs.

Here: which windows are scored and in what unit. Not here: when to evaluate, reporting, the loss (model.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from diloco.errors import ConfigError
from diloco.worker.data import Corpus
from diloco.worker.model import next_token_loss
from diloco.worker.sampler import Indices, take


def evaluation_windows(num_tokens: int, sequence_length: int, limit: int) -> Indices:
    """First tokens of at most `limit` windows of sequence_length + 1, evenly spaced over num_tokens; int64.

    Raises ConfigError when not one window fits.
    """
    windows = (num_tokens - 1) // sequence_length
    if windows < 1:
        raise ConfigError(
            f"model.sequence_length = {sequence_length}: longer than the {num_tokens} held-out tokens; "
            "use more text or a shorter length"
        )
    count = min(windows, limit)
    return np.arange(count, dtype=np.int64) * windows // count * sequence_length


def evaluate(
    model: nn.Module,
    corpus: Corpus,
    *,
    sequence_length: int,
    batch_size: int,
    max_batches: int,
    device: str | torch.device,
    share: tuple[int, int] = (0, 1),
) -> float:
    """Mean held-out loss in nats/byte: (sum of -log p over scored tokens) / (tokens * corpus.bytes_per_token).

    Scores at most batch_size * max_batches windows, the same ones for the same arguments, with the model in
    eval mode and without gradients; every module's train/eval mode is put back afterwards, also after an error.
    The result does not depend on batch_size beyond rounding and how many windows it allows. NaN or infinity is
    returned as it is. With a `share` (i, n) of several processes up to n times as many windows count; this one scores
    every n-th from the i-th on and returns its summand of the mean: the result is the sum over i. Raises ConfigError when the held-out part is too short or the numbers are below 1.
    """
    if batch_size < 1 or max_batches < 1:
        raise ConfigError(
            f"train.batch_size = {batch_size}, train.eval_batches = {max_batches}: must be at least 1"
        )
    part, parts = share
    everything = evaluation_windows(len(corpus.heldout), sequence_length, batch_size * max_batches * parts)
    starts = everything[part::parts]
    offsets = np.arange(sequence_length + 1, dtype=np.int64)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = 0.0
    try:
        # no_grad, not inference_mode: a model that caches tensors on first use must still be trainable after it.
        with torch.no_grad():
            for at in range(0, len(starts), batch_size):
                rows = take(corpus.heldout, starts[at : at + batch_size, None] + offsets)
                loss = next_token_loss(model, torch.from_numpy(rows).to(device))
                total += float(loss) * len(rows)
    finally:
        for module, training in modes:
            module.training = training
    return total / len(everything) / corpus.bytes_per_token
