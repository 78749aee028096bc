"""A run's coordinator as its journal tells it: read, repeated and checked, without serving anybody.

Also here: the run's configuration beside the journal, without which nobody could repeat it, and the parameters by name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from diloco.config import RunConfig
from diloco.coordinator.journal import Journal
from diloco.coordinator.replay import replay
from diloco.coordinator.state import Coordinator
from diloco.errors import ConfigError, StorageError


def journal_folder(config: RunConfig, run_dir: Path) -> Path:
    """Where the run's journal is."""
    return Path(config.topology.journal) if config.topology.journal else run_dir / "journal"


def remember(config: RunConfig, run_dir: Path) -> None:
    """Keep the run's configuration in its folder, as config.json. Raises StorageError."""
    target = run_dir / "config.json"
    beside = target.with_name(f".config.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise StorageError(
            f"cannot write {str(target)!r}: {error.strerror}; free space there and restart with --resume"
        ) from None


def recall(run_dir: Path) -> RunConfig:
    """The configuration of the run in `run_dir`: its config.json or, of a complete run, its report's.

    Raises StorageError if there is none, or if it cannot be read.
    """
    for name, key in (("config.json", None), ("report.json", "config")):
        path = run_dir / name
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                return RunConfig.from_dict(found if key is None else found[key])
            except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
                raise StorageError(f"{str(path)!r} cannot be used: {error}") from None
    raise StorageError(f"there is no run in {str(run_dir)!r}: give the folder of a run, such as runs/demo")


def parameters(coordinator: Coordinator) -> dict[str, Tensor]:
    """The run's parameters by name, as they are to be used; fp32, own memory."""
    assert coordinator.plan is not None, "there is nothing before the run has started"
    found = {}
    for fragment in coordinator.plan.fragments:
        shard = coordinator.ledgers[fragment.index].shard
        values = shard.state.get("x", shard.params)  # GPA evaluates and ships its average
        for span in fragment.spans:
            part = values[span.offset : span.offset + span.stop - span.start]
            found[span.name] = part.view(span.shape).clone()
    return found


def rebuild(config: RunConfig, run_dir: Path) -> Coordinator:
    """The coordinator after the last record of the journal; nothing is added to it.

    Every commit is repeated and its digest compared. Raises StorageError for a journal that is missing, damaged or
    has no starting values yet, EnvironmentProblem while a coordinator is writing it.
    """
    folder = journal_folder(config, run_dir)
    if not (folder / "journal.jsonl").exists():
        raise StorageError(
            f"there is no journal in {str(folder)!r}: give the folder of a run, such as runs/demo"
        )
    journal = Journal(folder, fsync=False)
    try:
        coordinator = Coordinator(config)
        replay(coordinator, journal.read(), 0.0)
    finally:
        journal.close()
    if coordinator.plan is None or len(coordinator.ledgers) < len(coordinator.plan.fragments):
        raise StorageError(f"the run in {str(run_dir)!r} has no parameters yet: its workers had not begun")
    return coordinator
