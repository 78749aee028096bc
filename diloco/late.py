"""Contributions that come after the commit they were meant for: the arithmetic of `fault.late`. Pure functions.

What is done with such a contribution is decided in `diloco.coordinator.lateness`; what its sender does in
`diloco.worker.replica_late`. In short, D being the update, s how many commits it is behind, G the run's value:

    skip      not used; the worker takes G as in any round
    isolate   not used, and G not taken: the worker goes on from its own values (DiLoCo's drop, 2311.08105)
    rollback  not used; the worker's values become G
    carry     counted in the fragment's next commit, weighted by its tokens
    discount  counted in the fragment's next commit, with its weight times (1 + s)^-staleness_pow (2401.09135)

With ``fault.rebase`` what is counted late is turned into what the same worker would have measured from the value that
it is applied to: D' = D + (G_now - G_base), as if it had sent its parameters. Every node that repeats the outer step
needs G_base for that, so the last `fault.s_max` values of a fragment are part of its outer state ("base.1" is one commit
old): they are in snapshots, in the journal's, in checkpoints, and alike everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diloco.aggregate import staleness_weight, weights

if TYPE_CHECKING:
    from diloco.config import RunConfig

COUNTING = ("carry", "discount")  # policies under which a late contribution counts in the next commit
BASE = "base."

State = dict[str, Tensor]


def base_state(config: RunConfig, numel: int) -> State:
    """What a fragment's outer state holds besides, fp32 [numel] each: 4 * s_max * numel bytes, or nothing."""
    if config.fault.late not in COUNTING or not config.fault.rebase:
        return {}
    return {f"{BASE}{s}": torch.zeros(numel) for s in range(1, config.fault.s_max + 1)}


def tracks_bases(state: State) -> bool:
    return f"{BASE}1" in state


def rebase_mean(mean: Tensor, late: Sequence[tuple[float, int]], params: Tensor, state: State) -> None:
    """``mean += sum w (params - G_base)`` over the `late` (weight w, staleness s), in order; then `params` is base 1.

    In place, fp32 [n]. Called once for each commit, before `params` moves. Product and sum are rounded one after the
    other, so that it is the same on every machine. KeyError for a staleness beyond what is kept.
    """
    for weight, s in late:
        mean.add_((params - state[f"{BASE}{s}"]).mul_(weight))
    depth = sum(name.startswith(BASE) for name in state)
    for s in range(depth, 1, -1):
        state[f"{BASE}{s}"].copy_(state[f"{BASE}{s - 1}"])
    state[f"{BASE}1"].copy_(params)


def shares(
    policy: str,
    mode: str,
    tokens: Sequence[int],
    *,
    steps: Sequence[int],
    shards: Sequence[int],
    staleness: Sequence[int],
    staleness_pow: float,
) -> list[float]:
    """Weights that sum to 1 of a commit's contributions, `staleness` 0 for those in time; without late ones `weights`.

    ``discount``: each weight under `mode` times ``(1 + s)^-staleness_pow``. ``carry``: those in time are weighed
    under `mode`, and a late one by its tokens, a token weighing as much as one of those in time does on average.
    """
    late = [i for i, s in enumerate(staleness) if s]
    if not late:
        return weights(mode, tokens, steps=steps, shards=shards)
    if policy == "discount":
        sizes = weights(mode, tokens, steps=steps, shards=shards)
        sizes = [size * staleness_weight(s, staleness_pow) for size, s in zip(sizes, staleness, strict=True)]
    else:
        sizes = _by_tokens(mode, tokens, steps, shards, set(late))
    total = sum(sizes)
    return [size / total for size in sizes]


def _by_tokens(
    mode: str, tokens: Sequence[int], steps: Sequence[int], shards: Sequence[int], late: set[int]
) -> list[float]:
    fresh = [i for i in range(len(tokens)) if i not in late]
    if not fresh:
        return weights("tokens", tokens)
    kept = [tokens[i] for i in fresh]
    own = weights(mode, kept, steps=[steps[i] for i in fresh], shards=[shards[i] for i in fresh])
    known, total = dict(zip(fresh, own, strict=True)), sum(kept)
    return [
        known[i] if i in known else (t / total if total else 1 / len(fresh)) for i, t in enumerate(tokens)
    ]


def late_problems(c: RunConfig) -> list[str]:
    """In words, every combination of `fault.late` and `codec.ef_recover` with other settings that cannot work."""
    policy, mode, found = c.fault.late, c.stream.overlap, []
    if policy != "skip" and mode in ("delayed", "eager", "async"):
        found.append(f"fault.late = {policy!r} cannot be combined with stream.overlap = {mode!r}: use 'skip'")
    if policy in COUNTING:
        found += _counting_problems(c)
    if c.codec.ef_recover and policy in ("isolate", "rollback"):
        why = "keeps the work in the worker's values" if policy == "isolate" else "gives the work up"
        found.append(
            f"codec.ef_recover = True cannot be combined with fault.late = {policy!r}, which {why}: set it to False"
        )
    if c.codec.ef_recover and mode in ("eager", "async"):
        found.append(
            f"codec.ef_recover = True cannot be combined with stream.overlap = {mode!r}, in which what was left out is "
            "not lost by a fixed share: set it to False"
        )
    return found


def _counting_problems(c: RunConfig) -> list[str]:
    policy, found = c.fault.late, []
    needs = (
        ("robust.kind", c.robust.kind, "mean", "a late update cannot be compared with those in time"),
        (
            "weights.normalize",
            c.weights.normalize,
            "none",
            "the way to the newer value has no steps to divide by",
        ),
        ("weights.merge", c.weights.merge, "mean", "the way to the newer value is no worker's direction"),
    )
    for name, value, offered, why in needs:
        if value != offered:
            found.append(
                f"{name} = {value!r} cannot be combined with fault.late = {policy!r}: {why}; use {offered!r}"
            )
    if c.fault.s_max == 0:
        found.append(
            f"fault.s_max = 0 accepts nothing late, so fault.late = {policy!r} is 'skip': use 1 or more"
        )
    if c.topology.kind == "replicated":
        found.append(
            f"fault.late = {policy!r} cannot be combined with topology.kind = 'replicated': what a leader holds for the "
            "next commit would be lost with it, and its sender had been told that it counts; use 'skip' or 'isolate'"
        )
    return found


def late_settings(c: RunConfig) -> dict[str, object]:
    """What every node of a run must share of [fault]: the rest is each node's own affair."""
    if c.fault.late in COUNTING:
        return {"late": c.fault.late, "rebase": c.fault.rebase, "s_max": c.fault.s_max}
    return {"late": c.fault.late}
