"""How much of a server one peer may take: rates, places for those who have not said who they are, open files."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

REMEMBERED = 4096  # peers whose rates are known; the longest silent one is forgotten first
MAX_CONNECTIONS = 4096
WANTED_FILES = 16_384


class Budgets:
    """A token bucket per peer: `burst` at once, `per_s` in the long run."""

    def __init__(self, burst: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._per_s, self._clock = burst, per_s, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # peer -> (tokens, when)

    def take(self, peer: str) -> bool:
        """Whether `peer` may do it once more now."""
        now = self._clock()
        tokens, when = self._left.pop(peer, (self._burst, now))
        tokens = min(self._burst, tokens + (now - when) * self._per_s)
        allowed = tokens >= 1.0
        self._left[peer] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._left) > REMEMBERED:
            self._left.popitem(last=False)
        return allowed


class Lobby:
    """Sessions that have not joined yet: `places` per peer. Who comes when it is full pushes the oldest one out.

    Whoever joins at once is thus let in however many others sit and wait.
    """

    def __init__(self, places: int, seconds: float) -> None:
        self._places, self._seconds = places, seconds
        self._waiting: dict[str, list[asyncio.Timeout]] = {}

    @contextlib.asynccontextmanager
    async def wait(self, peer: str) -> AsyncIterator[None]:
        """Raises TimeoutError inside the block after `seconds`, or when pushed out."""
        waiting = self._waiting.setdefault(peer, [])
        if len(waiting) >= self._places:
            waiting.pop(0).reschedule(asyncio.get_running_loop().time())
        async with asyncio.timeout(self._seconds) as limit:
            waiting.append(limit)
            try:
                yield
            finally:
                if limit in waiting:
                    waiting.remove(limit)
                if not waiting and self._waiting.get(peer) is waiting:
                    del self._waiting[peer]


def max_connections() -> int:
    """As many as may be open while half of the process's files stay free; the limit on files is raised if it can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)
