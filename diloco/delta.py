"""The arithmetic between a worker's parameters and the global ones. Pure functions on flat fp32 tensors.

Sign: a pseudo-gradient is old minus new, so that it acts as a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diloco.kernels import ops


def pseudo_gradient(anchor: Tensor, local: Tensor) -> Tensor:
    """``anchor - local`` (2311.08105), fp32 [n]. The anchor is the global value the worker last took."""
    return torch.sub(anchor, local)


def merge(local: Tensor, new: Tensor, alpha: float) -> Tensor:
    """``alpha * local + (1 - alpha) * new`` (2501.18512 eq. 3), fp32 [n].

    The two ends are exact: alpha 0 gives `new`, alpha 1 gives `local`, bit for bit.
    """
    if alpha == 0.0:
        return new.clone()
    if alpha == 1.0:
        return local.clone()
    if local.dtype == new.dtype == torch.float32 and local.dim() == 1 and new.is_contiguous():
        merged = local.clone(memory_format=torch.contiguous_format)
        ops.merge(merged, new, alpha)
        return merged
    return local.mul(alpha).add_(new.mul(1.0 - alpha))


def merge_delay_corrected(local: Tensor, new: Tensor, sent: Tensor) -> Tensor:
    """``new + (local - sent)`` (2605.20866): keep all that the worker did since it sent its parameters `sent`."""
    return torch.sub(local, sent).add_(new)


def rebase(delta: Tensor, base: Tensor, now: Tensor) -> Tensor:
    """A pseudo-gradient against `base` turned into one against `now`: equal to having sent the parameters."""
    return delta + (now - base)
