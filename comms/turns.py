"""Waiting for one's turn on the link, on a real clock: the asyncio side of `diloco.comms.pacing`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping

from diloco.comms.pacing import Claim, Pacer, Window
from diloco.errors import TransportError


class OverError(TransportError):
    """The session whose link was waited for is over."""


class Turns:
    """One direction of the link. Lives on one loop; not thread-safe."""

    def __init__(self) -> None:
        self._pacer, self._window = Pacer(), Window()
        self._changed = asyncio.Event()

    @property
    def trip_s(self) -> float:
        """Seconds from taking a turn until the far end's answer, at least; 0 while none has come."""
        return self._window.floor

    def claim(self, fragment: int, *, urgent: bool) -> Claim:
        """A claim that begins now; it has no bytes yet and takes no turns until it is `held`."""
        return Claim(fragment, time.monotonic(), 0, 0, urgent)

    def expect(self, deadlines: Mapping[int, float], share: float) -> None:
        """See `Pacer.expect`; times are those of time.monotonic."""
        self._pacer.expect(deadlines, share, time.monotonic())
        self._wake()

    @contextlib.contextmanager
    def held(self, claim: Claim, at: int, end: int) -> Iterator[None]:
        """One attempt: bytes `[at, end)` are still to be moved."""
        claim.at, claim.end = at, end
        self._pacer.enter(claim, time.monotonic())
        self._wake()
        try:
            yield
        finally:
            self._pacer.leave(claim, time.monotonic())
            self._wake()

    @contextlib.asynccontextmanager
    async def span(self, claim: Claim) -> AsyncIterator[tuple[int, int]]:
        """The next bytes [start, end), once it is their turn; empty when all are under way.

        The block moves them and is left when the far end has answered. Raises OverError.
        """
        start, end = await self._turn(claim)
        begun, window, under_way = time.monotonic(), self._window.size, self._pacer.under_way
        try:
            yield start, end
        finally:
            self._pacer.answered(claim, end - start)
            if not claim.flying:
                self._wake()
        if start < end:
            self._window.answered(end - start, time.monotonic() - begun, window, under_way)

    async def _turn(self, claim: Claim) -> tuple[int, int]:
        while claim in self._pacer:
            wait = self._pacer.wait(claim, time.monotonic())
            if wait == 0:
                taken = self._pacer.take(claim, self._window.size, time.monotonic(), self._window.fill)
                if not claim.left:
                    self._wake()
                return taken
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
        raise OverError("the session is over")

    def end(self) -> None:
        """The link is gone: whoever waits for a turn gets OverError."""
        self._pacer.clear()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
