"""What contributions lead to: answers collected into rounds, commits, and repeated answers for who missed one.

Plain functions on the `Coordinator` of `diloco.coordinator.state`, which decides when to call them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diloco.aggregate import weights
from diloco.comms import downlink, frame
from diloco.comms.messages import Aborted, Contribution, Heartbeat, Refused, Resend, Skip
from diloco.coordinator.gates import check_contribution
from diloco.coordinator.membership import Member, Status
from diloco.coordinator.records import commit_record, snapshot_record
from diloco.coordinator.rounds import Answer, Committed, Round
from diloco.errors import CorruptDataError

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator


def heartbeat(c: Coordinator, member: Member, message: Heartbeat) -> None:
    member.progress, member.versions = message.progress, message.versions
    if c.plan is None or not c.started:
        return
    patience_s = 3 * c.config.fault.heartbeat_s
    if c.seeder() is member and c.now - (c.asked_at or 0.0) > patience_s:
        c.greet(member)
    if len(message.versions) != len(c.plan.fragments):
        return
    if member.status is Status.SYNCING:
        member.status = Status.ACTIVE
    for fragment, version in enumerate(message.versions):
        done = c.committed.get(fragment)
        quiet_s = 2 * c.config.fault.heartbeat_s
        if done is not None and version < done.version and c.now - done.at > quiet_s:
            c.send_commit(member, fragment)
    for fragment, number in message.in_flight:
        done, open_round = c.committed.get(fragment), c.rounds.get(fragment)
        if not 0 <= fragment < len(message.versions) or _ended(c, member, fragment, number):
            continue
        if done is not None and message.versions[fragment] < done.version:
            c.send_commit(member, fragment)
        elif open_round is None or not open_round.has(member.index):
            c.send(member.name, Resend(fragment, number))


def contribution(c: Coordinator, member: Member, message: Contribution) -> None:
    p, number = message.fragment, message.round
    if c.plan is None or p not in c.ledgers:
        return  # the starting value is not here yet; the worker offers it again
    if _ended(c, member, p, number):
        return
    try:
        checked = check_contribution(message.frame, c.plan, p, c.run_hash, c.codec, member, number)
    except CorruptDataError as error:
        c.reject(member, p, number, f"corrupt: {error}")
        _answered_empty(c, member, p, number)
        return
    base = checked.header.base_version
    done, version = c.committed.get(p), c.ledgers[p].shard.version
    if done is not None and base < version and (member.index, number) in done.rounds:
        c.send_commit(member, p)  # from an earlier life, or before a restart
    elif base > version:
        reason = f"fragment {p}: base version {base} is newer than any commit here ({version})"
        c.send(member.name, Refused("corrupt", reason))
    elif base < version:
        member.lagging.discard(p)  # it works again: the next round waits for it
        c.reject(member, p, number, "late")
        c.send_commit(member, p)
    else:
        open_round = c.rounds.setdefault(p, Round(c.now))
        member.lagging.discard(p)
        open_round.skipped.pop(member.index, None)
        if member.index not in open_round.answers or open_round.answers[member.index].round < number:
            header = checked.header
            open_round.answers[member.index] = Answer(member.index, number, header.tokens, message.frame)
            if not open_round.waits_for(c.expected(p)):
                c.arrivals.learn(open_round.opened, c.now)


def skip(c: Coordinator, member: Member, message: Skip) -> None:
    if not _ended(c, member, message.fragment, message.round):
        c.rejections["skipped_by_worker"] += 1
        _answered_empty(c, member, message.fragment, message.round)


def _answered_empty(c: Coordinator, member: Member, fragment: int, number: int) -> None:
    """Do not wait for this member: it has answered, with nothing that counts."""
    if fragment in c.ledgers:
        open_round = c.rounds.setdefault(fragment, Round(c.now))
        if member.index not in open_round.answers:
            open_round.skipped[member.index] = number


def _ended(c: Coordinator, member: Member, p: int, number: int) -> bool:
    """Whether this life of the worker has had its answer to the round; the last answer is repeated."""
    last, aborted = c.closed.get((p, member.index), (-1, False))
    if number == last and aborted:
        c.send(member.name, Aborted(p, number, "the round ended without a commit"))
    elif number == last:
        c.send_commit(member, p)
    return number <= last


def commit(c: Coordinator, p: int, open_round: Round) -> None:
    ledger, answers = c.ledgers[p], [open_round.answers[i] for i in sorted(open_round.answers)]
    shares = weights(c.config.weights.mode, [a.tokens for a in answers])
    parts = [downlink.Part(a.index, w, a.frame) for a, w in zip(answers, shares, strict=True)]
    frames = downlink.close(c.config.codec.down, ledger, parts, c.codec, fragment=p, run_id=c.run_hash)
    done = Committed(
        version=ledger.shard.version,
        at=c.now,
        weights=tuple((a.index, w) for a, w in zip(answers, shares, strict=True)),
        rounds=tuple((a.index, a.round) for a in answers),
        digest=frame.digest(ledger.shard.params),
        frames=frames,
    )
    del c.rounds[p]
    close(c, p, open_round, aborted=False)
    c.account(p, done, sum(a.tokens for a in answers), c.inner_step())
    names = {m.index: m.name for m in c.members.values()}
    contributors = [names[a.index] for a in answers]
    c.actions.append(commit_record(p, done, answers, contributors, step=c.inner_step(), epoch=c.epoch))
    if done.version % c.config.topology.checkpoint_every_commits == 0:
        c.actions.append(snapshot_record(p, ledger, c.run_hash))
    for member in c.by_index():
        if member.status is Status.ACTIVE and not open_round.has(member.index) and p not in member.lagging:
            member.lagging = set(c.ledgers)
        if member.live:
            c.send_commit(member, p)


def close(c: Coordinator, p: int, ended: Round, *, aborted: bool) -> dict[int, int]:
    """Remember whose round this was, by worker index: what comes for it again gets the same answer."""
    numbers = {**ended.skipped, **{i: a.round for i, a in ended.answers.items()}}
    for index, number in numbers.items():
        c.closed[p, index] = (number, aborted)
    return numbers
