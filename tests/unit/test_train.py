"""`LocalTrainer` in one process: every inner and outer optimizer, interruption, evaluation, NaN, the run's folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diloco.comms.metrics import WorkerCollector
from diloco.config import RunConfig
from diloco.errors import ConfigError, NonFiniteError
from diloco.training import doubts
from diloco.worker import checkpoint
from diloco.worker.train import LocalTrainer

STEPS = 9


class StopAt(threading.Event):
    """Set by itself while `trainer` makes inner step `step`: a Ctrl+C at an exact place."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.trainer: LocalTrainer | None = None

    def is_set(self) -> bool:
        return self.trainer is not None and self.trainer.step + 1 >= self.step


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before, generator = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(before)
    torch.set_rng_state(generator)


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = np.random.default_rng(3).choice(np.array(["river", "stone", "light", "house"]), 3000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return str(tmp_path / "text.txt")


def config(text: str, outer: str = "none", **sections: Mapping[str, Any]) -> RunConfig:
    raw: dict[str, dict[str, Any]] = {
        "run": {"run_id": "r", "inner_steps_total": STEPS},
        "model": {"preset": "nano", "sequence_length": 16},
        "data": {"source": text},
        "train": {"batch_size": 2, "threads": 1, "eval_batches": 1, "outer": outer},
        "schedule": {"kind": "constant"},
        "snoo": {"k": 4, "lr": 0.7, "momentum": 0.5},
        "gpa": {"mu_x": 0.8},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return RunConfig.from_dict(raw)


def trainer(
    c: RunConfig,
    folder: Path,
    *,
    stop_at: int | None = None,
    resume: bool = False,
    said: list[str] | None = None,
) -> LocalTrainer:
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event() if stop_at is None else StopAt(stop_at)
    say = (said if said is not None else []).append
    made = LocalTrainer(c, run_dir=folder, resume=resume, stop=stop, say=say)
    if isinstance(stop, StopAt):
        stop.trainer = made
    return made


def everything(folder: Path) -> dict[str, Tensor]:
    """The tensors of the newest checkpoint and the exported parameters."""
    found = checkpoint.load(folder / "state")
    assert found is not None
    return {**found[0], **load_file(folder / "checkpoint" / "model.safetensors")}


COMBINATIONS = [
    ("adamw", "none"),
    ("adamw", "snoo"),
    ("adamw", "gpa"),
    ("adamw", "anytime"),
    ("muon", "snoo"),
    ("muon", "gpa"),
    ("hyperball", "snoo"),
    ("md", "snoo"),
    ("schedule-free", "none"),
    ("schedule-free-plus", "none"),
]


@pytest.mark.parametrize(("inner", "outer"), COMBINATIONS)
def test_stopping_and_resuming_changes_no_bit(tmp_path: Path, text: str, inner: str, outer: str) -> None:
    """6 steps, checkpoint, a new trainer, 3 steps = 9 steps: parameters, every optimizer state, result.

    Step 6 lies between two outer steps (k = 4), and so does the end.
    """
    optim = {"kind": inner} if inner not in ("muon", "md") else {"kind": inner, "iteration_dtype": "float32"}
    c = config(text, outer, optim=optim, train={"eval_every": 3})
    straight = trainer(c, tmp_path / "straight").run()
    assert trainer(c, tmp_path / "resumed", stop_at=6).run() is None
    saved = checkpoint.load(tmp_path / "resumed" / "state")
    assert saved is not None and saved[1]["step"] == 6
    assert trainer(c, tmp_path / "resumed", resume=True).run() == straight
    one, two = everything(tmp_path / "straight"), everything(tmp_path / "resumed")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    ("inner", "outer"), [("adamw", "gpa"), ("adamw", "snoo"), ("adamw", "anytime"), ("schedule-free", "none")]
)
def test_evaluating_does_not_change_the_run(tmp_path: Path, text: str, inner: str, outer: str) -> None:
    """Evaluated after every step or never, the run ends with the same bits, although averages round on the way back."""
    for name, every in (("often", 1), ("never", 0)):
        c = config(text, outer, optim={"kind": inner}, train={"eval_every": every})
        assert trainer(c, tmp_path / name).run() is not None
    often, never = everything(tmp_path / "often"), everything(tmp_path / "never")
    for name, value in often.items():
        assert torch.equal(value, never[name]), name
    lines = (tmp_path / "often" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if "eval" in line] == list(range(1, STEPS))


def test_what_is_exported_is_the_average_and_what_is_saved_is_not(tmp_path: Path, text: str) -> None:
    """GPA: the checkpoint holds y and z, from which x follows; the exported parameters are x."""
    trainer(config(text, "gpa"), tmp_path).run()
    found = checkpoint.load(tmp_path / "state")
    assert found is not None
    tensors, meta = found
    names = [name for group in meta["optimizer"]["param_groups"] for name in group["param_names"]]
    exported = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert exported.keys() == set(names)
    moved = 0.0
    for index, name in enumerate(names):
        y, z = tensors[f"model/{name}"], tensors[f"optimizer/{index}.gpa_z"]
        assert torch.allclose(exported[name], y + (1 - 1 / 0.7) * (z - y), atol=1e-6)
        moved += float((exported[name] - y).norm())
    assert moved > 1e-3


def test_the_last_partial_round_of_snoo_is_closed_once(tmp_path: Path, text: str) -> None:
    """After 9 steps with k = 4 the end equals theta after one more outer step; resuming a complete run takes no other."""
    c = config(text, "snoo")
    trainer(c, tmp_path / "cut", stop_at=8).run()  # p = theta: an outer step has just been made
    before = checkpoint.load(tmp_path / "cut" / "state")
    first = trainer(c, tmp_path / "whole")
    final = first.run()
    saved, exported = (
        everything(tmp_path / "whole"),
        load_file(tmp_path / "whole" / "checkpoint/model.safetensors"),
    )
    assert before is not None
    for index, (name, p) in enumerate(first.inner.model.named_parameters()):
        assert torch.equal(saved[f"model/{name}"], exported[name])
        assert not torch.equal(before[0][f"model/{name}"], exported[name])
        assert torch.equal(p.detach(), exported[name]), index
    slow = [saved[k] for k in saved if k.endswith("snoo_slow")]
    assert sum(float(t.double().sum()) for t in slow) == pytest.approx(
        sum(float(t.double().sum()) for t in exported.values())
    )
    assert trainer(c, tmp_path / "whole", resume=True).run() == final
    again = everything(tmp_path / "whole")
    assert all(torch.equal(value, again[name]) for name, value in saved.items())


def test_a_run_that_ends_with_a_round_takes_no_further_outer_step(tmp_path: Path, text: str) -> None:
    """8 steps with k = 4, interrupted after 6: the end is what the outer step at 8 left, resumed or not."""
    c = config(text, "snoo", run={"inner_steps_total": 8})
    trainer(config(text, "snoo"), tmp_path / "longer", stop_at=8).run()
    found = checkpoint.load(tmp_path / "longer" / "state")
    trainer(c, tmp_path / "resumed", stop_at=6).run()
    trainer(c, tmp_path / "resumed", resume=True).run()
    assert found is not None
    for name, value in load_file(tmp_path / "resumed" / "checkpoint" / "model.safetensors").items():
        assert torch.equal(value, found[0][f"model/{name}"]), name


def test_an_optimizer_that_needs_the_loss_gets_it(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean loss of the step in nats per token, which for bytes is what the log has."""
    made = trainer(config(text, optim={"kind": "schedule-free-plus"}), tmp_path)
    given: list[float] = []
    original = made.optimizer.step

    def step(*, loss: float) -> object:
        given.append(loss)
        return original(loss=loss)  # type: ignore[call-overload]

    monkeypatch.setattr(made.optimizer, "step", step)
    made.run()
    lines = (tmp_path / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert given == [json.loads(line)["loss"] for line in lines] and len(given) == STEPS


@pytest.mark.parametrize("outer", ["none", "snoo", "gpa"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, text: str, outer: str) -> None:
    """A NaN loss at step 9 of 9 leaves the parameters and states of step 8, counts no tokens, and is said."""
    said: list[str] = []
    good = trainer(config(text, outer, run={"inner_steps_total": STEPS - 1}), tmp_path / "good")
    bad = trainer(config(text, outer), tmp_path / "bad", said=said)
    bad.inner.agree = lambda loss: float("nan") if bad.step == STEPS - 1 else loss
    good.run()
    bad.run()
    one, two = everything(tmp_path / "good"), everything(tmp_path / "bad")
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert good.facts()["tokens"] == bad.facts()["tokens"] == (STEPS - 1) * 2 * 16
    assert any("not finite, step skipped" in line for line in said)


def test_a_run_that_only_gives_nan_ends_with_an_error(tmp_path: Path, text: str) -> None:
    """Twenty in a row, then the error names what to lower."""
    made = trainer(config(text, run={"inner_steps_total": 50}), tmp_path)
    made.inner.agree = lambda loss: float("inf")
    with pytest.raises(NonFiniteError, match=r"20 inner steps in a row.*optim\.lr"):
        made.run()
    assert made.step == 19


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, text: str) -> None:
    """Without `resume` a checkpoint or a journal there is an error that says what to do; nothing is touched."""
    c = config(text)
    trainer(c, tmp_path / "own").run()
    before = everything(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"continue it with --resume, or use another run\.run_id"):
        trainer(c, tmp_path / "own")
    assert everything(tmp_path / "own").keys() == before.keys()
    (tmp_path / "other" / "journal").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a coordinator's run"):
        trainer(c, tmp_path / "other", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"outer": "snoo"}}, "train.outer = 'snoo', but the run was started with 'gpa'"),
        ({"optim": {"weight_decay": 0.3}}, "optim.weight_decay = 0.3, but the run was started with 0.1"),
        ({"model": {"preset": "tiny"}}, "model.preset = 'tiny'"),
        ({"run": {"seed": 5}}, "run.seed = 5"),
    ],
)
def test_resuming_with_settings_that_do_not_fit_is_refused(
    tmp_path: Path, text: str, change: dict[str, dict[str, Any]], message: str
) -> None:
    """What the state depends on, or what loading it would silently override, is named with both values."""
    trainer(config(text, "gpa"), tmp_path, stop_at=2).run()
    outer = change.pop("train", {}).get("outer", "gpa")
    with pytest.raises(ConfigError, match=message):
        trainer(config(text, outer, **change), tmp_path, resume=True).run()


def test_a_run_can_be_extended_with_another_schedule(tmp_path: Path, text: str) -> None:
    """Length, schedule and learning rate may change: the new rate is what the next steps use."""
    trainer(config(text), tmp_path).run()
    longer = config(text, run={"inner_steps_total": STEPS + 3}, optim={"lr": 5e-4})
    made = trainer(longer, tmp_path, resume=True)
    made.run()
    assert made.step == STEPS + 3
    assert made.facts()["lr"] == 5e-4


def test_resuming_where_nothing_was_saved_starts_the_run(tmp_path: Path, text: str) -> None:
    """So that a batch system can always pass --resume."""
    made = trainer(config(text), tmp_path, resume=True)
    assert made.run() is not None and made.step == STEPS


def test_the_report_has_every_key_and_nothing_on_the_wire(tmp_path: Path, text: str) -> None:
    """report.json as a distributed run's; one worker, whose digest is that of the exported parameters."""
    made = trainer(config(text, "gpa"), tmp_path)
    final = made.run()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report.keys() == {
        "tokens", "train_seconds", "eval_loss_start", "eval_loss_end", "commits", "workers", "global_digest",
        "bytes_up", "bytes_down", "bytes_data_parallel", "compute_utilisation", "exposed_comm_seconds",
        "hidden_comm_seconds", "versions", "config", "prediction", "overlap", "wire_bits_per_second",
    }  # fmt: skip
    assert report["eval_loss_end"] == final < report["eval_loss_start"]
    assert report["tokens"] == STEPS * 2 * 16 and report["train_seconds"] > 0
    assert report["bytes_up"] == report["bytes_down"] == report["bytes_data_parallel"] == 0
    assert report["compute_utilisation"] == 1.0
    (worker,) = report["workers"]
    assert worker["steps"] == STEPS and worker["live"] and worker["digest"] == report["global_digest"]
    with made.evaluation_point():
        assert made.digest() == report["global_digest"]
    assert made.digest() != report["global_digest"]
    samples = {
        sample.name: sample.value
        for family in WorkerCollector(made.facts).collect()
        for sample in family.samples
    }
    assert samples["diloco_worker_inner_step"] == STEPS
    assert samples["diloco_worker_tokens_total"] == report["tokens"]
    assert samples["diloco_worker_compute_utilisation_ratio"] == 1.0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "rank0" in page and "<svg" in page and "one node" in page
    assert "Bytes on the wire" not in page and '<section class="unused">' in page


def test_an_average_around_an_average_is_refused(text: str) -> None:
    """At the configuration, before anything is built."""
    with pytest.raises(ConfigError, match="averages its weights itself"):
        config(text, "gpa", optim={"kind": "schedule-free"})


@pytest.mark.parametrize(
    ("outer", "sections", "message"),
    [
        (
            "none",
            {"snoo": {"k": 5}},
            "[snoo] has no effect with train.outer = 'none'; use train.outer = 'snoo'",
        ),
        ("gpa", {"gpa": {"mu_x": 0.9967}}, "gpa.mu_x = 0.9967 averages over about 303 steps of a run of 9"),
        ("snoo", {"snoo": {"k": 50}}, "snoo.k = 50 is more than the 9 steps"),
        ("none", {"schedule": {"cooldown": 3}}, "schedule.cooldown = 3 has no effect"),
    ],
)
def test_settings_that_are_probably_not_meant_are_doubted(
    text: str, outer: str, sections: dict[str, dict[str, Any]], message: str
) -> None:
    """Each says what to do; settings that are in use draw no warning."""
    plain: dict[str, Any] = {"snoo": {"k": 10, "lr": 0.7, "momentum": 0.9}, "gpa": {"mu_x": 0.5}}
    if outer != "snoo":
        plain["snoo"] = {"momentum": 0.9}
    if outer != "gpa":
        plain["gpa"] = {"mu_x": 0.9967}
    changed = plain | {name: plain.get(name, {}) | values for name, values in sections.items()}
    found = doubts(config(text, outer, **changed))
    assert any(line.startswith(message) for line in found), found


def test_settings_in_use_draw_no_doubt() -> None:
    """The defaults, and each outer optimizer with settings of its own in a run that is long enough."""
    for name, values in (
        ("none", {}),
        ("snoo", {"k": 28}),
        ("gpa", {"mu_x": 0.99}),
        ("anytime", {"half_life": 0.2}),
    ):
        raw: dict[str, Any] = {"train": {"outer": name}, "schedule": {"kind": "linear"}}
        if values:
            raw[name] = values
        assert doubts(RunConfig.from_dict(raw)) == []
