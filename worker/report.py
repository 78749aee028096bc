"""A run's report: report.json for programs, report.html for people. The drawing is in `charts`.

Both follow from the coordinator's status at the end and from the heartbeats that it recorded on the way.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from diloco.config import RunConfig
from diloco.errors import StorageError
from diloco.fragments import FragmentPlan
from diloco.readout import (
    UNKNOWN,
    bytes_text,
    count_text,
    data_parallel_bytes,
    duration_text,
    loss_text,
    number,
    percent_text,
    rate_text,
    total,
    utilisation,
    versus_text,
    whole,
    wire_rates,
)
from diloco.worker import charts
from diloco.worker.gantt import gantt
from diloco.worker.prediction import milliseconds, predict
from diloco.worker.series import Track, timelines, tracks
from diloco.worker.timeline import Timeline, Total

Row = Mapping[str, Any]


def build_report(
    status: Mapping[str, Any],
    *,
    parameters: int,
    plan: FragmentPlan | None = None,
    series: Iterable[Row] = (),
) -> dict[str, Any]:
    """What report.json holds. Losses in nats per byte, times in seconds; None where nobody knows.

    `tokens`, bytes and seconds are sums over workers. A worker is `live` if it took part to the end, which includes
    having left because the run was complete. `eval_loss_start` is the mean over first lives (a worker that
    came back first evaluates a trained model), `eval_loss_end` the mean over workers that finished; both
    fall back to every worker that has a value. `bytes_data_parallel`: see `readout.data_parallel_bytes`.

    With the run's `plan`, `prediction` is what the model of the link says beside what was measured
    (`diloco.worker.prediction.predict`). `overlap` has per fragment ``rounds``, ``exposed_comm_seconds`` and
    ``hidden_comm_seconds``, sums over the workers whose timelines are in `series`, the recorded heartbeats.
    """
    members: Sequence[Row] = status["members"]
    compute_s, exposed_s = total(members, "compute_s"), total(members, "exposed_s")
    report = {
        "tokens": whole(total(members, "tokens")),
        "train_seconds": status["seconds"],
        "eval_loss_start": _mean(members, "eval_start", [m for m in members if m["incarnation"] == 1]),
        "eval_loss_end": _mean(members, "eval_end", [m for m in members if m["finished"]]),
        "commits": status["commits"],
        "workers": [
            {
                "id": m["id"],
                "steps": whole(m["step"]),
                "tokens": whole(m["tokens"]),
                "digest": m["digest"],
                "live": bool(m["live"] or m["finished"]),
            }
            for m in members
        ],
        "global_digest": status["global_digest"],
        "bytes_up": whole(total(members, "bytes_up")),
        "bytes_down": whole(total(members, "bytes_down")),
        "bytes_data_parallel": data_parallel_bytes(parameters, [whole(m["step"]) for m in members]),
        "wire_bits_per_second": wire_rates(members),
        "compute_utilisation": utilisation(compute_s, exposed_s),
        "exposed_comm_seconds": exposed_s,
        "hidden_comm_seconds": total(members, "hidden_s"),
        "versions": {str(f["index"]): f["version"] for f in status["fragments"]},
        "prediction": predict(RunConfig.from_dict(status["config"]), plan, members) if plan else None,
        "overlap": _overlap(timelines(series)),
        "config": status["config"],
    }
    cleaned: dict[str, Any] = _without_nan(report)
    return cleaned


def write_report(
    run_dir: str | os.PathLike[str],
    report: Mapping[str, Any],
    series: Iterable[Row],
    fragments: Sequence[Row] = (),
) -> Path:
    """Write report.json and report.html into `run_dir`, each whole or not at all; returns the page's path.

    `series` are the recorded heartbeats in order of time; `fragments`, as in the status, adds sizes to the
    page's table of fragments. Raises StorageError if the directory cannot be written.
    """
    folder = Path(run_dir)
    text = json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n"
    page = render_html(report, series, fragments, run_id=folder.name)
    _write(folder / "report.json", text)
    _write(folder / "report.html", page)
    return folder / "report.html"


def render_html(
    report: Mapping[str, Any], series: Iterable[Row], fragments: Sequence[Row] = (), *, run_id: str = ""
) -> str:
    """The page: one self-contained HTML document that loads nothing. All text in it is escaped.

    A report without fragments is of a run on one node: what is about a network is left out.
    """
    series = list(series)
    found, drawn = tracks(series), timelines(series)
    in_order = [str(w["id"]) for w in report["workers"]]
    curves = [found.get(name, Track(name)) for name in in_order]
    config = report["config"] or {}
    overlap, window = gantt({name: drawn[name] for name in in_order if name in drawn})
    name = str(config.get("run", {}).get("run_id") or run_id or "run")
    sent = report["bytes_up"] + report["bytes_down"]
    seconds = number(report["train_seconds"]) or 0.0
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(name),
        subtitle=html.escape(
            f"{len(in_order)} worker{'' if len(in_order) == 1 else 's'} · {duration_text(seconds)} · "
            f"{count_text(report['tokens'])} tokens"
            + (f" · {report['commits']} commits" if report["versions"] else " · one node")
        ),
        network="" if report["versions"] else "unused",
        cards=_cards(report, sent),
        loss=charts.loss_curves(curves, number(report["eval_loss_start"]), number(report["eval_loss_end"])),
        traffic=charts.traffic(report["bytes_data_parallel"], report["bytes_up"], report["bytes_down"]),
        time=charts.time_split(curves, seconds),
        overlap=overlap,
        window=html.escape(window),
        prediction=_prediction(report.get("prediction")),
        exposed=duration_text(report["exposed_comm_seconds"]),
        hidden=duration_text(report["hidden_comm_seconds"]),
        workers=_workers_table(report, curves),
        fragments=_fragments_table(report, fragments),
        digest=html.escape(str(report["global_digest"] or UNKNOWN)),
        config=html.escape(json.dumps(_without_nan(config), indent=2, ensure_ascii=False)),
    )


def digests_equal(report: Mapping[str, Any]) -> bool | None:
    """Whether every worker that stayed to the end holds the global parameters; None if one has not said."""
    digests = [w["digest"] for w in report["workers"] if w["live"]]
    if not report["global_digest"] or any(d and d != report["global_digest"] for d in digests):
        return False if report["global_digest"] else None
    return True if digests and all(digests) else None


def _cards(report: Mapping[str, Any], sent: int) -> str:
    baseline, equal = report["bytes_data_parallel"], digests_equal(report)
    answer, colour = {True: ("yes", "good"), False: ("no", "bad"), None: (UNKNOWN, "")}[equal]
    start, taken = loss_text(report["eval_loss_start"]), duration_text(report["train_seconds"])
    waited = duration_text(report["exposed_comm_seconds"])
    traffic = f"{bytes_text(sent)} up and down; data parallel {bytes_text(baseline)}"
    cards = [
        ("Final loss", loss_text(report["eval_loss_end"]), f"nats/byte, held-out text, from {start}", ""),
        (
            "Bytes on the wire",
            versus_text(sent, baseline),
            traffic,
            "bad" if sent > baseline > 0 else "accent",
        ),
        (
            "Compute utilisation",
            percent_text(report["compute_utilisation"]),
            f"{waited} spent waiting for the network",
            "",
        ),
        ("Tokens", count_text(report["tokens"]), f"in {taken}", ""),
        ("Commits", f"{report['commits']:,}", f"over {len(report['versions'])} fragments", ""),
        ("Replicas identical", answer, "digests of all workers and the coordinator", colour),
    ]
    if not report["versions"]:
        cards = [card for card in cards if card[0] in ("Final loss", "Tokens")]
        if len(report["workers"]) > 1:
            cards.append(("Replicas identical", answer, "digests of all processes", colour))
    return "\n".join(
        f'<div class="card {kind}"><h3>{html.escape(label)}</h3><p class="figure">{html.escape(figure)}</p>'
        f"<p>{html.escape(note)}</p></div>"
        for label, figure, note, kind in cards
    )


def _workers_table(report: Mapping[str, Any], curves: Sequence[Track]) -> str:
    rows = []
    for position, (worker, track) in enumerate(zip(report["workers"], curves, strict=True)):
        busy = utilisation(track.sum("compute_s"), track.sum("exposed_s"))
        digest = str(worker["digest"] or "")
        same = digest != "" and digest == report["global_digest"]
        rows.append(
            (
                f'<span class="dot c{position % charts.COLOURS}"></span>{html.escape(str(worker["id"]))}',
                f"{worker['steps']:,}",
                count_text(worker["tokens"]),
                loss_text(track.smoothed[-1][1] if track.smoothed else None),
                percent_text(busy),
                bytes_text(track.sum("bytes_up")),
                bytes_text(track.sum("bytes_down")),
                "stayed to the end" if worker["live"] else "left",
                f'<code title="{html.escape(digest)}">{html.escape(digest[:12]) or UNKNOWN}</code>'
                + (' <span class="good">=</span>' if same else ""),
            )
        )
    heads = (
        "Worker", "#Inner steps", "#Tokens", "#Training loss", "#Utilisation", "#Sent", "#Received", "Membership",
        "Digest",
    )  # fmt: skip
    return _table(heads, rows)


def _fragments_table(report: Mapping[str, Any], fragments: Sequence[Row]) -> str:
    sizes = {str(f["index"]): whole(f["numel"]) for f in fragments}
    everything = sum(sizes.values())
    overlap = report.get("overlap") or {}
    rows = [
        (
            html.escape(str(index)),
            f"{sizes[index]:,}" if index in sizes else UNKNOWN,
            percent_text(sizes[index] / everything) if index in sizes and everything else UNKNOWN,
            html.escape(f"{commits:,}"),
            *(
                duration_text(overlap.get(str(index), {}).get(key))
                for key in ("exposed_comm_seconds", "hidden_comm_seconds")
            ),
        )
        for index, commits in report["versions"].items()
    ]
    heads = ("Fragment", "#Parameters", "#Share of the model", "#Commits", "#Exposed", "#Hidden")
    return _table(heads, rows)


def _prediction(prediction: Row | None) -> str:
    """The model's figures beside the measured ones, and what went into the model."""
    if prediction is None:
        return '<p class="empty">No worker measured enough for a prediction.</p>'
    inputs, measured = prediction["inputs"], prediction["measured"]
    rows = [
        (name, show(prediction[key]), show(measured[key]))
        for name, key, show in (
            ("Compute utilisation", "compute_utilisation", percent_text),
            ("Bytes sent, all workers", "bytes_up", bytes_text),
            ("Bytes received, all workers", "bytes_down", bytes_text),
            ("Mean rate up, one worker", "mean_up_bits_per_s", rate_text),
            ("Peak rate up, one worker", "peak_up_bits_per_s", rate_text),
            ("Mean rate down, one worker", "mean_down_bits_per_s", rate_text),
            ("Peak rate down, one worker", "peak_down_bits_per_s", rate_text),
            ("Exposed communication, all workers", "exposed_comm_seconds", duration_text),
        )
    ]
    words = (
        f"<p>From the run's settings and what was measured: {milliseconds(inputs['step_time_s'])} per inner step of "
        f"the slowest of {inputs['workers']}, {rate_text(inputs['up_bits_per_s'])} up, "
        f"{rate_text(inputs['down_bits_per_s'])} down, round trip {milliseconds(inputs['rtt_s'])}. "
        "The model knows no time for coding, averaging and the journal, no lost bytes and no "
        "idle start; its peaks are of rounds, those measured may be of the starting values.</p>"
    )
    return words + _table(("", "#Predicted", "#Measured"), rows)


def _overlap(found: Mapping[str, Timeline]) -> dict[str, Any]:
    sums: dict[int, Total] = {}
    for one in found.values():
        for fragment, rounds in one.totals.items():
            sums.setdefault(fragment, Total()).add(rounds)
    return {
        str(fragment): {
            "rounds": rounds.rounds,
            "exposed_comm_seconds": rounds.exposed,
            "hidden_comm_seconds": rounds.hidden,
        }
        for fragment, rounds in sorted(sums.items())
    }


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; a head that starts with # stands over numbers."""
    kinds = [' class="n"' if head.startswith("#") else "" for head in heads]
    top = "".join(f"<th{kind}>{head.lstrip('#')}</th>" for kind, head in zip(kinds, heads, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _mean(members: Sequence[Row], key: str, preferred: Sequence[Row]) -> float | None:
    for group in (preferred, members):
        known = [v for m in group if (v := number(m[key])) is not None]
        if known:
            return sum(known) / len(known)
    return None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return number(value) if isinstance(value, float) else value


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise StorageError(
            f"report: cannot write {path}: {error}; free space there or make the directory writable"
        ) from error
