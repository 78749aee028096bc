"""Codecs: a flat fp32 tensor to payload bytes and back, with every check that received bytes need.

The arithmetic is in `diloco.kernels.ops`; the header around a payload is in `diloco.comms.frame`; error feedback
is in `diloco.comms.feedback`. A codec is a small frozen value: equal settings compare equal.
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diloco.codec_section import MAX_BLOCK, MAX_CHUNK
from diloco.comms.codec_options import bits_of, known_options, power_of_two, spans_of
from diloco.comms.feedback import ErrorFeedback
from diloco.comms.payload import Payload, all_finite, flat, require_finite, sized, to_bytes
from diloco.errors import ConfigError, CorruptDataError, NonFiniteError, nearest
from diloco.kernels import cpu, ops
from diloco.kernels import reference as ref
from diloco.kernels import reference_blocks as blocks
from diloco.kernels import reference_stat as stat
from diloco.kernels import reference_topk as topk
from diloco.kernels.settings import Settings

__all__ = ["NAMES", "Codec", "ErrorFeedback", "Payload", "by_id", "get", "infer"]

NAMES = ("fp32", "fp16", "bf16", "int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4", "stat", "topk")
Key = tuple[int, ...]  # unsigned 64-bit numbers that name a message


class Codec(Protocol):
    """What encodes a fragment's update. `block` is 0 for a codec without blocks, the chunk for topk."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def stochastic(self) -> bool: ...

    def wire_size(self, n: int) -> int:
        """Payload bytes for `n` values."""
        ...

    def encode(self, tensor: Tensor, key: Key = ()) -> bytes:
        """Payload of a 1-D contiguous fp32 CPU tensor; NonFiniteError if it holds NaN or infinity.

        Stochastic rounding is a function of the codec's seed and `key`, which names the message; others ignore it.
        """
        ...

    def encode_rest(
        self, delta: Tensor, error: Tensor | None, beta: float, residual: Tensor, key: Key = ()
    ) -> bytes:
        """Payload of e = beta*`error` + `delta`; `residual` <- e - decoded, undefined after NonFiniteError."""
        ...

    def decode(self, payload: Payload, n: int) -> Tensor:
        """The `n` values (fp32, own memory); CorruptDataError for anything an encoder would not send."""
        ...

    def decode_add(self, payload: Payload, weight: float, out: Tensor) -> None:
        """``out += weight * decoded`` with two fp32 roundings, so that every node gets the same bits.

        Nothing is added if the payload is refused with CorruptDataError.
        """
        ...

    def decode_add_all(self, payloads: Sequence[Payload], weights: Sequence[float], out: Tensor) -> None:
        """`decode_add` of each in this order, in one pass; nothing is added if any is refused."""
        ...

    def norm(self, payload: Payload, n: int) -> float:
        """L2 norm of the decoded values, summed in fp64."""
        ...

    def checked(self, payload: Payload, n: int) -> Any:
        """The payload after every check, not copied, as `add_checked` takes it; or CorruptDataError."""
        ...

    def add_checked(self, payloads: Sequence[Any], weights: Sequence[float], out: Tensor) -> None:
        """`decode_add` of what `checked` gave, in this order."""
        ...


class _OnKernels(ABC):
    """What is the same for all codecs once a payload is known to be sound (`checked`)."""

    __slots__ = ()

    @property
    def stochastic(self) -> bool:
        return False

    def encode(self, tensor: Tensor, key: Key = ()) -> bytes:
        tensor = flat(tensor)
        return self._sent(ops.encode(x=tensor, seed=self._draws(key), **self._options()), tensor)

    def encode_rest(
        self, delta: Tensor, error: Tensor | None, beta: float, residual: Tensor, key: Key = ()
    ) -> bytes:
        delta, draws = flat(delta), self._draws(key)
        if error is None:
            residual.zero_()
        made = ops.encode(x=delta, error=error, residual=residual, beta=beta, seed=draws, **self._options())
        return self._sent(made, delta)

    def decode(self, payload: Payload, n: int) -> Tensor:
        out = torch.empty(n, dtype=torch.float32)
        ops.merge(out, self.checked(payload, n), 0.0, **self._options())
        return out

    def decode_add(self, payload: Payload, weight: float, out: Tensor) -> None:
        self.decode_add_all((payload,), (weight,), out)

    def decode_add_all(self, payloads: Sequence[Payload], weights: Sequence[float], out: Tensor) -> None:
        out = flat(out)
        self.add_checked([self.checked(payload, out.numel()) for payload in payloads], weights, out)

    def add_checked(self, payloads: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        ops.decode_accumulate(payloads=payloads, weights=weights, out=out, **self._options())

    def norm(self, payload: Payload, n: int) -> float:
        return math.sqrt(
            float(ops.squared_norms(payloads=[self.checked(payload, n)], n=n, **self._options()))
        )

    def on_kernels(self, key: Key) -> dict[str, Any]:
        """The codec, and how it rounds the message `key`, as `diloco.kernels.ops` takes them."""
        return {"seed": self._draws(key), **self._options()}

    def _sent(self, made: ops.Encoded, tensor: Tensor) -> bytes:
        if math.isnan(float(made.squared_norm)):
            require_finite(tensor)
            raise NonFiniteError(
                "cannot encode NaN or infinity: the update and what was left of the last overflow"
            )
        return to_bytes(made.payload)

    def _draws(self, key: Key) -> int | None:
        """The seed of this message's stochastic rounding; None rounds to nearest."""
        return None

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The codec as `ops` takes it."""

    @abstractmethod
    def checked(self, payload: Payload, n: int) -> Tensor:
        """The bytes of `payload` (uint8, not copied) after every check, or CorruptDataError."""


@dataclass(frozen=True, slots=True)
class _Cast(_OnKernels):
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

    def _options(self) -> dict[str, Any]:
        return {"codec": self.name}

    def checked(self, payload: Payload, n: int) -> Tensor:
        data = sized(self.name, payload, self.wire_size(n), n)
        fine = cpu.holds_numbers_only(Settings(self.name), data, n)
        if fine is None:
            fine = all_finite(data.clone().view(ref.CAST_DTYPES[self.name]))
        if not fine:
            raise CorruptDataError(f"{self.name} payload holds NaN or infinity among its {n} values")
        return data


@dataclass(frozen=True, slots=True)
class _Block(_OnKernels):
    """int8, e4m3, e5m2, e3m0, e2m1, nf4, int4. `seed` is the run's, for `stochastic` rounding alone."""

    name: str
    block: int
    stochastic: bool = False
    seed: int = 0

    @property
    def id(self) -> int:
        return NAMES.index(self.name)

    def wire_size(self, n: int) -> int:
        return blocks.block_size(self.name, n, self.block)

    def _draws(self, key: Key) -> int | None:
        if not self.stochastic:
            return None
        named = struct.pack(f"<{1 + len(key)}Q", self.seed, *key)
        # 63 bits: the operators' integers have a sign.
        return int.from_bytes(hashlib.sha256(named).digest()[:8], "little") >> 1

    def _options(self) -> dict[str, Any]:
        return {"codec": self.name, "block": self.block}

    def checked(self, payload: Payload, n: int) -> Tensor:
        data = sized(self.name, payload, self.wire_size(n), n)
        # A payload starts at any address; the copy of its scales is aligned for fp32.
        scales = blocks.scales_of(data[: 4 * blocks.scale_count(n, self.block)].clone(), n, self.block)
        bad = (~(torch.isfinite(scales) & (scales >= 0))).nonzero()
        if bad.numel():
            first = int(bad[0])
            raise CorruptDataError(
                f"{self.name} scale of block {first} is {float(scales[first])}, want finite >= 0"
            )
        if self.name in blocks.FP8_DTYPES:
            fine = cpu.holds_numbers_only(Settings(self.name, self.block), data, n)
            if fine is None:
                # e4m3fn has NaN at 7f alone, e5m2 infinity at 7c and NaN above it.
                largest = 0x7E if self.name == "e4m3" else 0x7B
                codes = blocks.codes_of(data, n, self.block)
                fine = not any(bool(((part & 0x7F) > largest).any()) for part in ref.parts(codes))
            if not fine:
                raise CorruptDataError(f"{self.name} payload holds a NaN or infinity code")
        return data


@dataclass(frozen=True, slots=True)
class _Stat(_OnKernels):
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

    def _options(self) -> dict[str, Any]:
        return {"codec": "stat", "bits": self.bits, "groups": self.spans}

    def checked(self, payload: Payload, n: int) -> Tensor:
        data = sized(self.name, payload, self.wire_size(n), n)
        groups = len(self._groups(n))
        constants = data[: 4 * groups * (1 + (1 << self.bits))].clone()
        if not all_finite(stat.constants_of(constants, groups, self.bits)):
            raise CorruptDataError("stat payload holds NaN or infinity in its shifts or tables")
        return data

    def _groups(self, n: int) -> tuple[int, ...]:
        if self.spans and sum(self.spans) != n:
            raise ConfigError(f"codec stat: spans cover {sum(self.spans)} values, the tensor has {n}")
        return self.spans or ((n,) if n else ())


@dataclass(frozen=True, slots=True)
class _TopK(_OnKernels):
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

    def _options(self) -> dict[str, Any]:
        return {"codec": "topk", "k": self.k, "block": self.block, "bits": self.bits}

    def checked(self, payload: Payload, n: int) -> Tensor:
        data = sized(self.name, payload, self.wire_size(n), n)
        index = topk.indices_of(data, n, self.k, self.block)
        if bool((index >= self.block).any()) or bool((index[:, 1:] <= index[:, :-1]).any()):
            raise CorruptDataError(f"topk indices are not ascending below the chunk of {self.block}")
        at, groups = topk.index_bytes(n, self.k, self.block), 1 if n else 0
        constants = data[at : at + 4 * groups * (1 + (1 << self.bits))].clone()
        if not all_finite(stat.constants_of(constants, groups, self.bits)):
            raise CorruptDataError("topk payload holds NaN or infinity in its shift or table")
        return data


def get(name: str, **options: Any) -> Codec:
    """The codec called `name`.

    Options: `block` (a power of two, default 256, 64 for nf4), `stochastic` (round at random, without bias) and its
    `seed` for int8 .. int4; `bits` (2, 4 or 8, default 4) and `spans` (sizes of the groups) for stat; `k` (even,
    default 64), `chunk` (default 4096) and `bits` (default 2) for topk. ``stochastic=False`` fits all.
    Raises ConfigError naming the option, its value and the fix.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown codec {name!r}{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    stochastic, seed = options.pop("stochastic", False), options.pop("seed", 0)
    if type(stochastic) is not bool or (stochastic and name not in blocks.DIVISOR):
        raise ConfigError(
            f"codec {name}: stochastic={stochastic!r} is for {', '.join(blocks.DIVISOR)}; leave codec.stochastic false"
        )
    if name in ref.CAST_DTYPES:
        known_options(name, options, ())
        return _Cast(name)
    if name in blocks.DIVISOR:
        known_options(name, options, ("block",))
        block = power_of_two(name, "block", options.get("block", 64 if name == "nf4" else 256), MAX_BLOCK)
        return _Block(name, block, stochastic, seed if stochastic else 0)
    if name == "stat":
        known_options(name, options, ("bits", "spans"))
        return _Stat(bits_of(name, options.get("bits", 4)), spans_of(options.get("spans", ())))
    known_options(name, options, ("k", "chunk", "bits"))
    chunk = power_of_two(name, "chunk", options.get("chunk", 4096), MAX_CHUNK)
    k = options.get("k", 64)
    if type(k) is not int or k < 2 or k % 2 or k > chunk:
        raise ConfigError(f"codec topk: k={k!r} must be an even integer from 2 to the chunk of {chunk}")
    return _TopK(k, chunk, bits_of(name, options.get("bits", 2)))


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
