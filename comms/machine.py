"""The interface between a state machine and whatever drives it: events in, actions out.

A machine holds no socket, clock, thread or random source. Its driver (simulator, in-process, gRPC) delivers
events one at a time, performs the returned actions in order, and calls `handle(Tick(), now)` when `deadline`
has passed. The same machines therefore run in virtual time and over a real network, bit for bit alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diloco.comms.link_meter import LinkRates
from diloco.comms.messages import Buffer, Message
from diloco.errors import DilocoError

COORDINATOR = "coordinator"  # the peer name under which workers know the coordinator


@dataclass(frozen=True, slots=True)
class Received:
    """`message` arrived from `sender` (a worker's name, or COORDINATOR)."""

    sender: str
    message: Message


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed; `deadline` was reached."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A way to `peer` is open (again); nothing sent before may be assumed to have arrived."""

    peer: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The way to `peer` broke; it may come back."""

    peer: str


@dataclass(frozen=True, slots=True)
class Computed:
    """A `Compute` job ended with `result`."""

    result: Any


@dataclass(frozen=True, slots=True)
class Send:
    to: str
    message: Message


@dataclass(frozen=True, slots=True)
class Persist:
    """Write `record` (one JSON line) and its `blobs` so that they survive a crash, before the next Send leaves."""

    record: Mapping[str, Any]
    blobs: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class Compute:
    """Run `job` anywhere, in the order given, and hand its result back as `Computed`.

    Heavy work (encode, decode) is expressed this way so that a driver can keep it off the training thread.
    """

    job: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Stop:
    """The machine has ended: normally, or because of `error`."""

    reason: str
    error: DilocoError | None = None


Event = Received | Tick | Connected | Lost | Computed
Action = Send | Persist | Compute | Stop


class Machine(Protocol):
    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event. `now` is in seconds on any monotonic clock."""
        ...

    @property
    def deadline(self) -> float | None:
        """When to call with `Tick()` if nothing else happens; None for never."""
        ...

    def check(self) -> None:
        """Assert the machine's invariants."""
        ...


class Connection(Protocol):
    """A worker's way to its coordinator. Thread-safe; `receive` is called from one thread."""

    def send(self, message: Message) -> None:
        """Queue a message. Never blocks on the network; a copy already under way is not sent twice."""
        ...

    def receive(self, timeout_s: float | None) -> Event | None:
        """The next Connected, Lost or Received event; None after `timeout_s` seconds."""
        ...

    def settings(self) -> Mapping[str, Any] | None:
        """The run's configuration as the coordinator has it, or None when it cannot be asked."""
        ...

    def traffic(self) -> tuple[int, int]:
        """Bytes of frames sent and received so far."""
        ...

    def rates(self) -> LinkRates:
        """What the link to the coordinator gave so far; NaN where there is none, or nothing was measured."""
        ...

    def expect(self, deadlines: Mapping[int, float], share: float) -> None:
        """When the fragments in flight are wanted, on time.monotonic; others can wait, but for starting values and
        snapshots, which come before all.

        What is wanted first travels first. What goes up may be spread over `share` of the time that is left when it
        begins, and what comes down over most of what is left then; 0: nothing is spread. Replaces what was said before.
        """
        ...

    def close(self) -> None: ...
