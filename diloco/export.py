"""`diloco export`: a run's global parameters as one safetensors file, with its digests checked on the way.

A complete run has them in its folder already; of any other they are rebuilt from the journal.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diloco.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from diloco.config import RunConfig


def add_command(commands: Any) -> None:
    """`commands` is what `ArgumentParser.add_subparsers` returned."""
    export = commands.add_parser("export", help="a run's global parameters as one safetensors file")
    export.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="such as runs/demo")
    export.add_argument("--to", required=True, metavar="FILE", type=Path)
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(f"--{overrides[0].partition('=')[0]} cannot be set: the run has its settings")
    print(export(arguments.run_dir, arguments.to))
    return 0


def export(run_dir: Path, to: Path) -> str:
    """Write the parameters of the run in `run_dir` to the file `to`; returns what was written, in words.

    The file's metadata has the run's `digest` and `run_id`. Raises StorageError for a run that is not there, has no
    parameters yet or is damaged, EnvironmentProblem while its coordinator runs, ConfigError for an unusable `to`.
    """
    from diloco.coordinator.rebuild import parameters, rebuild, recall

    if to.is_dir() or not to.absolute().parent.is_dir():
        raise ConfigError(
            f"--to {str(to)!r} is no file in a folder that exists: name one, such as model.safetensors"
        )
    config = recall(run_dir)
    saved = run_dir / "checkpoint" / "model.safetensors"
    if saved.exists() and (run_dir / "report.json").exists():
        tensors, digest = _saved(saved, run_dir, config)
        origin = "the final parameters"
    else:
        coordinator = rebuild(config, run_dir)
        tensors, digest = parameters(coordinator), coordinator.global_digest()
        origin = f"the parameters after {coordinator.commits} commits" + (
            "" if coordinator.complete else ", of a run that is not complete"
        )
    _write(to, tensors, {"digest": digest, "run_id": config.run.run_id})
    count = sum(t.numel() for t in tensors.values())
    return f"{to}: {origin}, {len(tensors)} tensors, {count:,} values, digest {digest[:16]}"


def _saved(path: Path, run_dir: Path, config: RunConfig) -> tuple[dict[str, Tensor], str]:
    """The file that a complete run left, if it is what the run ended with."""
    from safetensors import SafetensorError, safe_open

    try:
        report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest, wanted = metadata.get("digest", ""), str(report["global_digest"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    if digest != wanted:
        raise _damaged(path, f"its digest is {digest[:16]!r}, the run ended with {wanted[:16]!r}")
    held = _digest(tensors, run_dir, config)
    if held is not None and held != wanted:
        raise _damaged(path, f"its values have the digest {held[:16]!r}, the run ended with {wanted[:16]!r}")
    return tensors, digest


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(
        f"{str(path)!r} is damaged: {why}; remove it, and the parameters are rebuilt from the journal"
    )


def _digest(tensors: dict[str, Tensor], run_dir: Path, config: RunConfig) -> str | None:
    """Of the values themselves, by the journal's plan; None where what is saved is not what replicas compare."""
    from diloco.comms import frame
    from diloco.coordinator.rebuild import journal_folder
    from diloco.fragments import FragmentPlan, gather

    journal = journal_folder(config, run_dir) / "journal.jsonl"
    if config.outer.kind == "gpa" or not journal.exists():
        return None
    with journal.open(encoding="utf-8") as lines:
        record = json.loads(next((line for line in lines if '"type":"start"' in line), "null"))
    if record is None:
        return None
    plan = FragmentPlan.from_description(record["plan"])
    try:
        return frame.model_digest(frame.digest(gather(fragment, tensors)) for fragment in plan.fragments)
    except KeyError as error:
        raise _damaged(run_dir / "checkpoint" / "model.safetensors", f"it lacks {error}") from None


def _write(to: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(to)
    except (OSError, SafetensorError) as error:  # the library does not raise OSError for a full disk
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {str(to)!r}: {error}; free space there, or name another file"
        ) from None
