"""The coordinator as a state machine: no sockets, clock, threads or files.

It lets workers in, collects their contributions into rounds, commits outer updates, and asks its driver to make
each commit durable before anybody hears of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from diloco.aggregate import rda_pieces
from diloco.comms import downlink, frame
from diloco.comms.codec import Codec
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
    LeaseRequest,
    Leave,
    Refused,
    Rejected,
    Skip,
    Waiting,
    Welcome,
)
from diloco.comms.uplink import codecs_for
from diloco.config import RunConfig
from diloco.coordinator import contributions, farewell, lateness, leasing, pace, values
from diloco.coordinator.admission import refusal
from diloco.coordinator.membership import Member, Status
from diloco.coordinator.records import member_record, start_record
from diloco.coordinator.replay import replay
from diloco.coordinator.rounds import Answer, Arrivals, Committed, Round, Verdict
from diloco.fragments import FragmentPlan
from diloco.robust import rule_of
from diloco.settings import settings_json


class Coordinator:
    """`handle(event, now) -> actions`; `deadline`; `check()`. See `diloco.comms.machine`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.settings = settings_json(config)
        self.run_hash = frame.run_id_hash(config.run.run_id)
        self.codecs: list[Codec] = []  # of each fragment of the plan
        self.rule = rule_of(config)
        self.asynchronous = config.stream.overlap == "async"
        # (fragment, worker index) -> its newest round that counted, and the version that has it.
        self.counted: dict[tuple[int, int], tuple[int, int]] = {}
        # By fragment and worker index what came late and will be in the next commit.
        self.late: dict[int, dict[int, Answer]] = {}
        self.leases = leasing.table_of(config)
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
        self.final = ""  # digest of the run's final value, once nothing counts any more
        self.ending_at: float | None = None  # since when somebody waits for that
        self.epoch = 1
        self.commits = 0
        self.aborts = 0
        self.tokens = 0  # of accepted contributions
        self.rejections: Counter[str] = Counter()
        self._base_step = 0  # the run's position as the journal knew it
        self.asked_at: float | None = None  # when the starting values were last asked for
        self.now = 0.0
        self.actions: list[Action] = []

    # ---- the machine's interface ----

    def handle(self, event: Event, now: float) -> list[Action]:
        self.now, self.actions = now, []
        if isinstance(event, Received):
            self._received(event)
        self._expire()
        for fragment in list(self.rounds):
            self._judge(fragment)
        leasing.sweep(self)
        farewell.settle(self)
        return self.actions

    @property
    def deadline(self) -> float | None:
        times = [t for m in self.members.values() if (t := m.expires(self.config.fault)) is not None]
        times += pace.deadlines(self) + farewell.deadlines(self)
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
            total = sum(w for _, w in done.weights)
            assert self.asynchronous or abs(total - 1.0) < 1e-9, "weights do not sum to 1"
        if self.leases is not None:
            self.leases.check()

    # ---- what arrives ----

    def _received(self, event: Received) -> None:
        message = event.message
        if isinstance(message, Join):
            self._join(message)
            return
        if not isinstance(message, Heartbeat | Contribution | Initial | Skip | Fetch | Leave | LeaseRequest):
            return
        member = self.members.get(message.worker)
        if event.sender != message.worker or member is None or member.incarnation != message.incarnation:
            self.send(
                event.sender, Refused("incarnation", "this life of the worker is not known here: join again")
            )
            return
        if member.status is Status.GONE:
            if isinstance(message, Leave):
                farewell.leave(self, member, message)
            return
        self._revive(member)
        member.last_seen = self.now
        farewell.moved(self, member, message)
        if farewell.too_late(self, member, message):
            return
        match message:
            case Heartbeat():
                contributions.heartbeat(self, member, message)
            case Contribution():
                contributions.contribution(self, member, message)
            case Initial():
                values.initial(self, member, message)
            case Skip():
                contributions.skip(self, member, message)
            case Fetch():
                values.fetch(self, member, message)
            case LeaseRequest():
                leasing.request(self, member, message)
            case Leave():
                farewell.leave(self, member, message)

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
            self.send(message.worker, refused)
            return
        member = self.members.get(message.worker)
        if member is not None and member.nonce == message.nonce:
            member.last_seen, member.versions = self.now, message.versions
            if not member.finished:
                self._revive(member)
            self._admit(member)
            return
        if self.plan is None:
            self.plan = FragmentPlan.from_description(message.plan)
            self.codecs = codecs_for(self.config, self.plan)
        incarnation = member.incarnation + 1 if member else 1
        index = member.index if member else -1
        if member is not None:
            self._forget_answers(member)
        joined = Member(message.worker, message.nonce, incarnation, self.now, index=index)
        if member is not None:  # a new life is no way out of a quarantine
            joined.conduct, joined.rejected = member.conduct, member.rejected
        self.members[message.worker] = joined
        if self.started:
            if index < 0:
                joined.index = 1 + max((m.index for m in self.members.values()), default=-1)
            joined.status = Status.SYNCING
            self.actions.append(member_record(joined))
        self._admit(joined)

    def _admit(self, member: Member) -> None:
        if (
            not self.started
            and len([m for m in self.members.values() if m.live]) >= self.config.topology.workers
        ):
            self._start()
        else:
            self.greet(member)

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
        self.actions.append(start_record(self.plan, self.epoch, self.by_index()))
        for member in self.by_index():
            self.greet(member)

    def greet(self, member: Member) -> None:
        if not self.started:
            live = tuple(sorted(m.name for m in self.members.values() if m.live))
            self.send(member.name, Waiting(live, self.config.topology.workers))
            return
        asked = values.seeder(self) is member
        if asked:
            self.asked_at = self.now
        self.send(
            member.name,
            Welcome(
                worker=member.name,
                incarnation=member.incarnation,
                index=member.index,
                members=len([m for m in self.members.values() if m.live]),
                epoch=self.epoch,
                # whoever starts the run starts at its beginning, however late its welcome comes
                step=0 if member.cohort else self.inner_step(),
                versions=self.versions(),
                initial=asked,
            ),
        )

    # ---- rounds ----

    def _judge(self, p: int) -> None:
        open_round, fault = self.rounds[p], self.config.fault
        expected = self.expected(p)
        quorum = fault.quorum or max(1, -(-len(expected) // 2))
        grace = pace.grace_s(self, p, open_round)
        verdict = open_round.judge(expected, quorum, grace, fault.round_timeout_s, self.now)
        if verdict is Verdict.COMMIT:
            contributions.commit(self, p, open_round)
        elif verdict is Verdict.ABORT:
            del self.rounds[p]
            self.aborts += 1
            numbers = contributions.close(self, p, open_round, aborted=True)
            reason = "no quorum in time" if open_round.answers else "no usable contribution"
            for member in self.by_index():
                if member.index in numbers:
                    self.send(member.name, Aborted(p, numbers[member.index], reason))

    def account(self, p: int, done: Committed, tokens: int, step: int) -> None:
        """A commit has happened, now or in the journal."""
        self.committed[p] = done
        self.commits += 1
        self.tokens += tokens
        self._base_step = max(self._base_step, step)

    def send_commit(self, member: Member, p: int) -> None:
        done = self.committed.get(p)
        if done is not None:
            self.send(member.name, self._commit_for(member, p, done))
        elif p in self.ledgers and self.ledgers[p].shard.version:
            values.snapshot(self, member, p)  # taken over without the commit that made it

    def _commit_for(self, member: Member, p: int, done: Committed) -> Commit:
        frames = done.frames
        if self.config.codec.down == "relay" and member.incarnation == self._contributed_as(member, done):
            # its own it still holds, but for one that came late
            frames = tuple(
                (i, f) for i, f in frames if i != member.index or lateness.is_late(f, done.version)
            )
        return Commit(p, done.version, done.weights, done.rounds, done.digest, frames, done.local_steps)

    @staticmethod
    def _contributed_as(member: Member, done: Committed) -> int | None:
        """The incarnation under which `member` contributed to the commit, or None."""
        for index, contribution in done.frames:
            if index == member.index:
                return frame.read_header(contribution).incarnation
        return None

    # ---- time, membership, the end ----

    def _expire(self) -> None:
        for member in self.members.values():
            if member.expire(self.config.fault, self.now) and member.status is Status.DEAD:
                seeder = values.seeder(self) if self.started else None
                if seeder is not None:
                    self.greet(seeder)

    def expected(self, p: int) -> list[int]:
        """Whom a round of fragment `p` waits for, by worker index."""
        return [
            m.index
            for m in self.by_index()
            if m.status is Status.ACTIVE
            and p not in m.lagging
            and not (m.done or m.conduct.barred(self.ended))
        ]

    def offence(self, member: Member, fragment: int, number: int) -> None:
        """A bad contribution: noted, and after too many of them the worker is shut out."""
        assert self.plan is not None
        what, limit = (member.incarnation, fragment, number), self.config.fault.quarantine_after
        if member.conduct.offend(what, self.ended, len(self.plan.fragments), limit):
            self.shut_out(member)

    def shut_out(self, member: Member) -> None:
        """What it has in open rounds does not count, and nobody waits for it."""
        self.rejections["quarantines"] += 1
        lateness.forget(self, member.index)
        for open_round in self.rounds.values():
            answer = open_round.answers.pop(member.index, None)
            if answer is not None:
                open_round.skipped[member.index] = answer.round

    def _forget_answers(self, member: Member) -> None:
        """A new life begins: what the old one sent to rounds that are still open is taken back."""
        self.closed = {key: ended for key, ended in self.closed.items() if key[1] != member.index}
        for p in list(self.rounds):
            self.rounds[p].answers.pop(member.index, None)
            self.rounds[p].skipped.pop(member.index, None)
            if not self.rounds[p].answers and not self.rounds[p].skipped:
                del self.rounds[p]

    # ---- restart ----

    def restore(
        self, records: Sequence[tuple[Mapping[str, Any], Sequence[Buffer]]], now: float
    ) -> list[Action]:
        """Rebuild everything from the journal by repeating its commits; raises StorageError if a digest differs."""
        self.now, self.actions = now, []
        replay(self, records, now)
        self.epoch += 1
        self.persist({"type": "epoch", "epoch": self.epoch})
        if self.complete:
            self.actions.append(Stop("complete"))
        farewell.settle(self)
        return self.actions

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

    def by_index(self) -> list[Member]:
        return sorted(self.members.values(), key=lambda m: (m.index, m.name))

    @property
    def ended(self) -> int:
        """Rounds of any fragment that are over."""
        return self.commits + self.aborts

    def pieces(self, p: int) -> downlink.Pieces:
        """The ranges of fragment `p` that merge by direction, if any do."""
        assert self.plan is not None
        return rda_pieces(self.plan.fragments[p]) if self.rule.by_direction else ()

    def reject(self, member: Member, fragment: int, number: int, reason: str) -> None:
        cause = reason.split(":")[0]
        self.rejections[cause] += 1
        member.rejected[cause] += 1
        self.send(member.name, Rejected(fragment, number, reason))

    def send(self, to: str, message: Any) -> None:
        self.actions.append(Send(to, message))

    def persist(self, record: Mapping[str, Any], blobs: Sequence[Buffer] = ()) -> None:
        self.actions.append(Persist(record, blobs))
