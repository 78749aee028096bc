"""What the model of the link predicts for a run as it was configured, beside what was measured.

The arithmetic is `diloco.forecast`; here the run's settings and what its workers measured become its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diloco.comms.codec import get
from diloco.comms.frame import frame_size
from diloco.comms.uplink import codec_for
from diloco.config import RunConfig
from diloco.forecast import Site, forecast
from diloco.fragments import FragmentPlan, block_of
from diloco.readout import (
    UNKNOWN,
    bytes_text,
    number,
    percent_text,
    rate_text,
    total,
    utilisation,
    whole,
)

Row = Mapping[str, Any]


def predict(
    config: RunConfig, plan: FragmentPlan, members: Sequence[Row], *, workers: int | None = None
) -> dict[str, Any] | None:
    """Prediction and measurement for `members` (the fields of `Progress` at their end); None if none trained in
    a time that can be.

    `workers` is how many there are in all, if `members` are not all of them: sums are then over `members` alone.
    ``inputs`` is what was measured and went in: ``workers``, ``parameters``, ``layers``, ``step_time_s`` (of the slowest),
    ``up_bits_per_s``, ``down_bits_per_s``, ``rtt_s`` (medians; null where nothing was measured, which counts as no
    limit). Then ``compute_utilisation``, ``seconds``, ``exposed_comm_seconds`` (sum over workers), ``bytes_up`` and
    ``bytes_down`` (sums, starting values included), and of one worker ``mean_`` and ``peak_`` ``up_`` and
    ``down_bits_per_s`` (peaks over one second). ``measured`` has the same names.
    """
    trained = [m for m in members if _step_time(m) is not None]
    steps = max((whole(m["step"]) for m in trained), default=0)
    if steps < 1:
        return None
    times = [t for m in trained if (t := _step_time(m)) is not None]
    slowest, here = max(times), len(trained)
    count = max(here, workers or 0)
    up_bps, down_bps, rtt = (_median(trained, key) for key in ("link_up_bps", "link_down_bps", "rtt_s"))
    site = Site(slowest, up_bps or math.inf, down_bps or math.inf, rtt or 0.0)
    up = [frame_size(codec_for(config, f), f.numel) for f in plan.fragments]
    down = [_down_bytes(config, size, f.numel, count) for size, f in zip(up, plan.fragments, strict=True)]
    found = forecast(
        plan,
        steps,
        site,
        up,
        down,
        tau=_overlap_steps(config),
        pace=config.stream.pace,
        flush=_flushed(config, plan, steps),
    )
    values = sum(frame_size(get("fp32"), f.numel) for f in plan.fragments)
    compute = math.fsum(times) * steps
    # The first worker's starting values go up once, and down to all others.
    bytes_up = here * found.bytes_up + here * values // count
    bytes_down = here * found.bytes_down + here * (count - 1) * values // count
    return {
        "inputs": {
            "workers": count,
            "parameters": plan.numel,
            "layers": len({block_of(s.name) for f in plan.fragments for s in f.spans} - {None}) or None,
            "step_time_s": slowest,
            "up_bits_per_s": up_bps,
            "down_bits_per_s": down_bps,
            "rtt_s": rtt,
        },
        "compute_utilisation": min(1.0, compute / (here * found.seconds)),
        "seconds": found.seconds,
        "exposed_comm_seconds": max(0.0, here * found.seconds - compute),
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "mean_up_bits_per_s": 8 * bytes_up / (here * found.seconds),
        "mean_down_bits_per_s": 8 * bytes_down / (here * found.seconds),
        "peak_up_bits_per_s": found.peak_up_bps,
        "peak_down_bits_per_s": found.peak_down_bps,
        "measured": _measured(trained),
    }


def sentence(prediction: Mapping[str, Any]) -> str:
    """Prediction beside measurement in one line, for a log."""
    inputs, measured = prediction["inputs"], prediction["measured"]
    pairs = [
        (name, show(prediction[key]), show(measured[key]))
        for name, key, show in (
            ("compute utilisation", "compute_utilisation", percent_text),
            ("up", "bytes_up", bytes_text),
            ("down", "bytes_down", bytes_text),
            ("mean rate up", "mean_up_bits_per_s", rate_text),
            ("peak rate up", "peak_up_bits_per_s", rate_text),
        )
    ]
    told = ", ".join(f"{name} {a} (measured {b})" for name, a, b in pairs)
    return (
        f"predicted: {told}; from {milliseconds(inputs['step_time_s'])} per step, link "
        f"{rate_text(inputs['up_bits_per_s'])} up, {rate_text(inputs['down_bits_per_s'])} down, "
        f"round trip {milliseconds(inputs['rtt_s'])}"
    )


def milliseconds(seconds: object) -> str:
    found = number(seconds)
    return UNKNOWN if found is None else f"{1e3 * found:.1f} ms"


def _measured(members: Sequence[Row]) -> dict[str, Any]:
    compute_s, exposed_s = total(members, "compute_s"), total(members, "exposed_s")
    seconds = compute_s + exposed_s  # of all workers together, so the quotients below are of one
    up, down = whole(total(members, "bytes_up")), whole(total(members, "bytes_down"))
    return {
        "compute_utilisation": utilisation(compute_s, exposed_s),
        "seconds": seconds / len(members),
        "exposed_comm_seconds": exposed_s,
        "bytes_up": up,
        "bytes_down": down,
        "mean_up_bits_per_s": 8 * up / seconds if seconds else None,
        "mean_down_bits_per_s": 8 * down / seconds if seconds else None,
        "peak_up_bits_per_s": _most(members, "peak_up_bps"),
        "peak_down_bits_per_s": _most(members, "peak_down_bps"),
    }


def _step_time(member: Row) -> float | None:
    """Seconds of computing per inner step of the run; a worker that came back counts its last life only.

    A worker's own word: None for what is no time, 0 < t < inf.
    """
    compute, steps = number(member.get("compute_s")) or 0.0, whole(member.get("step"))
    rate = number(member.get("steps_per_s")) or 0.0
    if compute > 0 and steps > 0 and member.get("incarnation", 1) == 1:
        found = compute / steps
    else:
        found = 1 / rate if rate > 0 else 0.0
    return found if 0 < found < math.inf else None


def _flushed(config: RunConfig, plan: FragmentPlan, steps: int) -> list[int]:
    """Fragments of which the last turn left something out: no step after it, and taken whole, is nothing left."""
    s = config.stream
    if not s.final_flush:
        return []
    mixed = s.overlap == "inner" and s.merge != "delay_corrected" and s.alpha > 0
    done = () if mixed or s.overlap == "eager" else plan.due(steps)
    return [f.index for f in plan.fragments if f.index not in done]


def _overlap_steps(config: RunConfig) -> int:
    match config.stream.overlap:
        case "inner" | "delay_corrected":
            return config.stream.tau
        case "delayed" | "eager":
            return config.stream.H
    return 0


def _down_bytes(config: RunConfig, up: int, numel: int, workers: int) -> int:
    """What a worker gets back per commit when all of `workers` contributed frames of `up` bytes."""
    match config.codec.down:
        case "relay":
            return (workers - 1) * up
        case "g_fp32":
            return frame_size(get("fp32"), numel)
        case "g_bf16":
            return frame_size(get("bf16"), numel)
    return up


def _median(members: Sequence[Row], key: str) -> float | None:
    known = sorted(v for m in members if (v := number(m.get(key))) is not None and v > 0)
    return known[(len(known) - 1) // 2] if known else None


def _most(members: Sequence[Row], key: str) -> float | None:
    return max((v for m in members if (v := number(m.get(key))) is not None), default=None)
