"""Charts as inline SVG text, coloured by the page's style sheet (light and dark). No data is read here.

Classes used: `c0`..`c7` a worker's colour, `axis`, `grid`, `label`, and one per kind of bar.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from diloco.readout import bytes_text, count_text, duration_text, percent_text, utilisation, versus_text
from diloco.worker.series import Point, Track

COLOURS = 8  # workers beyond share colours
WIDTH = 1080


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]; about `about` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= rough * 0.999), default=10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def loss_curves(curves: Sequence[Track], start: float | None, end: float | None) -> str:
    """Training loss against tokens: one smoothed line per worker over its raw values; held-out loss as levels."""
    drawn = [(i, t) for i, t in enumerate(curves) if t.raw]
    if not drawn:
        return '<p class="empty">No heartbeat with a loss was recorded.</p>'
    height, left, right, top, bottom = 400, 64, 150, 14, 48
    levels = [v for v in (start, end) if v is not None]
    raws = [y for _, t in drawn for _, y in t.raw]
    smooths = [y for _, t in drawn for _, y in t.smoothed]
    # A single spike in the raw values must not flatten the curves.
    ceiling = max(smooths + levels)
    y_low, y_high = min([*raws, *levels]), max(ceiling, min(max(raws), ceiling * 1.1))
    margin = 0.04 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - margin, y_high + margin
    x_high = max(x for _, t in drawn for x, _ in t.raw) or 1.0

    def px(x: float) -> float:
        return left + (WIDTH - left - right) * x / x_high

    def py(y: float) -> float:
        return top + (height - top - bottom) * (y_high - min(y, y_high)) / (y_high - y_low)

    def path(points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)

    floor = height - bottom
    out = []
    for y in ticks(y_low, y_high):
        out.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        out.append(f'<text class="label" x="{left - 9}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in ticks(0.0, x_high, 7):
        out.append(f'<line class="axis" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{floor}" y2="{floor + 5}"/>')
        out.append(
            f'<text class="label" x="{px(x):.1f}" y="{floor + 20}" text-anchor="middle">{_round_count(x)}</text>'
        )
    out.append(f'<line class="axis" x1="{left}" x2="{WIDTH - right}" y1="{floor}" y2="{floor}"/>')
    middle = left + (WIDTH - left - right) / 2
    out.append(
        f'<text class="title" x="{middle}" y="{height - 6}" text-anchor="middle">tokens, per worker</text>'
    )
    out.append(
        f'<text class="title" transform="translate(15,{(top + floor) / 2}) rotate(-90)" text-anchor="middle">'
        "loss, nats/byte</text>"
    )
    for i, t in drawn:
        out.append(f'<path class="raw c{i % COLOURS}" d="{path(t.raw)}"/>')
    for i, t in drawn:
        out.append(
            f'<path class="curve c{i % COLOURS}" d="{path(t.smoothed)}"><title>{html.escape(t.worker)}</title></path>'
        )
    edge = WIDTH - right + 10
    for name, level in (("start", start), ("end", end)):
        if level is not None:
            y = py(level)
            out.append(f'<line class="level" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text class="label" x="{edge}" y="{y + 4:.1f}">held-out, {name} {level:.3f}</text>')
    return legend([(f"c{i % COLOURS}", t.worker) for i, t in drawn]) + svg(
        height, out, "Training loss against tokens, per worker"
    )


def traffic(baseline: int, up: int, down: int) -> str:
    """Bytes that data parallel would have sent, and what this run sent and received, on one linear scale."""
    sent = up + down
    rows = [("Data parallel", baseline, 0), ("This run", up, down)]
    most = max(baseline, sent, 1)
    left, right, bar, gap = 150, 250, 34, 18
    span = WIDTH - left - right
    out = []
    for position, (name, first, second) in enumerate(rows):
        y = 6 + position * (bar + gap)
        a, b = (max(span * v / most, 2.0) if v else 0.0 for v in (first, second))
        kinds = ("baseline", "") if position == 0 else ("up", "down")
        out.append(row_name(name, left, y + bar / 2))
        out.append(f'<rect class="{kinds[0]}" x="{left}" y="{y}" width="{a:.1f}" height="{bar}"/>')
        if b:
            out.append(f'<rect class="down" x="{left + a:.1f}" y="{y}" width="{b:.1f}" height="{bar}"/>')
        note = bytes_text(first + second)
        if position == 1:
            note += f" = {bytes_text(up)} up + {bytes_text(down)} down"
            if sent and baseline:
                note += f" · {versus_text(sent, baseline)}"
        # Beside a short bar, inside a long one: the text must not leave the drawing.
        kind, x, anchor = ("value", left + a + b + 10, "start")
        if x + 8 * len(note) > WIDTH:
            kind, x, anchor = ("inside", left + a + b - 10, "end")
        out.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y + bar / 2 + 5}" text-anchor="{anchor}">{note}</text>'
        )
    floor = 6 + 2 * (bar + gap) - 6
    out.append(f'<line class="axis" x1="{left}" x2="{left + span}" y1="{floor}" y2="{floor}"/>')
    for v in ticks(0.0, float(most), 4):
        x = left + span * v / most
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>')
        out.append(
            f'<text class="label" x="{x:.1f}" y="{floor + 20}" text-anchor="middle">{_tick_bytes(v)}</text>'
        )
    keys = [
        ("baseline", "data parallel, sent"),
        ("up", "workers to coordinator"),
        ("down", "back to workers"),
    ]
    return legend(keys) + svg(floor + 30, out, "Bytes sent by this run and by data parallel training")


def time_split(curves: Sequence[Track], seconds: float) -> str:
    """Per worker: compute, exposed communication and the rest of the run's wall-clock `seconds`, stacked.

    The thin bar below is communication that ran while the worker computed.
    """
    left, right, bar, gap = 150, 120, 24, 26
    span = WIDTH - left - right
    split = [
        (t.worker, t.sum("compute_s") or 0.0, t.sum("exposed_s") or 0.0, t.sum("hidden_s") or 0.0)
        for t in curves
    ]
    most = max([seconds, *(c + e for _, c, e, _ in split)], default=0.0)
    if not split or most <= 0:
        return '<p class="empty">No time was recorded.</p>'
    out = []
    for position, (name, compute, exposed, hidden) in enumerate(split):
        y, x = 4 + position * (bar + gap), float(left)
        out.append(row_name(name, left, y + bar / 2))
        rest = max(0.0, seconds - compute - exposed)
        for kind, words, value in (
            ("compute", "compute", compute),
            ("exposed", "exposed communication", exposed),
            ("rest", "other", rest),
        ):
            width = span * value / most
            title = f"{html.escape(name)}: {words} {duration_text(value)}"
            out.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{bar}">'
                f"<title>{title}</title></rect>"
            )
            text = duration_text(value)
            if width > 8.5 * len(text):
                out.append(f'<text class="inside" x="{x + 8:.1f}" y="{y + bar / 2 + 5}">{text}</text>')
            x += width
        out.append(
            f'<rect class="hidden" x="{left}" y="{y + bar + 3}" width="{span * min(hidden, most) / most:.1f}" '
            f'height="6"><title>{html.escape(name)}: hidden communication {duration_text(hidden)}</title></rect>'
        )
        busy = percent_text(utilisation(compute, exposed))
        out.append(f'<text class="value" x="{left + span + 12}" y="{y + bar / 2 + 5}">{busy}</text>')
    floor = 4 + len(split) * (bar + gap) - 8
    out.append(f'<line class="axis" x1="{left}" x2="{left + span}" y1="{floor}" y2="{floor}"/>')
    scale, unit = (1.0, "s") if most < 300 else (60.0, "min") if most < 18000 else (3600.0, "h")
    for v in ticks(0.0, most / scale, 7):
        at = left + span * v * scale / most
        out.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{floor}" y2="{floor + 5}"/>')
        out.append(
            f'<text class="label" x="{at:.1f}" y="{floor + 20}" text-anchor="middle">{v:g} {unit}</text>'
        )
    keys = [
        ("compute", "compute"),
        ("exposed", "exposed communication"),
        ("rest", "other: start-up, data, evaluation"),
        ("hidden", "communication hidden behind compute"),
    ]
    return legend(keys) + svg(floor + 30, out, "Where the time of each worker went")


def row_name(name: str, left: float, y: float) -> str:
    """A name to the left of a row whose middle is at `y`."""
    shown = name if len(name) <= 18 else name[:17] + "…"
    return (
        f'<text class="name" x="{left - 12}" y="{y + 5}" text-anchor="end">{html.escape(shown)}'
        f"<title>{html.escape(name)}</title></text>"
    )


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """What the colours mean: (class, words)."""
    items = "".join(f'<li><span class="dot {kind}"></span>{html.escape(words)}</li>' for kind, words in keys)
    return f'<ul class="legend">{items}</ul>'


def svg(height: float, parts: Sequence[str], label: str) -> str:
    """The parts as one drawing, `WIDTH` wide."""
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">\n{body}\n</svg>'


def _round_count(value: float) -> str:
    text = count_text(value)
    unit = text[-1] if text[-1].isalpha() else ""
    return f"{float(text.removesuffix(unit)):g}{unit}"


def _tick_bytes(value: float) -> str:
    figure, unit = bytes_text(value).split(" ")
    return f"{float(figure):g} {unit}"
