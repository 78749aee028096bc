"""A node of a run without a coordinator, as a state machine: a worker's half, and a coordinator while it leads.

The rules of rounds are those of `diloco.coordinator`; here is only who applies them. The lowest live name leads. It
is followed for as long as it is heard at least once in a lease (`fault.round_timeout_s`, or `fault.dead_s` if that is
shorter); then the next lowest asks everybody for what they hold, takes what is newest, and leads on in a higher epoch.
What a leader says carries its epoch: whoever has been replaced is heard by nobody.

A commit is published (Persist) once every live follower holds its payloads, so that it outlives the leader. With
``fault.quorum`` above half of the workers no two sides of a parted network can both commit; without it they can, and
those who come back take the value of the side whose epoch is higher.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diloco import founding
from diloco.comms.machine import (
    COORDINATOR,
    Action,
    Computed,
    Connected,
    Event,
    Lost,
    Persist,
    Received,
    Send,
    Stop,
    Tick,
)
from diloco.comms.messages import Commit, Contribution, Message, Refused, Skip, Snapshot
from diloco.comms.peering import Ask, Beacon, Handover, Head, Seat, Under
from diloco.coordinator.state import Coordinator
from diloco.coordinator.succession import newest, seats_of
from diloco.errors import CorruptDataError
from diloco.worker.holding import Holdings
from diloco.worker.replica import Replica
from diloco.worker.replica_slots import is_of_plan, shard_of


@dataclass(slots=True)
class Unpublished:
    """What a leader does once its followers hold these commits."""

    commits: list[tuple[int, int]]  # (fragment, version)
    followers: set[str]
    then: list[Action]


def better(a: tuple[int, str], b: tuple[int, str]) -> bool:
    """Whether whoever follows `b` (epoch, leader) must follow `a` instead: a later epoch, or the lower of two names."""
    same = a[0] == b[0] and a[1] != b[1]
    return a[0] > b[0] or (same and a[1] != "" and (b[1] == "" or a[1] < b[1]))


class Peer:
    """`handle(event, now) -> actions`; `deadline`; `check()`; the training thread's actions go through `perform`.

    Connected(name) makes another peer known; a peer that is heard is known too. `others` are known from the start.
    """

    def __init__(self, replica: Replica, others: Iterable[str] = ()) -> None:
        self.replica, self.config = replica, replica.config
        self.name = replica.worker
        self.holdings = Holdings(replica)
        self.epoch, self.leader = 0, ""  # whom I follow
        self.ruling = False  # the leader has said that it takes contributions; or I lead and do
        self.coordinator: Coordinator | None = None
        self.beacons: dict[str, Beacon] = {}
        self.heard: dict[str, float] = {}
        self.known = set(others)
        self.seats: tuple[Seat, ...] = ()
        self.founded: tuple[Head, ...] = ()
        self.taken: dict[int, Handover] = {}  # what I was handed as a candidate
        self.asked: dict[int, float] = {}  # when I last asked for a fragment
        self.unpublished: deque[Unpublished] = deque()
        self.parked: dict[tuple[str, int], Contribution | Skip] = {}
        self.next_beacon = 0.0
        self.told = False  # that I am done
        self.now = 0.0
        self.out: list[Action] = []

    # ---- the machine's interface ----

    def handle(self, event: Event, now: float) -> list[Action]:
        self._begin(now)
        match event:
            case Received(sender=sender, message=message):
                self.heard[sender] = now
                self.known.add(sender)
                self._received(sender, message)
            case Connected(peer=peer):
                self.known.add(peer)
                self.tell(peer)
            case Lost():
                pass  # silence decides
            case Computed():
                self.to_replica(event)
            case Tick():
                self._tick()
        self._lead()
        return self.out

    def perform(self, actions: Sequence[Action], now: float) -> list[Action]:
        """What the training thread got from the replica, as actions of this peer."""
        self._begin(now)
        self._from_replica(actions)
        self._lead()
        return self.out

    @property
    def deadline(self) -> float | None:
        times = [self.next_beacon, self.replica.deadline]
        if self.coordinator is not None:
            times.append(self.coordinator.deadline)
        return min(t for t in times if t is not None)

    def check(self) -> None:
        self.replica.check()
        if self.coordinator is not None:
            assert self.leader == self.name and self.ruling, "a coordinator without a reign"
            self.coordinator.check()

    @property
    def leads(self) -> bool:
        return self.coordinator is not None

    # ---- who is there ----

    @property
    def lease_s(self) -> float:
        """For so long after it was last heard a peer is followed, or waited for."""
        return min(self.config.fault.round_timeout_s, self.config.fault.dead_s)

    def _begin(self, now: float) -> None:
        if now - self.now > self.config.fault.suspect_s:  # I was away: of the others' silence I know nothing
            self.heard = dict.fromkeys(self.heard, now)
        self.now, self.out = now, []

    def live(self, within_s: float) -> set[str]:
        return {self.name, *(p for p, at in self.heard.items() if self.now < at + within_s)}

    @property
    def able(self) -> bool:
        """Whether I hold the value of every fragment, and so could lead the run on."""
        return self.replica.stopped is None and all(version >= 0 for version, _ in self.holdings.heads())

    def _next_leader(self) -> str:
        """Whom the rules want: the lowest live peer that holds everything, or the lowest at all before the run."""
        live = self.live(self.lease_s)
        able = {p for p in live if p in self.beacons and self.beacons[p].able} - {self.name}
        if self.able:
            able.add(self.name)
        if able:
            return min(able)
        return min(live) if len(live) >= self.config.topology.workers else ""

    # ---- beacons, and who leads ----

    def beacon(self) -> Beacon:
        c = self.coordinator
        return Beacon(
            self.name,
            self.epoch,
            self.leader,
            self.able,
            self.holdings.heads(),
            self.holdings.whole(),
            self.replica.step,
            self._seats(),
            ruling=c is not None,
            founded=self.founded if c is not None else (),
        )

    def tell(self, *peers: str) -> None:
        beacon = self.beacon()
        self.out += [Send(peer, beacon) for peer in peers if peer != self.name]

    def _tick(self) -> None:
        if self.now >= self.next_beacon:
            self.next_beacon = self.now + self.config.fault.heartbeat_s
            following = self.leader in self.live(self.lease_s) and not self._denied()
            wanted = self._next_leader() if self.replica.stopped is None else ""
            # A live leader is replaced by a lower name only, and by none that is about to leave.
            if wanted == self.name != self.leader and not (
                following and (self.leader < self.name or self.replica.leaving is not None)
            ):
                self._follow(self.epoch + 1, self.name)
            self.tell(*sorted(self.known))
        due = self.replica.deadline
        if due is not None and self.now >= due:
            self.to_replica(Tick())
        if self.coordinator is not None:
            self.from_coordinator(self.coordinator.handle(Tick(), self.now))

    def _denied(self) -> bool:
        """Whether the leader has begun a new life, which does not lead."""
        beacon = self.beacons.get(self.leader)
        return beacon is not None and beacon.epoch >= self.epoch and beacon.leader != self.leader

    def _follow(self, epoch: int, leader: str) -> None:
        """Drop whoever led, myself included: nothing of it that is unpublished was used here."""
        self.seats = self._seats()
        self.epoch, self.leader, self.ruling = epoch, leader, False
        self.coordinator = None
        self.unpublished.clear()
        self.parked.clear()
        self.taken.clear()
        self.asked.clear()
        self.to_replica(Lost(COORDINATOR))

    def ready_for(self, founded: tuple[Head, ...]) -> bool:
        """Let go of what the new reign does not have. False while a job is at work on it: try again later."""
        slots = self.replica.slots
        if any(version < 0 for version, _ in self.holdings.heads()) and not any(s.version for s in slots):
            # Starting values of a leader that did not finish giving them: there will be others.
            if any(slot.jobs for slot in slots):
                return False
            for slot in slots:
                slot.forget()
            self.holdings = Holdings(self.replica)
        for p in self.holdings.differs(founded):
            self.holdings.doubt(p)
        return True

    def _received(self, sender: str, message: Message) -> None:
        match message:
            case Beacon() if message.peer == sender:
                self._heard(message)
            case Ask(epoch=epoch, leader=leader, fragment=p) if (epoch, leader) == (self.epoch, self.leader):
                held = self.holdings.hand_over(p) if is_of_plan(message, len(self.replica.slots)) else None
                if held is not None:
                    self.out.append(Send(sender, Handover(epoch, leader, *held)))
            case Handover(epoch=epoch, leader=leader, value=value, commit=commit):
                if not is_of_plan(value, len(self.replica.slots)):
                    return
                if commit is not None and commit.fragment != value.fragment:
                    return
                if (epoch, leader) == (self.epoch, self.name) and self.coordinator is None:
                    with contextlib.suppress(CorruptDataError, ValueError, RuntimeError):  # asked for again
                        shard_of(value, self.replica.plan, self.config)
                        self.taken[value.fragment] = message
                elif self.ruling and (epoch, leader) == (self.epoch, self.leader) and sender == leader:
                    if commit is not None:
                        self.holdings.note(commit)
                    self._from_leader(value)
            case Under(epoch=epoch, leader=leader, message=inner):
                if not self.ruling or (epoch, leader) != (self.epoch, self.leader):
                    return
                if self.coordinator is not None:
                    self._from_follower(sender, inner)
                elif sender == self.leader:
                    self._from_leader(inner)

    def _heard(self, beacon: Beacon) -> None:
        if not len(beacon.heads) == len(beacon.whole) == len(self.replica.slots):
            return  # of another model
        self.beacons[beacon.peer] = beacon
        self.seats = newest(self.seats, beacon.seats)
        theirs, mine = (beacon.epoch, beacon.leader), (self.epoch, self.leader)
        if better(theirs, mine):
            # In my own name, and not made by this life of mine: I do not lead, and say so.
            self._follow(beacon.epoch, "" if beacon.leader == self.name else beacon.leader)
            self.tell(beacon.leader)
        elif better(mine, theirs):
            self.tell(beacon.peer)  # so that it learns whom to follow
        known = self.ruling or theirs != (self.epoch, self.leader)
        if beacon.ruling and not known and self.ready_for(beacon.founded):
            self.ruling = True
            self.to_replica(Connected(COORDINATOR))

    # ---- the worker's half ----

    def to_replica(self, event: Event) -> None:
        self._from_replica(self.replica.handle(event, self.now))

    def _from_replica(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Stop):
                continue  # told when I am done
            if not isinstance(action, Send):
                self.out.append(action)
            elif self.coordinator is not None:
                self._from_follower(self.name, action.message)
            elif self.ruling:
                self.out.append(Send(self.leader, Under(self.epoch, self.leader, action.message)))

    def _from_leader(self, message: Message) -> None:
        """What the leader says, to the replica."""
        if not is_of_plan(message, len(self.replica.slots)):
            return
        if isinstance(message, Refused) and message.kind == "corrupt":
            for slot in self.replica.slots:
                self.holdings.doubt(slot.index)
            self.to_replica(Connected(COORDINATOR))
            return
        if isinstance(message, Commit | Snapshot):
            self.holdings.note(message)
        self.to_replica(Received(COORDINATOR, message))
        if isinstance(message, Commit) and self.leader != self.name:
            self.tell(self.leader)  # it is held here

    # ---- leading ----

    def _from_follower(self, sender: str, message: Message) -> None:
        """To the coordinator. A fragment's next round waits until its last commit is published.

        So at most the newest version of a fragment is unpublished, and a successor that has it publishes it.
        """
        assert self.coordinator is not None
        pending = {p for entry in self.unpublished for p, _ in entry.commits}
        if isinstance(message, Contribution | Skip) and message.fragment in pending:
            self.parked[sender, message.fragment] = message
        else:
            self.from_coordinator(self.coordinator.handle(Received(sender, message), self.now))

    def from_coordinator(self, actions: Sequence[Action]) -> None:
        """To others at once; what makes a commit public, and my own use of it, once they hold it."""
        commits = [
            (int(a.record["fragment"]), int(a.record["version"]))
            for a in actions
            if isinstance(a, Persist) and a.record["type"] == "commit"
        ]
        followers, later = set[str](), list[Action]()
        for action in actions:
            if isinstance(action, Send) and action.to != self.name:
                self.out.append(Send(action.to, self._signed(action.message)))
                if isinstance(action.message, Commit):
                    followers.add(action.to)
            else:
                later.append(action)
        if later:
            self.unpublished.append(Unpublished(commits, followers if commits else set(), later))

    def _signed(self, message: Message) -> Under | Handover:
        """A snapshot goes with the commit that made it: that may be unpublished, and whoever has it must be able to."""
        c = self.coordinator
        if c is not None and isinstance(message, Snapshot):
            done = c.committed.get(message.fragment)
            if done is not None and done.version == message.version and done.frames:
                made = (done.weights, done.rounds, done.digest, done.frames, done.local_steps)
                commit = Commit(message.fragment, done.version, *made)
                return Handover(self.epoch, self.leader, message, commit)
        return Under(self.epoch, self.leader, message)

    def _lead(self) -> None:
        """Found the reign when everybody has reported; then publish what is held by all who live."""
        if self.leader == self.name and self.coordinator is None:
            founding.found(self)
        while self.unpublished and self.coordinator is not None and self._is_held(self.unpublished[0]):
            for action in self.unpublished.popleft().then:
                if isinstance(action, Send):
                    self._from_leader(action.message)
                elif not isinstance(action, Stop):
                    self.out.append(action)
            parked, self.parked = self.parked, {}
            for (sender, _), message in parked.items():
                self._from_follower(sender, message)
        if self.done and not self.told:
            self.told = True
            stopped = self.replica.stopped
            self.out += [stopped] if stopped is not None else []

    def _is_held(self, entry: Unpublished) -> bool:
        if not entry.commits:
            return True
        holders = {self.name}
        others = {seat.worker for seat in self._seats() if seat.gone}  # of whom it is not expected
        for peer, beacon in self.beacons.items():
            if (beacon.epoch, beacon.leader) == (self.epoch, self.leader):
                if all(beacon.heads[p][0] >= v for p, v in entry.commits):
                    holders.add(peer)
                elif any(beacon.heads[p][0] < v - 1 for p, v in entry.commits):
                    others.add(peer)  # it lacks earlier ones: a snapshot will bring it up
        waited = (entry.followers & self.live(self.config.fault.suspect_s)) - others
        return waited <= holders and len(holders) >= self.needed()

    def needed(self) -> int:
        """How many peers must hold a commit, and take part in a succession, this one included.

        Whoever has left can be on nobody else's side any more.
        """
        gone = sum(seat.gone for seat in self._seats())
        return max(1, (self.config.fault.quorum or 1) - gone)

    def _seats(self) -> tuple[Seat, ...]:
        return self.seats if self.coordinator is None else newest(self.seats, seats_of(self.coordinator))

    # ---- the end ----

    @property
    def done(self) -> bool:
        """My work is over and nobody needs me: I do not lead, or the run is complete."""
        return self.replica.stopped is not None and (self.coordinator is None or self.coordinator.complete)
