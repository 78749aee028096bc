"""Which matrices a parameter holds, and orthogonalising many of them in few batched calls.

A parameter of two dimensions is one matrix; one of three is a stack of matrices ``[E, r, c]``; more dimensions are
flattened to ``[d0, prod(rest)]``. Group options change that: `stacked` (False flattens three dimensions too, True
treats all leading dimensions as a stack) and `blocks` (fused weights such as qkv: a number of equal blocks along
dim 0, or their sizes).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diloco.errors import ConfigError, nearest
from diloco.optim.coefficients import coefficient_set
from diloco.optim.orthogonalize import (
    ITERATION_DTYPES,
    check_options,
    compiled,
    orthogonalize,
    orthogonalize_each,
)
from diloco.optim.sharded import is_sharded, shares_memory, spread_like, whole
from diloco.optim.state import state_dtype

SCALES = ("match_rms", "original", "spectral", "shape_up", "none")
EXACT = "rms_exact"  # a scale that depends on the update and not on its shape alone
# Bounds the stacked copy of one batched call (elements), so that memory does not grow with the model.
_BATCH_ELEMENTS = 1 << 26


def shape_scale(name: str, rows: int, columns: int) -> float:
    """The factor on an orthogonal update of ``rows x columns``; `match_rms` gives it RMS 0.2 (arXiv 2502.16982)."""
    match name:
        case "match_rms":
            return 0.2 * math.sqrt(max(rows, columns))
        case "original":
            return math.sqrt(max(1.0, rows / columns))
        case "spectral":
            return math.sqrt(rows / columns)
        case "shape_up":
            return math.sqrt(max(rows / columns, columns / rows))
        case "none":
            return 1.0
    raise ConfigError(f"scale is {name!r}: known are {', '.join(SCALES)}{nearest(name, SCALES)}")


def check_scale(name: str) -> None:
    """Refuse what is neither a shape factor nor "rms_exact"."""
    known = (*SCALES, EXACT)
    if name not in known:
        raise ConfigError(f"scale is {name!r}: known are {', '.join(known)}{nearest(name, known)}")


def with_exact_rms(update: Tensor, eps: float = 1e-10) -> Tensor:
    """0.2 sqrt(r c) O/(||O|| + eps) of each matrix of ``[N, r, c]``: RMS 0.2, and zero for zero."""
    rows, columns = update.shape[-2:]
    norm: Tensor = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True) + eps
    return update * (0.2 * math.sqrt(rows * columns) / norm)


def split(tensor: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
    """Views of `tensor` (a parameter, or anything shaped like one), one per block, each ``[N, r, c]``."""
    stacked, blocks = group["stacked"], group["blocks"]
    if tensor.ndim < 2:
        raise ConfigError(
            f"a matrix optimizer got a parameter of shape {tuple(tensor.shape)}: give vectors and scalars to AdamW"
        )
    if tensor.numel() == 0:
        raise ConfigError(
            f"a matrix optimizer got a parameter of shape {tuple(tensor.shape)}, which has no elements: leave it out"
        )
    as_stack = tensor.ndim == 3 if stacked is None else stacked and tensor.ndim > 2
    flat = tensor.reshape(-1, *tensor.shape[-2:]) if as_stack else tensor.reshape(1, tensor.shape[0], -1)
    if blocks == 1:
        return [flat]
    rows = flat.shape[1]
    sizes = [rows // blocks] * blocks if isinstance(blocks, int) and blocks > 0 else blocks
    if isinstance(sizes, int) or sum(sizes) != rows or min(sizes) < 1:
        raise ConfigError(
            f"blocks is {blocks}: it does not divide the {rows} rows of shape {tuple(tensor.shape)}"
        )
    return list(torch.split(flat, list(sizes), dim=1))


def iteration_dtype(value: torch.dtype | str) -> torch.dtype:
    """A dtype from itself or its name. Groups hold the name, so that a state dictionary can be written as JSON."""
    known = {str(d).removeprefix("torch."): d for d in ITERATION_DTYPES}
    name = str(value).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"iteration_dtype is {name!r}: known are {', '.join(known)}{nearest(name, known)}")
    return known[name]


def check_matrix_group(group: dict[str, Any]) -> None:
    """Refuse shapes that hold no matrix, blocks that do not fit, and unusable orthogonalisation options."""
    dtype = iteration_dtype(group["iteration_dtype"])
    group["iteration_dtype"] = str(dtype).removeprefix("torch.")
    check_options(
        coefficient_set(group["coefficients"]),
        dtype,
        group["orth_eps"],
        group["form"],
        group["start"],
    )
    for p in group["params"]:
        if not all(shares_memory(block, p) for block in split(p.detach(), group)):
            problem = "cannot be cut into its matrices as it is sharded: shard it otherwise, or not at all"
            if not is_sharded(p):
                problem = "is not contiguous: make it so with .contiguous()"
            raise ConfigError(f"a parameter of shape {tuple(p.shape)} {problem}")


def orthogonalize_all(matrices: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """orth of every matrix of every ``[N, r, c]`` tensor, in the iteration dtype and the given orientation.

    The result equals the one-by-one one. On a CPU, where batching torch's products gains nothing, all go into one
    compiled call or one after another; elsewhere equal shapes (after turning tall matrices) share a batched call.
    Sharded matrices are gathered, and every process keeps its part of the result.
    """
    if any(is_sharded(m) for m in matrices):
        found = orthogonalize_all([whole(m) for m in matrices], group)
        return [spread_like(o, m) for o, m in zip(found, matrices, strict=True)]
    chosen, dtype = coefficient_set(group["coefficients"]), iteration_dtype(group["iteration_dtype"])
    orth = partial(
        orthogonalize,
        coefficients=group["coefficients"],
        dtype=dtype,
        eps=group["orth_eps"],
        form=group["form"],
        start=group["start"],
    )
    if matrices and compiled(matrices[0].device, chosen, dtype, group["start"]):
        each = [x for m in matrices for x in m.unbind()]
        alone = iter(orthogonalize_each(each, chosen, dtype, group["orth_eps"], group["form"]))
        return [torch.stack([next(alone) for _ in m]) for m in matrices]
    if matrices and matrices[0].device.type == "cpu":
        return [orth(m) for m in matrices]
    out: list[Tensor | None] = [None] * len(matrices)
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, m in enumerate(matrices):
        alike[(min(m.shape[1:]), max(m.shape[1:]), m.device, m.dtype)].append(i)
    for (n, m_, *_), indices in alike.items():
        assert isinstance(n, int) and isinstance(m_, int)
        limit = max(1, _BATCH_ELEMENTS // max(n * m_, 1))
        for chunk in _chunks(indices, [matrices[i].shape[0] for i in indices], limit):
            wide = [
                matrices[i].mT if matrices[i].shape[1] > matrices[i].shape[2] else matrices[i] for i in chunk
            ]
            result = orth(torch.cat(wide) if len(wide) > 1 else wide[0])
            for i, part in zip(chunk, torch.split(result, [w.shape[0] for w in wide]), strict=True):
                out[i] = part.mT if matrices[i].shape[1] > matrices[i].shape[2] else part
    return [o for o in out if o is not None]


def apply_update(p: Tensor, update: Tensor, *, step: float, decay: float, cautious: bool) -> None:
    """``p = p (1 - decay) - step update`` in place; `update` has p's shape.

    With `cautious`, only entries where ``update * p >= 0`` decay (arXiv 2510.12402). 16-bit parameters are updated
    in float32 and rounded once.
    """
    wide = p.to(state_dtype(p))  # p itself unless it is narrower
    update = update.to(wide.dtype)
    if decay:
        if cautious:
            wide.mul_((update * wide >= 0).to(wide.dtype).mul_(-decay).add_(1))
        else:
            wide.mul_(1 - decay)
    wide.add_(update, alpha=-step)
    if wide is not p:
        p.copy_(wide)


def _chunks(indices: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    chunks: list[list[int]] = []
    used = limit
    for index, size in zip(indices, sizes, strict=True):
        if used + size > limit:
            chunks.append([])
            used = 0
        chunks[-1].append(index)
        used += size
    return chunks
