"""A chaos run from beginning to end: start, strike, look, hurry home, compare. What is checked is in `checks`."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diloco.chaos import checks, strike
from diloco.chaos.cluster import Cluster
from diloco.chaos.paced import SEQUENCE
from diloco.chaos.report import Outcome
from diloco.chaos.schedule import OF_LIARS, Fault, schedule
from diloco.comms import frame
from diloco.comms.query import fetch_status
from diloco.config import RunConfig
from diloco.errors import ConfigError, EnvironmentProblem, StorageError
from diloco.worker import checkpoint

STEPS_PER_S = 4.0  # of each worker, which four of them can do on two busy cores
BATCH = 8
TICK_S = 0.1
LOOK_S = 2.0
PATIENCE_S = 60.0  # without a commit, whatever happened
START_S = 180.0  # to the first commit
HOME_S = 240.0  # from the last fault to the end of the run, at the least
SLOWEST_S = 3.0  # per step, when the run would be over before its faults are

TEMPLATE = """\
[run]
run_id = "{run_id}"
seed = {seed}
inner_steps_total = {steps}

[model]
factory = "diloco.chaos.paced:make"
sequence_length = {sequence}

[data]
source = "stdlib"

[train]
batch_size = {batch}
threads = 1
checkpoint_every = 10

[optim]
lr = 0.003

[schedule]
kind = "cosine"
warmup = {warmup}

[outer]
lr = 0.8
momentum = 0.4

[stream]
H = 10
frag_layers = 1
tau = 2
alpha = 0.0
merge = "delay_corrected"

[codec]
up = "e3m0"
down = "{down}"

[weights]
mode = "tokens"

[robust]
kind = "cos_gate"

[fault]
heartbeat_s = 0.5
suspect_s = 12.0
dead_s = 24.0
fixed_grace_s = 15.0

[topology]
workers = {workers}
checkpoint_every_commits = 10
"""


def config_text(run_id: str, seed: int, steps: int, workers: int) -> str:
    """The configuration of a chaos run, and of the run without faults that it is compared with."""
    down = "relay" if workers <= 2 else "q4_ef"
    return TEMPLATE.format(
        run_id=run_id, seed=seed, steps=steps, warmup=max(5, steps // 20), sequence=SEQUENCE, batch=BATCH, down=down,
        workers=workers,
    )  # fmt: skip


@dataclass(slots=True)
class _Watch:
    """What has been seen so far, and what of it was wrong."""

    outcome: Outcome
    records: list[dict[str, Any]] = field(default_factory=list)
    last_commit: float = 0.0
    commits: int = 0

    def violation(self, promise: str, found: Sequence[str]) -> None:
        for words in found:
            if words not in self.outcome.violations[promise]:
                self.outcome.violations[promise].append(words)


def run(
    *,
    minutes: float,
    seed: int,
    workers: int,
    compare: bool,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Outcome | None:
    """The whole of it; None if `stop` was set. Raises ConfigError, EnvironmentProblem."""
    if not 0 < minutes <= 600 or not 1 <= workers <= 64 or seed < 0:
        raise ConfigError(
            f"--minutes {minutes:g} must be between 0 and 600, --workers {workers} between 1 and 64 and "
            f"--seed {seed} at least 0"
        )
    steps = max(60, round(60 * minutes * STEPS_PER_S / 10) * 10)
    faults = schedule(seed, minutes, workers)
    watch = _Watch(Outcome(seed=seed, minutes=minutes, workers=workers))
    folder, config = _prepare("chaos", seed, steps, workers)
    say(f"{len(faults)} faults in {minutes:g} min, {workers} workers, seed {seed}; logs in {folder}/logs/")
    cluster = Cluster(folder, config, workers, seed, [])
    try:
        finished = _first_commit(cluster, watch, stop) and _strikes(
            cluster, watch, faults, minutes, steps, stop, say
        )
        if finished:
            _home(cluster, watch, minutes, stop)
    finally:
        cluster.end()
    if stop.is_set():
        return None
    _judge_the_end(watch, folder, RunConfig.load(config), workers)
    if compare and watch.outcome.passed:
        say("the same without faults, at as many committed tokens")
        _compare(watch, seed, workers, stop)
    return None if stop.is_set() else watch.outcome


def _prepare(run_id: str, seed: int, steps: int, workers: int) -> tuple[Path, Path]:
    folder = Path("runs") / run_id
    config = folder / "run.toml"
    text = config_text(run_id, seed, steps, workers)
    RunConfig.from_toml(text)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    return folder, config


def _first_commit(cluster: Cluster, watch: _Watch, stop: threading.Event) -> bool:
    limit = time.monotonic() + START_S
    (cluster.folder / "pace").write_text("0.05", encoding="ascii")
    while not stop.is_set():
        watch.violation("nobody is lost", cluster.tend())
        if _look(cluster, watch):
            return True
        if time.monotonic() > limit or watch.outcome.violations["nobody is lost"]:
            watch.violation("the run goes on", [f"no commit within {START_S:g} s of the start"])
            return False
        stop.wait(0.5)
    return False


def _strikes(
    cluster: Cluster,
    watch: _Watch,
    faults: Sequence[Fault],
    minutes: float,
    steps: int,
    stop: threading.Event,
    say: Callable[[str], None],
) -> bool:
    """All faults, and a look at the promises after each; False when there is no point in going on."""
    begun = watch.last_commit = time.monotonic()
    todo, open_faults, looked = list(faults), list[Fault](), 0.0
    notes: dict[Fault, dict[str, Any]] = {}
    while todo or open_faults or time.monotonic() < begun + 60 * minutes:
        now = time.monotonic() - begun
        due = [f for f in open_faults if now >= f.until]
        for fault in due:
            open_faults.remove(fault)
            _note(notes[fault], strike.end(cluster, fault))
        while todo and now >= todo[0].at:
            fault = todo.pop(0)
            notes[fault] = {
                "kind": fault.kind,
                "at": round(now, 2),
                "target": fault.target,
                "for_s": fault.for_s,
            }
            watch.outcome.faults.append(notes[fault])
            say(f"{now:6.1f} s  {fault.kind:<16} {fault.target:<11} {fault.for_s:4.1f} s")
            _note(notes[fault], strike.begin(cluster, fault))
            open_faults.append(fault)
        watch.violation("nobody is lost", cluster.tend())
        if due or time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            _look(cluster, watch, replicas=bool(due))
            _set_pace(cluster, begun + 60 * minutes - looked, steps)
        if cluster.complete:
            if todo:
                words = f"it was over before its last {len(todo)} faults"
                watch.violation("the run goes on", [words])
            return True
        if stop.is_set() or cluster.over or watch.outcome.violations["the run goes on"]:
            return False
        stop.wait(TICK_S)
    return True


def _note(note: dict[str, Any], words: str) -> None:
    if words:
        note["note"] = words


def _look(cluster: Cluster, watch: _Watch, *, replicas: bool = False) -> int:
    """Check what can be checked while everything runs; returns the number of commits."""
    # In this order: what somebody holds now must be in the journal a moment later.
    status = fetch_status(cluster.address, 1.0)
    held = holdings(cluster.folder, cluster.names) if replicas else []
    records = read_journal(cluster.folder)
    outcome = watch.outcome
    watch.violation("nothing committed is lost", checks.lost(watch.records, records))
    watch.violation("nothing committed is lost", checks.ahead(records, status["members"] if status else ()))
    watch.violation("every version once", checks.gaps(records))
    watch.violation("nothing is counted twice", checks.counted_twice(records))
    watch.violation("replicas are identical", checks.unequal(records, held))
    outcome.compared += len(held)
    watch.records = records
    commits, now = len(checks.commits_of(records)), time.monotonic()
    if commits > watch.commits or not watch.last_commit:
        watch.commits, watch.last_commit = commits, now
    outcome.longest_wait_s = max(outcome.longest_wait_s, now - watch.last_commit)
    if now - watch.last_commit > PATIENCE_S and not cluster.complete:
        watch.violation("the run goes on", [f"no commit for {PATIENCE_S:g} s after commit {commits}"])
    return commits


def _set_pace(cluster: Cluster, left_s: float, steps: int) -> None:
    """So that the run lasts for as long as there are faults to come, and then hurries."""
    status = fetch_status(cluster.address, 1.0)
    if status is not None:
        left = steps - int(status["inner_step"]) - 20
        pace = (
            min(SLOWEST_S, left_s / left) if left > 0 and left_s > 0 else (SLOWEST_S if left_s > 0 else 0.0)
        )
        beside = cluster.folder / ".pace"
        beside.write_text(f"{pace:.4f}", encoding="ascii")
        beside.replace(cluster.folder / "pace")


def _home(cluster: Cluster, watch: _Watch, minutes: float, stop: threading.Event) -> None:
    """No more faults: the run ends by itself."""
    limit = time.monotonic() + max(HOME_S, 60 * minutes)
    (cluster.folder / "pace").write_text("0", encoding="ascii")
    while not cluster.all_ended and not stop.is_set():
        watch.violation("nobody is lost", cluster.tend())
        if time.monotonic() > limit:
            watch.violation("the run goes on", ["it did not end after its last fault"])
            return
        stop.wait(0.5)
    watch.violation("nobody is lost", cluster.tend())


def _judge_the_end(watch: _Watch, folder: Path, config: RunConfig, workers: int) -> None:
    from diloco.coordinator.rebuild import rebuild

    outcome, records = watch.outcome, read_journal(folder)
    watch.violation("nothing committed is lost", checks.lost(watch.records, records))
    watch.violation("every version once", checks.gaps(records))
    watch.violation("nothing is counted twice", checks.counted_twice(records))
    liars = frozenset(f["target"] for f in outcome.faults if f["kind"] in OF_LIARS)
    outcome.commits = len(checks.commits_of(records))
    committed = checks.committed_tokens(records, len(checks.versions(records)), liars)
    trained = sum((folder / "steps" / f"w{i}").stat().st_size for i in range(workers)) * BATCH * SEQUENCE
    outcome.committed_tokens, outcome.goodput = committed, committed / trained if trained else 0.0
    if not (folder / "report.json").exists():
        return
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    try:
        rebuilt = rebuild(config, folder).global_digest()
    except StorageError as error:
        watch.violation("replicas are identical", [f"the journal cannot be repeated: {error}"])
        return
    found = checks.unlike_the_end(records, report, rebuilt)
    watch.violation("replicas are identical", found)
    outcome.digests_equal, outcome.loss = not found, report["eval_loss_end"]


def _compare(watch: _Watch, seed: int, workers: int, stop: threading.Event) -> None:
    """Run without faults for as many steps as give the committed tokens, and note its loss."""
    outcome = watch.outcome
    steps = max(20, round(outcome.committed_tokens / (workers * BATCH * SEQUENCE)))
    folder, config = _prepare("chaos-baseline", seed, steps, workers)
    cluster = Cluster(folder, config, workers, seed, [])
    try:
        _home(cluster, watch, outcome.minutes, stop)
    finally:
        cluster.end()
    if (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        outcome.fault_free_loss = report["eval_loss_end"]


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The journal's whole lines."""
    path = folder / "journal" / "journal.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def holdings(folder: Path, workers: Sequence[str]) -> list[checks.Holding]:
    """What each worker's newest checkpoint holds; a worker without one, or in the middle of writing it, is left out."""
    found = []
    for name in workers:
        try:
            saved = checkpoint.load(folder / "workers" / name / "checkpoint")
        except (StorageError, OSError):
            continue
        if saved is not None:
            tensors = checkpoint.unpack(saved[0], "replica")
            for p, slot in enumerate(saved[1]["replica"]["slots"]):
                if f"{p}.params" in tensors:
                    digest = frame.digest(tensors[f"{p}.params"])
                    found.append(checks.Holding(name, p, int(slot["version"]), digest))
    return found
