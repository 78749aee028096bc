"""Parameters spread over processes (DTensor, as FSDP2 makes them): whole matrices, and each process's own part.

Elementwise rules work on DTensors as they are. What needs a whole matrix gathers it, computes the same on every
process, and keeps its part. Which placements there are is torch's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    """Whether `t` is a DTensor; asked without importing torch.distributed.tensor, which takes a while."""
    return hasattr(t, "device_mesh")


def whole(t: Tensor) -> Tensor:
    """All of `t` as an ordinary tensor, on every process (a collective operation); ordinary tensors as they are."""
    if not is_sharded(t):
        return t
    sharded: Any = t
    full: Tensor = sharded.full_tensor()
    return full


def spread_like(full: Tensor, t: Tensor) -> Tensor:
    """`full`, the same on every process, with the placements of `t`; nothing is sent. As it is for an ordinary `t`."""
    if not is_sharded(t):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    like: Any = t
    mesh = like.device_mesh
    copies: Any = DTensor.from_local(full.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    kept = [Replicate() if p.is_partial() else p for p in like.placements]
    spread: Tensor = copies.redistribute(mesh, kept)
    return spread


def local(t: Tensor) -> Tensor:
    """This process's part of `t`, sharing its memory; ordinary tensors as they are."""
    if not is_sharded(t):
        return t
    sharded: Any = t
    own: Tensor = sharded.to_local()
    return own


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each: torch's `_foreach` operations do not all know DTensors."""
    return [local(t) for t in tensors]


def shares_memory(view: Tensor, t: Tensor) -> bool:
    """Whether writing to `view` writes to `t`."""
    a, b = local(view), local(t)
    return a.numel() == 0 or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
