"""What a contribution must satisfy before it may count. Pure checks, cheapest first; no state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diloco.comms.codec import Codec
from diloco.comms.frame import FrameHeader, decode_frame, unpack
from diloco.comms.messages import Buffer
from diloco.coordinator.membership import Member
from diloco.errors import CorruptDataError
from diloco.fragments import FragmentPlan


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
) -> Checked:
    """Decode a frame if everything about it is as announced; CorruptDataError says what is not.

    `member` and `number` (its round) are compared with the header when given.
    """
    if not 0 <= fragment < len(plan.fragments):
        raise CorruptDataError(f"fragment {fragment} does not exist; the plan has {len(plan.fragments)}")
    numel = plan.fragments[fragment].numel
    header, _ = unpack(frame, max_payload=codec.wire_size(numel))
    expect = {"fragment": fragment, "run_id": run_hash, "n": numel, "codec": codec.id, "block": codec.block}
    if member is not None:
        expect |= {"worker": member.index, "incarnation": member.incarnation}
    if number is not None:
        expect["round"] = number
    for name, value in expect.items():
        if getattr(header, name) != value:
            raise CorruptDataError(
                f"frame header {name} = {getattr(header, name)} where {value} was expected"
            )
    if member is not None and not 1 <= header.steps <= 4 * plan.H:
        raise CorruptDataError(f"frame header steps = {header.steps} lies outside 1..4H = {4 * plan.H}")
    _, values = decode_frame(frame, codec=codec)
    return Checked(header, values)
