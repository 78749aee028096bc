"""Orthogonalised updates on CPUs with AVX-512: whole batches of matrices of any shapes, in one call each.

The arithmetic is in `csrc/orthogonal.cpp`; this module lays out pointers and says where that code is worth calling.
Results depend neither on the number of threads nor on what else is in the batch. Which coefficients and segments to
use, and what to do elsewhere, is the caller's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain

import torch
from torch import Tensor

from diloco.kernels.native import library

Triple = tuple[float, float, float]
MAX_ITERATIONS = 63
_BFLOAT16, _NESTEROV, _CAUTIOUS, _RESTORE_RMS = 1, 2, 4, 8
_SUPPORTED = {torch.float32: 1, torch.bfloat16: 2}
_I64, _F32 = ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True, slots=True)
class Iteration:
    """orth(G): X = G/(div ||G|| + eps), then per triple A = X X^T, X = a X + (b A + c A A) X, in `dtype`."""

    triples: tuple[Triple, ...]
    dtype: torch.dtype
    div: float = 1.0
    eps: float = 1e-7


@dataclass(frozen=True, slots=True)
class Update:
    """M = lerp(M, g, weight); u = lerp(g, M, 1 - weight) if nesterov else M; p = keep p - step orth(u).

    `cautious`: only entries with ``update * p >= 0`` are multiplied by `keep`. With second moments, rows of O = orth(u)
    are divided by sqrt(v) + norm_eps after v = lerp(v, mean(O^2), advance), and the result gets the Frobenius norm of O
    back (`restore_rms`: an RMS of 0.2).
    """

    weight: float
    keep: float
    nesterov: bool
    cautious: bool
    advance: float = 0.0
    norm_eps: float = 0.0
    restore_rms: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """One matrix to update: contiguous float32 CPU tensors ``[r, c]``, `second` ``[r, 1]`` or None; see `orthogonalize`
    for `segments`."""

    weights: Tensor
    gradient: Tensor
    momentum: Tensor
    second: Tensor | None
    segments: Sequence[int]
    step: float


def supports(dtype: torch.dtype, iterations: int = 1) -> bool:
    """Whether iterations in `dtype` are faster here than torch's products: AVX-512, with AVX512-BF16 and no AMX."""
    found = library()
    if found is None or iterations > MAX_ITERATIONS:
        return False
    return bool(_probe(found) & _SUPPORTED.get(dtype, 0))


def orthogonalize(
    matrices: Sequence[Tensor], segments: Sequence[Sequence[int]], iteration: Iteration
) -> list[Tensor]:
    """orth of each float32 CPU matrix ``[r, c]``, as new tensors of the iteration's dtype. Zero gives zero.

    Each matrix has its own `segments`, numbers of iterations that sum to all. Within a segment longer than one only the
    small Gram matrix is iterated, and X is recomputed at its end; all ones is the plain form.
    """
    sources = [m.contiguous() for m in matrices]
    for m in sources:
        _check(m)
    results = [torch.empty_like(m, dtype=iteration.dtype) for m in sources]
    table = [
        (m.data_ptr(), 0, r.data_ptr(), 0, 0, *m.shape, _starts(s))
        for m, r, s in zip(sources, results, segments, strict=True)
    ]
    _call(table, [0.0] * len(table), iteration, (-1.0, 1.0, 0.0, 0.0), 0)
    return results


def update(targets: Sequence[Target], iteration: Iteration, how: Update) -> None:
    """Advance momentum, second moments and weights of every target in place; gradients are only read.

    Raises ValueError for a tensor that is not contiguous float32 in CPU memory, or of another shape than the weights.
    """
    for t in targets:
        _check(t.weights, t.gradient, t.momentum, *(() if t.second is None else (t.second,)))
    table = [
        (
            *(t.gradient.data_ptr(), t.momentum.data_ptr(), 0, t.weights.data_ptr()),
            0 if t.second is None else t.second.data_ptr(),
            *(*t.weights.shape, _starts(t.segments)),
        )
        for t in targets
    ]
    flags = how.nesterov * _NESTEROV | how.cautious * _CAUTIOUS | how.restore_rms * _RESTORE_RMS
    scalars = (how.weight, how.keep, how.advance, how.norm_eps)
    _call(table, [t.step for t in targets], iteration, scalars, flags)


def _check(weights: Tensor, *others: Tensor) -> None:
    for tensor in (weights, *others):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"want contiguous float32 CPU tensors, got {tensor.dtype} on {tensor.device}")
        if tensor.shape not in (weights.shape, (weights.shape[0], 1)):
            raise ValueError(f"a tensor of {tuple(tensor.shape)} goes with weights of {tuple(weights.shape)}")


def _starts(segments: Sequence[int]) -> int:
    """One bit for the first iteration of each segment."""
    return sum(1 << first for first in accumulate(segments[:-1], initial=0))


def _call(
    table: Sequence[Sequence[int]],
    steps: Sequence[float],
    iteration: Iteration,
    scalars: tuple[float, float, float, float],
    flags: int,
) -> None:
    found = library()
    assert found is not None
    triples = iteration.triples
    if iteration.dtype == torch.bfloat16:
        flags |= _BFLOAT16
    failed = found.diloco_orthogonal(
        _I64(len(table)),
        (_I64 * (8 * len(table)))(*chain.from_iterable(table)),
        (_F32 * len(table))(*steps),
        _I64(len(triples)),
        (_F32 * (3 * len(triples)))(*chain.from_iterable(triples)),
        (_F32 * 6)(iteration.div, iteration.eps, *scalars),
        _I64(flags),
        _I64(torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the packed matrices of an orthogonalisation")


@cache
def _probe(found: ctypes.CDLL) -> int:
    """The dtypes that the library is good for on this CPU, as bits."""
    return int(found.diloco_orthogonal_supported()) if hasattr(found, "diloco_orthogonal_supported") else 0
