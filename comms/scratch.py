"""Memory for what lives within one call: the first write to a fresh page costs more than the arithmetic on it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(n: int) -> Tensor:
    """fp32 [n], of undefined values: this thread's own, and the same memory at its next call, however it is used then.

    The largest that was asked for is kept as long as the thread lives: a fragment's size.
    """
    kept: Tensor | None = getattr(_kept, "values", None)
    if kept is None or kept.numel() < n:
        kept = _kept.values = torch.empty(n)
    return kept[:n]
