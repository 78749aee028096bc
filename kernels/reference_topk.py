"""Plain-torch definition of the sparse codec `topk` (SparseLoCo 2508.15706): the k largest |x| of every chunk.

Layout of a payload: the indices of all chunks, ascending within a chunk, 12 bits each, two in three bytes; then all kept
values in the same order, encoded by `stat` as one group. The last chunk is padded with zeros to full length. The input
is cut into flat chunks; callers that want 64x64 tiles of a matrix reorder it first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diloco.kernels.reference import SLICE
from diloco.kernels.reference_stat import encode_stat, stat_size, stat_values


def chunk_count(n: int, chunk: int) -> int:
    """Chunks of `n` values; the last one may be padded."""
    return (n + chunk - 1) // chunk


def inner_groups(n: int, k: int, chunk: int) -> tuple[int, ...]:
    """The groups the kept values form for `stat`: one, or none without values."""
    return (chunk_count(n, chunk) * k,) if n else ()


def index_bytes(n: int, k: int, chunk: int) -> int:
    """Bytes of all indices: 1.5*k for each chunk (`k` is even)."""
    return chunk_count(n, chunk) * (k // 2) * 3


def topk_size(n: int, k: int, chunk: int, bits: int) -> int:
    """Payload bytes: indices and `stat` payload of the kept values."""
    return index_bytes(n, k, chunk) + stat_size(inner_groups(n, k, chunk), bits)


def encode_topk(x: Tensor, k: int, chunk: int, bits: int) -> Tensor:
    """Encode fp32 `x` [n]; uint8 [topk_size]. Ties in |x| go to the lower index."""
    n = x.numel()
    chunks = chunk_count(n, chunk)
    indices = torch.empty(chunks, k, dtype=torch.int32, device=x.device)
    kept = torch.empty(chunks, k, dtype=torch.float32, device=x.device)
    step = max(1, SLICE // chunk)
    for first in range(0, chunks, step):
        part = x[first * chunk : (first + step) * chunk]
        if part.numel() % chunk:
            part = torch.nn.functional.pad(part, (0, -part.numel() % chunk))
        rows = part.view(-1, chunk)
        index = _largest(rows.abs(), k)
        indices[first : first + step] = index
        kept[first : first + step] = rows.gather(1, index)
    values = encode_stat(kept.view(-1), inner_groups(n, k, chunk), bits)
    return torch.cat((_pack12(indices.view(-1)), values))


def indices_of(payload: Tensor, n: int, k: int, chunk: int) -> Tensor:
    """Indices within the chunk, int32 [chunks, k]."""
    packed = payload[: index_bytes(n, k, chunk)].view(-1, 3).to(torch.int32)
    b0, b1, b2 = packed.unbind(1)
    pairs = torch.stack((b0 | ((b1 & 15) << 8), (b1 >> 4) | (b2 << 4)), dim=1)
    return pairs.view(chunk_count(n, chunk), k)


def topk_values(payload: Tensor, n: int, k: int, chunk: int, bits: int) -> Iterator[tuple[int, Tensor]]:
    """The `n` dense values of uint8 `payload` as fresh fp32 slices; indices must be below `chunk` and distinct."""
    index = indices_of(payload, n, k, chunk).to(torch.int64)
    kept = torch.empty(index.numel(), dtype=torch.float32, device=payload.device)
    # The inner payload starts wherever the indices end; a copy of its own is aligned for the fp32 views.
    inner = payload[index_bytes(n, k, chunk) :].clone()
    for lo, values in stat_values(inner, inner_groups(n, k, chunk), bits):
        kept[lo : lo + values.numel()] = values
    kept = kept.view(index.shape)
    step = max(1, SLICE // chunk)
    for first in range(0, index.shape[0], step):
        rows = index[first : first + step]
        dense = torch.zeros(rows.shape[0], chunk, dtype=torch.float32, device=payload.device)
        dense.scatter_(1, rows, kept[first : first + step])
        yield first * chunk, dense.view(-1)[: n - first * chunk]


def _largest(magnitude: Tensor, k: int) -> Tensor:
    """Ascending indices (int64 [rows, k]) of the k largest of each row, ties to the lower index."""
    last = magnitude.topk(k, dim=1).values[:, -1:]
    above, equal = magnitude > last, magnitude == last
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def _pack12(index: Tensor) -> Tensor:
    a, b = index.view(-1, 2).unbind(1)
    return torch.stack((a & 255, (a >> 8) | ((b & 15) << 4), b >> 4), dim=1).to(torch.uint8).view(-1)
