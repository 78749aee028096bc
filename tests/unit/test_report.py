"""report.json, report.html and the figures in them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from diloco.config import RunConfig
from diloco.errors import StorageError
from diloco.fragments import build_plan
from diloco.readout import bytes_text, count_text, data_parallel_bytes, duration_text, rate_text, versus_text
from diloco.worker.charts import ticks
from diloco.worker.report import build_report, digests_equal, write_report
from diloco.worker.series import read_series, smooth, thin, tracks
from diloco.worker.timeline import Round, Span, Timeline, Total, dump

NAN = float("nan")
DIGEST = "ab" * 32
KEYS = {
    "tokens", "train_seconds", "eval_loss_start", "eval_loss_end", "commits", "workers", "global_digest", "bytes_up",
    "bytes_down", "bytes_data_parallel", "compute_utilisation", "exposed_comm_seconds", "hidden_comm_seconds",
    "versions", "config", "prediction", "overlap",
    "wire_bits_per_second",
}  # fmt: skip


def member(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name, "index": 0, "state": "gone", "incarnation": 1, "versions": [3, 2], "step": 100, "tokens": 5000,
        "loss": 2.0, "lr": 1e-3, "tokens_per_s": 50.0, "compute_s": 90.0, "exposed_s": 10.0, "hidden_s": 4.0,
        "bytes_up": 1000, "bytes_down": 3000, "heartbeat_age_s": 0.1, "eval_start": 5.5, "eval_end": 2.5,
        "digest": DIGEST, "finished": "complete", "live": False,
    } | changes  # fmt: skip


def status(*members: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": "demo", "phase": "complete", "epoch": 1, "commits": 5, "aborted": 0, "inner_step": 100,
        "inner_steps_total": 100, "tokens": 9999, "fragments": [
            {"index": 0, "numel": 600, "version": 3}, {"index": 1, "numel": 400, "version": 2},
        ],
        "members": list(members), "rejections": {}, "global_digest": DIGEST, "seconds": 120.0,
        "config": RunConfig().model_dump(mode="json"),
    }  # fmt: skip


def heartbeats(*names: str, count: int = 50) -> list[dict[str, Any]]:
    return [
        {"t": float(i), "worker": n, "step": i, "tokens": 100 * i, "loss": 6.0 - 0.05 * i, "compute_s": 0.9 * i,
         "exposed_s": 0.1 * i, "hidden_s": 0.05 * i, "bytes_up": 20 * i, "bytes_down": 60 * i}
        for i in range(count) for n in names
    ]  # fmt: skip


class Page(HTMLParser):
    """Tags and attributes of a page; fails on tags that are closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag != "meta":  # the only void element here that may stay open
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_has_exactly_the_agreed_keys_and_sums_over_workers() -> None:
    """Names are fixed; tokens, bytes and seconds are sums, utilisation is compute / (compute + exposed)."""
    report = build_report(status(member("a"), member("b", compute_s=70.0, exposed_s=30.0)), parameters=1000)
    assert set(report) == KEYS
    assert {k for w in report["workers"] for k in w} == {"id", "steps", "tokens", "digest", "live"}
    assert (report["tokens"], report["bytes_up"], report["bytes_down"]) == (10_000, 2000, 6000)
    assert report["compute_utilisation"] == pytest.approx(160 / 200)
    assert (report["exposed_comm_seconds"], report["hidden_comm_seconds"]) == (40.0, 8.0)
    assert report["versions"] == {"0": 3, "1": 2}
    assert report["train_seconds"] == 120.0 and report["commits"] == 5


def test_the_report_has_peak_and_mean_rate_of_the_wire() -> None:
    """The highest peak of any worker; bits over compute and exposed time, as a mean over workers; null when unknown."""
    workers = member("a", peak_up_bps=900.0), member("b", peak_up_bps=700.0, exposed_s=70.0)
    rates = build_report(status(*workers), parameters=1000)["wire_bits_per_second"]
    assert rates["up"] == {"peak": 900.0, "mean": pytest.approx((80.0 + 50.0) / 2)}
    assert rates["down"] == {"peak": None, "mean": pytest.approx((240.0 + 150.0) / 2)}


def test_data_parallel_bytes_follow_the_ring_formula() -> None:
    """Per worker and step 2 (M-1)/M times 2 bytes times parameters; one worker alone sends nothing."""
    assert data_parallel_bytes(1000, [10, 30]) == 40 * 2 * 1 // 2 * 2 * 1000
    assert data_parallel_bytes(1000, [10] * 4) == 40 * 3 * 1000
    assert data_parallel_bytes(1000, [10]) == 0 == data_parallel_bytes(1000, [])
    assert build_report(status(member("a"), member("b")), parameters=7)["bytes_data_parallel"] == 200 * 2 * 7


def test_unknown_values_become_null_and_never_nan(tmp_path: Path) -> None:
    """JSON readers choke on NaN: it is written as null, wherever it came from."""
    empty = member(
        "a", eval_start=None, eval_end=NAN, loss=NAN, compute_s=None, exposed_s=None, bytes_up=None
    )
    state = status(empty) | {"config": {"optim": {"lr": NAN}}}
    write_report(tmp_path, build_report(state, parameters=10), [{"worker": "a", "loss": NAN, "tokens": None}])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["eval_loss_start"] is None and read["eval_loss_end"] is None
    assert read["compute_utilisation"] is None and read["bytes_up"] == 0
    assert read["config"] == {"optim": {"lr": None}}
    assert (
        "nan"
        not in re.sub(
            r"<style>.*</style>", "", (tmp_path / "report.html").read_text(), flags=re.DOTALL
        ).lower()
    )


def test_start_loss_ignores_workers_that_came_back() -> None:
    """A second life first evaluates a trained model, which is not where the run began."""
    report = build_report(status(member("a"), member("b", incarnation=2, eval_start=3.0)), parameters=1)
    assert report["eval_loss_start"] == 5.5
    gone = member("c", eval_end=4.0, finished="")
    assert build_report(status(member("a"), gone), parameters=1)["eval_loss_end"] == 2.5


def test_digests_are_compared_over_workers_that_stayed() -> None:
    """A worker that left half way may hold anything; one that stayed may not; silence is not agreement."""
    left = member("b", digest="cd" * 32, finished="")
    assert digests_equal(build_report(status(member("a"), left), parameters=1)) is True
    assert digests_equal(build_report(status(member("a"), left | {"live": True}), parameters=1)) is False
    assert digests_equal(build_report(status(member("a"), member("b", digest="")), parameters=1)) is None
    assert digests_equal(build_report(status(), parameters=1)) is None


def test_page_stands_alone_and_is_well_formed(tmp_path: Path) -> None:
    """No script, image, font or style comes from elsewhere, and every element is closed."""
    state = status(member("a"), member("b"))
    path = write_report(
        tmp_path / "runs" / "demo",
        build_report(state, parameters=1000),
        heartbeats("a", "b"),
        state["fragments"],
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == [] and not {"link", "script", "img", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert page.tags.count("svg") == 3 and "details" in page.tags and "prefers-color-scheme: dark" in text
    assert len(re.findall(r'<path class="curve c[01]"', text)) == 2
    assert "50× fewer" in text  # 2 * 100 * 2 * 1000 bytes against 8000
    assert "$" not in text


def test_page_shows_overlap_and_prediction_beside_measurement(tmp_path: Path) -> None:
    """With the plan and the workers' timelines: a chart, its numbers per fragment, and both columns of figures."""
    plan = build_plan({"embed": (60, 10), "blocks.0.w": (20, 20)}, 10)
    state = status(member("a"), member("b", link_up_bps=8e6, link_down_bps=4e6, rtt_s=0.02))
    rounds = [
        Round(0, 0, 10, 12, 5.0, 5.5, 5.75, 0.25, "merged-in"),
        Round(1, 0, 15, 17, 7.0, 7.5, 7.5, 0.0, "aborted"),
    ]
    totals = {0: Total(1, 0.25, 0.5), 1: Total(1, 0.0, 2.0)}
    record = dump(Timeline(1e9, rounds, [Span(0.0, 7.0, 1, 15)], totals))
    series = [*heartbeats("a", "b"), *({"worker": name, "timeline": record} for name in "ab")]
    report = build_report(state, parameters=1000, plan=plan, series=series)
    assert report["overlap"] == {
        "0": {"rounds": 2, "exposed_comm_seconds": 0.5, "hidden_comm_seconds": 1.0},
        "1": {"rounds": 2, "exposed_comm_seconds": 0.0, "hidden_comm_seconds": 4.0},
    }
    prediction = report["prediction"]
    assert prediction["inputs"]["up_bits_per_s"] == 8e6 and prediction["inputs"]["parameters"] == 1000
    assert prediction["measured"]["compute_utilisation"] == report["compute_utilisation"]
    assert prediction["measured"]["bytes_up"] == report["bytes_up"]
    text = write_report(tmp_path, report, series, state["fragments"]).read_text(encoding="utf-8")
    assert Page(text).tags.count("svg") == 4 and "$" not in text
    assert "Drawn: every round." in text and "8.00 Mbit/s up" in text and "round trip 20.0 ms" in text
    row = re.search(
        r"<td>Compute utilisation</td><td class=\"n\">([\d.]+) %</td><td class=\"n\">90.0 %</td>", text
    )
    assert row is not None and 0 < float(row[1]) <= 100
    assert '<td class="n">0.50 s</td><td class="n">1.0 s</td>' in text


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    """Worker names and configuration values come from other people."""
    evil = '<script>alert(1)</script>&"'
    state = status(member(evil, digest=evil), member("b"))
    state["config"]["run"]["run_id"] = evil
    state["config"]["data"]["source"] = evil
    state["global_digest"] = evil
    page = write_report(tmp_path, build_report(state, parameters=10), heartbeats(evil, "b")).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "script" not in Page(page).tags


@pytest.mark.parametrize("names", [(), ("a",), tuple("abcdefghij")])
def test_page_draws_any_number_of_workers_without_a_heartbeat(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A run that ended at once still has a report."""
    state = status(*(member(n) for n in names)) | {"seconds": 0.0}
    page = write_report(tmp_path, build_report(state, parameters=10), []).read_text()
    assert "No heartbeat with a loss was recorded." in page
    Page(page)


def test_drawing_stays_inside_its_frame_when_nothing_was_saved(tmp_path: Path) -> None:
    """More bytes than data parallel is said as it is, and its long bar leaves room for the words."""
    state = status(member("a", bytes_up=10**6), member("b"))
    page = write_report(tmp_path, build_report(state, parameters=1), heartbeats("a")).read_text()
    assert "2,518× more" in page and "fewer" not in page
    ends = [
        float(x) + float(w)
        for x, w in re.findall(r'<rect class="\w*" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', page)
    ]
    assert ends and max(ends) <= 1080


def test_a_report_is_written_whatever_workers_sent(tmp_path: Path) -> None:
    """Numbers that nobody can have measured break no sum and no drawing."""
    plan = build_plan({"w": (10, 10)}, 10, layout="single")
    for absurd in (1.7e308, -1.7e308, 5e-324, float("inf"), NAN):
        facts = {k: absurd for k, v in member("ada").items() if isinstance(v, float)}
        series = [{k: absurd if isinstance(v, float) else v for k, v in h.items()} for h in heartbeats("ada")]
        told = status(member("ada", **facts, steps_per_s=absurd), member("bob", **facts))
        write_report(tmp_path, build_report(told, parameters=100, plan=plan, series=series), series)
        assert json.loads((tmp_path / "report.json").read_text())["commits"] == 5


def test_files_are_replaced_whole_and_failures_say_what_to_do(tmp_path: Path) -> None:
    """Nothing but the two files is left behind; a directory that cannot be made is a StorageError."""
    report = build_report(status(member("a")), parameters=1)
    write_report(tmp_path, report, [])
    write_report(tmp_path, report, heartbeats("a"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    with pytest.raises(StorageError, match="cannot write .*free space"):
        write_report(tmp_path / "report.json" / "below", report, [])


def test_json_report_reads_back_equal(tmp_path: Path) -> None:
    """What is written is what was built."""
    report = build_report(status(member("a"), member("b")), parameters=10)
    write_report(tmp_path, report, [])
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_counters_are_summed_over_the_lives_of_a_worker() -> None:
    """A process that starts anew counts from 0; what its earlier life did still happened."""
    rows = [{"worker": "a", "compute_s": v} for v in (1.0, 5.0, None, 0.5, 2.0)]
    track = tracks(rows)["a"]
    assert track.sum("compute_s") == 7.0
    assert track.sum("bytes_up") is None


def test_smoothing_keeps_straight_lines_and_quiets_noise() -> None:
    """A fitted line neither lags behind a falling curve nor bends at its ends."""
    line = [(float(i), 6.0 - 0.01 * i) for i in range(300)]
    assert [x for x, _ in smooth(line)] == [x for x, _ in line]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    zigzag = [(x, y + (0.5 if i % 2 else -0.5)) for i, (x, y) in enumerate(line)]
    assert max(abs(a[1] - b[1]) for a, b in zip(smooth(zigzag), line, strict=True)) < 0.15
    assert smooth([]) == [] and smooth([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_thinning_averages_neighbours_and_loses_none() -> None:
    """Every point counts in exactly one mean, so the total is kept where groups are equal."""
    points = [(float(i), float(i % 7)) for i in range(2800)]
    thinned = thin(points, 400)
    assert len(thinned) == 400
    assert sum(y for _, y in thinned) * 7 == pytest.approx(sum(y for _, y in points))
    assert thin([], 400) == []


def test_torn_last_line_of_the_record_is_left_out(tmp_path: Path) -> None:
    """The process may have died in the middle of a line."""
    file = tmp_path / "progress.jsonl"
    assert read_series(file) == []
    file.write_text('{"worker": "a", "loss": NaN}\n[1]\n{"worker": "b", "lo')
    assert [r["worker"] for r in read_series(file)] == ["a"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (1.4, 6.2, [2, 3, 4, 5, 6]),
        (0.0, 1.5e6, [0, 5e5, 1e6, 1.5e6]),
        (3.0, 3.0, [3]),
    ],
)
def test_axis_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    """1, 2 or 5 times a power of ten apart."""
    assert ticks(low, high) == pytest.approx(expected)


def test_numbers_read_as_people_write_them() -> None:
    """Three significant digits, units that never show 1000 of themselves, and a dash for the unknown."""
    assert [bytes_text(v) for v in (0, 999, 999.6, 1234, 999_960, 16e9, None)] == [
        "0 B", "999 B", "1.00 kB", "1.23 kB", "1.00 MB", "16.0 GB", "–",
    ]  # fmt: skip
    assert [count_text(v) for v in (950, 12_345, 4_560_000, NAN)] == ["950", "12.3k", "4.56M", "–"]
    assert [duration_text(v) for v in (0, 0.42, 59.99, 245, 11_220, 187_200)] == [
        "0.0 s", "0.42 s", "1 min 00 s", "4 min 05 s", "3 h 07 min", "2 d 04 h",
    ]  # fmt: skip
    assert [rate_text(v) for v in (12, 8e6, 1.5e9, None)] == ["12 bit/s", "8.00 Mbit/s", "1.50 Gbit/s", "–"]
    assert [versus_text(*v) for v in ((1, 412), (2, 3), (3, 2), (0, 5), (5, 0))] == [
        "412× fewer", "1.5× fewer", "1.5× more", "–", "–",
    ]  # fmt: skip
