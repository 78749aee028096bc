"""How many inner steps each worker makes in a round, when slower workers may make fewer (DyLU, 2401.09135)."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
