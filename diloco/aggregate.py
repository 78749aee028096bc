"""How contributions become one pseudo-gradient: weights, step normalisation, and merging by direction.

Sums run in ascending worker index with an fp32 accumulator, so that the order of arrival changes no bit. What
holds out against bad contributions is in `diloco.robust`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.fragments import Fragment
from diloco.sums import norm, weighted_sum

MODES = ("uniform", "tokens", "tokens_rate", "shard")

# Dotted or underscored parts of a name that say "embedding": embed, tok_embeddings, embed_tokens, wte, wpe.
_EMBEDDING = re.compile(r"(?:^|[._])(?:wte|wpe|(?:un)?emb(?:ed\w*|s)?)(?=[._]|$)")
_NO_DIRECTION = 1e-8  # norm of the mean direction below which there is none
_SMALLEST = 1e-30  # norms below this count as zero: their reciprocal would leave fp32


def weights(
    mode: str,
    tokens: Sequence[int],
    *,
    steps: Sequence[int] | None = None,
    shards: Sequence[int] | None = None,
    staleness: Sequence[int] | None = None,
    staleness_pow: float = 0.5,
) -> list[float]:
    """Weights that sum to 1 over the accepted contributions, normalised in fp64.

    ``uniform`` counts heads; ``tokens`` counts the tokens each contribution trained on; ``tokens_rate`` is
    tokens * (tokens / steps), which favours big batches (2604.21428); ``shard`` counts the tokens that each one's
    data has (`shards`), for data that is not alike (2311.08105). Nothing to count: uniform. A contribution
    whose base is `staleness` commits old is multiplied by ``(1 + staleness)^-staleness_pow`` (2401.09135).
    Raises ConfigError on an unknown mode, ``tokens_rate`` without `steps`, or ``shard`` without `shards`.
    """
    if mode not in MODES:
        raise ConfigError(f"weights.mode = {mode!r} is unknown; use one of {', '.join(map(repr, MODES))}")
    if mode == "tokens_rate" and steps is None:
        raise ConfigError("weights.mode = 'tokens_rate' needs the steps of each contribution")
    if mode == "shard" and shards is None:
        raise ConfigError("weights.mode = 'shard' needs the size of each worker's shard")
    sizes: list[float] = [1.0] * len(tokens)
    if mode == "tokens" and any(tokens):
        sizes = [count for count in tokens]
    elif mode == "tokens_rate" and steps is not None and any(tokens):
        sizes = [count * (count / max(1, s)) for count, s in zip(tokens, steps, strict=True)]
    elif mode == "shard" and shards is not None and any(shards):
        sizes = [size for size in shards]
    if staleness is not None:
        sizes = [size * staleness_weight(s, staleness_pow) for size, s in zip(sizes, staleness, strict=True)]
    total = sum(sizes)
    return [size / total for size in sizes]


def staleness_weight(s: int, power: float) -> float:
    """``(1 + s)^-power`` for an update that was measured `s` commits ago (2401.09135)."""
    return float((1.0 + s) ** -power)


def step_scales(steps: Sequence[int], shares: Sequence[float]) -> list[float]:
    """FedNova (2007.07481): the factor ``(sum_k w_k a_k) / a_m`` before each D_m, a_m its inner steps.

    ``sum_m w_m scale_m D_m`` then is the mean progress per step times the mean number of steps: whoever did more
    steps does not pull harder. Equal steps give exactly 1. `shares` sum to 1.
    """
    if min(steps) == max(steps):
        return [1.0] * len(steps)
    mean = sum(w * a for w, a in zip(shares, steps, strict=True))
    return [mean / a for a in steps]


def rda_pieces(fragment: Fragment) -> list[tuple[int, int]]:
    """Where the tensors that merge by direction lie in the fragment's buffer: all but embeddings, told by name."""
    return [
        (span.offset, span.offset + span.stop - span.start)
        for span in fragment.spans
        if not _EMBEDDING.search(span.name)
    ]


def rda(deltas: Sequence[Tensor], shares: Sequence[float], pieces: Sequence[tuple[int, int]]) -> Tensor:
    """Average directions and lengths apart (RDA, 2604.21428), fp32 [n]: averaging shortens what does not agree.

    On each [start, stop) of `pieces`: ``R = (sum w ||D||) * u / ||u||`` with ``u = sum w D / ||D||``. Outside
    them, where ``||u|| < 1e-8`` and where any D is zero: the weighted mean. `shares` sum to 1. One contribution
    comes back as it is.
    """
    merged = weighted_sum(list(deltas), list(shares))
    if len(deltas) == 1:
        return merged
    for start, stop in pieces:
        parts = [delta[start:stop] for delta in deltas]
        lengths = [norm(part) for part in parts]
        if min(lengths) < _SMALLEST:
            continue
        u = weighted_sum(parts, [w / n for w, n in zip(shares, lengths, strict=True)])
        direction = norm(u)
        if direction >= _NO_DIRECTION:
            length = sum(w * n for w, n in zip(shares, lengths, strict=True))
            torch.mul(u, length / direction, out=merged[start:stop])
    return merged
