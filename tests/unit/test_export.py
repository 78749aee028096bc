"""`diloco export`: the run's parameters as one file, from the final checkpoint or from the journal, or a clear refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diloco
from diloco.cli import main
from diloco.comms.machine import Persist
from diloco.config import RunConfig
from diloco.coordinator.journal import Journal
from diloco.coordinator.rebuild import remember
from diloco.coordinator.service import CoordinatorService
from diloco.errors import ConfigError, EnvironmentProblem, StorageError
from diloco.export import export


def train(folder: Path, outer: str = "nesterov") -> tuple[RunConfig, dict[str, Tensor], str]:
    """A run of a few numbers from beginning to end; what the worker ended with, and the digest."""
    sections = {
        "stream": {"H": 2, "frag_layers": 1},
        "topology": {"workers": 1, "checkpoint_every_commits": 3},
    }
    config = RunConfig.from_dict(
        {"run": {"inner_steps_total": 9}, "outer": {"kind": outer, "momentum": 0.5}, **sections}
    )
    folder.mkdir(parents=True)
    service = CoordinatorService(config, folder, listen="127.0.0.1:0")
    remember(config, folder)
    connection = diloco.connect(f"127.0.0.1:{service.start()}")
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 5)])})
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = diloco.DiLoCo(model, inner, connection, config=config, worker="w0", tokens=1)
    for _ in range(9):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    optimizer.flush()
    digest = optimizer.digest()
    optimizer.close()
    assert service.wait(30)
    service.export()
    report = {"global_digest": digest, "config": config.model_dump(mode="json")}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    service.close()
    return config, {name: p.detach().clone() for name, p in model.named_parameters()}, digest


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    _, values, digest = train(folder)
    return folder, values, digest


def copied(source: Path, target: Path, *without: str) -> Path:
    """A copy of a run's folder, less some of its files."""
    shutil.copytree(source, target)
    for name in without:
        (target / name).unlink()
    return target


def holds(file: Path, values: dict[str, Tensor], digest: str) -> None:
    found = load_file(file)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"digest": digest, "run_id": "run"}


def test_a_complete_run_gives_its_final_parameters(
    complete: tuple[Path, dict[str, Tensor], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line; the values of the worker, the run's digest beside them."""
    folder, values, digest = complete
    assert main(["export", str(folder), "--to", str(tmp_path / "m.safetensors")]) == 0
    assert "final" in capsys.readouterr().out
    holds(tmp_path / "m.safetensors", values, digest)


@pytest.mark.parametrize("missing", ["checkpoint/model.safetensors", "report.json"])
def test_without_the_final_file_the_journal_gives_the_same(
    complete: tuple[Path, dict[str, Tensor], str], tmp_path: Path, missing: str
) -> None:
    """Snapshots and the commits after them are repeated."""
    folder = copied(complete[0], tmp_path / "run", missing)
    assert "commits" in export(folder, tmp_path / "m.safetensors")
    holds(tmp_path / "m.safetensors", *complete[1:])


def test_an_unfinished_run_gives_its_newest_parameters(
    complete: tuple[Path, dict[str, Tensor], str], tmp_path: Path
) -> None:
    """It says that the run is not complete."""
    folder = copied(complete[0], tmp_path / "run", "checkpoint/model.safetensors", "report.json")
    journal = folder / "journal" / "journal.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if '"type":"complete"' not in line and '"type":"leave"' not in line]
    journal.write_text("".join(kept), encoding="utf-8")
    assert "not complete" in export(folder, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == complete[1].keys()


def test_a_running_average_is_exported_where_the_run_evaluates_it(tmp_path: Path) -> None:
    """With GPA outside, what is exported is the average, as the final checkpoint has it."""
    train(tmp_path / "run", "gpa")
    export(tmp_path / "run", tmp_path / "a.safetensors")
    (tmp_path / "run" / "checkpoint" / "model.safetensors").unlink()
    export(tmp_path / "run", tmp_path / "b.safetensors")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _other_digest(path: Path) -> None:
    save_file(load_file(path), path, metadata={"digest": "0" * 64, "run_id": "run"})


@pytest.mark.parametrize(
    ("harm", "words"),
    [(_flip, "its values"), (_other_digest, "its digest"), (lambda p: p.write_bytes(b"x"), "damaged")],
)
def test_a_damaged_final_file_is_refused_and_the_way_out_named(
    complete: tuple[Path, dict[str, Tensor], str], tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    """A bit of a value, the digest, or no such file at all; nothing is written."""
    folder = copied(complete[0], tmp_path / "run")
    harm(folder / "checkpoint" / "model.safetensors")
    with pytest.raises(StorageError, match=words) as caught:
        export(folder, tmp_path / "m.safetensors")
    assert "rebuilt from the journal" in str(caught.value)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_damaged_journal_is_refused(complete: tuple[Path, dict[str, Tensor], str], tmp_path: Path) -> None:
    """A commit whose contribution was changed gives another digest, or cannot be read."""
    folder = copied(complete[0], tmp_path / "run", "checkpoint/model.safetensors")
    newest = max((folder / "journal" / "blobs").iterdir())
    _flip(newest)
    with pytest.raises(diloco.DilocoError):
        export(folder, tmp_path / "m.safetensors")


def test_a_folder_without_a_run_and_a_run_without_parameters_are_refused(tmp_path: Path) -> None:
    """Each in its own words."""
    with pytest.raises(StorageError, match="no run in"):
        export(tmp_path, tmp_path / "m.safetensors")
    remember(RunConfig(), tmp_path)
    with pytest.raises(StorageError, match="no journal"):
        export(tmp_path, tmp_path / "m.safetensors")
    journal = Journal(tmp_path / "journal")
    journal.append(Persist({"type": "epoch", "epoch": 1}))
    with pytest.raises(EnvironmentProblem, match="another coordinator"):
        export(tmp_path, tmp_path / "m.safetensors")
    journal.close()
    with pytest.raises(StorageError, match="no parameters yet"):
        export(tmp_path, tmp_path / "m.safetensors")


def test_a_target_that_is_no_file_is_refused(
    complete: tuple[Path, dict[str, Tensor], str], tmp_path: Path
) -> None:
    """A folder, or a file in a folder that is not there."""
    for target in (tmp_path, tmp_path / "not" / "there.safetensors"):
        with pytest.raises(ConfigError, match="--to"):
            export(complete[0], target)
