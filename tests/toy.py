"""A toy model for protocol tests: workers that pull a few vectors towards their own targets, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diloco.comms.machine import COORDINATOR, Connected, Persist
from diloco.comms.messages import Buffer, Progress
from diloco.comms.sim import Simulation, Weather
from diloco.config import RunConfig
from diloco.coordinator.state import Coordinator
from diloco.fragments import FragmentPlan, build_plan, gather, scatter
from diloco.worker import replica_end
from diloco.worker.replica import Replica

ROLES = {
    "embed": "embed",
    "blocks.0.w": "matrix",
    "blocks.1.w": "matrix",
    "blocks.2.w": "scalar",
    "head": "head",
}
SHAPES = {"embed": (7, 3), "blocks.0.w": (5, 5), "blocks.1.w": (4, 6), "blocks.2.w": (3,), "head": (2, 5)}


def config(**sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "run": {"inner_steps_total": 20, "seed": 1},
        "stream": {"H": 5, "frag_layers": 1, "tau": 1, "alpha": 0.5},
        "outer": {"lr": 0.7, "momentum": 0.5},
        "codec": {"up": "fp32", "down": "g_fp32"},
        "topology": {"workers": 2},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return RunConfig.from_dict(raw)


def plan_of(c: RunConfig) -> FragmentPlan:
    s = c.stream
    return build_plan(
        SHAPES,
        s.H,
        layout=s.layout,
        frag_layers=s.frag_layers,
        first_round=s.first_round,
        roles=ROLES if any(vars(c.codec.roles).values()) else None,
    )


class ToyModel:
    """Parameters by name and one SGD step on ``|theta - target|^2 / 2`` with a target that moves by the step."""

    def __init__(self, plan: FragmentPlan, flavour: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tensors = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        self.plan, self.flavour = plan, flavour

    def train_step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * self.flavour + step)
        for tensor in self.tensors.values():
            target = torch.randn(tensor.shape, generator=generator) + self.flavour
            tensor.sub_(0.1 * (tensor - target))

    def read(self, fragment: int) -> Tensor:
        return gather(self.plan.fragments[fragment], self.tensors)

    def write(self, fragment: int, values: Tensor) -> None:
        scatter(self.plan.fragments[fragment], values, self.tensors)


class ToyWorker:
    """Drives a Replica through a whole run inside a simulation."""

    def __init__(
        self, sim: Simulation, name: str, c: RunConfig, *, flavour: int, step_s: float = 1.0, nonce: int = 1
    ):
        self.sim, self.name, self.config, self.step_s = sim, name, c, step_s
        self.plan = plan_of(c)
        self.model = ToyModel(self.plan, flavour)
        self.replica = Replica(self.plan, c, self.model, worker=name, nonce=nonce)
        self.state = "start"
        self.finished = False
        self.trained = 0
        self.tell_speed = False  # in heartbeats
        self.poison: Callable[[int, ToyModel], None] = lambda step, model: None
        sim.add(name, self.replica)
        sim.after[name] = self._advance
        sim.at(0.0, lambda: sim.deliver(name, Connected(COORDINATOR)))

    def kill(self) -> None:
        self.sim.remove(self.name)

    @property
    def alive(self) -> bool:
        return self.sim.machines.get(self.name) is self.replica

    def _advance(self) -> None:
        """Called after every event: go on if nothing holds us."""
        if not self.alive or self.finished or self.state == "computing" or self.replica.blocked:
            return
        if self.replica.stopped is not None:
            return
        self.sim.perform(self.name, self.replica.merge())
        if self.replica.blocked:
            return
        if self.state in ("start", "stepping"):
            if self.replica.step >= self.config.run.inner_steps_total:
                self.state = "draining"
                self.replica.drain()
            else:
                self.state = "computing"
                self.sim.at(self.step_s, self._step)
                return
        if self.state == "draining" and not self.replica.blocked:
            self.sim.perform(self.name, self.replica.merge())
            self.state = "flushing"
            self.sim.perform(self.name, self.replica.flush(self.sim.now))
        if self.state == "flushing" and not self.replica.blocked:
            self.sim.perform(self.name, self.replica.merge())
            self.state = "ending"
            self.sim.perform(self.name, replica_end.ask(self.replica, self.sim.now))
        if self.state == "ending" and not self.replica.blocked:
            self.sim.perform(self.name, self.replica.merge())
            self.finished = True
            self.sim.perform(self.name, self.replica.leave("complete"))

    def _step(self) -> None:
        if not self.alive:
            return
        self.model.train_step(self.replica.step + 1)
        self.trained += 1
        if self.tell_speed:
            self.replica.progress = Progress(steps_per_s=1.0 / self.step_s)
        self.poison(self.replica.step + 1, self.model)
        self.state = "stepping"
        self.sim.perform(self.name, self.replica.after_step(10, self.sim.now))
        self._advance()


class Disk:
    """A journal in memory, with what the real one promises: what was persisted is there after a crash."""

    def __init__(self) -> None:
        self.records: list[tuple[dict[str, Any], list[Buffer]]] = []

    def write(self, action: Persist) -> None:
        self.records.append((dict(action.record), list(action.blobs)))

    def commits(self) -> list[dict[str, Any]]:
        return [r for r, _ in self.records if r["type"] == "commit"]


class Cluster:
    """One coordinator and its workers on one virtual network."""

    def __init__(
        self, c: RunConfig, *, seed: int = 0, weather: Weather | None = None, flavours: Sequence[int] = (0, 1)
    ):
        self.config = c
        self.sim = Simulation(seed, weather)
        self.disk = Disk()
        self.coordinator = Coordinator(c)
        self.sim.on_persist[COORDINATOR] = self.disk.write
        self.sim.add(COORDINATOR, self.coordinator)
        self.workers = [
            ToyWorker(self.sim, f"w{i}", c, flavour=f, nonce=100 + i) for i, f in enumerate(flavours)
        ]

    def run(self, until_s: float = 5000.0) -> Cluster:
        self.sim.run(
            until_s,
            lambda: self.coordinator.complete and all(w.finished or not w.alive for w in self.workers),
        )
        return self

    def restart_coordinator(self) -> None:
        """Crash now, start again from the journal alone."""
        self.coordinator = Coordinator(self.config)
        actions = self.coordinator.restore(list(self.disk.records), self.sim.now)
        self.sim.add(COORDINATOR, self.coordinator)
        self.sim.perform(COORDINATOR, actions)
        for worker in self.workers:
            if worker.alive:
                name = worker.name
                self.sim.at(0.1, lambda name=name: self.sim.deliver(name, Connected(COORDINATOR)))  # type: ignore[misc]

    def values(self) -> dict[int, Tensor]:
        return {p: ledger.shard.params.clone() for p, ledger in self.coordinator.ledgers.items()}
