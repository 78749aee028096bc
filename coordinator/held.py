"""What a coordinator knows of its standby's progress, and the words to workers that wait for it. No rules.

When words have to wait is in `diloco.coordinator.lead`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from diloco.comms.machine import Action, Send

MAX_HELD = 20_000  # words to workers; more are dropped, as a network may


@dataclass(slots=True)
class Follower:
    """The standby that is connected: the next record to send, and how many it has."""

    node: str
    sent: int
    acked: int
    heard: float
    ready: bool = False


class Held:
    """Actions in their order, each with how many records the standby must have first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Action]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, count: int, action: Action) -> None:
        if len(self._waiting) < MAX_HELD or not isinstance(action, Send):
            self._waiting.append((count, action))

    def release(self, count: int) -> list[Action]:
        """Those that waited for `count` records or fewer."""
        released = []
        while self._waiting and self._waiting[0][0] <= count:
            released.append(self._waiting.popleft()[1])
        return released
