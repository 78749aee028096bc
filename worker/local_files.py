"""The folder of a `diloco train` run: logs while it trains, checkpoints to continue from, final parameters, report.

steps.jsonl        one line per inner step, and per evaluation
progress.jsonl     now and then a heartbeat's fields, as a coordinator records them; the report's curves
state/             the newest checkpoint (`checkpoint`): model, optimizer, random state
checkpoint/        model.safetensors, the final parameters at the point of evaluation
report.json, .html
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from diloco.config import RunConfig
from diloco.errors import ConfigError, StorageError
from diloco.readout import number
from diloco.worker import checkpoint
from diloco.worker.inner import finite
from diloco.worker.report import build_report, write_report
from diloco.worker.series import read_series

# What a checkpoint's tensors depend on, or what a loaded optimizer would silently keep: these never change in a run.
FIXED = ("run.seed", "model.*", "data.*", "optim.*", "train.outer")
FREE = ("optim.lr", "optim.matrix_lr")  # the schedule sets them anew at every step
_READ = ("run", "model", "data", "train", "optim", "schedule", "snoo", "gpa", "anytime")


class RunFiles:
    """One run's folder. Making one raises ConfigError if the folder holds another run and `resume` is not asked for."""

    def __init__(self, folder: Path, config: RunConfig, world: int, *, resume: bool) -> None:
        self.folder, self.config, self.world, self.resume = folder, config, world, resume
        self._state = folder / "state"
        if (folder / "journal").exists():
            raise ConfigError(
                f"{str(folder)!r} holds a coordinator's run: use another run.run_id for `diloco train`"
            )
        if not resume and (self._state / "latest").exists():
            raise ConfigError(
                f"{str(folder)!r} holds an earlier run: continue it with --resume, or use another run.run_id"
            )

    # ---- checkpoints ----

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        more: Mapping[str, Mapping[str, Tensor]],
        meta: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint. Raises StorageError; the one before then stays."""
        state, numbers = checkpoint.flatten_optimizer(optimizer.state_dict())
        tensors = checkpoint.pack({"model": model.state_dict(), "optimizer": state, **more})
        settings = {name: getattr(self.config, name).model_dump(mode="json") for name in _READ}
        own = {"step": step, "optimizer": numbers, "config": settings, "world": self.world}
        checkpoint.save(self._state, step, tensors, {**meta, **own})

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Put the newest checkpoint into `model` and `optimizer`: its step, all tensors and `meta`; None without one.

        Raises ConfigError if it is of a run with other settings that cannot change, StorageError if it is damaged.
        """
        found = checkpoint.load(self._state) if self.resume else None
        if found is None:
            return None
        tensors, meta = found
        self._check(meta)
        model.load_state_dict(checkpoint.unpack(tensors, "model"))
        state = checkpoint.unpack(tensors, "optimizer")
        optimizer.load_state_dict(checkpoint.unflatten_optimizer(state, meta["optimizer"]))
        return int(meta["step"]), tensors, meta

    def _check(self, meta: Mapping[str, Any]) -> None:
        problems = []
        for name in _READ:
            now, before = getattr(self.config, name).model_dump(mode="json"), meta["config"].get(name, {})
            for key in sorted({*now, *before}):
                full = f"{name}.{key}"
                fixed = full in FIXED or f"{name}.*" in FIXED
                if fixed and full not in FREE and now.get(key) != before.get(key):
                    problems.append(
                        f"{full} = {now.get(key)!r}, but the run was started with {before.get(key)!r}"
                    )
        if self.world != meta["world"]:
            problems.append(f"{self.world} processes, but the run was started with {meta['world']}")
        if problems:
            raise ConfigError(
                f"--resume: {'; '.join(problems)}: use the run's own settings, or another run.run_id"
            )

    # ---- results ----

    def log(self) -> Log:
        """The run's logs: continued with `resume`, else begun anew."""
        return Log(self.folder, "a" if self.resume else "w")

    def export(self, model: nn.Module, digest: str) -> Path:
        """Write the model's present parameters and buffers by name, a tied one once; returns the path."""
        folder = self.folder / "checkpoint"
        target, partial = folder / "model.safetensors", folder / ".model.safetensors"
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        once = {name for name, _ in model.named_parameters()}
        tensors = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in model.state_dict().items()
            if name in once or name not in tied
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"digest": digest, "run_id": self.config.run.run_id})
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"cannot write the final parameters {str(target)!r}: {error}; free space there and use --resume"
            ) from None
        return target

    def report(self, facts: Mapping[str, Any], digests: list[str], seconds: float) -> None:
        """Write report.json and report.html: one entry per rank, nothing on the wire."""
        members = [
            {
                **{key: number(value) for key, value in facts.items()},
                "id": f"rank{rank}",
                "incarnation": 1,
                "digest": digest,
                "finished": "complete",
                "live": True,
            }
            for rank, digest in enumerate(digests)
        ]
        status = {
            "seconds": seconds,
            "commits": 0,
            "members": members,
            "global_digest": digests[0],
            "fragments": [],
            "config": self.config.model_dump(mode="json"),
        }
        # What ranks exchange stays on the node, so there is nothing that data parallel would have sent instead.
        report = build_report(status, parameters=0)
        write_report(self.folder, report, read_series(self.folder / "progress.jsonl"))


class Log:
    """steps.jsonl and progress.jsonl of `folder`, or nothing at all without one. A context manager."""

    def __init__(self, folder: Path | None = None, mode: str = "a") -> None:
        self._files: list[IO[str]] = []
        if folder is not None:
            for name in ("steps.jsonl", "progress.jsonl"):
                self._files.append((folder / name).open(mode, encoding="utf-8"))
        self._last_row = self._last_line = -float("inf")

    def step(self, facts: Mapping[str, Any], seconds: float, *, force: bool = False) -> None:
        """Record one step, and a heartbeat if one is due: often at first, at most a thousandth of the run apart."""
        if not self._files:
            return
        steps, progress = self._files
        if not force:
            line = {"step": facts["step"], "loss": finite(facts["loss"]), "t": round(time.time(), 3)}
            steps.write(json.dumps(line) + "\n")
        if force or seconds - self._last_row >= max(0.2, seconds / 1000):
            self._last_row = seconds
            row = {k: finite(v) if isinstance(v, float) else v for k, v in facts.items()}
            progress.write(json.dumps({"t": round(seconds, 3), **row}) + "\n")
            for file in self._files:
                file.flush()

    def evaluation(self, step: int, loss: float) -> None:
        if self._files:
            self._files[0].write(json.dumps({"step": step, "eval": finite(loss)}) + "\n")

    def line_due(self, every_s: float) -> bool:
        """Whether the terminal should hear of the present step; True at most every `every_s` seconds."""
        now = time.monotonic()
        if now - self._last_line < every_s:
            return False
        self._last_line = now
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
