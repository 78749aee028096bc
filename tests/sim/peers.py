"""A toy run without a coordinator, in virtual time: peers, who kills them, and what must hold after each run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from diloco.comms import frame
from diloco.comms.machine import Action, Event, Persist, Received
from diloco.comms.messages import Buffer
from diloco.comms.sim import Simulation, Weather
from diloco.config import RunConfig
from diloco.peer import Peer
from diloco.worker.replica import Replica
from tests.toy import ToyModel, plan_of


class ToyPeer:
    """Drives a Peer through a whole run inside a simulation; dies after its `fuse`-th action from when it is set."""

    def __init__(self, swarm: Swarm, name: str, *, flavour: int, nonce: int, step_s: float = 1.0) -> None:
        self.swarm, self.sim, self.name, self.step_s = swarm, swarm.sim, name, step_s
        self.config = swarm.config
        plan = plan_of(self.config)
        self.model = ToyModel(plan, flavour)
        self.replica = Replica(plan, self.config, self.model, worker=name, nonce=nonce)
        self.peer = Peer(self.replica, [p.name for p in swarm.peers])
        self.state, self.finished = "start", False
        self.fuse: int | None = None
        self.dead = False
        self.sim.add(name, self)
        self.sim.after[name] = self._advance
        self.sim.on_persist[name] = lambda action: swarm.publish(name, action)

    # ---- the machine, as the simulation sees it ----

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.dead or (isinstance(event, Received) and self.swarm.parts(self.name, event.sender)):
            return []
        return self._burn(self.peer.handle(event, now))

    @property
    def deadline(self) -> float | None:
        return self.peer.deadline

    def check(self) -> None:
        self.peer.check()

    def _burn(self, actions: list[Action]) -> list[Action]:
        if self.fuse is None or len(actions) <= self.fuse:
            self.fuse = None if self.fuse is None else self.fuse - len(actions)
            return actions
        self.dead = True
        self.sim.at(0.0, self.kill)  # the simulation is in the middle of this event
        return actions[: self.fuse]

    # ---- life and training ----

    def kill(self) -> None:
        self.dead = True
        if self.sim.machines.get(self.name) is self:
            self.sim.remove(self.name)

    @property
    def alive(self) -> bool:
        return not self.dead

    def _do(self, actions: list[Action]) -> None:
        self.sim.perform(self.name, self._burn(self.peer.perform(actions, self.sim.now)))

    def _advance(self) -> None:
        r = self.replica
        if not self.alive or self.finished or self.state == "computing" or r.blocked or r.stopped is not None:
            return
        self._do(r.merge())
        if r.blocked or not self.alive:
            return
        if self.state in ("start", "stepping") and r.step < self.config.run.inner_steps_total:
            self.state = "computing"
            self.sim.at(self.step_s, self._step)
        elif self.state in ("start", "stepping"):
            self.state = "draining"
            r.drain()
            self._advance()
        elif self.state == "draining":
            self.state = "flushing"
            self._do(r.flush(self.sim.now))
            self._advance()
        else:
            self.finished = True
            self._do(r.leave("complete"))

    def _step(self) -> None:
        if self.alive:
            self.model.train_step(self.replica.step + 1)
            self.state = "stepping"
            self._do(self.replica.after_step(10, self.sim.now))
            self._advance()


class Swarm:
    """Peers on one virtual network, and the commits that they published, by (fragment, version)."""

    def __init__(
        self,
        c: RunConfig,
        *,
        seed: int = 0,
        weather: Weather | None = None,
        flavours: Sequence[int] = (0, 1, 2),
    ) -> None:
        self.config, self.sim = c, Simulation(seed, weather)
        self.published: dict[tuple[int, int], tuple[dict[str, Any], list[Buffer]]] = {}
        self.leaders: list[str] = []  # who published, in order, without repetition
        self.peers: list[ToyPeer] = []
        self.cut: frozenset[str] = frozenset()  # nothing passes between these and the others
        self._nonces = itertools.count(100)
        for i, flavour in enumerate(flavours):
            self.join(f"w{i}", flavour)

    def join(self, name: str, flavour: int) -> ToyPeer:
        """A new process, which knows the names of the others; an older one of that name is dead."""
        for old in [p for p in self.peers if p.name == name]:
            old.kill()
            self.peers.remove(old)
        peer = ToyPeer(self, name, flavour=flavour, nonce=next(self._nonces))
        for other in self.peers:
            other.peer.known.add(name)
        self.peers.append(peer)
        return peer

    def parts(self, a: str, b: str) -> bool:
        return (a in self.cut) != (b in self.cut)

    def publish(self, leader: str, action: Persist) -> None:
        """What a store of records would see: a key is written once, or again with the same content."""
        if not self.leaders or self.leaders[-1] != leader:
            self.leaders.append(leader)
        record = dict(action.record)
        if record["type"] == "commit":
            key = (record["fragment"], record["version"])
            before = self.published.setdefault(key, (record, list(action.blobs)))
            assert before[0]["digest"] == record["digest"], f"{key} was committed twice, and differently"

    def once_started(self, delay_s: float, call: Callable[[], object]) -> None:
        """`call` when the start cohort has been complete for so long: without it no run begins."""

        def begin() -> None:
            call()

        def look() -> None:
            if self.leaders:
                self.sim.at(delay_s, begin)
            else:
                self.sim.at(0.1, look)

        self.sim.at(0.0, look)

    @property
    def leader(self) -> ToyPeer | None:
        return next((p for p in self.peers if p.alive and p.peer.leads), None)

    @property
    def live(self) -> list[ToyPeer]:
        return [p for p in self.peers if p.alive]

    def run(self, until_s: float = 5000.0) -> Swarm:
        self.sim.run(until_s, lambda: bool(self.live) and all(p.finished for p in self.live))
        done = [p.peer for p in self.live]
        self.sim.run(self.sim.now + 500.0, lambda: all(p.done for p in done))
        return self

    def digest(self) -> str:
        """Of the newest published commit of every fragment, as a run's digest is made."""
        newest = {p: v for p, v in sorted(self.published)}
        return frame.model_digest([self.published[p, v][0]["digest"] for p, v in sorted(newest.items())])


def require_promises(swarm: Swarm) -> None:
    """Nothing published is lost, nothing counts twice, and whoever is alive holds exactly what was published."""
    newest: dict[int, int] = {}
    counted: set[tuple[int, int, int, int]] = set()
    for (p, version), (record, blobs) in sorted(swarm.published.items()):
        assert version == newest.get(p, 0) + 1, f"fragment {p}: version {newest.get(p, 0) + 1} is missing"
        newest[p] = version
        assert abs(sum(record["weights"]) - 1.0) < 1e-9
        for blob in blobs:
            h = frame.read_header(blob)
            key = (p, h.worker, h.incarnation, h.round)
            assert key not in counted, f"counted twice: {key}"
            counted.add(key)
    states: dict[tuple[int, int], set[str]] = {}
    for peer in swarm.live:
        for slot in peer.replica.slots:
            shard = slot.shard
            if shard is None or slot.broken or slot.version == 0:
                continue
            record, _ = swarm.published[slot.index, slot.version]
            assert frame.digest(shard.params) == record["digest"], f"{peer.name}, fragment {slot.index}"
            state = frame.model_digest([frame.digest(shard.state[name]) for name in sorted(shard.state)])
            states.setdefault((slot.index, slot.version), set()).add(state)
    assert all(len(found) == 1 for found in states.values()), "outer states differ"
    ends = [p for p in swarm.live if p.finished]
    assert ends and swarm.digest() in {p.replica.digest() for p in ends}, "what was published is lost"
