"""One simulated run: the real coordinator, standby and workers under a scenario's faults, watched after every event.

The world is that of `tests.sim.succession`, with tiny models; here are the faults, an operator who repairs what they
broke, and `outcome_of`, which runs a scenario to its end or to the first broken promise.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import torch

from diloco.comms.machine import Action, Event, Persist, Received, Send, Tick
from diloco.comms.messages import Commit, FromCoordinator, FromWorker, Join, Snapshot
from diloco.comms.uplink import codecs_for
from diloco.coordinator.membership import Member
from diloco.coordinator.standby import Standby
from diloco.coordinator.state import Coordinator
from tests.sim.faults import Fused
from tests.sim.leased import LeasedWorker
from tests.sim.lies import flip, poison, spoilt
from tests.sim.promises import Violation, Watch, require
from tests.sim.scenario import CALM, STORM, Fault, Scenario, scenario, shrunk
from tests.sim.succession import Node, World
from tests.toy import Cluster, ToyWorker, plan_of

TINY = {"embed": (2, 2), "blocks.0.w": (3,), "head": (2,)}
TINY_ROLES = {"embed": "embed", "blocks.0.w": "scalar", "head": "head"}
REPAIR_S = 2.0  # until the operator starts again what has died
MAX_EVENTS = 60_000
OTHER = {"a": "b", "b": "a"}


@contextmanager
def tiny() -> Iterator[None]:
    """Toy models of a few numbers."""
    with mock.patch.multiple("tests.toy", SHAPES=TINY, ROLES=TINY_ROLES):
        yield


class Watched(ToyWorker):
    """A toy worker that can be stopped and continued, and is watched."""

    trial: Trial

    def _step(self) -> None:
        until = self.trial.stopped.get(self.name, 0.0)
        if self.alive and self.trial.now < until:
            self.sim.at(until - self.trial.now, self._step)
            return
        if self.alive:
            if self.trained == 0:
                self.trial.watch.begins(self.replica, self.model)
            self.trial.watch.trained[self.name] = self.trial.watch.trained.get(self.name, 0) + 1
        super()._step()

    def _advance(self) -> None:
        super()._advance()
        if self.alive:
            self.trial.watch.worker(self.replica)


class WatchedLeased(Watched, LeasedWorker):
    """The same with data by lease."""


class Trial(World):
    """A world under a scenario's faults."""

    def __init__(self, s: Scenario) -> None:
        self.scenario, self.stopped = s, dict[str, float]()  # who is stopped, until when
        c = s.config
        self.watch = Watch(c, codecs_for(c, plan_of(c)), tampered=s.tampered)
        self.full: set[str] = set()  # nodes whose disk is full
        self.spoiling: tuple[str, float] = ("", 0.0)
        self.said: deque[tuple[str, Event]] = deque(maxlen=400)  # to nodes, for replays
        self.heard: dict[str, list[Event]] = {}  # by workers in this life
        self.nonces = itertools.count(1000)
        self.chance = random.Random(s.seed + 1)
        super().__init__(c, seed=s.seed, workers=s.workers, weather=s.weather, standby=s.standby)
        for fault in s.faults:
            self.at(fault.at, partial(self._fault, fault))

    def new_worker(self, position: int, nonce: int) -> ToyWorker:
        name = f"w{position}"
        self.watch.forget(name)
        self.heard[name] = []
        kind = WatchedLeased if self.config.data.mode == "leased" else Watched
        worker = kind.__new__(kind)
        worker.trial = self
        worker.__init__(self, name, self.config, flavour=position, nonce=nonce)  # type: ignore[misc]
        return worker

    # ---- every event ----

    def deliver(self, name: str, event: Event) -> None:
        until = self.stopped.get(name, 0.0)
        if self.now < until and not isinstance(event, Tick):
            self.at(until - self.now, partial(self.deliver, name, event))
            return
        if isinstance(event, Received):
            if name in self.nodes and isinstance(event.message, FromWorker):
                self.said.append((name, event))
            elif name in self.heard and isinstance(event.message, FromCoordinator):
                self.watch.hears(event.message)
                self.heard[name] = [*self.heard[name][-40:], event]
        node, former = self.nodes.get(name), self._of_former_life(name, event)
        heard = former.last_seen if former is not None else 0.0
        super().deliver(name, event)
        if former is not None:
            require(former.last_seen == heard, "4 (I15)", f"{name} hears a former life of {former.name}")
        machine = self.machines.get(name)
        if node is not None and node.lead is not None and isinstance(machine, Fused) and not machine.dead:
            self.watch.leads(name, node.life, node.lead.coordinator, self.now)

    def _of_former_life(self, name: str, event: Event) -> Member | None:
        """The member in whose name a former life of it speaks."""
        lead = self.nodes[name].lead if name in self.nodes else None
        if lead is None or not isinstance(event, Received):
            return None
        member = lead.coordinator.members.get(event.sender)
        life = getattr(event.message, "incarnation", None)
        return member if member is not None and life is not None and life < member.incarnation else None

    def _arm(self, name: str) -> None:
        super()._arm(name)
        if self.now < self.stopped.get(name, 0.0):
            self._ticks.pop(name, None)  # armed again by the event that wakes it

    def perform(self, name: str, actions: list[Action]) -> None:
        node = self.nodes.get(name)
        life = node.life if node is not None else 0
        for action in actions:
            if node is not None and node.life != life:
                return  # it died of the last one
            if isinstance(action, Persist) and name in self.full:
                self.full.discard(name)
                self._dies(name)
                return
            if node is not None and isinstance(action, Send):
                self.watch.says(name, action)
            super().perform(name, [action])

    def _write(self, node: Node, action: Persist) -> None:
        super()._write(node, action)
        record = dict(action.record)
        self.watch.record(node.name, len(node.disk.records) == 1, record, action.blobs)
        if record["type"] == "commit" and node.lead is not None:
            self.watch.committed(node.name, node.lead.coordinator, record["fragment"])

    def _in_session(self, worker: str, to: str, event: Received) -> None:
        kind, chance = self.spoiling
        if kind and self.chance.random() < chance:
            event = Received(event.sender, spoilt(event.message, kind, self.chance))
        super()._in_session(worker, to, event)

    # ---- faults ----

    def _fault(self, f: Fault) -> None:
        names = ["a", "b"] if self.scenario.standby else ["a"]
        node, worker = names[f.who % len(names)], f.who % len(self.workers)
        match f.kind:
            case "kill coordinator":
                self.arm(node, int(f.amount), partial(self._repair, node))
            case "disk full":
                self.full.add(node)
                self.at(f.lasts_s, lambda: self.full.discard(node))
            case "stop coordinator":
                self._stop(node, f.lasts_s)
            case "stop worker":
                self._stop(self.workers[worker].name, f.lasts_s)
            case "part" | "isolate":
                everybody = [*names, *(w.name for w in self.workers)]
                one = node if f.kind == "part" else everybody[f.who % len(everybody)]
                others = [n for n in everybody if n != one]
                for other in others if f.kind == "isolate" else [others[f.other % len(others)]]:
                    self.part(one, other)
                    self.at(f.lasts_s, partial(self.heal, one, other))
            case "slow link":
                name = self.workers[worker].name
                self.slow_s[name] = f.amount
                self.at(f.lasts_s, partial(self.slow_s.__setitem__, name, 0.0))
            case "slow worker":
                self.workers[worker].step_s = f.amount
            case "storm":
                self.weather = STORM
                self.at(f.lasts_s, partial(setattr, self, "weather", self.scenario.weather))
            case "corrupt" | "tamper":
                self.spoiling = (f.kind, f.amount)
                self.at(f.lasts_s, partial(setattr, self, "spoiling", ("", 0.0)))
            case "replay":
                self._replay(int(f.amount))
            case "nan":
                self.workers[worker].poison = partial(poison, int(f.amount))
            case "flip signs":
                flip(self.workers[worker].replica)
            case "kill worker" | "restart worker":
                self._end_worker(worker, f)

    def _reachable(self, one: str, other: str) -> bool:
        node = self.nodes.get(other)
        ended = node is not None and node.stopped is not None and isinstance(node.machine, Standby)
        if ended and node is not None and isinstance(node.machine, Standby) and node.machine.lead is None:
            return False
        return super()._reachable(one, other)

    def _stop(self, name: str, lasts_s: float) -> None:
        """As kill -STOP: nothing is lost, all comes later."""
        self.stopped[name] = max(self.stopped.get(name, 0.0), self.now + lasts_s)
        self.at(lasts_s, partial(self.deliver, name, Tick()))

    def _dies(self, name: str) -> None:
        """In the middle of what it does: nothing more of it happens."""
        machine = self.machines.get(name)
        if isinstance(machine, Fused):
            machine.dead = True
        self.at(0.0, partial(self.kill, name))
        self._repair(name)

    def _repair(self, name: str) -> None:
        self.at(REPAIR_S, partial(self._start_again, name))

    def _start_again(self, name: str) -> None:
        node = self.nodes[name]
        if node.machine is not None:
            return
        if node.stopped is not None and node.stopped.reason == "superseded":
            self.start_standby(name, OTHER[name])
        else:
            self.restart(name, OTHER[name])

    def _stopped(self, node: Node, stop: Any) -> None:
        super()._stopped(node, stop)
        if stop.error is None and isinstance(node.machine, Standby) and node.machine.lead is None:
            for worker in [name for name, (at, _) in self.session.items() if at == node.name]:
                self._end_session(worker)  # its process ends with the run
        if stop.error is not None and stop.reason != "superseded" and not isinstance(stop.error, Violation):
            raise Violation(f"3: node {node.name} ends: {stop.error}")
        if stop.error is not None:
            self._repair(node.name)

    def _end_worker(self, position: int, f: Fault) -> None:
        worker = self.workers[position]
        if not worker.alive or worker.finished:
            return
        others = [w for w in self.workers if w is not worker and w.alive]
        started = any(r["type"] == "start" for node in self.nodes.values() for r, _ in node.disk.records)
        worker.kill()
        if worker.name in self.session:
            self._end_session(worker.name)
        if f.kind == "restart worker" or not others or not started:
            self.at(f.lasts_s, partial(self._new_life, position))

    def _new_life(self, position: int) -> None:
        """What the last one said may still be on its way."""
        name = self.workers[position].name
        if self.workers[position].alive:
            return
        self.workers[position] = self.new_worker(position, next(self.nonces))
        of_it = [(to, e) for to, e in self.said if isinstance(e, Received) and e.sender == name]
        for to, event in of_it[-8:]:
            if isinstance(event, Received) and not isinstance(event.message, Join):
                self.at(self.chance.uniform(0.0, 4.0), partial(self.deliver, to, event))

    def _replay(self, count: int) -> None:
        """What was said comes again, out of order: to nodes from every life, to workers what this life heard."""
        nonces = {w.name: w.replica.nonce for w in self.workers}
        again = [
            (name, event)
            for name, event in self.said
            if not (isinstance(event, Received) and isinstance(event.message, Join))
            or event.message.nonce == nonces[event.message.worker]
        ]
        for name, event in self.chance.sample(again, min(count, len(again))):
            to = next((n.name for n in self.nodes.values() if n.lead is not None), name)
            self.at(self.chance.uniform(0.0, 0.5), partial(self.deliver, to, event))
        for worker in self.workers:
            known = [e for e in self.heard[worker.name] if isinstance(e, Received)]
            late = [e for e in known if isinstance(e.message, Commit | Snapshot)]
            for event in self.chance.sample(late, min(count // 4, len(late))):
                self.at(self.chance.uniform(0.0, 0.5), partial(self._again, worker, event))

    def _again(self, worker: ToyWorker, event: Event) -> None:
        if worker.alive:
            self.deliver(worker.name, event)


# ---- a whole run ----


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a scenario went: `violation` is "" or says which promise was broken, and when."""

    seed: int
    events: int
    virtual_s: float
    violation: str


def outcome_of(s: Scenario) -> Outcome:
    """Run the scenario to its end, or to the first broken promise."""
    torch.set_num_threads(1)
    events, now = 0, 0.0
    with tiny():
        try:
            trial = Trial(s)
            try:
                trial.run(s.bound_s, partial(_done, trial), MAX_EVENTS)
                _require_end(trial)
            finally:
                events, now = trial.events, trial.now
        except Exception as error:  # noqa: BLE001 - whatever a machine raises is a broken promise
            words = f"{type(error).__name__}: {error}"
            return Outcome(s.seed, events, now, f"{words} (event {events}, second {now:.2f})")
    return Outcome(s.seed, events, now, "")


def outcome_of_seed(seed: int) -> Outcome:
    return outcome_of(scenario(seed))


def shrunk_by_running(s: Scenario) -> Scenario:
    return shrunk(s, lambda fewer: bool(outcome_of(fewer).violation))


def _done(trial: Trial) -> bool:
    return trial.completed() is not None and all(
        w.finished or not w.alive or w.replica.stopped for w in trial.workers
    )


def _require_end(trial: Trial) -> None:
    leader = trial.completed()
    assert leader is not None
    ends = [record for record, _ in leader.disk.records if record["type"] == "complete"]
    require(len(ends) == 1, "3", f"the run is complete {len(ends)} times")
    digest, book = ends[0]["digest"], trial.watch.books[leader.name]
    for key, told in trial.watch.told.items():
        require(book.digests.get(key) == told, "3", f"commit {key} was announced and is lost")
    again = Coordinator(trial.config)
    again.restore(list(leader.disk.records), 0.0)
    require(again.global_digest() == digest, "I19", "the journal, repeated, gives another value")
    finished = [w for w in trial.workers if w.finished]
    require(bool(finished), "5", "no worker got to the end")
    for worker in finished:
        require(worker.replica.digest() == digest, "2", f"{worker.name} ends with another value")
        for p, ledger in again.ledgers.items():
            same = torch.equal(worker.model.read(p), ledger.shard.params)
            require(same, "2", f"{worker.name}'s model is not the run's")
    for worker in trial.workers:
        stop = worker.replica.stopped
        fine = stop is None or stop.error is None or "is complete" in stop.reason
        require(not worker.alive or fine, "3", f"{worker.name} was sent away: {stop}")
    if trial.scenario.delays_only:
        plain = tuple(section for section in trial.scenario.sections if section[0] not in ("data", "model"))
        want = undisturbed(replace(trial.scenario, seed=0, faults=(), weather=CALM, sections=plain))
        require(digest == want, "6 (I15)", "delays and restarts have changed the result")


@lru_cache(maxsize=4096)
def undisturbed(s: Scenario) -> str:
    """The digest of the run without faults, standby or weather."""
    return Cluster(s.config, flavours=tuple(range(s.workers))).run().coordinator.global_digest()
