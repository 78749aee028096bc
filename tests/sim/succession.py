"""A coordinator with a standby and workers in virtual time: who can reach whom, who is alive, what each disk holds.

The machines are the real ones; the network between them is this file's. A worker has one session at a time and goes
through its addresses, as `GrpcConnection` does; what was said in a session that has ended is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from diloco.comms import frame
from diloco.comms.following import PRIMARY, STANDBY, Entry, Parted, Reached, Turned
from diloco.comms.machine import (
    COORDINATOR,
    Action,
    Connected,
    Event,
    Lost,
    Persist,
    Received,
    Send,
    Stop,
)
from diloco.comms.messages import Commit, Refused
from diloco.comms.sim import Simulation, Weather
from diloco.config import RunConfig
from diloco.coordinator.lead import Lead
from diloco.coordinator.standby import DIVERGED, Standby, peer_of
from diloco.coordinator.state import Coordinator
from diloco.late import COUNTING
from tests.sim.faults import Fused
from tests.toy import Disk, ToyWorker

RETRY_S = 0.2  # about, between two attempts to reach a node


class Node:
    """A place where a coordinator or a standby runs, with a disk that outlives it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.disk = Disk()
        self.machine: Lead | Standby | None = None
        self.follows = ""  # the node that its standby follows
        self.link = 0  # counts the ways to that node; what was on an earlier one is lost
        self.open = False
        self.life = 0
        self.copies = 0  # of a journal that it has begun
        self.copy = False  # whether its journal is one, which its operator may not continue as a coordinator
        self.stopped: Stop | None = None

    @property
    def lead(self) -> Lead | None:
        """The machine that lets workers in, if there is one."""
        lead = self.machine if isinstance(self.machine, Lead) else self.machine and self.machine.lead
        return lead if isinstance(lead, Lead) and not lead.undecided and not lead.stopped else None


class World(Simulation):
    """The coordinator "a", its standby "b" and workers. `cut` holds pairs of names that cannot reach each other."""

    def __init__(
        self,
        config: RunConfig,
        *,
        seed: int = 0,
        workers: int = 2,
        weather: Weather | None = None,
        standby: bool = True,
    ):
        super().__init__(seed, weather)
        self.config = config
        self.nodes = {name: Node(name) for name in ("a", "b")}
        self.cut: set[frozenset[str]] = set()
        self.session: dict[str, tuple[str, int]] = {}  # worker -> (node, number) of its open session
        self.sessions = 0
        self.slow_links_s = 0.0  # between a standby and its coordinator, on top of the weather
        self.told: dict[tuple[int, int], str] = {}  # (fragment, version) that any worker heard of -> digest
        self.start_primary("a")
        if standby:
            self.start_standby("b", "a")
        self.workers = [self.new_worker(i, 100 + i) for i in range(workers)]

    def new_worker(self, position: int, nonce: int) -> ToyWorker:
        """A life of worker `position`."""
        return ToyWorker(self, f"w{position}", self.config, flavour=position, nonce=nonce)

    def finish(self, until_s: float = 4000.0) -> World:
        """Run until some node has the whole run behind it and all workers that live are done."""
        self.run(
            until_s,
            lambda: (
                self.completed() is not None
                and all(w.finished or not w.alive or w.replica.stopped for w in self.workers)
            ),
        )
        return self

    def completed(self) -> Node | None:
        """A node whose journal says that the run is complete, and that has ended for it."""
        ends = [n for n in self.nodes.values() if n.stopped is not None and n.stopped.reason == "complete"]
        return ends[0] if ends else None

    # ---- lives of nodes ----

    def start_primary(self, name: str) -> None:
        node = self.nodes[name]
        lead = Lead(Coordinator(self.config))
        actions = lead.restore(list(node.disk.records), self.now) if node.disk.records else []
        self._start(node, lead, "", actions)

    def start_standby(self, name: str, of: str) -> None:
        node = self.nodes[name]
        if not node.disk.records:
            node.copies, node.copy = node.copies + 1, True
        records = node.disk.records
        machine = Standby(self.config, f"{name}{node.copies}", list(records), lambda n: records[:n], self.now)
        self._start(node, machine, of, [])
        self._reach(node, node.life)

    def _start(self, node: Node, machine: Lead | Standby, follows: str, actions: list[Action]) -> None:
        node.life += 1
        node.machine, node.stopped, node.open, node.follows = machine, None, False, follows
        self.on_persist[node.name] = partial(self._write, node)
        self.on_stop[node.name] = partial(self._stopped, node)
        self.add(node.name, Fused(machine))
        self.perform(node.name, actions)

    def _write(self, node: Node, action: Persist) -> None:
        node.disk.write(action)
        if isinstance(node.machine, Standby):
            node.copy = node.machine.lead is None

    def restart(self, name: str, of: str) -> None:
        """As a careful operator does: a copy follows again, anything else goes on by itself."""
        if self.nodes[name].machine is None:
            if self.nodes[name].copy:
                self.start_standby(name, of)
            else:
                self.start_primary(name)

    def _stopped(self, node: Node, stop: Stop) -> None:
        node.stopped = stop
        life = node.life
        if stop.reason == DIVERGED:
            node.disk.records = []
            self.at(0.0, lambda: self.start_standby(node.name, node.follows) if node.life == life else None)
        elif stop.error is not None:
            self.at(0.0, lambda: self.kill(node.name) if node.life == life else None)

    def kill(self, name: str) -> None:
        """As kill -9: its disk stays."""
        node = self.nodes[name]
        node.life += 1
        node.machine = None
        self.remove(name)
        for other in self.nodes.values():
            if name in (other.name, other.follows):
                self._break(other)
        for worker, (at, _) in list(self.session.items()):
            if at == name:
                self._end_session(worker)

    def arm(self, name: str, fuse: int, then: Callable[[], None] = lambda: None) -> None:
        """Let the node die after `fuse` more actions, and `then` happen."""
        machine = self.machines.get(name)
        if isinstance(machine, Fused) and machine.fuse is None:
            machine.fuse = fuse

            def died() -> None:
                self.at(0.0, partial(self.kill, name))
                self.at(0.0, then)

            machine.died = died

    # ---- who can reach whom ----

    def part(self, one: str, other: str) -> None:
        """Nothing gets through between the two any more; both notice a little later."""
        self.cut.add(frozenset((one, other)))
        for node in self.nodes.values():
            if {node.name, node.follows} == {one, other}:
                self._break(node)
        for worker, (at, _) in list(self.session.items()):
            if {worker, at} == {one, other}:
                self._end_session(worker)

    def heal(self, one: str, other: str) -> None:
        self.cut.discard(frozenset((one, other)))

    def _reachable(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cut and other in self.machines

    # ---- the way from a standby to the node that it follows ----

    def _reach(self, node: Node, life: int) -> None:
        if node.life != life or node.stopped is not None:
            return
        if not node.open and self._reachable(node.name, node.follows):
            node.open = True
            node.link += 1
            self.deliver(node.name, Received(PRIMARY, Reached()))
        self.at(self.random.uniform(0.5, 1.5) * RETRY_S, partial(self._reach, node, life))

    def _break(self, node: Node) -> None:
        if node.open:
            node.open = False
            node.link += 1
            follows, link = node.follows, node.link

            def noticed() -> None:
                if node.link == link:  # else another stream of the standby has taken this one's place
                    self.deliver(follows, Received(STANDBY, Parted()))

            # A standby dials again only when it knows that it is parted.
            self.at(0.0, lambda: self.deliver(node.name, Received(PRIMARY, Parted())))
            self.at(self._delay(), noticed)

    def _between(self, node: Node, upwards: bool, event: Received) -> None:
        """In order, and not at all once the way is broken."""
        if not node.open:
            return
        link, lane = node.link, f"{node.name} {upwards}"
        to, sender = (node.follows, STANDBY) if upwards else (node.name, PRIMARY)
        end = max(self._busy_until.get(lane, 0.0), self.now + self._delay() + self.slow_links_s)
        self._busy_until[lane] = end

        def arrive() -> None:
            if node.link == link:
                self.deliver(to, Received(sender, event.message))
                if isinstance(event.message, Turned) and node.link == link:
                    self._break(node)  # whoever is turned away comes again

        self.at(end - self.now, arrive)

    # ---- sessions of workers ----

    def deliver(self, name: str, event: Event) -> None:
        if event == Connected(COORDINATOR) and name not in self.session:
            self._dial(name, 0)  # a toy worker that begins
        else:
            super().deliver(name, event)

    def _dial(self, worker: str, attempt: int) -> None:
        if worker not in self.machines or worker in self.session:
            return
        name = sorted(self.nodes)[attempt % len(self.nodes)]
        if not self._reachable(worker, name):
            self.at(self.random.uniform(0.5, 1.5) * RETRY_S, partial(self._dial, worker, attempt + 1))
            return
        self.sessions += 1
        self.session[worker] = (name, self.sessions)
        self.deliver(name, Connected(worker))
        self.deliver(worker, Connected(COORDINATOR))

    def _end_session(self, worker: str) -> None:
        name, _ = self.session.pop(worker)
        self.deliver(worker, Lost(COORDINATOR))
        self.at(self._delay(), lambda: self.deliver(name, Lost(worker)))
        following = sorted(self.nodes).index(name) + 1
        self.at(self.random.uniform(0.5, 1.5) * RETRY_S, partial(self._dial, worker, following))

    def _in_session(self, worker: str, to: str, event: Received) -> None:
        session = self.session.get(worker)
        if session is None or (to != worker and session[0] != to):
            return

        def arrive() -> None:
            if self.session.get(worker) != session:
                return
            if isinstance(event.message, Refused) and event.message.kind == "standby":
                self._end_session(worker)
            else:
                self._note(event)
                self.deliver(to, event)

        copies = 2 if self.random.random() < self.weather.duplicate else 1
        for _ in range(copies):
            if self.random.random() >= self.weather.drop:
                self.at(self._delay() + self.slow_s.get(worker, 0.0), arrive)

    def _note(self, event: Received) -> None:
        """Whatever any worker hears of a version must be the same, whoever says it."""
        message = event.message
        if isinstance(message, Commit):
            key = (message.fragment, message.version)
            digest = self.told.setdefault(key, message.digest)
            assert digest == message.digest, f"two commits {key}"

    # ---- words on their way ----

    def perform(self, name: str, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Entry):
                index = action.message.index
                record, blobs = self.nodes[name].disk.records[index]
                super().perform(name, [Send(action.to, Entry(index, record, blobs))])
            else:
                super().perform(name, [action])

    def _transmit(self, sender: str, to: str, event: Event) -> None:
        assert isinstance(event, Received)
        peer = peer_of(event.message)
        if peer == PRIMARY:
            self._between(self.nodes[sender], True, event)
        elif peer == STANDBY:
            for node in self.nodes.values():
                if node.follows == sender:
                    self._between(node, False, event)
        elif sender in self.nodes:
            if self.session.get(to, ("", 0))[0] == sender:
                self._in_session(to, to, Received(COORDINATOR, event.message))
        elif sender in self.session:
            self._in_session(sender, self.session[sender][0], event)


def require_sound(world: World) -> None:
    """The complete journal has one commit per version; all that was ever told is in it; every replica agrees.

    Where workers were given up for a while, those that are done before the others do not have the last commits.
    """
    leader = world.completed()
    assert leader is not None
    ends = [record for record, _ in leader.disk.records if record["type"] == "complete"]
    assert len(ends) == 1
    digests: dict[tuple[int, int], str] = {}
    newest: dict[int, int] = {}
    for record in leader.disk.commits():
        p, version = record["fragment"], record["version"]
        assert version == newest.get(p, 0) + 1, "a committed version was lost or doubled"
        newest[p] = version
        digests[p, version] = record["digest"]
        late = world.config.fault.late in COUNTING  # then a worker may be there with two rounds
        who = list(zip(record["indices"], record["rounds"] if late else record["indices"], strict=True))
        assert len(set(who)) == len(who), "one worker counted twice"
    for key, digest in world.told.items():
        assert digests.get(key) == digest, f"commit {key} was announced and is lost"
    for worker in world.workers:
        if worker.alive:
            stop = worker.replica.stopped
            assert stop is None or stop.error is None or "is complete" in stop.reason, f"sent away: {stop}"
            for slot in worker.replica.slots:
                if slot.shard is not None and slot.version > 0 and not slot.broken:
                    held = frame.digest(slot.shard.params)
                    assert held == digests[slot.index, slot.version], f"{worker.name} holds another value"
    finals = {w.replica.digest() for w in world.workers if w.finished}
    assert ends[0]["digest"] in finals
