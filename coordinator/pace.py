"""How fast workers go, and what follows: how many inner steps each makes (DyLU), and how long late ones are waited for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diloco.coordinator.rounds import Round
from diloco.overlap import local_steps

if TYPE_CHECKING:
    from diloco.coordinator.state import Coordinator


def local_paces(c: Coordinator) -> tuple[tuple[int, int], ...]:
    """(worker index, inner steps per H) of the live members, by the speeds they last reported; () without dylu.

    Told with the commits of the first fragment, and kept in the journal with them: what a worker does then depends
    on the commits alone.
    """
    if not c.config.weights.dylu or c.plan is None:
        return ()
    live = [m for m in c.by_index() if m.live]
    paces = local_steps(c.plan.H, [m.progress.steps_per_s for m in live])
    return tuple(zip([m.index for m in live], paces, strict=True))


def grace_s(c: Coordinator, p: int, waiting: Round) -> float:
    """How long this round of fragment `p` waits for the rest once it has a quorum."""
    return c.arrivals.grace_s(c.config.fault, slack_s(c, p, waiting))


def deadlines(c: Coordinator) -> list[float]:
    """When each open round is over at the latest, as things are."""
    timeout = c.config.fault.round_timeout_s
    return [waiting.deadline(grace_s(c, p, waiting), timeout) for p, waiting in c.rounds.items()]


def slack_s(c: Coordinator, p: int, waiting: Round) -> float:
    """``max(0, tau T_step - T_quorum - T_sync)``: how long a round may still wait and hold nobody up (2604.21428).

    A worker takes a result in tau inner steps after it sent. T_step is that of the fastest live worker, T_quorum how
    long the round took to its quorum, T_sync how long a commit of this fragment takes to the worker with the slowest
    link: its round trip, and the bytes of the fragment's last commit. 0 without overlap, and while no worker has said
    how fast it is. Time in seconds.
    """
    stream = c.config.stream
    live = [m.progress for m in c.members.values() if m.live]
    fastest = max((w.steps_per_s for w in live), default=0.0)
    if stream.overlap not in ("inner", "delay_corrected") or not (fastest > 0 and math.isfinite(fastest)):
        return 0.0
    done = c.committed.get(p)
    size = sum(memoryview(framed).nbytes for _, framed in done.frames) if done is not None else 0
    sync = max(
        (_known(w.rtt_s) + _known(8 * size / (w.link_down_bps or math.nan)) for w in live), default=0.0
    )
    quorum = (c.now if waiting.quorum_at is None else waiting.quorum_at) - waiting.opened
    return max(0.0, stream.tau / fastest - quorum - sync)


def _known(seconds: float) -> float:
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
