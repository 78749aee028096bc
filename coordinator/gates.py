"""What a contribution must satisfy before it may count. Pure checks, cheapest first; no state.

Each refusal has a cause, one word of `CAUSES`: it is counted by it, and the sender hears it with the details.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.comms.codec import Codec
from diloco.comms.frame import NORM_TOLERANCE, FrameHeader, read_header, unpack
from diloco.comms.messages import Buffer
from diloco.coordinator.membership import Member
from diloco.errors import CorruptDataError
from diloco.fragments import FragmentPlan

# stale: from before the newest commit (not bad, only late). ahead: from after it. The others are bad ones.
# quarantined: earlier ones were bad. lease: made with data that is not the sender's (it was silent for too long).
CAUSES = ("corrupt", "ahead", "stale", "steps", "tokens", "values", "norm", "quarantined", "lease")

MAX_NORM = 1e18  # its square still is an fp32 number, so no outer optimizer can overflow
MAX_TOKENS_PER_STEP = 1 << 32
MAX_SHARD = 1 << 50  # tokens
TOKEN_FACTOR = 8  # how far tokens per step may be from what the same worker has had so far, either way


class Unfit(CorruptDataError):
    """A contribution that must not count; `cause` is one of `CAUSES`."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Checked:
    header: FrameHeader
    values: Tensor


def check_contribution(
    frame: Buffer,
    plan: FragmentPlan,
    fragment: int,
    run_hash: int,
    codec: Codec,
    member: Member | None = None,
    number: int | None = None,
    version: int | None = None,
) -> Checked:
    """Decode a frame if everything about it is as announced; Unfit says what is not.

    `member`, `number` (its round) and `version` (the newest commit) are compared with the header when given.
    """
    header, payload = check_header(frame, plan, fragment, run_hash, codec, member, number, version)
    try:
        values = codec.decode(payload, header.n)
    except CorruptDataError as error:
        raise Unfit("values", str(error)) from None
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    if not norm <= MAX_NORM:
        cause = "norm" if math.isfinite(norm) else "values"
        raise Unfit(cause, f"the decoded values have norm {norm:g}, want at most {MAX_NORM:g}")
    if abs(norm - header.l2norm) > NORM_TOLERANCE * max(norm, header.l2norm):
        raise Unfit("norm", f"decoded norm {norm:g} is not the header's {header.l2norm:g}")
    return Checked(header, values)


def check_header(
    frame: Buffer,
    plan: FragmentPlan,
    fragment: int,
    run_hash: int,
    codec: Codec,
    member: Member | None,
    number: int | None,
    version: int | None,
) -> tuple[FrameHeader, Buffer]:
    """Header and payload, if the frame is whole and is what the message around it says: all that needs no decoding."""
    if not 0 <= fragment < len(plan.fragments):
        raise Unfit("corrupt", f"fragment {fragment} does not exist; the plan has {len(plan.fragments)}")
    numel = plan.fragments[fragment].numel
    try:
        header = read_header(frame, max_payload=codec.wire_size(numel))
    except CorruptDataError as error:
        raise Unfit("corrupt", str(error)) from None
    expect = {"fragment": fragment, "run_id": run_hash, "n": numel, "codec": codec.id, "block": codec.block}
    if member is not None:
        expect |= {"worker": member.index, "incarnation": member.incarnation}
    if number is not None:
        expect["round"] = number
    for name, value in expect.items():
        if getattr(header, name) != value:
            raise Unfit(
                "corrupt", f"frame header {name} = {getattr(header, name)} where {value} was expected"
            )
    try:
        _, payload = unpack(frame, codec=codec)
    except CorruptDataError as error:
        raise Unfit("corrupt", str(error)) from None
    if version is not None and header.base_version != version:
        cause = "stale" if header.base_version < version else "ahead"
        raise Unfit(cause, f"base version {header.base_version} where {version} is the newest commit")
    if member is not None:
        _require_counts(header, plan.H, member)
    return header, payload


def check_shard(mode: str, shard: int, member: Member) -> None:
    """Under weights.mode = "shard": a size that data can have, and the same in all of this life's contributions."""
    if mode != "shard":
        return
    if not 1 <= shard <= MAX_SHARD:
        raise Unfit("tokens", f"shard = {shard} tokens lies outside 1..2^50 = {MAX_SHARD}")
    if member.shard not in (0, shard):
        raise Unfit("tokens", f"shard = {shard} tokens, where this worker said {member.shard} before")


def _require_counts(header: FrameHeader, H: int, member: Member) -> None:
    """Steps that a round can have, and tokens that this worker's steps can have. No tokens are always allowed."""
    if not 1 <= header.steps <= 4 * H:
        raise Unfit("steps", f"frame header steps = {header.steps} lies outside 1..4H = {4 * H}")
    rate, usual = header.tokens / header.steps, member.tokens_per_step
    if rate > MAX_TOKENS_PER_STEP:
        raise Unfit("tokens", f"frame header tokens = {header.tokens} in {header.steps} steps")
    if rate and usual and not usual / TOKEN_FACTOR <= rate <= usual * TOKEN_FACTOR:
        raise Unfit(
            "tokens",
            f"frame header tokens = {header.tokens} in {header.steps} steps: {rate:g} a step, where this worker had "
            f"{usual:g} so far",
        )
