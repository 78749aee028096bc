"""How contributions become one pseudo-gradient: weights and the mean.

Sums run in ascending worker index with an fp32 accumulator, so that the order of arrival changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from diloco.errors import ConfigError


def weights(mode: str, tokens: Sequence[int]) -> list[float]:
    """Weights that sum to 1 over the accepted contributions, normalised in fp64.

    ``uniform`` counts heads; ``tokens`` counts the tokens each contribution trained on (all zero: uniform).
    Raises ConfigError on an unknown mode.
    """
    if mode not in ("uniform", "tokens"):
        raise ConfigError(f"weights.mode = {mode!r} is unknown; use 'uniform' or 'tokens'")
    total = sum(tokens)
    if mode == "uniform" or total == 0:
        return [1.0 / len(tokens)] * len(tokens)
    return [count / total for count in tokens]
