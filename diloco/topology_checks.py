"""Which topologies go with which other settings: what cannot work. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diloco.config import RunConfig


def topology_problems(c: RunConfig) -> list[str]:
    """In words, every combination of `topology.kind` with other settings that cannot work.

    In a replicated run every worker receives the payloads of a round and steps by itself. Robust rules go with it:
    each worker repeats the combination, and who counts at all is named by the commit.
    """
    if c.topology.kind != "replicated":
        return []
    found = []
    if c.stream.overlap == "async":
        found.append(
            "stream.overlap = 'async' cannot be combined with topology.kind = 'replicated': only the sender hears of "
            "its commit, so the others cannot take the step; use topology.kind = 'central'"
        )
    if c.codec.down != "relay":
        found.append(
            f"codec.down = {c.codec.down!r} cannot be combined with topology.kind = 'replicated': every worker needs "
            "the payloads themselves to take the outer step; use 'relay'"
        )
    return found
