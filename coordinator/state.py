"""The coordinator as a state machine: no sockets, clock, threads or files.

It lets workers in, collects their contributions into rounds, commits outer updates, and asks its driver to make
each commit durable before anybody hears of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from diloco import outer
from diloco.aggregate import weights
from diloco.comms import codec, downlink, frame
from diloco.comms.machine import Action, Event, Persist, Received, Send, Stop
from diloco.comms.messages import (
    Aborted,
    Buffer,
    Commit,
    Contribution,
    Fetch,
    Heartbeat,
    Initial,
    Join,
    Leave,
    Refused,
    Rejected,
    Resend,
    Skip,
    Snapshot,
    Waiting,
    Welcome,
)
from diloco.config import RunConfig
from diloco.coordinator.admission import refusal
from diloco.coordinator.gates import check_contribution
from diloco.coordinator.membership import Member, Status
from diloco.coordinator.records import commit_record, member_record, snapshot_record, start_record
from diloco.coordinator.replay import replay
from diloco.coordinator.rounds import Answer, Arrivals, Committed, Round, Verdict
from diloco.errors import CorruptDataError
from diloco.fragments import FragmentPlan
from diloco.settings import settings_json


class Coordinator:
    """`handle(event, now) -> actions`; `deadline`; `check()`. See `diloco.comms.machine`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.settings = settings_json(config)
        self.run_hash = frame.run_id_hash(config.run.run_id)
        self.codec = downlink.uplink_codec(config.codec)
        self.members: dict[str, Member] = {}
        self.plan: FragmentPlan | None = None
        self.ledgers: dict[int, downlink.Ledger] = {}
        self.rounds: dict[int, Round] = {}  # all and only the fragments with an answer and no commit yet
        self.committed: dict[int, Committed] = {}
        # (fragment, worker index) -> the last round of this worker's life that ended here, and whether without a commit
        self.closed: dict[tuple[int, int], tuple[int, bool]] = {}
        self.arrivals = Arrivals()
        self.started = False
        self.complete = False
        self.epoch = 1
        self.commits = 0
        self.aborts = 0
        self.tokens = 0  # of accepted contributions
        self.rejections: Counter[str] = Counter()
        self._base_step = 0  # the run's position as the journal knew it
        self._asked_at: float | None = None  # when the starting values were last asked for
        self._now = 0.0
        self._actions: list[Action] = []

    # ---- the machine's interface ----

    def handle(self, event: Event, now: float) -> list[Action]:
        self._now, self._actions = now, []
        if isinstance(event, Received):
            self._received(event)
        self._expire()
        for fragment in list(self.rounds):
            self._judge(fragment)
        self._finish_if_done()
        return self._actions

    @property
    def deadline(self) -> float | None:
        times = [t for m in self.members.values() if (t := m.expires(self.config.fault)) is not None]
        grace, timeout = self.arrivals.grace_s(self.config.fault), self.config.fault.round_timeout_s
        times += [r.deadline(grace, timeout) for r in self.rounds.values()]
        return min(times) if times and not self.complete else None

    def check(self) -> None:
        """Invariants: rounds are open only for known fragments and never hold a stranger's answer."""
        indices = [m.index for m in self.members.values() if m.index >= 0]
        assert len(indices) == len(set(indices)), "two members share an index"
        for fragment, open_round in self.rounds.items():
            assert fragment in self.ledgers, f"round open for unknown fragment {fragment}"
            assert set(open_round.answers) | set(open_round.skipped) <= set(indices), (
                "an answer from a stranger"
            )
        for fragment, done in self.committed.items():
            assert done.version == self.ledgers[fragment].shard.version, "the cached commit is not the newest"
            assert abs(sum(w for _, w in done.weights) - 1.0) < 1e-9, "weights do not sum to 1"

    # ---- what arrives ----

    def _received(self, event: Received) -> None:
        message = event.message
        if isinstance(message, Join):
            self._join(message)
            return
        if not isinstance(message, Heartbeat | Contribution | Initial | Skip | Fetch | Leave):
            return
        member = self.members.get(message.worker)
        if event.sender != message.worker or member is None or member.incarnation != message.incarnation:
            self._send(
                event.sender, Refused("incarnation", "this life of the worker is not known here: join again")
            )
            return
        if member.status is Status.GONE and not isinstance(message, Leave):
            return
        self._revive(member)
        member.last_seen = self._now
        match message:
            case Heartbeat():
                self._heartbeat(member, message)
            case Contribution():
                self._contribution(member, message)
            case Initial():
                self._initial(member, message)
            case Skip():
                self._skip(member, message)
            case Fetch():
                self._snapshot(member, message.fragment)
            case Leave():
                self._leave(member, message)

    def _join(self, message: Join) -> None:
        refused = refusal(
            message,
            run_id=self.config.run.run_id,
            settings=self.settings,
            plan=self.plan,
            complete=self.complete,
            versions=self.versions(),
        )
        if refused is not None:
            self.rejections["join_" + refused.kind] += 1
            self._send(message.worker, refused)
            return
        member = self.members.get(message.worker)
        if member is not None and member.nonce == message.nonce:
            member.last_seen, member.versions = self._now, message.versions
            if not member.finished:
                self._revive(member)
            self._admit(member)
            return
        if self.plan is None:
            self.plan = FragmentPlan.from_description(message.plan)
        incarnation = member.incarnation + 1 if member else 1
        index = member.index if member else -1
        if member is not None:
            self._forget_answers(member)
        joined = Member(message.worker, message.nonce, incarnation, self._now, index=index)
        self.members[message.worker] = joined
        if self.started:
            if index < 0:
                joined.index = 1 + max((m.index for m in self.members.values()), default=-1)
            joined.status = Status.SYNCING
            self._actions.append(member_record(joined))
        self._admit(joined)

    def _admit(self, member: Member) -> None:
        if (
            not self.started
            and len([m for m in self.members.values() if m.live]) >= self.config.topology.workers
        ):
            self._start()
        else:
            self._greet(member)

    def _revive(self, member: Member) -> None:
        """It was only silent."""
        if member.status in (Status.SUSPECT, Status.DEAD, Status.GONE):
            synced = self.plan is not None and len(member.versions) == len(self.plan.fragments)
            member.status = Status.ACTIVE if synced else Status.SYNCING
            if not self.started:
                member.status = Status.JOINING

    def _start(self) -> None:
        """The start cohort is complete: number its members by name and ask the first for the starting values."""
        assert self.plan is not None
        self.started = True
        for index, name in enumerate(sorted(self.members)):
            self.members[name].index = index
            if self.members[name].live:
                self.members[name].status = Status.ACTIVE
                self.members[name].cohort = True
        self._actions.append(start_record(self.plan, self.epoch, self._by_index()))
        for member in self._by_index():
            self._greet(member)

    def _greet(self, member: Member) -> None:
        if not self.started:
            live = tuple(sorted(m.name for m in self.members.values() if m.live))
            self._send(member.name, Waiting(live, self.config.topology.workers))
            return
        asked = self._seeder() is member
        if asked:
            self._asked_at = self._now
        self._send(
            member.name,
            Welcome(
                worker=member.name,
                incarnation=member.incarnation,
                index=member.index,
                members=len([m for m in self.members.values() if m.live]),
                epoch=self.epoch,
                # whoever starts the run starts at its beginning, however late its welcome comes
                step=0 if member.cohort and not member.versions else self.inner_step(),
                versions=self.versions(),
                initial=asked,
            ),
        )

    def _seeder(self) -> Member | None:
        """Who gives the starting values: the lowest live index, while any is missing."""
        assert self.plan is not None
        if len(self.ledgers) == len(self.plan.fragments):
            return None
        return next((m for m in self._by_index() if m.live), None)

    def _initial(self, member: Member, message: Initial) -> None:
        assert self.plan is not None
        if message.fragment in self.ledgers or self._seeder() is not member:
            return
        try:
            values = check_contribution(
                message.frame, self.plan, message.fragment, self.run_hash, codec.get("fp32")
            ).values
        except CorruptDataError as error:
            self._send(member.name, Refused("corrupt", str(error)))
            return
        self._persist(
            {"type": "initial", "fragment": message.fragment, "digest": frame.digest(values)}, [message.frame]
        )
        self.begin(message.fragment, message.frame)
        for other in self._by_index():
            if other is not member and other.live:
                self._snapshot(other, message.fragment)

    def begin(self, fragment: int, initial: Buffer) -> None:
        """The fragment's starting value is here."""
        o = self.config.outer
        optimizer = outer.make(
            o.kind, lr=o.lr, momentum=o.momentum, gpa_lr=o.gpa_lr, gpa_mu_x=o.gpa_mu_x, gpa_mu_y=o.gpa_mu_y
        )
        shard = outer.OuterShard.start(optimizer, frame.decode_frame(initial)[1])
        self.ledgers[fragment] = downlink.Ledger.start(shard, self.config.codec.down, self.codec)

    def _heartbeat(self, member: Member, message: Heartbeat) -> None:
        member.progress, member.versions = message.progress, message.versions
        if self.plan is None or not self.started or len(message.versions) != len(self.plan.fragments):
            return
        if member.status is Status.SYNCING:
            member.status = Status.ACTIVE
        patience_s = 3 * self.config.fault.heartbeat_s
        if self._seeder() is member and self._now - (self._asked_at or 0.0) > patience_s:
            self._greet(member)
        for fragment, version in enumerate(message.versions):
            done = self.committed.get(fragment)
            quiet_s = 2 * self.config.fault.heartbeat_s
            if done is not None and version < done.version and self._now - done.at > quiet_s:
                self._send_commit(member, fragment)
        for fragment, number in message.in_flight:
            done, open_round = self.committed.get(fragment), self.rounds.get(fragment)
            if not 0 <= fragment < len(message.versions) or self._ended(member, fragment, number):
                continue
            if done is not None and message.versions[fragment] < done.version:
                self._send_commit(member, fragment)
            elif open_round is None or not open_round.has(member.index):
                self._send(member.name, Resend(fragment, number))

    def _ended(self, member: Member, p: int, number: int) -> bool:
        """Whether this life of the worker has had its answer to the round; the last answer is repeated."""
        last, aborted = self.closed.get((p, member.index), (-1, False))
        if number == last and aborted:
            self._send(member.name, Aborted(p, number, "the round ended without a commit"))
        elif number == last:
            self._send_commit(member, p)
        return number <= last

    def _contribution(self, member: Member, message: Contribution) -> None:
        p, number = message.fragment, message.round
        if self.plan is None or p not in self.ledgers:
            return  # the starting value is not here yet; the worker offers it again
        if self._ended(member, p, number):
            return
        try:
            checked = check_contribution(
                message.frame, self.plan, p, self.run_hash, self.codec, member, number
            )
        except CorruptDataError as error:
            self._reject(member, p, number, f"corrupt: {error}")
            self._answered_empty(member, p, number)
            return
        base = checked.header.base_version
        done, version = self.committed.get(p), self.ledgers[p].shard.version
        if done is not None and base < version and (member.index, number) in done.rounds:
            self._send_commit(member, p)  # from an earlier life, or before a restart
        elif base > version:
            reason = f"fragment {p}: base version {base} is newer than any commit here ({version})"
            self._send(member.name, Refused("corrupt", reason))
        elif base < version:
            self._reject(member, p, number, "late")
            self._send_commit(member, p)
        else:
            open_round = self.rounds.setdefault(p, Round(self._now))
            member.lagging = False
            open_round.skipped.pop(member.index, None)
            if member.index not in open_round.answers or open_round.answers[member.index].round < number:
                header = checked.header
                open_round.answers[member.index] = Answer(member.index, number, header.tokens, message.frame)
                if not open_round.waits_for(self._expected()):
                    self.arrivals.learn(open_round.opened, self._now)

    def _skip(self, member: Member, message: Skip) -> None:
        if not self._ended(member, message.fragment, message.round):
            self.rejections["skipped_by_worker"] += 1
            self._answered_empty(member, message.fragment, message.round)

    def _answered_empty(self, member: Member, fragment: int, number: int) -> None:
        """Do not wait for this member: it has answered, with nothing that counts."""
        if fragment in self.ledgers:
            open_round = self.rounds.setdefault(fragment, Round(self._now))
            if member.index not in open_round.answers:
                open_round.skipped[member.index] = number

    def _snapshot(self, member: Member, fragment: int) -> None:
        ledger = self.ledgers.get(fragment)
        if ledger is None:
            return  # it is sent to everybody as soon as the starting value is here
        shard = ledger.shard
        frames = downlink.snapshot_frames(
            self.config.codec.down, shard, fragment=fragment, run_id=self.run_hash
        )
        self._send(member.name, Snapshot(fragment, shard.version, frame.digest(shard.params), frames))

    def _leave(self, member: Member, message: Leave) -> None:
        if member.status is not Status.GONE:
            member.status, member.progress, member.digest = Status.GONE, message.progress, message.digest
            member.finished = "complete" if message.reason == "complete" else ""
            self._persist(
                {"type": "leave", "worker": member.name, "reason": message.reason, "digest": message.digest}
            )
        self._send(member.name, Refused("left", "goodbye"))

    # ---- rounds ----

    def _judge(self, p: int) -> None:
        open_round, fault = self.rounds[p], self.config.fault
        expected = self._expected()
        quorum = fault.quorum or max(1, -(-len(expected) // 2))
        grace = self.arrivals.grace_s(fault)
        verdict = open_round.judge(expected, quorum, grace, fault.round_timeout_s, self._now)
        if verdict is Verdict.COMMIT:
            self._commit(p, open_round)
        elif verdict is Verdict.ABORT:
            del self.rounds[p]
            self.aborts += 1
            numbers = self._close(p, open_round, aborted=True)
            reason = "no quorum in time" if open_round.answers else "no usable contribution"
            for member in self._by_index():
                if member.index in numbers:
                    self._send(member.name, Aborted(p, numbers[member.index], reason))

    def _commit(self, p: int, open_round: Round) -> None:
        ledger, answers = self.ledgers[p], [open_round.answers[i] for i in sorted(open_round.answers)]
        shares = weights(self.config.weights.mode, [a.tokens for a in answers])
        parts = [downlink.Part(a.index, w, a.frame) for a, w in zip(answers, shares, strict=True)]
        frames = downlink.close(
            self.config.codec.down, ledger, parts, self.codec, fragment=p, run_id=self.run_hash
        )
        done = Committed(
            version=ledger.shard.version,
            at=self._now,
            weights=tuple((a.index, w) for a, w in zip(answers, shares, strict=True)),
            rounds=tuple((a.index, a.round) for a in answers),
            digest=frame.digest(ledger.shard.params),
            frames=frames,
        )
        del self.rounds[p]
        self._close(p, open_round, aborted=False)
        self.account(p, done, sum(a.tokens for a in answers), self.inner_step())
        names = {m.index: m.name for m in self.members.values()}
        contributors = [names[a.index] for a in answers]
        self._actions.append(
            commit_record(p, done, answers, contributors, step=self.inner_step(), epoch=self.epoch)
        )
        if done.version % self.config.topology.checkpoint_every_commits == 0:
            self._actions.append(snapshot_record(p, ledger, self.run_hash))
        for member in self._by_index():
            member.lagging = member.lagging or (
                member.status is Status.ACTIVE and not open_round.has(member.index)
            )
            if member.live:
                self._send_commit(member, p)

    def _close(self, p: int, ended: Round, *, aborted: bool) -> dict[int, int]:
        """Remember whose round this was, by worker index: what comes for it again gets the same answer."""
        numbers = {**ended.skipped, **{i: a.round for i, a in ended.answers.items()}}
        for index, number in numbers.items():
            self.closed[p, index] = (number, aborted)
        return numbers

    def account(self, p: int, done: Committed, tokens: int, step: int) -> None:
        """A commit has happened, now or in the journal."""
        self.committed[p] = done
        self.commits += 1
        self.tokens += tokens
        self._base_step = max(self._base_step, step)

    def _send_commit(self, member: Member, p: int) -> None:
        done = self.committed.get(p)
        if done is not None:
            self._send(member.name, self._commit_for(member, p, done))

    def _commit_for(self, member: Member, p: int, done: Committed) -> Commit:
        frames = done.frames
        if self.config.codec.down == "relay" and member.incarnation == self._contributed_as(member, done):
            frames = tuple((i, f) for i, f in frames if i != member.index)  # its own it still holds
        return Commit(p, done.version, done.weights, done.rounds, done.digest, frames)

    @staticmethod
    def _contributed_as(member: Member, done: Committed) -> int | None:
        """The incarnation under which `member` contributed to the commit, or None."""
        for index, contribution in done.frames:
            if index == member.index:
                return frame.unpack(contribution)[0].incarnation
        return None

    # ---- time, membership, the end ----

    def _expire(self) -> None:
        for member in self.members.values():
            if member.expire(self.config.fault, self._now) and member.status is Status.DEAD:
                seeder = self._seeder() if self.started else None
                if seeder is not None:
                    self._greet(seeder)

    def _expected(self) -> list[int]:
        return [m.index for m in self._by_index() if m.status is Status.ACTIVE and not m.lagging]

    def _forget_answers(self, member: Member) -> None:
        """A new life begins: what the old one sent to rounds that are still open is taken back."""
        self.closed = {key: ended for key, ended in self.closed.items() if key[1] != member.index}
        for p in list(self.rounds):
            self.rounds[p].answers.pop(member.index, None)
            self.rounds[p].skipped.pop(member.index, None)
            if not self.rounds[p].answers and not self.rounds[p].skipped:
                del self.rounds[p]

    def _finish_if_done(self) -> None:
        if self.complete or not self.started or any(m.live for m in self.members.values()):
            return
        if any(m.finished for m in self.members.values()):
            self.complete = True
            self._persist(
                {"type": "complete", "versions": list(self.versions()), "digest": self.global_digest()}
            )
            self._actions.append(Stop("complete"))

    # ---- restart ----

    def restore(
        self, records: Sequence[tuple[Mapping[str, Any], Sequence[Buffer]]], now: float
    ) -> list[Action]:
        """Rebuild everything from the journal by repeating its commits; raises StorageError if a digest differs."""
        self._now, self._actions = now, []
        replay(self, records, now)
        self.epoch += 1
        self._persist({"type": "epoch", "epoch": self.epoch})
        if self.complete:
            self._actions.append(Stop("complete"))
        self._finish_if_done()
        return self._actions

    # ---- facts ----

    def versions(self) -> tuple[int, ...]:
        count = len(self.plan.fragments) if self.plan else 0
        return tuple(self.ledgers[p].shard.version if p in self.ledgers else 0 for p in range(count))

    def inner_step(self) -> int:
        """The run's position: the furthest inner step that any member has reported."""
        return max([self._base_step, *(m.progress.step for m in self.members.values())])

    def global_digest(self) -> str:
        if not self.plan or len(self.ledgers) < len(self.plan.fragments):
            return ""
        return frame.model_digest([frame.digest(self.ledgers[p].shard.params) for p in sorted(self.ledgers)])

    def _by_index(self) -> list[Member]:
        return sorted(self.members.values(), key=lambda m: (m.index, m.name))

    def _reject(self, member: Member, fragment: int, number: int, reason: str) -> None:
        self.rejections[reason.split(":")[0]] += 1
        self._send(member.name, Rejected(fragment, number, reason))

    def _send(self, to: str, message: Any) -> None:
        self._actions.append(Send(to, message))

    def _persist(self, record: Mapping[str, Any], blobs: Sequence[Buffer] = ()) -> None:
        self._actions.append(Persist(record, blobs))
