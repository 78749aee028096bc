"""What a codec is set to, as the kernels take it: a flat frozen value with the size of a payload."""

from __future__ import annotations

from dataclasses import dataclass

from diloco.kernels import reference as ref
from diloco.kernels import reference_blocks as blocks
from diloco.kernels import reference_stat as stat
from diloco.kernels import reference_topk as topk

CODECS = (*ref.CAST_DTYPES, *blocks.DIVISOR, "stat", "topk")


@dataclass(frozen=True, slots=True)
class Settings:
    """`block` counts values for int8 .. int4 and is the chunk of topk; `bits` is for stat and topk, `k` for topk.

    `groups` are the sizes of stat's groups, which must sum to n; empty means one group.
    """

    codec: str
    block: int = 0
    bits: int = 0
    k: int = 0
    groups: tuple[int, ...] = ()

    @property
    def family(self) -> str:
        """cast, block, stat or topk."""
        if self.codec in ref.CAST_DTYPES:
            return "cast"
        return "block" if self.codec in blocks.DIVISOR else self.codec

    def spans(self, n: int) -> tuple[int, ...]:
        """The groups that `n` values form for stat."""
        return self.groups or ((n,) if n else ())

    def size(self, n: int) -> int:
        """Payload bytes of `n` values."""
        match self.family:
            case "cast":
                return ref.cast_size(self.codec, n)
            case "block":
                return blocks.block_size(self.codec, n, self.block)
            case "stat":
                return stat.stat_size(self.spans(n), self.bits)
        return topk.topk_size(n, self.k, self.block, self.bits)


def settings(
    codec: str,
    block: int | None = None,
    bits: int | None = None,
    k: int | None = None,
    groups: tuple[int, ...] = (),
) -> Settings:
    """Settings with the codec's defaults: block 256 (nf4 64, topk 4096), bits 4 (topk 2), k 64.

    Raises ValueError for an unknown codec, or a value that the layout of its payload cannot have.
    """
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    made = Settings(codec)
    match made.family:
        case "block":
            made = Settings(codec, (64 if codec == "nf4" else 256) if block is None else block)
        case "stat":
            made = Settings(codec, bits=4 if bits is None else bits, groups=tuple(groups))
        case "topk":
            made = Settings(
                codec,
                4096 if block is None else block,
                2 if bits is None else bits,
                64 if k is None else k,
            )
    if made.family in ("block", "topk") and (made.block < 2 or made.block & (made.block - 1)):
        raise ValueError(f"codec {codec}: block={made.block} must be a power of two from 2 up")
    if made.family in ("stat", "topk") and made.bits not in stat.BITS:
        raise ValueError(f"codec {codec}: bits={made.bits} must be 2, 4 or 8")
    if made.family == "topk" and (made.k < 2 or made.k % 2 or made.k > made.block or made.block > 4096):
        raise ValueError(f"codec topk: k={made.k} must be even, from 2 to the chunk of {made.block} <= 4096")
    return made
