"""The [codec] section: its keys, their defaults, and what is impossible about a combination.

Nothing here needs torch. Turning the section into codecs is `diloco.comms.uplink`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diloco.errors import nearest

BLOCK_CODECS = ("int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4")
MAX_BLOCK = 1 << 16
MAX_CHUNK = 1 << 12
CODECS = ("fp32", "fp16", "bf16", *BLOCK_CODECS, "stat", "topk")


class Roles(BaseModel):
    """[codec.roles]: the codec of the parameters of one role, as `diloco params` tells it; unset: `codec.up`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    matrix: str | None = None
    embed: str | None = None
    head: str | None = None
    router: str | None = None
    scalar: str | None = None


class Codec(BaseModel):
    """How contributions and updates are quantised."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    up: str = "e3m0"
    down: Literal["relay", "mean_q", "q4_ef", "g_fp32", "g_bf16"] = "relay"
    roles: Roles = Roles()
    groups: Literal["fragment", "tensor", "row"] = "fragment"  # what stat and topk take as one
    block: int | None = Field(
        None, ge=1
    )  # values that share a scale; None: the codec's own, 64 for nf4, else 256
    bits: Literal[2, 4, 8] | None = None  # per value of stat, or kept by topk; None: 4 for stat, 2 for topk
    stochastic: bool = False
    ef: Literal["off", "on"] = "off"
    ef_beta: float = Field(0.95, ge=0, le=1)
    ef_recover: bool = False  # what a late round's merge takes away of its work goes into the error feedback
    topk: int = Field(64, ge=2)
    chunk: int = Field(4096, ge=2)

    def names(self) -> dict[str, str]:
        """Every codec in use, by the key that names it."""
        given = {f"codec.roles.{role}": name for role, name in self.roles}
        return {"codec.up": self.up, **{key: name for key, name in given.items() if name is not None}}


def codec_problems(c: Codec) -> list[str]:
    """In words, what cannot work in this section; each names the key, the value and the fix."""
    found, used = [], c.names()
    for key, name in used.items():
        if name not in CODECS:
            found.append(
                f"{key} = {name!r} is no codec{nearest(name, CODECS)}; use one of {', '.join(CODECS)}"
            )
    blocks, sparse = [n for n in used.values() if n in BLOCK_CODECS], "topk" in used.values()
    if c.block is not None and (c.block & (c.block - 1) or (blocks and not 2 <= c.block <= MAX_BLOCK)):
        found.append(f"codec.block = {c.block} must be a power of two from 2 to {MAX_BLOCK}, such as 256")
    if c.topk % 2:
        found.append(f"codec.topk = {c.topk} must be even: two indices share three bytes")
    if sparse and (c.chunk & (c.chunk - 1) or c.chunk > MAX_CHUNK):
        found.append(f"codec.chunk = {c.chunk} must be a power of two from 2 to {MAX_CHUNK}")
    if sparse and c.topk > c.chunk:
        found.append(f"codec.topk = {c.topk} keeps more than the codec.chunk = {c.chunk} values of a chunk")
    if c.stochastic:
        # Where nothing is rounded, nothing can be rounded at random either: fp32 beside others is fine.
        wrong = {k: n for k, n in used.items() if n in CODECS and n not in (*BLOCK_CODECS, "fp32")}
        if not wrong and not blocks:
            wrong = {"codec.up": c.up} if c.up in CODECS else {}
        found += [
            f"codec.stochastic = True cannot be combined with {key} = {name!r}, which has no stochastic rounding: "
            f"use one of {', '.join(BLOCK_CODECS)}"
            for key, name in wrong.items()
        ]
    if c.groups != "fragment" and not {"stat", "topk"}.intersection(used.values()):
        found.append(
            f"codec.groups = {c.groups!r} has an effect with the codecs 'stat' and 'topk' only: use 'fragment'"
        )
    if c.groups == "row" and "stat" not in used.values():
        found.append("codec.groups = 'row' is for the codec 'stat': with 'topk' use 'tensor'")
    return found
