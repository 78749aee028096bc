"""Figures that follow from a run's status, and how people read them. No I/O, no drawing.

The status is what the coordinator reports about a run; numbers that nobody knows yet are None in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNKNOWN = "–"
MOST = 1e30  # what is beyond is no measurement of anything, and sums of such overflow


def number(value: object) -> float | None:
    """`value` as a float below `MOST` in size, or None for everything else (None, NaN, infinities, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < MOST else None


def whole(value: object) -> int:
    """`value` as an int; 0 where it is unknown."""
    found = number(value)
    return 0 if found is None else int(found)


def total(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    """Sum of `key` over `rows`; unknown values count as 0."""
    return math.fsum(number(row.get(key)) or 0.0 for row in rows)


def utilisation(compute_s: float | None, exposed_s: float | None) -> float | None:
    """compute / (compute + exposed communication), in 0..1; None before anything was measured."""
    busy = (compute_s or 0.0) + (exposed_s or 0.0)
    return (compute_s or 0.0) / busy if busy > 0 else None


def mean_bps(row: Mapping[str, Any], way: str) -> float | None:
    """Bit/s of a worker's updates, `way` up or down, over all of its time; None before anything was measured."""
    sent = number(row.get(f"bytes_{way}"))
    seconds = (number(row.get("compute_s")) or 0.0) + (number(row.get("exposed_s")) or 0.0)
    return 8 * sent / seconds if sent is not None and seconds > 0 else None


def wire_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By direction, in bit/s: the highest "peak" of any worker, and the "mean" of the workers' mean rates."""
    found: dict[str, dict[str, float | None]] = {}
    for way in ("up", "down"):
        peaks = [p for row in rows if (p := number(row.get(f"peak_{way}_bps"))) is not None]
        means = [m for row in rows if (m := mean_bps(row, way)) is not None]
        found[way] = {
            "peak": max(peaks, default=None),
            "mean": math.fsum(means) / len(means) if means else None,
        }
    return found


def data_parallel_bytes(parameters: int, steps: Iterable[int]) -> int:
    """Bytes that data-parallel training would have sent: a bf16 ring all-reduce of the gradient at every step.

    sum over workers of steps * 2 (M - 1) / M * 2 bytes * parameters, M workers. 0 for a single worker.
    Only what is sent counts, although each byte is received again elsewhere.
    """
    counts = list(steps)
    members = len(counts)
    return sum(counts) * 4 * (members - 1) * parameters // members if members else 0


def versus_text(sent: float, baseline: float) -> str:
    """How `sent` compares with `baseline`: ``412× fewer``, ``1.5× more``; UNKNOWN if either is 0."""
    if sent <= 0 or baseline <= 0:
        return UNKNOWN
    ratio, word = (baseline / sent, "fewer") if baseline >= sent else (sent / baseline, "more")
    return f"{ratio:,.0f}× {word}" if ratio >= 9.95 else f"{ratio:.1f}× {word}"


def bytes_text(value: object) -> str:
    """Decimal units, three significant digits: ``1.23 MB``."""
    found = number(value)
    if found is None:
        return UNKNOWN
    return (
        f"{found:.0f} B" if abs(found) < 999.5 else _scaled(found, ("kB", "MB", "GB", "TB", "PB", "EB"), " ")
    )


def rate_text(bits_per_s: object) -> str:
    """``8.00 Mbit/s``."""
    found = number(bits_per_s)
    if found is None:
        return UNKNOWN
    if abs(found) < 999.5:
        return f"{found:.0f} bit/s"
    return _scaled(found, ("kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"), " ")


def count_text(value: object) -> str:
    """``950``, ``12.3k``, ``4.56M``."""
    found = number(value)
    if found is None:
        return UNKNOWN
    return f"{found:.0f}" if abs(found) < 999.5 else _scaled(found, ("k", "M", "G", "T", "P", "E"), "")


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    power = 1
    while power < len(units) and abs(value) / 1000.0**power >= 999.5:
        power += 1
    value, unit = value / 1000.0**power, units[power - 1]
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{gap}{unit}"


def duration_text(seconds: object) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 05 s``, ``3 h 07 min``, ``2 d 04 h``."""
    found = number(seconds)
    if found is None:
        return UNKNOWN
    if found < 59.95:
        return f"{found:.2f} s" if 0 < found < 0.995 else f"{found:.1f} s"
    whole_s = round(found)
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02d} s"
    if whole_s < 86400:
        return f"{whole_s // 3600} h {whole_s % 3600 // 60:02d} min"
    return f"{whole_s // 86400} d {whole_s % 86400 // 3600:02d} h"


def percent_text(fraction: object) -> str:
    """``97.4 %``; UNKNOWN for None."""
    found = number(fraction)
    return UNKNOWN if found is None else f"{100 * found:.1f} %"


def loss_text(loss: object) -> str:
    """Three decimals; UNKNOWN for None and NaN."""
    found = number(loss)
    return UNKNOWN if found is None else f"{found:.3f}"


def printable(text: object) -> str:
    """`text` without control characters, which could rewrite a terminal's screen."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
