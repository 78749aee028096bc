"""Machines in one process: a hub that stands where the network would be. Same messages, no copies, no sockets."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any

from diloco.comms.driver import MachineThread
from diloco.comms.link_meter import LinkRates
from diloco.comms.machine import COORDINATOR, Action, Connected, Event, Machine, Persist, Received, Send, Stop
from diloco.comms.messages import Commit, Contribution, Initial, Join, Message, Snapshot


def frame_bytes(message: Message) -> int:
    """Bytes of the frames that ride in a message."""
    if isinstance(message, Contribution | Initial):
        return memoryview(message.frame).nbytes
    if isinstance(message, Commit | Snapshot):
        return sum(memoryview(frame).nbytes for _, frame in message.frames)
    return 0


class LocalHub:
    """Drives the coordinator's machine; `connect()` gives a worker its connection."""

    def __init__(
        self, machine: Machine, settings: Mapping[str, Any], persist: Callable[[Persist], None]
    ) -> None:
        self._settings, self._persist = settings, persist
        self._inboxes: dict[str, queue.SimpleQueue[Event]] = {}
        self.thread = MachineThread(machine, self._perform, name="coordinator")
        self.thread.start()

    def connect(self) -> LocalConnection:
        return LocalConnection(self)

    def close(self) -> None:
        self.thread.stop()

    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def attach(self, worker: str, inbox: queue.SimpleQueue[Event]) -> None:
        self._inboxes[worker] = inbox

    def _perform(self, action: Action) -> None:
        match action:
            case Persist():
                self._persist(action)
            case Send(to=to, message=message):
                if to in self._inboxes:
                    self._inboxes[to].put(Received(COORDINATOR, message))
            case Stop():
                pass  # the hub outlives the run, so that late farewells are still answered


class LocalConnection:
    """A worker's end of the hub. Implements `diloco.comms.machine.Connection`."""

    def __init__(self, hub: LocalHub) -> None:
        self._hub = hub
        self._worker = ""
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._inbox.put(Connected(COORDINATOR))
        self._up = self._down = 0

    def send(self, message: Message) -> None:
        if isinstance(message, Join):
            self._worker = message.worker
            self._hub.attach(message.worker, self._inbox)
        self._up += frame_bytes(message)
        self._hub.thread.post(Received(self._worker, message))

    def receive(self, timeout_s: float | None) -> Event | None:
        try:
            event = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Received):
            self._down += frame_bytes(event.message)
        return event

    def settings(self) -> Mapping[str, Any] | None:
        return self._hub.settings()

    def traffic(self) -> tuple[int, int]:
        return self._up, self._down

    def expect(self, deadlines: Mapping[int, float], share: float) -> None:
        """There is no link to share."""

    def rates(self) -> LinkRates:
        return LinkRates()

    def close(self) -> None:
        """The hub goes on: other workers may be connected."""
