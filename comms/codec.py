"""Codecs: a flat fp32 tensor to payload bytes and back, with every check that received bytes need.

The arithmetic is in `diloco.kernels.reference*`; the header around a payload is in `diloco.comms.frame`; error feedback
is in `diloco.comms.feedback`. A codec is a small frozen value: equal settings compare equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diloco.comms.feedback import ErrorFeedback
from diloco.errors import ConfigError, CorruptDataError, NonFiniteError, nearest
from diloco.kernels import reference as ref
from diloco.kernels import reference_blocks as blocks
from diloco.kernels import reference_stat as stat
from diloco.kernels import reference_topk as topk

__all__ = ["NAMES", "Codec", "ErrorFeedback", "Payload", "by_id", "get", "infer"]

Payload = bytes | bytearray | memoryview

NAMES = ("fp32", "fp16", "bf16", "int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4", "stat", "topk")
MAX_BLOCK = 1 << 16
MAX_CHUNK = 1 << 12


class Codec(Protocol):
    """What encodes a fragment's update. `block` is 0 for a codec without blocks, the chunk for topk."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int: ...

    def wire_size(self, n: int) -> int:
        """Payload bytes for `n` values."""
        ...

    def encode(self, tensor: Tensor) -> bytes:
        """Payload of a 1-D contiguous fp32 CPU tensor; NonFiniteError if it holds NaN or infinity."""
        ...

    def decode(self, payload: Payload, n: int) -> Tensor:
        """The `n` values (fp32, own memory); CorruptDataError for anything an encoder would not send."""
        ...

    def decode_add(self, payload: Payload, weight: float, out: Tensor) -> None:
        """``out += weight * decoded`` with two fp32 roundings, so that every node gets the same bits.

        Nothing is added if the payload is refused with CorruptDataError.
        """
        ...

    def norm(self, payload: Payload, n: int) -> float:
        """L2 norm of the decoded values, summed in fp64."""
        ...


class _Decoder:
    """decode and decode_add, which are the same for all codecs once the values come slice by slice."""

    __slots__ = ()

    def decode(self, payload: Payload, n: int) -> Tensor:
        out = torch.empty(n, dtype=torch.float32)
        for lo, part in self._values(payload, n):
            out[lo : lo + part.numel()] = part
        return out

    def decode_add(self, payload: Payload, weight: float, out: Tensor) -> None:
        out = _flat(out)
        for lo, part in self._values(payload, out.numel()):
            out[lo : lo + part.numel()].add_(part.mul_(weight))

    def norm(self, payload: Payload, n: int) -> float:
        return math.sqrt(sum(float(part.double().square_().sum()) for _, part in self._values(payload, n)))

    def _values(self, payload: Payload, n: int) -> Iterator[tuple[int, Tensor]]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Cast(_Decoder):
    """fp32, fp16, bf16."""

    name: str

    @property
    def id(self) -> int:
        return NAMES.index(self.name)

    @property
    def block(self) -> int:
        return 0

    def wire_size(self, n: int) -> int:
        return ref.cast_size(self.name, n)

    def encode(self, tensor: Tensor) -> bytes:
        tensor = _flat(tensor)
        _require_finite(tensor)
        return _to_bytes(ref.encode_cast(self.name, tensor))

    def _values(self, payload: Payload, n: int) -> Iterator[tuple[int, Tensor]]:
        data = _sized(self, payload, n)
        stored = data.view(ref.CAST_DTYPES[self.name])
        if not _all_finite(stored):
            raise CorruptDataError(f"{self.name} payload holds NaN or infinity among its {n} values")
        return ref.cast_values(self.name, data, n)


@dataclass(frozen=True, slots=True)
class _Block(_Decoder):
    """int8, e4m3, e5m2, e3m0, e2m1, nf4, int4."""

    name: str
    block: int

    @property
    def id(self) -> int:
        return NAMES.index(self.name)

    def wire_size(self, n: int) -> int:
        return blocks.block_size(self.name, n, self.block)

    def encode(self, tensor: Tensor) -> bytes:
        tensor = _flat(tensor)
        data = blocks.encode_blocks(self.name, tensor, self.block)
        # The scale of a block is finite exactly if all its values are: no further pass over the tensor is needed.
        bad = (~torch.isfinite(blocks.scales_of(data, tensor.numel(), self.block))).nonzero()
        if bad.numel():
            raise NonFiniteError(f"{self.name} cannot encode NaN or infinity: first in block {int(bad[0])}")
        return _to_bytes(data)

    def _values(self, payload: Payload, n: int) -> Iterator[tuple[int, Tensor]]:
        data = _sized(self, payload, n)
        scales = blocks.scales_of(data, n, self.block)
        bad = (~(torch.isfinite(scales) & (scales >= 0))).nonzero()
        if bad.numel():
            first = int(bad[0])
            raise CorruptDataError(
                f"{self.name} scale of block {first} is {float(scales[first])}, want finite >= 0"
            )
        if self.name in blocks.FP8_DTYPES:
            # e4m3fn has NaN at 7f alone, e5m2 infinity at 7c and NaN above it.
            largest = 0x7E if self.name == "e4m3" else 0x7B
            codes = blocks.codes_of(data, n, self.block)
            if any(bool(((part & 0x7F) > largest).any()) for part in ref.parts(codes)):
                raise CorruptDataError(f"{self.name} payload holds a NaN or infinity code")
        return blocks.block_values(self.name, data, n, self.block)


@dataclass(frozen=True, slots=True)
class _Stat(_Decoder):
    """stat: `bits` per value, one group per span, or one in all if `spans` is empty."""

    bits: int
    spans: tuple[int, ...] = ()

    @property
    def id(self) -> int:
        return NAMES.index("stat")

    @property
    def name(self) -> str:
        return "stat"

    @property
    def block(self) -> int:
        return 0

    def wire_size(self, n: int) -> int:
        return stat.stat_size(self._groups(n), self.bits)

    def encode(self, tensor: Tensor) -> bytes:
        tensor = _flat(tensor)
        _require_finite(tensor)
        return _to_bytes(stat.encode_stat(tensor, self._groups(tensor.numel()), self.bits))

    def _values(self, payload: Payload, n: int) -> Iterator[tuple[int, Tensor]]:
        data = _sized(self, payload, n)
        groups = self._groups(n)
        if not _all_finite(stat.constants_of(data, len(groups), self.bits)):
            raise CorruptDataError("stat payload holds NaN or infinity in its shifts or tables")
        return stat.stat_values(data, groups, self.bits)

    def _groups(self, n: int) -> tuple[int, ...]:
        if self.spans and sum(self.spans) != n:
            raise ConfigError(f"codec stat: spans cover {sum(self.spans)} values, the tensor has {n}")
        return self.spans or ((n,) if n else ())


@dataclass(frozen=True, slots=True)
class _TopK(_Decoder):
    """topk: the `k` largest of each `block` values, themselves coded by stat with `bits`."""

    k: int
    block: int
    bits: int

    @property
    def id(self) -> int:
        return NAMES.index("topk")

    @property
    def name(self) -> str:
        return "topk"

    def wire_size(self, n: int) -> int:
        return topk.topk_size(n, self.k, self.block, self.bits)

    def encode(self, tensor: Tensor) -> bytes:
        tensor = _flat(tensor)
        _require_finite(tensor)
        return _to_bytes(topk.encode_topk(tensor, self.k, self.block, self.bits))

    def _values(self, payload: Payload, n: int) -> Iterator[tuple[int, Tensor]]:
        data = _sized(self, payload, n)
        index = topk.indices_of(data, n, self.k, self.block)
        if bool((index >= self.block).any()) or bool((index[:, 1:] <= index[:, :-1]).any()):
            raise CorruptDataError(f"topk indices are not ascending below the chunk of {self.block}")
        inner = data[topk.index_bytes(n, self.k, self.block) :].clone()
        if not _all_finite(stat.constants_of(inner, 1 if n else 0, self.bits)):
            raise CorruptDataError("topk payload holds NaN or infinity in its shift or table")
        return topk.topk_values(data, n, self.k, self.block, self.bits)


def get(name: str, **options: Any) -> Codec:
    """The codec called `name`.

    Options: `block` for int8 .. int4 (a power of two, default 256, 64 for nf4); `bits` (2, 4 or 8, default 4) and
    `spans` (sizes of the groups) for stat; `k` (even, default 64), `chunk` (default 4096) and `bits` (default 2) for
    topk; `stochastic`, which may only be False. Raises ConfigError naming the option, its value and the fix.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown codec {name!r}{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    if options.pop("stochastic", False) is not False:
        raise ConfigError(f"codec {name}: stochastic rounding is not available; leave codec.stochastic false")
    if name in ref.CAST_DTYPES:
        _known_options(name, options, ())
        return _Cast(name)
    if name in blocks.DIVISOR:
        _known_options(name, options, ("block",))
        return _Block(
            name, _power_of_two(name, "block", options.get("block", 64 if name == "nf4" else 256), MAX_BLOCK)
        )
    if name == "stat":
        _known_options(name, options, ("bits", "spans"))
        return _Stat(_bits(name, options.get("bits", 4)), _spans(options.get("spans", ())))
    _known_options(name, options, ("k", "chunk", "bits"))
    chunk = _power_of_two(name, "chunk", options.get("chunk", 4096), MAX_CHUNK)
    k = options.get("k", 64)
    if type(k) is not int or k < 2 or k % 2 or k > chunk:
        raise ConfigError(f"codec topk: k={k!r} must be an even integer from 2 to the chunk of {chunk}")
    return _TopK(k, chunk, _bits(name, options.get("bits", 2)))


def by_id(id: int, block: int = 0) -> Codec:
    """The codec with wire number `id` and `block` (or chunk), 0 where it has none. Raises CorruptDataError.

    `bits` and `k` have their defaults; `infer` finds them from a payload's size.
    """
    if not 0 <= id < len(NAMES):
        raise CorruptDataError(f"unknown codec id {id}, want 0..{len(NAMES) - 1}")
    name = NAMES[id]
    options: dict[str, int] = {}
    if name == "topk":
        options = {"chunk": block, "k": min(64, block)}
    elif name in blocks.DIVISOR:
        options = {"block": block}
    elif block:
        raise CorruptDataError(f"codec {name} has no blocks, yet the block is {block}")
    try:
        return get(name, **options)
    except ConfigError as error:
        raise CorruptDataError(str(error)) from error


def infer(id: int, block: int, n: int, payload_len: int) -> Codec:
    """The codec whose payload of `n` values has `payload_len` bytes; CorruptDataError if there is none.

    Only stat (one group) and topk (2-bit values) have a choice: their size grows with `bits` and `k`, so that
    at most one fits.
    """
    codec = by_id(id, block)
    if codec.wire_size(n) == payload_len:
        return codec
    others: list[Codec] = []
    if codec.name == "stat":
        others = [get("stat", bits=bits) for bits in stat.BITS]
    elif codec.name == "topk":
        others = [get("topk", k=k, chunk=block) for k in range(2, block + 1, 2)]
    for other in others:
        if other.wire_size(n) == payload_len:
            return other
    raise CorruptDataError(
        f"{codec.name} payload of {payload_len} bytes, want {codec.wire_size(n)} for n={n}"
    )


def _known_options(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            takes = ", ".join((*known, "stochastic"))
            raise ConfigError(
                f"codec {name}: unknown option {option!r}{nearest(option, known)}; it takes {takes}"
            )


def _power_of_two(name: str, option: str, value: Any, largest: int) -> int:
    if type(value) is not int or not 2 <= value <= largest or value & (value - 1):
        raise ConfigError(f"codec {name}: {option}={value!r} must be a power of two from 2 to {largest}")
    return value


def _bits(name: str, value: Any) -> int:
    if type(value) is not int or value not in stat.BITS:
        raise ConfigError(f"codec {name}: bits={value!r} must be 2, 4 or 8")
    return value


def _spans(value: Any) -> tuple[int, ...]:
    spans = tuple(value)
    if not all(type(span) is int and span > 0 for span in spans):
        raise ConfigError(f"codec stat: spans={value!r} must be positive integers")
    return spans


def _flat(tensor: Tensor) -> Tensor:
    """The tensor without its gradient history, if it has the shape and type a codec needs."""
    if (
        tensor.dtype != torch.float32
        or tensor.dim() != 1
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
    ):
        raise TypeError(
            f"a codec needs a 1-D contiguous float32 CPU tensor, got {tensor.dtype} {tuple(tensor.shape)} "
            f"on {tensor.device}; use tensor.detach().float().cpu().reshape(-1)"
        )
    return tensor.detach()


def _all_finite(values: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in ref.parts(values))


def _require_finite(tensor: Tensor) -> None:
    if not _all_finite(tensor):
        count = sum(int((~torch.isfinite(part)).sum()) for part in ref.parts(tensor))
        raise NonFiniteError(f"cannot encode NaN or infinity: {count} of {tensor.numel()} values")


def _to_bytes(data: Tensor) -> bytes:
    return data.numpy().tobytes()


def _sized(codec: Codec, payload: Payload, n: int) -> Tensor:
    """The payload as an aligned uint8 tensor of its own, after a check of its size."""
    size, want = memoryview(payload).nbytes, codec.wire_size(n)
    if size != want:
        raise CorruptDataError(f"{codec.name} payload of {size} bytes, want {want} for n={n}")
    data = torch.empty(want, dtype=torch.uint8)
    data.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
    return data
