"""Uniform numbers for stochastic rounding: Philox4x32-10 (Salmon et al. 2011), a function of seed and place alone.

The counter is the place, so that any cut of the work into blocks, threads or programs draws the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)


def uniform(seed: int, first: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [n] in [0, 1): the draws of the places `first` .. first+n-1.

    The draw of place i is the top 24 bits of word i%4 of Philox4x32-10 with counter (i//4 low, i//4 high, 0, 0) and key
    (`seed` low, `seed` high), times 2^-24.
    """
    start = first // 4
    counter = torch.arange(start, (first + n + 3) // 4, dtype=torch.int64, device=device)
    c = [counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        high0, low0 = _multiply(_ROUND[0], c[0])
        high1, low1 = _multiply(_ROUND[1], c[2])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + _KEY[0]) & _MASK, (key[1] + _KEY[1]) & _MASK]
    words = torch.stack(c, dim=1).view(-1)[first - 4 * start :][:n]
    return (words >> 8).float().mul_(2.0**-24)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product of two 32-bit numbers, whose top bit int64 has no room for."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK
