"""The overlap of communication and computing as a chart: one lane per worker and fragment, along wall-clock time.

Inline SVG text in the page's colours, like `charts`; what it draws is a `Timeline` of each worker.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diloco.readout import duration_text
from diloco.worker.charts import WIDTH, legend, row_name, svg, ticks
from diloco.worker.timeline import Round, Span, Timeline

DRAWN = 10  # newest rounds per fragment: more cannot be told apart
LANES = 48  # over all workers
TAIL = 0.15  # of the window's length is left for the final exchange, however long it took
LEFT, RIGHT, PITCH, BAR, HEAD = 150, 236, 19, 13, 36
EXPOSED, HIDDEN = 106, 206  # where the columns of sums end, right of the lanes


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of the run in seconds since its first worker began; `origin` is that moment in Unix seconds."""

    origin: float
    begin: float
    end: float

    def x(self, t: float) -> float:
        """Where a time lies in the drawing, at its edge if outside."""
        share = (min(max(t, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return LEFT + (WIDTH - LEFT - RIGHT) * share


def gantt(timelines: Mapping[str, Timeline]) -> tuple[str, str]:
    """The drawing, and a caption that says which part of the run it shows. Without rounds, words instead of a drawing."""
    timed = {name: t for name, t in timelines.items() if t.rounds}
    if not timed:
        return '<p class="empty">No worker left a record of its rounds.</p>', ""
    window = _window(timed)
    fragments = sorted({r.fragment for t in timed.values() for r in t.rounds})
    shown = fragments[: LANES - 1]
    workers = list(timed)[: max(1, LANES // (len(shown) + 1))]
    out: list[str] = []
    top = 0.0
    for name in workers:
        out += _worker(name, timed[name], shown, window, top)
        top += HEAD + PITCH * (len(shown) + 1) + 10
    out += _axis(window, top)
    lost = any(_is_lost(r) for name in workers for r in timed[name].rounds)
    keys = [
        ("compute", "computing"),
        ("hidden", "in flight, behind computing"),
        ("exposed", "waited for: nothing else to do"),
        ("ready", "here, until its step comes"),
        *([("hidden lost", "did not count: late, refused or given up")] if lost else []),
    ]
    drawing = legend(keys) + svg(top + 48, out, "Exposed and hidden communication per fragment")
    return drawing, _caption(timed, workers, fragments, shown, window)


def _window(timed: Mapping[str, Timeline]) -> _Window:
    """The newest `DRAWN` rounds of each fragment at the worker that went on longest, and the run's end behind them.

    It begins earlier, by up to half its length, where another worker's newest rounds do.
    """
    origin = min(t.epoch for t in timed.values())
    newest = [_newest(t, t.epoch - origin) for t in timed.values()]
    begin, end = max(newest, key=lambda pair: pair[1])
    length = max(end - begin, 1e-3)
    begin = min(begin, max(begin - length / 2, min(first for first, last in newest if last >= begin)))
    last = max(t.epoch - origin + _end(r) for t in timed.values() for r in t.rounds)
    end = max(end, min(last, end + TAIL * length))
    return _Window(origin, begin - 0.01 * length, end + 0.01 * length)


def _newest(t: Timeline, shift: float) -> tuple[float, float]:
    """When the newest `DRAWN` rounds of each fragment began and ended, the run's last exchange left out."""
    usual = [r for r in t.rounds if not r.final] or list(t.rounds)
    count = DRAWN * len({r.fragment for r in usual})
    chosen = sorted(usual, key=lambda r: r.sent)[-count:]
    return shift + min(r.sent for r in chosen), shift + max(_end(r) for r in chosen)


def _end(r: Round) -> float:
    return max(v for v in (r.sent, r.answered, r.merged) if math.isfinite(v))


def _is_lost(r: Round) -> bool:
    return r.outcome in ("left-out", "aborted")


def _worker(name: str, t: Timeline, shown: Sequence[int], window: _Window, top: float) -> list[str]:
    shift, y = t.epoch - window.origin, top + HEAD
    out = [
        f'<text class="value" x="{LEFT}" y="{top + 14:.1f}">{html.escape(name)}</text>',
        *_steps(t.spans, shift, window, top + HEAD - 5),
        row_name("compute", LEFT, y + BAR / 2 - 1),
        _bar("lane", LEFT, y, WIDTH - LEFT - RIGHT, ""),
    ]
    for begin, end, first, last in _joined(t.spans, shift, window):
        title = f"computing, inner steps {first} to {last}: {duration_text(end - begin)}"
        out.append(_between("compute", window, begin, end, y, title))
    if top == 0:
        for x, words in ((WIDTH - RIGHT + EXPOSED, "exposed"), (WIDTH - RIGHT + HIDDEN, "hidden")):
            out.append(f'<text class="label" x="{x}" y="{y + 11:.1f}" text-anchor="end">{words}</text>')
    for fragment in shown:
        y += PITCH
        out.append(row_name(f"fragment {fragment}", LEFT, y + BAR / 2 - 1))
        out.append(_bar("lane", LEFT, y, WIDTH - LEFT - RIGHT, ""))
        for r in t.rounds:
            if r.fragment == fragment:
                out += _round(r, shift, window, y)
        total = t.totals.get(fragment)
        if total is not None:
            for x, seconds in ((EXPOSED, total.exposed), (HIDDEN, total.hidden)):
                out.append(
                    f'<text x="{WIDTH - RIGHT + x}" y="{y + 11:.1f}" text-anchor="end">{duration_text(seconds)}</text>'
                )
    return out


def _round(r: Round, shift: float, window: _Window, y: float) -> list[str]:
    end = _end(r)
    if end + shift < window.begin or r.sent + shift > window.end:
        return []
    answered = r.answered if math.isfinite(r.answered) else end
    waits = max(r.sent, answered - r.exposed)
    words = (
        f"fragment {r.fragment}, sent after inner step {r.step}, due at {r.due}: "
        f"hidden {duration_text(r.hidden)}, exposed {duration_text(r.exposed)}, {r.outcome or 'no answer'}"
    )
    dim = " lost" if _is_lost(r) else ""
    parts = [_between("ready" + dim, window, answered + shift, end + shift, y + BAR / 2 - 1.5, words, 3)]
    if waits > r.sent:
        parts.append(_between("hidden bar" + dim, window, r.sent + shift, waits + shift, y, words))
    if answered > waits:
        parts.append(_between("exposed" + dim, window, waits + shift, answered + shift, y, words))
    return [part for part in parts if part]


def _joined(spans: Sequence[Span], shift: float, window: _Window) -> list[tuple[float, float, int, int]]:
    """What of `spans` lies in the window; those too close to be told apart are one."""
    found: list[tuple[float, float, int, int]] = []
    near = 0.7 * (window.end - window.begin) / (WIDTH - LEFT - RIGHT)
    for s in spans:
        begin, end = s.begin + shift, s.end + shift
        if end < window.begin or begin > window.end:
            continue
        if found and begin - found[-1][1] < near:
            found[-1] = (found[-1][0], end, found[-1][2], s.last)
        else:
            found.append((begin, end, s.first, s.last))
    return found


def _steps(spans: Sequence[Span], shift: float, window: _Window, y: float) -> list[str]:
    """Inner steps over the compute lane, each where it ended."""
    inside = [s for s in spans if s.end + shift >= window.begin and s.begin + shift <= window.end]
    if not inside:
        return []
    out, edge = [], -math.inf
    for step in map(round, ticks(inside[0].first, inside[-1].last, 8)):
        for s in inside:
            if s.first <= step <= s.last:
                at = s.begin + (s.end - s.begin) * (step - s.first + 1) / (s.last - s.first + 1) + shift
                x = window.x(at)
                if window.begin <= at <= window.end and x > edge:
                    word = f"step {step:,}" if edge < 0 else f"{step:,}"
                    out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>')
                    out.append(
                        f'<text class="label" x="{x:.1f}" y="{y - 3}" text-anchor="middle">{word}</text>'
                    )
                    edge = x + 60
                break
    return out


def _axis(window: _Window, y: float) -> list[str]:
    out = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']
    unit, scale = ("s", 1.0) if window.end < 600 else ("min", 60.0) if window.end < 36_000 else ("h", 3600.0)
    for v in ticks(window.begin / scale, window.end / scale, 8):
        x = window.x(v * scale)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 5}"/>')
        out.append(f'<text class="label" x="{x:.1f}" y="{y + 20}" text-anchor="middle">{v:g} {unit}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    words = "time since the first worker began"
    out.append(f'<text class="title" x="{middle}" y="{y + 42}" text-anchor="middle">{words}</text>')
    return out


def _between(
    kind: str, window: _Window, begin: float, end: float, y: float, title: str, height: float = BAR
) -> str:
    """A bar from `begin` to `end`, no thinner than can be seen; nothing if it lies outside."""
    if end < window.begin or begin > window.end or end < begin:
        return ""
    x, to = window.x(begin), window.x(end)
    return _bar(kind, x, y, min(max(to - x, 1.2), WIDTH - RIGHT - x), title, height)


def _bar(kind: str, x: float, y: float, width: float, title: str, height: float = BAR) -> str:
    words = f"<title>{html.escape(title)}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:g}">{words}</rect>'
    )


def _caption(
    timed: Mapping[str, Timeline],
    workers: Sequence[str],
    fragments: Sequence[int],
    shown: Sequence[int],
    window: _Window,
) -> str:
    most = max(
        sum(r.fragment == f and _in(r, t, window) for r in t.rounds)
        for t in timed.values()
        for f in fragments
    )
    total = max((v.rounds for t in timed.values() for v in t.totals.values()), default=most)
    whole = all(t.kept_all and _in(r, t, window) for t in timed.values() for r in t.rounds)
    words = (
        "Drawn: every round."
        if whole
        else f"Drawn: the last {most} of up to {total} rounds of each fragment."
    )
    if len(shown) < len(fragments):
        words += f" Fragments {shown[0]} to {shown[-1]} of {len(fragments)}."
    if len(workers) < len(timed):
        words += f" The first {len(workers)} of {len(timed)} workers."
    return words


def _in(r: Round, t: Timeline, window: _Window) -> bool:
    shift = t.epoch - window.origin
    return _end(r) + shift >= window.begin and r.sent + shift <= window.end
