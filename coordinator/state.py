"""The coordinator as a state machine: no sockets, clock, threads or files.

It lets workers in, collects their contributions into rounds, commits outer updates, and asks its driver to make
each commit durable before anybody hears of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diloco import outer
from diloco.aggregate import weights
from diloco.comms import codec, downlink, frame
from diloco.comms.machine import Action, Connected, Event, Lost, Persist, Received, Send, Stop
from diloco.comms.messages import (
    PROTOCOL,
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
from diloco.coordinator.gates import check_contribution
from diloco.coordinator.membership import Member, Status
from diloco.coordinator.rounds import Answer, Arrivals, Round, Verdict
from diloco.errors import ConfigError, CorruptDataError, StorageError
from diloco.fragments import FragmentPlan
from diloco.settings import difference, settings_json


@dataclass(frozen=True, slots=True)
class Committed:
    """The newest commit of a fragment, kept to answer resends and latecomers."""

    version: int
    at: float
    weights: tuple[tuple[int, float], ...]
    rounds: tuple[tuple[int, int], ...]
    digest: str
    frames: downlink.Frames = field(repr=False)


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
        self.arrivals = Arrivals()
        self.started = False
        self.complete = False
        self.epoch = 1
        self.commits = 0
        self.aborts = 0
        self.tokens = 0  # of accepted contributions
        self.rejections: Counter[str] = Counter()
        self._base_step = 0  # the run's position as the journal knew it
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
        if member.status in (Status.GONE, Status.DEAD) and not isinstance(message, Leave):
            if member.finished:
                return
            member.status = Status.ACTIVE  # it was only silent
        if member.status is Status.SUSPECT:
            member.status = Status.ACTIVE
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
        refusal = self._refusal(message)
        if refusal is not None:
            self.rejections["join_" + refusal.kind] += 1
            self._send(message.worker, refusal)
            return
        member = self.members.get(message.worker)
        if member is not None and member.nonce == message.nonce:
            member.last_seen = self._now
            if not member.finished and member.status is not Status.SYNCING and self.started:
                member.status = Status.ACTIVE
            self._greet(member)
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
                joined.index = 1 + max(m.index for m in self.members.values())
            joined.status = Status.SYNCING
            self._persist(self._member_record(joined))
        elif len([m for m in self.members.values() if m.live]) >= self.config.topology.workers:
            self._start()
            return
        self._greet(joined)

    def _refusal(self, message: Join) -> Refused | None:
        c = self.config
        if message.protocol != PROTOCOL:
            return Refused(
                "protocol", f"protocol {message.protocol} here needs {PROTOCOL}: install the same version"
            )
        if message.run_id != c.run.run_id:
            return Refused("run", f"run.run_id = {message.run_id!r} but this is run {c.run.run_id!r}")
        if (found := difference(self.settings, message.settings)) is not None:
            return Refused("settings", found)
        try:
            theirs = FragmentPlan.from_description(message.plan)
        except ConfigError as error:
            return Refused("plan", str(error))
        if self.plan is not None and theirs.digest() != self.plan.digest():
            return Refused("plan", self.plan.difference(theirs))
        if self.complete:
            return Refused("complete", "this run is complete")
        ours = self.versions()
        if any(v > (ours[p] if p < len(ours) else 0) for p, v in enumerate(message.versions)):
            return Refused(
                "corrupt",
                f"the worker holds versions {list(message.versions)} but the coordinator only {list(ours)}: it lost "
                "committed rounds; restart it with --resume on the run's own journal",
            )
        return None

    def _start(self) -> None:
        """The start cohort is complete: number its members by name and ask the first for the starting values."""
        assert self.plan is not None
        self.started = True
        for index, name in enumerate(sorted(self.members)):
            self.members[name].index = index
            self.members[name].status = Status.ACTIVE
        self._persist({"type": "start", "plan": self.plan.describe(), "epoch": self.epoch})
        for member in self._by_index():
            self._persist(self._member_record(member))
        for member in self._by_index():
            self._greet(member)

    def _greet(self, member: Member) -> None:
        if not self.started:
            live = tuple(sorted(m.name for m in self.members.values() if m.live))
            self._send(member.name, Waiting(live, self.config.topology.workers))
            return
        self._send(
            member.name,
            Welcome(
                worker=member.name,
                incarnation=member.incarnation,
                index=member.index,
                members=len([m for m in self.members.values() if m.live]),
                epoch=self.epoch,
                step=self.inner_step(),
                versions=self.versions(),
                initial=self._seeder() is member,
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
        self._begin(message.fragment, message.frame)
        for other in self._by_index():
            if other is not member and other.live:
                self._snapshot(other, message.fragment)

    def _begin(self, fragment: int, initial: Buffer) -> None:
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
        for fragment, version in enumerate(message.versions):
            done = self.committed.get(fragment)
            quiet_s = 2 * self.config.fault.heartbeat_s
            if done is not None and version < done.version and self._now - done.at > quiet_s:
                self._send(member.name, self._commit_for(member, fragment, done))
        for fragment, number in message.in_flight:
            done, open_round = self.committed.get(fragment), self.rounds.get(fragment)
            if done is not None and (member.index, number) in done.rounds:
                self._send(member.name, self._commit_for(member, fragment, done))
            elif open_round is None or not open_round.has(member.index):
                self._send(member.name, Resend(fragment, number))

    def _contribution(self, member: Member, message: Contribution) -> None:
        p, number = message.fragment, message.round
        if self.plan is None or p not in self.ledgers:
            self._reject(member, p, number, "unknown_fragment")
            return
        try:
            checked = check_contribution(
                message.frame, self.plan, p, self.run_hash, self.codec, member, number
            )
        except CorruptDataError as error:
            self._reject(member, p, number, f"corrupt: {error}")
            self._answered_empty(member, p, number)
            return
        done, version = self.committed.get(p), self.ledgers[p].shard.version
        if done is not None and (member.index, number) in done.rounds:
            self._send(member.name, self._commit_for(member, p, done))
        elif checked.header.base_version > version:
            self._send(member.name, Refused("corrupt", f"fragment {p}: base version {checked.header.base_version} "
                                            f"is newer than any commit here ({version})"))  # fmt: skip
        elif checked.header.base_version < version:
            self._reject(member, p, number, "late")
            assert done is not None
            self._send(member.name, self._commit_for(member, p, done))
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
        if member.status is Status.GONE:
            self._send(member.name, Refused("left", "goodbye"))
            return
        member.status, member.progress, member.digest = Status.GONE, message.progress, message.digest
        member.finished = "complete" if message.reason == "complete" else ""
        self._persist(
            {"type": "leave", "worker": member.name, "reason": message.reason, "digest": message.digest}
        )

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
            numbers = {**open_round.skipped, **{i: a.round for i, a in open_round.answers.items()}}
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
        self._account(p, done, sum(a.tokens for a in answers))
        names = {m.index: m.name for m in self.members.values()}
        self._persist(
            {
                "type": "commit",
                "fragment": p,
                "version": done.version,
                "contributors": [names[a.index] for a in answers],
                "weights": shares,
                "digest": done.digest,
                "indices": [a.index for a in answers],
                "rounds": [a.round for a in answers],
                "tokens": [a.tokens for a in answers],
                "step": self.inner_step(),
                "epoch": self.epoch,
            },
            [a.frame for a in answers],
        )
        if done.version % self.config.topology.checkpoint_every_commits == 0:
            self._persist_snapshot(p)
        for member in self._by_index():
            member.lagging = member.lagging or (
                member.status is Status.ACTIVE and not open_round.has(member.index)
            )
            if member.live:
                self._send(member.name, self._commit_for(member, p, done))

    def _account(self, p: int, done: Committed, tokens: int) -> None:
        self.committed[p] = done
        self.commits += 1
        self.tokens += tokens

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

    def _persist_snapshot(self, p: int) -> None:
        ledger = self.ledgers[p]
        tensors = ledger.tensors()
        blobs = [
            downlink.value_frame(tensors[name], p, ledger.shard.version, self.run_hash)
            for name in sorted(tensors)
        ]
        record = {
            "type": "snapshot",
            "fragment": p,
            "version": ledger.shard.version,
            "names": sorted(tensors),
        }
        self._persist(record, blobs)

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
        newest = {r["fragment"]: r["version"] for r, _ in records if r["type"] == "snapshot"}
        for record, blobs in records:
            self._replay(record, blobs, newest)
        self.epoch += 1
        self._persist({"type": "epoch", "epoch": self.epoch})
        for member in self.members.values():  # leases start anew: nobody could be heard while we were away
            member.last_seen = now
            if not member.finished:
                member.status = Status.ACTIVE
        return self._actions

    def _replay(self, record: Mapping[str, Any], blobs: Sequence[Buffer], newest: Mapping[int, int]) -> None:
        kind = record["type"]
        if kind == "start":
            self.plan, self.started = FragmentPlan.from_description(record["plan"]), True
        elif kind == "epoch":
            self.epoch = max(self.epoch, int(record["epoch"]))
        elif kind == "member":
            old = self.members.get(record["worker"])
            member = Member(record["worker"], int(record["nonce"]), int(record["incarnation"]), self._now)
            member.index = int(record["index"])
            member.progress = old.progress if old else member.progress
            self.members[member.name] = member
        elif kind == "leave":
            gone = self.members[record["worker"]]
            gone.finished = "complete" if record["reason"] == "complete" else ""
            gone.status, gone.digest = Status.GONE, record["digest"]
        elif kind == "initial":
            self._begin(int(record["fragment"]), blobs[0])
        elif kind == "commit":
            self._replay_commit(record, blobs, newest.get(record["fragment"], 0))
        elif kind == "snapshot" and newest[record["fragment"]] == record["version"]:
            tensors = {n: frame.decode_frame(b)[1] for n, b in zip(record["names"], blobs, strict=True)}
            self.ledgers[record["fragment"]].load(tensors, int(record["version"]))
        elif kind == "complete":
            self.complete = True

    def _replay_commit(self, record: Mapping[str, Any], blobs: Sequence[Buffer], snapshot: int) -> None:
        p, version = int(record["fragment"]), int(record["version"])
        self._base_step = max(self._base_step, int(record["step"]))
        ledger = self.ledgers[p]
        parts = [
            downlink.Part(i, w, b) for i, w, b in zip(record["indices"], record["weights"], blobs, strict=True)
        ] if blobs else []  # fmt: skip
        frames: downlink.Frames = ()
        if parts and version > snapshot:
            frames = downlink.close(
                self.config.codec.down, ledger, parts, self.codec, fragment=p, run_id=self.run_hash
            )
            if frame.digest(ledger.shard.params) != record["digest"]:
                raise StorageError(
                    f"journal: repeating commit {version} of fragment {p} gives another digest than it recorded; "
                    "the journal is damaged, or this machine computes differently: restore it from a copy"
                )
        elif parts and self.config.codec.down == "relay":
            frames = tuple((part.index, part.frame) for part in parts)
        self._account(
            p,
            Committed(
                version,
                self._now,
                tuple(zip(record["indices"], record["weights"], strict=True)),
                tuple(zip(record["indices"], record["rounds"], strict=True)),
                record["digest"],
                frames,
            ),
            sum(record["tokens"]),
        )

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

    def _member_record(self, member: Member) -> dict[str, Any]:
        return {
            "type": "member",
            "worker": member.name,
            "nonce": member.nonce,
            "incarnation": member.incarnation,
            "index": member.index,
        }

    def _reject(self, member: Member, fragment: int, number: int, reason: str) -> None:
        self.rejections[reason.split(":")[0]] += 1
        self._send(member.name, Rejected(fragment, number, reason))

    def _send(self, to: str, message: Any) -> None:
        self._actions.append(Send(to, message))

    def _persist(self, record: Mapping[str, Any], blobs: Sequence[Buffer] = ()) -> None:
        self._actions.append(Persist(record, blobs))
