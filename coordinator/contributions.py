"""What contributions lead to: answers collected into rounds, commits, and repeated answers for who missed one.

Plain functions on the `Coordinator` of `diloco.coordinator.state`, which decides when to call them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diloco import robust
from diloco.comms import downlink, frame
from diloco.comms.messages import Aborted, Contribution, Heartbeat, Refused, Resend, Skip
from diloco.coordinator import arrivals, lateness, leasing, values
from diloco.coordinator.gates import Unfit, check_contribution, check_header, check_shard
from diloco.coordinator.membership import Member, Status
from diloco.coordinator.pace import local_paces
from diloco.coordinator.records import commit_record, snapshot_record
from diloco.coordinator.rounds import Answer, Committed, Round

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator


def heartbeat(c: Coordinator, member: Member, message: Heartbeat) -> None:
    member.progress, member.versions = message.progress, message.versions
    if c.plan is None or not c.started:
        return
    patience_s = 3 * c.config.fault.heartbeat_s
    if values.seeder(c) is member and c.now - (c.asked_at or 0.0) > patience_s:
        c.greet(member)
    if len(message.versions) != len(c.plan.fragments):
        return
    if member.status is Status.SYNCING:
        member.status = Status.ACTIVE
    if c.asynchronous:
        arrivals.in_flight(c, member, message)
        return
    for fragment, version in enumerate(message.versions):
        done = c.committed.get(fragment)
        quiet_s = 2 * c.config.fault.heartbeat_s
        newest = c.ledgers[fragment].shard.version if fragment in c.ledgers else 0
        if version < newest and (done is None or c.now - done.at > quiet_s):
            c.send_commit(member, fragment)
    in_flight = dict(message.in_flight)  # one answer a fragment, however often it is named
    for fragment, number in in_flight.items():
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
    if c.asynchronous:
        arrivals.contribution(c, member, message)
        return
    if _ended(c, member, p, number):
        return
    version = c.ledgers[p].shard.version
    try:
        if member.conduct.barred(c.ended):
            check_header(message.frame, c.plan, p, c.run_hash, c.codecs[p], member, number, version)
            raise Unfit(
                "quarantined", "too many of this worker's contributions were bad; later ones count again"
            )
        check_shard(c.config.weights.mode, message.shard, member)
        checked = check_contribution(
            message.frame, c.plan, p, c.run_hash, c.codecs[p], member, number, version
        )
        leasing.check(c, member, p, message.ranges, checked.header.tokens, in_time=True)
    except Unfit as error:
        _unfit(c, member, message, error)
        return
    if _passed(c, member, p, number):
        return
    if not lateness.supersedes(c, member, p, number, checked.header.steps):
        c.reject(member, p, number, "late")
        _answered_empty(c, member, p, number)
        return
    open_round = c.rounds.setdefault(p, Round(c.now))
    member.lagging.discard(p)
    open_round.skipped.pop(member.index, None)
    if member.index not in open_round.answers or open_round.answers[member.index].round < number:
        h = checked.header
        member.steps, member.tokens, member.shard = (
            member.steps + h.steps,
            member.tokens + h.tokens,
            message.shard,
        )
        answer = Answer(
            member.index,
            number,
            h.tokens,
            message.frame,
            h.steps,
            h.l2norm,
            message.shard,
            ranges=message.ranges,
        )
        open_round.answers[member.index] = answer
        if not open_round.waits_for(c.expected(p)):
            c.arrivals.learn(open_round.opened, c.now)


def _unfit(c: Coordinator, member: Member, message: Contribution, error: Unfit) -> None:
    p, number = message.fragment, message.round
    done = c.committed.get(p)
    if error.cause == "ahead":
        c.send(member.name, Refused("corrupt", f"fragment {p}: {error}: this coordinator has lost commits"))
    elif error.cause == "stale":
        # What is in that very commit came from an earlier life, or before a restart.
        if done is None or (member.index, number) not in done.rounds:
            member.lagging.discard(p)  # it works again: the next round waits for it
            lateness.take(c, member, message)
        c.send_commit(member, p)
    else:
        c.reject(member, p, number, f"{error.cause}: {error}")
        if error.cause not in ("quarantined", "lease"):
            c.offence(member, p, number)
        _answered_empty(c, member, p, number)


def skip(c: Coordinator, member: Member, message: Skip) -> None:
    if c.asynchronous:
        c.rejections["skipped_by_worker"] += 1
        arrivals.nothing(c, member, message.fragment, message.round)
    elif not _ended(c, member, message.fragment, message.round):
        if _passed(c, member, message.fragment, message.round):
            return
        c.rejections["skipped_by_worker"] += 1
        _answered_empty(c, member, message.fragment, message.round)


def _passed(c: Coordinator, member: Member, p: int, number: int) -> bool:
    """Let a newcomer go on at once from a round that the others have behind them; it keeps its work for the next.

    It would wait for them here while they wait for it on another fragment, until the grace period ends.
    """
    done = c.committed.get(p)
    if done is None or member.cohort or member.in_step or member.passes >= 2 * len(c.ledgers):
        return False
    others = [n for i, n in done.rounds if i != member.index]
    if not others or number > max(others):
        return False
    member.passes += 1
    member.lagging.discard(p)
    c.closed[p, member.index] = (number, True)
    c.send(member.name, Aborted(p, number, "the others have this round behind them"))
    return True


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
        lateness.repeat(c, member, p, number)
        c.send_commit(member, p)
    return number <= last


def commit(c: Coordinator, p: int, open_round: Round) -> None:
    ledger, everybody = c.ledgers[p], [open_round.answers[i] for i in sorted(open_round.answers)]
    answers, dropped = _chosen(c, p, everybody)
    answers = lateness.joined(c, p, answers)
    shares = lateness.shares(c, answers)
    parts = [downlink.Part(a.index, w, a.frame) for a, w in zip(answers, shares, strict=True)]
    frames = downlink.close(
        c.config.codec.down,
        ledger,
        parts,
        c.codecs[p],
        fragment=p,
        run_id=c.run_hash,
        rule=c.rule,
        pieces=c.pieces(p),
    )
    done = Committed(
        version=ledger.shard.version,
        at=c.now,
        weights=tuple((a.index, w) for a, w in zip(answers, shares, strict=True)),
        rounds=tuple((a.index, a.round) for a in answers),
        digest=frame.digest(ledger.shard.params),
        frames=frames,
        local_steps=local_paces(c) if p == 0 else (),
    )
    del c.rounds[p]
    close(c, p, open_round, aborted=False)
    c.account(p, done, sum(a.tokens for a in answers), c.inner_step())
    members = {m.index: m for m in c.members.values()}
    contributors = [members[a.index].name for a in answers]
    answers = leasing.committed(c, p, contributors, answers)
    for a in answers:
        members[a.index].in_step = True
        c.counted[p, a.index] = (a.round, done.version)
    c.actions.append(commit_record(p, done, answers, contributors, step=c.inner_step(), epoch=c.epoch))
    if done.version % c.config.topology.checkpoint_every_commits == 0:
        c.actions.append(snapshot_record(p, ledger, c.run_hash))
    for answer in dropped:
        words = (
            "norm far from the others'" if c.rule.kind == "norm_outlier" else "points away from the others'"
        )
        words = words if answer.norm > 0.0 else "an update of zeros"
        c.reject(members[answer.index], p, answer.round, f"outlier: {words} (robust.kind = {c.rule.kind!r})")
    for member in c.by_index():
        if member.status is Status.ACTIVE and not open_round.has(member.index) and p not in member.lagging:
            member.lagging = set(c.ledgers)
        if member.live:
            c.send_commit(member, p)


def commit_held(c: Coordinator) -> None:
    """The run ends: what came late and is in no commit yet becomes one of its own."""
    for p in sorted(c.late):
        c.rounds[p] = Round(c.now)
        commit(c, p, c.rounds[p])


def _chosen(c: Coordinator, p: int, answers: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Who counts in the commit, and who is dropped; under the plain mean nobody is."""
    if c.rule.kind == "mean":
        return answers, []
    left = [answers[i] for i in robust.moving([a.norm for a in answers])]
    if c.rule.kind == "norm_outlier":
        norms = [a.norm / a.steps if c.rule.by_steps else a.norm for a in left]
        left = [left[i] for i in robust.inliers(norms)]
    elif c.rule.kind == "cos_gate":
        numel = c.ledgers[p].shard.params.numel()
        codec = c.codecs[p]
        payloads = [frame.unpack(a.frame, codec=codec)[1] for a in left]
        left = [left[i] for i in robust.agreeing([codec.decode(payload, numel) for payload in payloads])]
    kept = {a.index for a in left}
    return left, [a for a in answers if a.index not in kept]


def close(c: Coordinator, p: int, ended: Round, *, aborted: bool) -> dict[int, int]:
    """Remember whose round this was, by worker index: what comes for it again gets the same answer."""
    numbers = {**ended.skipped, **{i: a.round for i, a in ended.answers.items()}}
    for index, number in numbers.items():
        c.closed[p, index] = (number, aborted)
    return numbers
