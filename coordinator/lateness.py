"""Contributions that come after the commit they were meant for: counted in the next one, or refused (`fault.late`).

Under ``carry`` and ``discount`` a late contribution that is at most `fault.s_max` commits behind is held for the next
commit of its fragment. It opens no round and counts for no quorum; a worker's own next contribution may be in the same
commit, so a worker can be there twice, with two rounds. It is in the journal before its sender hears that it counts: the
sender then builds its error feedback upon that, so a restart or a standby must not forget it. Each commit takes all
that is held; what is left at the end of the run becomes a commit of its own. Nothing counts twice: what is held and
what was counted is known by worker and round, from the journal too. What was promised outlives its sender's life: a new
one may go on from a checkpoint in which that work is done. One from before the word repeats the round: late again, it
hears that the round counts; in time, its own counts in place of what is held.

Plain functions on the `Coordinator`. The arithmetic is in `diloco.late`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diloco import late
from diloco.comms.frame import read_header
from diloco.comms.messages import COUNTS_LATER, Buffer, Contribution, Rejected
from diloco.coordinator import leasing
from diloco.coordinator.gates import Unfit, check_contribution
from diloco.coordinator.membership import Member
from diloco.coordinator.rounds import Answer
from diloco.ranges import parsed

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator


def take(c: Coordinator, member: Member, message: Contribution) -> None:
    """A whole contribution from before the newest commit: hold it, or tell its sender that it does not count."""
    assert c.plan is not None
    p, number, index = message.fragment, message.round, member.index
    base = read_header(message.frame).base_version
    if c.config.fault.late not in late.COUNTING:
        c.reject(member, p, number, "late")
        return
    newest, at = c.counted.get((p, index), (-1, 0))
    if number <= newest and base < at:
        return  # it is in a commit, which its sender is about to get
    held = c.late.get(p, {}).get(index)
    if held is not None and (held.round == number or (held.round > number and _of_old_life(held, member))):
        c.send(member.name, Rejected(p, number, COUNTS_LATER))
        return
    staleness = c.ledgers[p].shard.version - base
    if staleness > c.config.fault.s_max or held is not None or member.conduct.barred(c.ended):
        c.reject(member, p, number, "late")
        return
    try:
        header = check_contribution(message.frame, c.plan, p, c.run_hash, c.codecs[p], member, number).header
        leasing.check(c, member, p, message.ranges, header.tokens)
    except Unfit as error:
        c.reject(member, p, number, f"{error.cause}: {error}")
        if error.cause != "lease":
            c.offence(member, p, number)
        return
    member.steps, member.tokens = member.steps + header.steps, member.tokens + header.tokens
    member.shard = message.shard
    answer = Answer(
        index=index,
        round=number,
        tokens=header.tokens,
        frame=message.frame,
        steps=header.steps,
        norm=header.l2norm,
        shard=message.shard,
        staleness=staleness,
        ranges=message.ranges,
    )
    c.late.setdefault(p, {})[index] = answer
    c.persist(_record(p, c.ledgers[p].shard.version, member, answer), [message.frame])
    c.send(member.name, Rejected(p, number, COUNTS_LATER))


def joined(c: Coordinator, p: int, answers: list[Answer]) -> list[Answer]:
    """A commit's contributions: those of its round, and all that is held; by worker, then by round."""
    held = c.late.pop(p, {})
    return sorted([*held.values(), *answers], key=lambda a: (a.index, a.round)) if held else answers


def shares(c: Coordinator, answers: Sequence[Answer]) -> list[float]:
    """The weight of each of a commit's contributions."""
    return late.shares(
        c.config.fault.late,
        c.config.weights.mode,
        [a.tokens for a in answers],
        steps=[a.steps for a in answers],
        shards=[a.shard for a in answers],
        staleness=[a.staleness for a in answers],
        staleness_pow=c.config.weights.staleness_pow,
    )


def repeat(c: Coordinator, member: Member, p: int, number: int) -> None:
    """Somebody asks again about a round that ended: where it waits for a word on it, say that it does not count."""
    if c.config.fault.late in late.COUNTING and c.counted.get((p, member.index), (-1, 0))[0] < number:
        c.send(member.name, Rejected(p, number, "late"))


def supersedes(c: Coordinator, member: Member, p: int, number: int, steps: int) -> bool:
    """Whether a contribution in time may count beside what is held: a new life may repeat the old one's round.

    With all of its steps it takes the place of what is held; with fewer (it began from the run's value) what was
    promised stays, and the new one does not count.
    """
    held = c.late.get(p, {}).get(member.index)
    if held is None or held.round < number or not _of_old_life(held, member):
        return True
    if steps >= held.steps:
        forget(c, member.index, p)
        return True
    return False


def _of_old_life(held: Answer, member: Member) -> bool:
    return read_header(held.frame).incarnation != member.incarnation


def forget(c: Coordinator, index: int, fragment: int | None = None) -> None:
    """What is held of the worker (of one fragment, or of all) does not count: written down before anybody hears of it."""
    for p in [p for p, held in c.late.items() if index in held and fragment in (None, p)]:
        drop(c, index, p)
        c.persist({"type": "forget", "index": index, "fragment": p})


def drop(c: Coordinator, index: int, p: int) -> None:
    """Repeat a `forget` record of the journal. Its `late` record may have lost its bulk data to a later snapshot."""
    held = c.late.get(p, {})
    held.pop(index, None)
    if not held:
        c.late.pop(p, None)


def is_late(frame: Buffer, version: int) -> bool:
    """Whether a contribution in the commit of `version` was measured before the one that it follows."""
    return read_header(frame).base_version < version - 1


def restore(c: Coordinator, record: Mapping[str, Any], blobs: Sequence[Buffer]) -> None:
    """Repeat a `late` record of the journal. Without its bulk data, a later snapshot has it."""
    if blobs:
        answer = Answer(
            index=int(record["index"]),
            round=int(record["round"]),
            tokens=int(record["tokens"]),
            frame=blobs[0],
            steps=int(record["steps"]),
            norm=float(record["norm"]),
            shard=int(record["shard"]),
            staleness=int(record["staleness"]),
            ranges=parsed(record.get("ranges", ())),
        )
        c.late.setdefault(int(record["fragment"]), {})[answer.index] = answer


def _record(fragment: int, version: int, member: Member, answer: Answer) -> dict[str, Any]:
    """Held at `version` for the next commit."""
    record: dict[str, Any] = {
        "type": "late",
        "fragment": fragment,
        "version": version,
        "worker": member.name,
        "index": answer.index,
        "round": answer.round,
        "tokens": answer.tokens,
        "steps": answer.steps,
        "norm": answer.norm,
        "shard": answer.shard,
        "staleness": answer.staleness,
    }
    if answer.ranges:
        record["ranges"] = [list(r) for r in answer.ranges]
    return record
