"""Asynchronous runs (2401.09135): every contribution that is fresh enough is a commit of its own, at once.

Nobody waits for anybody. A contribution measured s = version - base commits ago counts with ``(1 + s)^-power`` and is
rejected beyond ``fault.s_max``; its sender, and nobody else, gets the new value. Any later value answers a sender whose
own answer was lost: it is told that its round is in it. What was counted is known from the journal, so that nothing
counts twice. Given the order of arrival, everything here is determined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diloco.aggregate import staleness_weight
from diloco.comms import downlink, frame
from diloco.comms.messages import Aborted, Commit, Contribution, Heartbeat, Refused, Resend
from diloco.coordinator import leasing
from diloco.coordinator.gates import Unfit, check_contribution
from diloco.coordinator.membership import Member
from diloco.coordinator.pace import local_paces
from diloco.coordinator.records import commit_record, snapshot_record
from diloco.coordinator.rounds import Answer, Committed

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator


def in_flight(c: Coordinator, member: Member, message: Heartbeat) -> None:
    """The worker asks what became of rounds that were not answered for long."""
    for p, number in message.in_flight:
        if p not in c.ledgers:
            continue
        held = message.versions[p] if p < len(message.versions) else 0
        if _counted(c, member, p, number, held):
            _value(c, member, p, number)
        else:
            c.send(member.name, Resend(p, number))


def contribution(c: Coordinator, member: Member, message: Contribution) -> None:
    """Apply it, or say why not; the sender goes on with the value as it then is."""
    assert c.plan is not None
    p, number = message.fragment, message.round
    try:
        checked = check_contribution(message.frame, c.plan, p, c.run_hash, c.codecs[p], member, number)
        header = checked.header
        counted = _counted(c, member, p, number, header.base_version)
        if not counted:
            leasing.check(c, member, p, message.ranges, header.tokens)
    except Unfit as error:
        c.reject(member, p, number, f"{error.cause}: {error}")
        limit, what = c.config.fault.quarantine_after, (member.incarnation, p, number)
        bad = error.cause != "lease"
        if bad and member.conduct.offend(what, c.ended, len(c.plan.fragments), limit):
            c.shut_out(member)
        nothing(c, member, p, number)
        return
    if counted:
        _value(c, member, p, number)
        return
    staleness = c.ledgers[p].shard.version - header.base_version
    if staleness < 0:
        reason = f"fragment {p}: base version {header.base_version} is newer than any commit here: commits are lost"
        c.send(member.name, Refused("corrupt", reason))
    elif member.conduct.barred(c.ended):
        c.reject(member, p, number, "quarantined: too many bad contributions; others count again later")
        nothing(c, member, p, number)
    elif staleness > c.config.fault.s_max:
        c.reject(member, p, number, "late")
        _value(c, member, p, None)
    else:
        member.steps, member.tokens = member.steps + header.steps, member.tokens + header.tokens
        answer = Answer(
            *(member.index, number, header.tokens, message.frame, header.steps, header.l2norm),
            ranges=message.ranges,
        )
        _commit(c, member, p, answer, staleness)


def nothing(c: Coordinator, member: Member, p: int, number: int) -> None:
    """The worker has nothing that counts: it goes on from the value it holds."""
    c.send(member.name, Aborted(p, number, "nothing that counts"))


def _counted(c: Coordinator, member: Member, p: int, number: int, base: int) -> bool:
    """Whether the worker's round is in a commit. A new life may use a number again, from a newer value."""
    newest, version = c.counted.get((p, member.index), (-1, 0))
    return number <= newest and base < version


def _value(c: Coordinator, member: Member, p: int, number: int | None) -> None:
    """Send the newest value, and that it holds the worker's round `number` if that is given."""
    done = c.committed.get(p)
    if done is not None:
        rounds = () if number is None else ((member.index, number),)
        c.send(
            member.name,
            Commit(p, done.version, done.weights, rounds, done.digest, done.frames, done.local_steps),
        )


def _commit(c: Coordinator, member: Member, p: int, answer: Answer, staleness: int) -> None:
    ledger = c.ledgers[p]
    weight = staleness_weight(staleness, c.config.weights.staleness_pow)
    part = downlink.Part(answer.index, weight, answer.frame)
    frames = downlink.close(c.config.codec.down, ledger, [part], c.codecs[p], fragment=p, run_id=c.run_hash)
    done = Committed(
        version=ledger.shard.version,
        at=c.now,
        weights=((answer.index, weight),),
        rounds=((answer.index, answer.round),),
        digest=frame.digest(ledger.shard.params),
        frames=frames,
        local_steps=local_paces(c) if p == 0 else (),
    )
    c.counted[p, answer.index] = (answer.round, done.version)
    (answer,) = leasing.committed(c, p, [member.name], [answer])
    c.account(p, done, answer.tokens, c.inner_step())
    c.actions.append(commit_record(p, done, [answer], [member.name], step=c.inner_step(), epoch=c.epoch))
    if done.version % c.config.topology.checkpoint_every_commits == 0:
        c.actions.append(snapshot_record(p, ledger, c.run_hash))
    _value(c, member, p, answer.round)
