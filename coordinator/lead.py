"""The coordinator with a standby behind it, as a state machine: what workers may hear, and when to go on alone.

Around `Coordinator`, which knows nothing of standbys: its records pass at once to the own disk and to the standby, and
what it says waits until the standby has what was written before. Without a standby everything passes. The rules of
the bond are in `diloco.coordinator.bond`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from diloco.comms.following import STANDBY, Ack, Beat, Entry, Follow, Parted, Turned, link
from diloco.comms.machine import Action, Event, Lost, Persist, Received, Send, Stop
from diloco.comms.messages import Claim, Join, Message, Refused, Vote
from diloco.coordinator.bond import (
    COORDINATOR_SIDE,
    Bond,
    Witness,
    bond_record,
    confirmed_record,
    end_record,
    standing,
)
from diloco.coordinator.held import Follower, Held
from diloco.coordinator.journal import Record
from diloco.coordinator.membership import Status
from diloco.coordinator.state import Coordinator
from diloco.errors import RefusedError
from diloco.settings import difference

WINDOW = 8  # records on their way to the standby
CLAIM_S = 0.5  # between two questions to the same witness

_HERE = (Status.JOINING, Status.SYNCING, Status.ACTIVE)


class Lead:
    """`handle(event, now) -> actions`; `deadline`; `check()`. See `diloco.comms.machine`.

    A restart with a standing bond leads nothing until its standby is back or the witnesses have ended the bond.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.chain: list[str] = []  # of each record the digest of the journal up to it
        self.bonds: list[Bond] = []  # the newest that the standby is known to have, and one it may have
        self.follower: Follower | None = None
        self.drops = 0  # bonds that were ended without the standby
        self.stopped = False
        self.now = 0.0
        self._out: list[Action] = []
        self._held = Held()
        self._written: deque[tuple[int, float]] = deque()  # under a bond: records that it lacks, since when
        self._renew = False  # votes may have been cast in the bond: begin another one
        self._lost_at = 0.0  # when the bond's standby was last here
        self._slow = 0  # times that a standby was dropped for being behind
        self._bind_after = 0.0  # so that a slow one does not hold the run up again and again
        self._next_claim = 0.0
        self._next_beat = 0.0
        self._deferred: list[Action] | None = None  # of a restart that may not lead yet
        self._joins: dict[str, Received] = {}  # who came meanwhile
        self._goodbyes: list[Send] = []  # to witnesses, who stay until a bond does without them

    def restore(self, records: Sequence[Record], now: float) -> list[Action]:
        """Like `Coordinator.restore`. With a standing bond nothing is returned, and `undecided` is true."""
        self.now, self._out = now, []
        for record, _ in records:
            self._link(record)
        actions = self.coordinator.restore(records, now)
        bonds = standing(record for record, _ in records)
        if bonds and not self.coordinator.complete:
            if self.coordinator.config.topology.standby == "auto":
                self.bonds, self._lost_at, self._deferred = bonds, now, actions
                return []
            self._pass(end_record("topology.standby = 'off'"))
        for action in actions:
            self._pass(action)
        return self._out

    def take_over(self, node: str, chain: Sequence[str], now: float) -> list[Action]:
        """Lead on from the records behind `chain`, which the coordinator has repeated: in the next epoch."""
        self.now, self._out, self.chain = now, [], list(chain)
        self._pass(end_record("the standby took over", node))
        for action in self.coordinator.restore([], now):
            self._pass(action)
        return self._out

    # ---- the machine's interface ----

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.stopped:
            return []
        self.now, self._out = now, []
        if not self._handled(event):
            for action in self.coordinator.handle(event, now):
                self._pass(action)
        if not self.stopped:
            self._attend()
        return self._out

    @property
    def deadline(self) -> float | None:
        if self.stopped:
            return None
        times = [] if self.undecided or self._yields() else [self.coordinator.deadline]
        patience_s = self.coordinator.config.fault.standby_s
        if self.follower is not None:
            times += [self._next_beat, self.follower.heard + patience_s]
        if self._in_step() and self._written:
            times.append(self._written[0][1] + patience_s)
        elif self.bonds and not self._in_step():
            times.append(max(self._next_claim, self._lost_at + patience_s))
        known = [t for t in times if t is not None]
        return min(known) if known else None

    def check(self) -> None:
        self.coordinator.check()
        assert self.bonds or not len(self._held), "words are held back and nobody is waited for"
        assert len(self.bonds) <= 2 and len({b.node for b in self.bonds}) <= 1, "bonds with two standbys"

    # ---- facts ----

    @property
    def count(self) -> int:
        """Records in the journal."""
        return len(self.chain)

    @property
    def undecided(self) -> bool:
        """Restarted, and not known yet to be the one who leads."""
        return self._deferred is not None

    def facts(self) -> dict[str, Any]:
        """For the status. "state": none, copying, in step, or lost while a bond stands without its standby."""
        state = "lost" if self.bonds else "none"
        if self.follower is not None:
            state = "in step" if self._in_step() and self.follower.acked > self.bonds[0].index else "copying"
        behind = self.count - self.follower.acked if self.follower is not None else None
        return {"state": state, "records_behind": behind, "dropped": self.drops, "held_back": len(self._held)}

    def _in_step(self) -> bool:
        """Whether the standby that may take over is the one that is connected."""
        return bool(self.bonds) and self.follower is not None and self.follower.node == self.bonds[0].node

    def _witnesses(self) -> tuple[Witness, ...]:
        return tuple(
            sorted((m.name, m.nonce) for m in self.coordinator.members.values() if m.status in _HERE)
        )

    # ---- records and words ----

    def _link(self, record: Any) -> None:
        self.chain.append(link(self.chain[-1] if self.chain else "", record))

    def _pass(self, action: Action) -> None:
        if isinstance(action, Persist):
            self._link(action.record)
            if self.bonds:
                self._written.append((self.count, self.now))
            self._out.append(action)
        elif isinstance(action, Send) and self._is_goodbye(action):
            self._goodbyes.append(action)
        elif self._must_wait():
            self._held.add(self.count, action)
        else:
            self._out.append(action)

    def _must_wait(self) -> bool:
        """Whether the standby may lack something that is written here."""
        f = self.follower
        return bool(self.bonds) and (
            bool(len(self._held)) or not self._in_step() or f is None or f.acked < self.count
        )

    def _is_goodbye(self, action: Send) -> bool:
        """To a witness that is not the last: once it has gone it cannot vote, so a new bond has to come first."""
        left = isinstance(action.message, Refused) and action.message.kind == "left"
        return left and self._is_witness(action.to) and bool(self._witnesses())

    def _is_witness(self, worker: str) -> bool:
        return any(name == worker for bond in self.bonds for name, _ in bond.witnesses)

    def _release(self, count: int) -> None:
        self._out += self._held.release(count)
        while self._written and self._written[0][0] <= count:
            self._written.popleft()

    def _yields(self) -> bool:
        """Whether the standby has the votes to lead: workers shall look for it."""
        return not self._in_step() and any(bond.ended_by_standby() for bond in self.bonds)

    # ---- what arrives ----

    def _handled(self, event: Event) -> bool:
        """Whether the event is for us, and not for the coordinator."""
        message = event.message if isinstance(event, Received) else None
        match message:
            case Follow():
                self._follow(message)
            case Ack():
                self._ack(message)
            case Parted():
                self._part()
            case Vote():
                for bond in self.bonds:
                    bond.hear(message)
            case Join() if self._is_elsewhere(message):
                pass
            case _ if self._yields():
                if isinstance(event, Received):
                    self._out.append(
                        Send(event.sender, Refused("standby", "the standby of this coordinator may lead now"))
                    )
            case Join() if self.undecided:
                self._joins[message.worker] = event  # type: ignore[assignment]
                self._next_claim = min(self._next_claim, self.now)
            case _:
                if self.undecided:
                    self._wait(event)
                return self.undecided
        return True

    def _wait(self, event: Event) -> None:
        """Something of a worker, while we may not lead: whoever has not joined yet shall, to vote and to be let in."""
        if isinstance(event, Lost):
            self._joins.pop(event.peer, None)
        elif isinstance(event, Received) and event.sender not in self._joins:
            self._out.append(Send(event.sender, Refused("incarnation", "join again")))

    def _is_elsewhere(self, message: Join) -> bool:
        """Whether the worker has followed a later coordinator. Believed where that is possible, so that none can lie us down."""
        c = self.coordinator
        if message.run_id != c.config.run.run_id or message.epoch <= c.epoch - int(self.undecided):
            return False
        if self.bonds and not self._in_step():
            self._stop(message.epoch)
        else:
            reason = f"the worker has followed epoch {message.epoch} of this run, here it is epoch {c.epoch}"
            self._out.append(Send(message.worker, Refused("standby", reason)))
        return True

    def _stop(self, epoch: int) -> None:
        self.stopped = True
        reason = f"another coordinator has taken over this run: it is at epoch {epoch}"
        fix = (
            "this one's newest records were never announced; it can follow that one with --standby HOST:PORT"
        )
        self._out.append(Stop("superseded", RefusedError(f"{reason}; {fix}")))

    def _follow(self, m: Follow) -> None:
        c = self.coordinator
        found = difference(c.settings, m.settings)
        before = self.chain[m.count - 1] if 0 < m.count <= self.count else ""
        if m.run_id != c.config.run.run_id:
            self._turn("run", f"run.run_id = {m.run_id!r}, but this is run {c.config.run.run_id!r}")
        elif found is not None:
            self._turn("settings", found)
        elif m.epoch > c.epoch - int(self.undecided):
            self._turn("superseded", f"a coordinator of epoch {c.epoch}")
            self._stop(m.epoch)
        elif c.config.topology.standby == "off":
            self._turn("off", "topology.standby = 'off'")
        elif m.count > self.count:
            self._turn("ahead", f"{self.count} records here, {m.count} there")
        elif m.chain != before:
            self._turn("diverged", f"another journal than the first {m.count} records of this one")
        else:
            self.follower = Follower(m.node, m.count, m.count, self.now)
            self._next_beat = self.now
            if self._in_step():
                self._renew = True
                self._all_here()
                self._written = deque((count, self.now) for count, _ in self._written)
                self._ack(Ack(m.count))
                if self.undecided:
                    self._decide()
            elif self.bonds:  # the standby of the bond has been replaced
                self._lost_at = self.now - c.config.fault.standby_s

    def _turn(self, kind: str, reason: str) -> None:
        self._tell(Turned(kind, reason, self.count, self.chain[-1] if self.chain else ""))
        self._part()

    def _tell(self, message: Message) -> None:
        self._out.append(Send(STANDBY, message))

    def _ack(self, m: Ack) -> None:
        f = self.follower
        if f is None:
            return
        f.acked, f.ready, f.heard = max(f.acked, min(m.count, f.sent)), m.ready, self.now
        if self._in_step():
            self._release(f.acked)
            if self.coordinator.complete and f.acked == self.count:
                self.bonds.clear()  # it has the whole run, and ends as we do
            if len(self.bonds) > 1 and self.bonds[1].index < f.acked:
                self.bonds.pop(0)
                self._pass_first(confirmed_record(self.bonds[0]))
                self._written.append((self.count, self.now))

    def _part(self) -> None:
        if self._in_step():
            self._lost_at = self.now
        self.follower = None

    # ---- time ----

    def _attend(self) -> None:
        f, patience_s = self.follower, self.coordinator.config.fault.standby_s
        if f is not None and self.now >= f.heard + patience_s:
            self._turn("slow", f"not heard for {patience_s:g} s")
        elif self._in_step() and self._written and self.now >= self._written[0][1] + patience_s:
            self._turn("slow", f"{len(self._written)} records behind for {patience_s:g} s")
            self._lost_at = self.now - patience_s  # it has had its time
            self._slow += 1
            self._bind_after = self.now + patience_s * 2.0 ** min(self._slow, 8)
        if self.bonds and not self._in_step():
            self._claim(patience_s)
        if self.bonds and all(bond.ended_by_coordinator() for bond in self.bonds):
            self._go_on_alone()
        self._bind()
        waiting, self._goodbyes = self._goodbyes, []
        for goodbye in waiting:
            self._pass(goodbye)
        self._feed()

    def _claim(self, patience_s: float) -> None:
        if self.now < max(self._next_claim, self._lost_at + patience_s):
            return
        self._next_claim = self.now + CLAIM_S
        for bond in self.bonds:
            for name in bond.missing():
                self._out.append(Send(name, Claim(bond.name, COORDINATOR_SIDE)))

    def _go_on_alone(self) -> None:
        """The standby of the bonds can never take over now: no longer wait for it."""
        self.bonds.clear()
        self._written.clear()
        self.drops += 1
        self._pass_first(end_record("the standby was dropped"))
        self._release(self.count)
        if self.undecided:
            self._decide()

    def _pass_first(self, record: Persist) -> None:
        self._link(record.record)
        self._out.append(record)

    def _decide(self) -> None:
        """It is us who lead."""
        actions, self._deferred = self._deferred or [], None
        self._all_here()
        for action in actions:
            self._pass(action)
        for join in self._joins.values():
            for action in self.coordinator.handle(join, self.now):
                self._pass(action)
        self._joins.clear()

    def _all_here(self) -> None:
        """Nobody could be heard meanwhile."""
        for member in self.coordinator.members.values():
            member.last_seen = self.now

    def _bind(self) -> None:
        """Begin a bond with a standby that has everything; or another one, when the witnesses are not the same."""
        f, witnesses = self.follower, self._witnesses()
        if self.undecided or f is None or not f.ready or f.acked < self.count or not witnesses:
            return
        if not self.bonds and self.now < self._bind_after:
            return
        if self.coordinator.complete or len(self.bonds) > 1 or (self.bonds and not self._in_step()):
            return
        if self.bonds and witnesses == self.bonds[0].witnesses and not self._renew:
            return
        self._renew = False
        bond = Bond(f.node, self.count, self.coordinator.epoch, witnesses)
        self._pass_first(bond_record(bond.node, bond.epoch, witnesses))
        self.bonds.append(bond)
        self._written.append((self.count, self.now))

    def _feed(self) -> None:
        f = self.follower
        if f is None:
            return
        while f.sent < self.count and f.sent < f.acked + WINDOW:
            self._tell(Entry(f.sent))
            f.sent += 1
        if self.now >= self._next_beat:
            self._next_beat = self.now + self.coordinator.config.fault.takeover_s / 4
            self._tell(Beat(self.count))
