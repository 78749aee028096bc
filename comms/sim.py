"""A network in virtual time for the real machines: seeded delay, duplicates, drops and reordering; crashes.

One seed is one run. Nothing here knows about rounds: a node is a machine plus what performs its actions.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from diloco.comms.machine import (
    Action,
    Compute,
    Computed,
    Event,
    Machine,
    Persist,
    Received,
    Send,
    Stop,
    Tick,
)


@dataclass(frozen=True, slots=True)
class Weather:
    """How the network treats messages; times in virtual seconds, chances from 0 to 1."""

    delay_s: tuple[float, float] = (0.01, 0.05)
    duplicate: float = 0.0
    drop: float = 0.0


class Simulation:
    """Nodes, a clock that jumps from event to event, and one random source."""

    def __init__(self, seed: int, weather: Weather | None = None) -> None:
        self.random = random.Random(seed)
        self.weather = weather or Weather()
        self.now = 0.0
        self.events = 0
        self.machines: dict[str, Machine] = {}
        self.on_persist: dict[str, Callable[[Persist], None]] = {}
        self.on_stop: dict[str, Callable[[Stop], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}  # called after each event of a node
        self.slow_s: dict[str, float] = {}  # how much longer what a node sends takes
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ticks: dict[str, float] = {}
        self._busy_until: dict[str, float] = {}  # jobs of a node end in the order they were given

    def add(self, name: str, machine: Machine) -> None:
        self.machines[name] = machine
        self._ticks.pop(name, None)
        self._arm(name)

    def remove(self, name: str) -> None:
        """The node is dead: what was addressed to it is lost."""
        self.machines.pop(name, None)

    def at(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), call))

    def deliver(self, name: str, event: Event) -> None:
        """Hand `event` to a node now and perform what it answers, in order."""
        machine = self.machines.get(name)
        if machine is None:
            return
        self.perform(name, machine.handle(event, self.now))
        machine.check()
        self._arm(name)
        if name in self.after:
            self.after[name]()

    def perform(self, name: str, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(to=to, message=message):
                    self._transmit(name, to, Received(name, message))
                case Persist():
                    if name in self.on_persist:
                        self.on_persist[name](action)
                case Compute(job=job):
                    end = max(self._busy_until.get(name, 0.0), self.now + self._delay())
                    self._busy_until[name] = end
                    self.at(end - self.now, self._job(name, self.machines.get(name), job))
                case Stop():
                    if name in self.on_stop:
                        self.on_stop[name](action)

    def run(self, until_s: float, done: Callable[[], bool], max_events: int = 200_000) -> None:
        """Advance until `done()`; AssertionError when the bound on time or events is met first."""
        while not done():
            assert self._queue, "the simulation has nothing left to do and is not done"
            at, _, call = heapq.heappop(self._queue)
            self.now = max(self.now, at)
            self.events += 1
            assert self.now <= until_s, f"not done after {until_s} virtual seconds"
            assert self.events <= max_events, f"not done after {max_events} events"
            call()

    def _job(self, name: str, machine: Machine | None, job: Callable[[], object]) -> Callable[[], None]:
        def finish() -> None:
            if machine is not None and self.machines.get(name) is machine:
                self.deliver(name, Computed(job()))

        return finish

    def _delay(self) -> float:
        return self.random.uniform(*self.weather.delay_s)

    def _transmit(self, sender: str, to: str, event: Event) -> None:
        copies = 2 if self.random.random() < self.weather.duplicate else 1
        for _ in range(copies):
            if self.random.random() >= self.weather.drop:
                self.at(self._delay() + self.slow_s.get(sender, 0.0), lambda: self.deliver(to, event))

    def _arm(self, name: str) -> None:
        machine = self.machines[name]
        deadline = machine.deadline
        if deadline is None or self._ticks.get(name) == deadline:
            return
        self._ticks[name] = deadline

        def tick() -> None:
            if self.machines.get(name) is machine and self._ticks.get(name) == deadline:
                del self._ticks[name]
                self.deliver(name, Tick())

        heapq.heappush(self._queue, (max(self.now, deadline), next(self._order), tick))
