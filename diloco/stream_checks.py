"""Which overlap modes go with which other settings: what cannot work, and what is probably not meant. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diloco.config import RunConfig

LINEAR = ("nesterov", "sgd", "sgdm")  # outer optimizers whose average over workers is that of their updates


def stream_problems(c: RunConfig) -> list[str]:
    """In words, every combination of the overlap mode with other settings that cannot work."""
    mode, found = c.stream.overlap, []
    if mode == "eager":
        found += _eager_problems(c)
    elif mode == "async":
        found += _async_problems(c)
    if mode in ("delayed", "eager", "async") and c.stream.merge != "lerp":
        found.append(
            f"stream.merge = {c.stream.merge!r} needs stream.overlap = 'inner': {mode!r} replaces the parameters"
        )
    if mode != "async":
        for key, default in (("dn_N", 1), ("dn_c", 0.0)):
            if getattr(c.weights, key) != default:
                found.append(
                    f"weights.{key} has an effect with stream.overlap = 'async' only, which is {mode!r}"
                )
        stale = (
            ("fault.s_max", c.fault.s_max, 1, ("carry", "discount")),
            ("weights.staleness_pow", c.weights.staleness_pow, 0.5, ("discount",)),
        )
        for name, value, default, policies in stale:
            if value != default and c.fault.late not in policies:
                found.append(
                    f"{name} = {value} has an effect with stream.overlap = 'async' or fault.late = "
                    f"{' or '.join(map(repr, policies))} only; these are {mode!r} and {c.fault.late!r}"
                )
    if c.stream.compensate and mode not in ("delayed", "async"):
        found.append(
            f"stream.compensate = {c.stream.compensate} needs stream.overlap = 'delayed' or 'async': with {mode!r} an "
            "update is applied to the value that it was measured from; set it to 0"
        )
    return found


def _eager_problems(c: RunConfig) -> list[str]:
    """Each worker steps by itself, with a plain mean in which it knows its own share."""
    found = []
    needs = (
        ("codec.down", c.codec.down, ("relay", "mean_q"), "workers need the averaged update, not its result"),
        ("outer.kind", c.outer.kind, LINEAR, "the workers' values must have an average"),
        ("weights.mode", c.weights.mode, ("uniform",), "each worker takes its own share of the mean back"),
        ("weights.normalize", c.weights.normalize, ("none",), "each worker takes its own share back"),
        ("weights.merge", c.weights.merge, ("mean",), "each worker takes its own share of the mean back"),
        ("robust.kind", c.robust.kind, ("mean",), "each worker takes its own share of the mean back"),
    )
    for name, value, offered, why in needs:
        if value not in offered:
            use = " or ".join(map(repr, offered))
            found.append(
                f"{name} = {value!r} cannot be combined with stream.overlap = 'eager': {why}; use {use}"
            )
    if c.outer.gradient_clip is not None:
        found.append(
            f"outer.gradient_clip = {c.outer.gradient_clip} cannot be combined with stream.overlap = 'eager': the "
            "workers' values must have an average, and clipped updates have none; leave it unset"
        )
    return found


def _async_problems(c: RunConfig) -> list[str]:
    """Contributions come one by one, and the value travels whole to their senders."""
    found = []
    needs = (
        ("codec.down", c.codec.down, "g_fp32", "a worker takes the whole value and no commit of others"),
        ("weights.mode", c.weights.mode, "uniform", "there is nobody to weigh a single contribution against"),
        ("weights.normalize", c.weights.normalize, "none", "a single contribution has no mean of steps"),
        ("weights.merge", c.weights.merge, "mean", "a single contribution is not merged"),
        ("robust.kind", c.robust.kind, "mean", "a single contribution cannot be compared with others"),
    )
    for name, value, offered, why in needs:
        if value != offered:
            found.append(
                f"{name} = {value!r} cannot be combined with stream.overlap = 'async': {why}; use {offered!r}"
            )
    delayed = c.weights.dn_N > 1 or c.weights.dn_c > 0
    if delayed and c.outer.kind != "nesterov":
        found.append(
            f"weights.dn_N and dn_c delay the momentum of outer.kind = 'nesterov', not of {c.outer.kind!r}"
        )
    if c.weights.dn_c > 1.0 / c.weights.dn_N:
        found.append(
            f"weights.dn_c = {c.weights.dn_c} must lie between 0 and 1 / weights.dn_N = {1.0 / c.weights.dn_N:.4g}"
        )
    return found


def stream_warnings(c: RunConfig) -> list[str]:
    """Overlap settings that work but are probably not meant, each with what to do instead."""
    mode, found = c.stream.overlap, []
    corrected = mode == "delay_corrected" or (mode == "inner" and c.stream.merge == "delay_corrected")
    if corrected and c.stream.alpha:
        found.append(
            f"stream.alpha = {c.stream.alpha} is ignored with delay correction, which keeps all local work by its own "
            "rule: set it to 0"
        )
    if mode == "async" and c.fault.s_max < c.topology.workers - 1:
        found.append(
            f"fault.s_max = {c.fault.s_max} with topology.workers = {c.topology.workers} rejects workers of equal "
            f"speed in stream.overlap = 'async': use {2 * c.topology.workers} or more"
        )
    momentum = c.outer.momentum if c.outer.kind in ("nesterov", "sgdm") else 0.0
    if mode == "async" and c.topology.workers > 1 and c.weights.dn_N == 1 and momentum >= 0.5:
        found.append(
            f"outer.momentum = {momentum} at every arrival of stream.overlap = 'async' moves too far: set "
            f"weights.dn_N = topology.workers = {c.topology.workers} and a tenth of the usual outer.lr"
        )
    return found + _pace_warnings(c)


def _pace_warnings(c: RunConfig) -> list[str]:
    mode = c.stream.overlap
    found: list[str] = []
    if not c.stream.pace:
        return found
    if mode in ("none", "async") or (mode in ("inner", "delay_corrected") and not c.stream.tau):
        found.append(
            f"stream.pace = {c.stream.pace} has no effect: with stream.overlap = {mode!r} and stream.tau = "
            f"{c.stream.tau} the worker waits for each answer, so nothing is held back"
        )
    if c.fault.fixed_grace_s is not None:
        found.append(
            f"stream.pace = {c.stream.pace} lets slower workers' contributions come later: fault.fixed_grace_s = "
            f"{c.fault.fixed_grace_s} must be longer than that difference, or leave it unset"
        )
    return found


def plan_warnings(c: RunConfig, fragments: int) -> list[str]:
    """What can be said once it is known into how many fragments the model is cut."""
    gap = c.stream.H // fragments
    if c.stream.overlap in ("inner", "delay_corrected") and c.stream.tau > gap:
        text = (
            f"stream.tau = {c.stream.tau} exceeds floor(H / fragments) = {gap}: several of the {fragments} "
        )
        return [text + "fragments are in flight at once and share the link"]
    return []
