"""Runs in which chosen contributions come late, and what each policy makes of them by its definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diloco.comms.machine import COORDINATOR, Action, Event, Persist, Received
from diloco.comms.messages import Contribution
from diloco.config import RunConfig
from diloco.coordinator.state import Coordinator
from tests.toy import Cluster, ToyModel, config

GRACE_S = 3.0
H = 5


def settings(**sections: dict[str, Any]) -> RunConfig:
    """One fragment, no overlap, averaging: so that a few lines of arithmetic say what must come out."""
    raw: dict[str, dict[str, Any]] = {
        "stream": {"H": H, "tau": 0, "alpha": 0.0, "layout": "single"},
        "outer": {"kind": "sgd", "lr": 0.7},
        "fault": {"quorum": 1, "fixed_grace_s": GRACE_S},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return config(**raw)


class Delayed(Cluster):
    """A cluster in which the contributions that `which` names arrive `by_s` later, each time they are sent."""

    def __init__(
        self, c: RunConfig, which: Callable[[Contribution], bool], *, by_s: float = GRACE_S + 0.5, **more: Any
    ) -> None:
        super().__init__(c, **more)
        self.which, self.by_s = which, by_s
        self.after: list[Tensor] = []  # the value of fragment 0 after each of its commits
        self.seen: list[Event] = []  # all that the coordinator ever got
        self.arriving: Event | None = None  # after its delay
        self.delay()
        write = self.disk.write

        def note(action: Persist) -> None:
            write(action)
            if action.record["type"] == "commit" and action.record["fragment"] == 0:
                self.after.append(self.values()[0])

        self.sim.on_persist[COORDINATOR] = note

    def run(self, until_s: float = 5000.0) -> Delayed:
        super().run(until_s)
        return self

    def delay(self) -> None:
        """For the present coordinator."""
        coordinator, inner = self.coordinator, self.coordinator.handle

        def handle(event: Event, now: float) -> list[Action]:
            if isinstance(event, Received) and event is not self.arriving:
                self.seen.append(event)
                if isinstance(event.message, Contribution) and self.which(event.message):
                    self.sim.at(self.by_s, partial(self._arrive, coordinator, event))
                    return []
            return inner(event, now)

        self.coordinator.handle = handle  # type: ignore[method-assign]

    def _arrive(self, coordinator: Coordinator, event: Event) -> None:
        if coordinator is self.coordinator:  # else it was lost with the connection
            self.arriving = event
            self.sim.deliver(COORDINATOR, event)

    def restart_coordinator(self) -> None:
        super().restart_coordinator()
        self.delay()


def once(worker: str, number: int) -> Callable[[Contribution], bool]:
    """The round `number` of `worker`, in every fragment, the first time."""
    left = set[int]()

    def which(message: Contribution) -> bool:
        if message.worker != worker or message.round != number or message.fragment in left:
            return False
        left.add(message.fragment)
        return True

    return which


def definition(c: RunConfig, late_round: int, rounds: int) -> list[Tensor]:
    """What the value is after each of `rounds` commits if worker 1 is late in `late_round`, in plain arithmetic."""
    policy, alpha, lr = c.fault.late, c.stream.alpha, c.outer.lr
    cluster = Cluster(c)
    models = [ToyModel(cluster.workers[0].plan, flavour) for flavour in (0, 1)]
    value = models[0].read(0)
    models[1].write(0, value)
    held: tuple[Tensor, Tensor] | None = None  # a late update and the value it was measured from
    found = []
    for n in range(1, rounds + 1):
        for model in models:
            for step in range((n - 1) * H + 1, n * H + 1):
                model.train_step(step)
        deltas = [value - model.read(0) for model in models]
        sizes = [1.0, 1.0]
        if n == late_round:
            deltas, sizes = deltas[:1], sizes[:1]
        if held is not None:
            update, base = held
            deltas.append(update + (value - base) if c.fault.rebase else update)
            sizes.append(1.0 if policy == "carry" else 2**-c.weights.staleness_pow)
            held = None
        if n == late_round and policy in ("carry", "discount"):
            held = (value - models[1].read(0), value)
        mean = sum((s / sum(sizes) * d for s, d in zip(sizes, deltas, strict=True)), torch.zeros_like(value))
        value = value - lr * mean
        found.append(value)
        for i, model in enumerate(models):
            share = alpha
            if n == late_round and i == 1:
                share = {"isolate": 1.0, "rollback": 0.0}.get(policy, alpha)
            model.write(0, share * model.read(0) + (1 - share) * value)
    return found
