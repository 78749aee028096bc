"""Codecs made of codecs: one after another over a fragment's spans, and tiles of a matrix instead of its rows.

Both are codecs like those of `diloco.comms.codec`, so that frames, error feedback and downlinks need not know. Which
part of which fragment has which codec is decided in `diloco.comms.uplink`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diloco.comms.codec import Codec, Key
from diloco.comms.payload import Payload, flat, sized
from diloco.errors import ConfigError

MIXED = 255  # its number in a frame, far from those of the codecs that have a name


@dataclass(frozen=True, slots=True)
class Mixed:
    """`parts`: (number of values, its codec), in the order of the values; payloads follow each other without gaps.

    Stochastic rounding adds the part's number to the key, so that no two parts draw the same numbers.
    """

    parts: tuple[tuple[int, Codec], ...]

    @property
    def id(self) -> int:
        return MIXED

    @property
    def name(self) -> str:
        return "mixed"

    @property
    def block(self) -> int:
        return 0

    @property
    def stochastic(self) -> bool:
        return any(codec.stochastic for _, codec in self.parts)

    @property
    def spans(self) -> tuple[int, ...]:
        """Sizes of the parts: a frame says by a flag that its reader must know them."""
        return tuple(n for n, _ in self.parts)

    def wire_size(self, n: int) -> int:
        self._require(n)
        return sum(codec.wire_size(count) for count, codec in self.parts)

    def encode(self, tensor: Tensor, key: Key = ()) -> bytes:
        tensor = flat(tensor)
        self._require(tensor.numel())
        return b"".join(codec.encode(tensor[at], (*key, i)) for i, at, codec in self._places())

    def encode_rest(
        self, delta: Tensor, error: Tensor | None, beta: float, residual: Tensor, key: Key = ()
    ) -> bytes:
        delta = flat(delta)
        self._require(delta.numel())
        return b"".join(
            codec.encode_rest(delta[at], None if error is None else error[at], beta, residual[at], (*key, i))
            for i, at, codec in self._places()
        )

    def decode(self, payload: Payload, n: int) -> Tensor:
        pieces = self._pieces(payload, n)
        values = [
            codec.decode(piece, count) for piece, (count, codec) in zip(pieces, self.parts, strict=True)
        ]
        return torch.cat([torch.empty(0), *values])

    def decode_add(self, payload: Payload, weight: float, out: Tensor) -> None:
        self.decode_add_all((payload,), (weight,), out)

    def decode_add_all(self, payloads: Sequence[Payload], weights: Sequence[float], out: Tensor) -> None:
        out = flat(out)
        self.add_checked([self.checked(payload, out.numel()) for payload in payloads], weights, out)

    def norm(self, payload: Payload, n: int) -> float:
        pieces = self._pieces(payload, n)
        return math.hypot(*(c.norm(piece, m) for piece, (m, c) in zip(pieces, self.parts, strict=True)))

    def checked(self, payload: Payload, n: int) -> list[Any]:
        pieces = self._pieces(payload, n)
        return [codec.checked(piece, count) for piece, (count, codec) in zip(pieces, self.parts, strict=True)]

    def add_checked(self, payloads: Sequence[Any], weights: Sequence[float], out: Tensor) -> None:
        for i, at, codec in self._places():
            codec.add_checked([payload[i] for payload in payloads], weights, out[at])

    def _places(self) -> Iterator[tuple[int, slice, Codec]]:
        start = 0
        for i, (count, codec) in enumerate(self.parts):
            yield i, slice(start, start + count), codec
            start += count

    def _pieces(self, payload: Payload, n: int) -> list[memoryview]:
        """Each part's payload, once the whole has the right length."""
        sized(self.name, payload, self.wire_size(n), n)
        view, start, pieces = memoryview(payload).cast("B"), 0, []
        for count, codec in self.parts:
            size = codec.wire_size(count)
            pieces.append(view[start : start + size])
            start += size
        return pieces

    def _require(self, n: int) -> None:
        if n != sum(self.spans):
            raise ConfigError(f"codec mixed: its parts cover {sum(self.spans)} values, the tensor has {n}")


@dataclass(frozen=True, slots=True)
class Tiled:
    """`inner` over the square tiles of a row-major matrix [rows, columns], tile after tile, each row by row.

    A tile has as many values as `inner` has in a chunk, and both sides of the matrix are multiples of its side
    (SparseLoCo 2508.15706: 64x64 tiles, chunks of 4096).
    """

    inner: Codec
    rows: int
    columns: int

    @property
    def id(self) -> int:
        return self.inner.id

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def stochastic(self) -> bool:
        return self.inner.stochastic

    @property
    def spans(self) -> tuple[int, ...]:
        return (self.rows * self.columns,)

    def wire_size(self, n: int) -> int:
        return self.inner.wire_size(n)

    def encode(self, tensor: Tensor, key: Key = ()) -> bytes:
        return self.inner.encode(self._tiles(flat(tensor)), key)

    def encode_rest(
        self, delta: Tensor, error: Tensor | None, beta: float, residual: Tensor, key: Key = ()
    ) -> bytes:
        before = None if error is None else self._tiles(error)
        rest = torch.empty_like(residual)
        payload = self.inner.encode_rest(self._tiles(flat(delta)), before, beta, rest, key)
        residual.copy_(self._matrix(rest))
        return payload

    def decode(self, payload: Payload, n: int) -> Tensor:
        return self._matrix(self.inner.decode(payload, n))

    def decode_add(self, payload: Payload, weight: float, out: Tensor) -> None:
        self.decode_add_all((payload,), (weight,), out)

    def decode_add_all(self, payloads: Sequence[Payload], weights: Sequence[float], out: Tensor) -> None:
        out = flat(out)
        self.add_checked([self.checked(payload, out.numel()) for payload in payloads], weights, out)

    def norm(self, payload: Payload, n: int) -> float:
        return self.inner.norm(payload, n)

    def checked(self, payload: Payload, n: int) -> Any:
        return self.inner.checked(payload, n)

    def add_checked(self, payloads: Sequence[Any], weights: Sequence[float], out: Tensor) -> None:
        tiles = self._tiles(out)
        self.inner.add_checked(payloads, weights, tiles)
        out.copy_(self._matrix(tiles))

    def _tiles(self, matrix: Tensor) -> Tensor:
        side = math.isqrt(self.block)
        cut = matrix.view(self.rows // side, side, self.columns // side, side)
        return cut.transpose(1, 2).contiguous().view(-1)

    def _matrix(self, tiles: Tensor) -> Tensor:
        side = math.isqrt(self.block)
        laid = tiles.view(self.rows // side, self.columns // side, side, side)
        return laid.transpose(1, 2).reshape(-1)
