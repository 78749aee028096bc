"""The terminal view of a run."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from diloco.live import eta_s, render


def member(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name, "index": 0, "state": "active", "incarnation": 1, "versions": [3, 1], "step": 1500, "tokens": 5000,
        "loss": 2.0414, "lr": 1e-3, "tokens_per_s": 7412.0, "compute_s": 90.0, "exposed_s": 10.0, "hidden_s": 4.0,
        "bytes_up": 1_230_000, "bytes_down": 3_450_000, "heartbeat_age_s": 1.25, "eval_start": 5.5, "eval_end": None,
        "digest": "", "finished": "", "live": True,
    } | changes  # fmt: skip


def status(*members: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "run_id": "demo", "phase": "running", "epoch": 2, "commits": 50, "aborted": 0, "inner_step": 1500,
        "inner_steps_total": 6000, "tokens": 8000, "fragments": [{"index": 0, "numel": 1_000_000, "version": 50}],
        "members": list(members), "rejections": {}, "global_digest": "ab", "seconds": 60.0, "config": {},
    } | changes  # fmt: skip


def drawn(state: dict[str, Any], width: int = 100) -> str:
    console = Console(
        width=width, force_terminal=False, color_system=None, record=True, file=None, quiet=False
    )
    with console.capture() as capture:
        console.print(render(state))
    text = capture.get()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    return text


def test_view_shows_run_progress_and_every_worker_at_100_columns() -> None:
    """Title, position, remaining time, and a complete row per worker."""
    text = drawn(status(member("a"), member("berlin-2", state="suspect")))
    lines = text.splitlines()
    assert lines[0].split() == [
        "demo",
        "running",
        "50",
        "commits",
        "·",
        "epoch",
        "2",
        "·",
        "1",
        "min",
        "00",
        "s",
    ]
    assert "step 1,500/6,000" in text and "3 min 00 s left" in text
    row = next(line for line in lines if line.startswith("berlin-2"))
    assert row.split() == [
        "berlin-2",
        "suspect",
        "1,500",
        "2.041",
        "7.41k",
        "90.0",
        "%",
        "1.23",
        "MB",
        "3.45",
        "MB",
        "1.2",
        "s",
    ]
    assert "…" not in text


def test_traffic_is_compared_with_data_parallel() -> None:
    """Both directions of all workers against a bf16 all-reduce at every step."""
    text = drawn(status(member("a"), member("b")))
    assert "Sent and received 9.36 MB · data parallel would have sent 6.00 GB · 641× fewer" in text
    alone = drawn(status(member("a")))
    assert "Sent and received 4.68 MB" in alone and "data parallel" not in alone
    wasteful = drawn(status(member("a"), member("b"), fragments=[{"index": 0, "numel": 1000, "version": 1}]))
    assert "1.6× more" in wasteful


def test_rejections_and_aborts_appear_only_when_there_are_some() -> None:
    """A quiet run has a quiet view."""
    quiet = drawn(status(member("a")))
    assert "ejected" not in quiet and "aborted" not in quiet
    loud = drawn(status(member("a"), rejections={"late": 2, "corrupt": 1}, aborted=3))
    assert "Rejected: corrupt 1, late 2" in loud and "3 aborted" in loud


def test_unknown_values_are_dashes() -> None:
    """Before the first heartbeat nothing is known, and that is no error."""
    keys = ("loss", "lr", "tokens_per_s", "compute_s", "exposed_s", "hidden_s", "heartbeat_age_s")
    text = drawn(status(member("a", **dict.fromkeys(keys)), seconds=None))
    row = next(line for line in text.splitlines() if line.startswith("a "))
    assert row.split() == ["a", "active", "1,500", "–", "–", "–", "1.23", "MB", "3.45", "MB", "–"]
    assert "None" not in text and "nan" not in text


def test_run_without_workers_says_so() -> None:
    """The first thing an operator sees after starting a coordinator."""
    text = drawn(status(phase="gathering", inner_step=0, fragments=[], commits=0))
    assert "No worker has joined yet." in text and "step 0/6,000" in text and "left" not in text


def test_finished_workers_are_told_from_lost_ones() -> None:
    """Both are gone; only one of them is worth a look."""
    done = member("a", state="gone", live=False, finished="complete")
    text = drawn(status(done, member("b", state="dead", live=False), phase="complete"))
    rows = {line.split()[0]: line.split()[1] for line in text.splitlines() if line[:2] in ("a ", "b ")}
    assert rows == {"a": "finished", "b": "dead"}


def test_names_cannot_write_markup_or_move_the_cursor() -> None:
    """Worker names come from other machines."""
    text = drawn(status(member("[red]x\x1b[2Jy\n")))
    assert "[red]x?[2Jy?" in text and "\x1b" not in text


def test_narrow_terminal_shortens_names_not_figures() -> None:
    """A figure cut short would be read as another figure."""
    text = drawn(status(member("a-very-long-worker-name-indeed")), width=80)
    row = next(line for line in text.splitlines() if line.startswith("a-"))
    assert "…" in row.split()[0]
    assert row.split()[1:] == [
        "active",
        "1,500",
        "2.041",
        "7.41k",
        "90.0",
        "%",
        "1.23",
        "MB",
        "3.45",
        "MB",
        "1.2",
        "s",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 180.0),
        ({"inner_step": 0}, None),
        ({"inner_step": 6000}, None),
        ({"seconds": None}, None),
        ({"phase": "complete"}, None),
    ],
)
def test_remaining_time_follows_from_the_mean_speed(changes: dict[str, Any], expected: float | None) -> None:
    """elapsed * (total - step) / step while it means anything."""
    assert eta_s(status(**changes)) == expected
