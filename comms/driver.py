"""Runs one machine on a thread of its own in real time: a queue of events, one timer, actions performed in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from diloco.comms.machine import Action, Event, Machine, Tick


class MachineThread:
    """`post` events from any thread; `perform` is called on the machine's thread with each batch of actions.

    Every event keeps the time at which it arrived, so that a long aggregation cannot make a punctual heartbeat
    look late. An exception in the machine or in `perform` ends the thread and is kept in `error`.
    """

    def __init__(
        self,
        machine: Machine,
        perform: Callable[[Action], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        name: str = "machine",
    ) -> None:
        self.machine, self._perform, self._clock = machine, perform, clock
        self._events: queue.SimpleQueue[tuple[Event, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def post(self, event: Event) -> None:
        self._events.put((event, self._clock()))

    def stop(self, timeout_s: float = 5.0) -> None:
        self._events.put(None)
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                event, at = item
                for action in self.machine.handle(event, at):
                    self._perform(action)
        except BaseException as error:  # noqa: BLE001 - kept for the owner, who waits on `ended`
            self.error = error
        finally:
            self.ended.set()

    def _next(self) -> tuple[Event, float] | None:
        deadline = self.machine.deadline
        try:
            if deadline is None:
                return self._events.get()
            return self._events.get(timeout=max(0.0, deadline - self._clock()))
        except queue.Empty:
            return Tick(), self._clock()
