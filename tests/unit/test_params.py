"""`diloco params`: the table of a run's parameters, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from diloco.cli import main
from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.optim.build import explain
from diloco.params import model_of, totals
from diloco.worker.model import build_model


def odd_model() -> nn.Module:
    """A model of the user's own."""
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npreset = "moe-tiny"\n[optim]\nkind = "muon"\nlr = 0.002\n')
    return str(path)


def test_json_lists_every_parameter_and_adds_up(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Names in model order, elements that sum to the model's, groups that sum to the parameters."""
    assert main(["params", run_file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = build_model("moe-tiny", 8, 0, device="meta")
    assert [r["name"] for r in found["parameters"]] == [n for n, _ in model.named_parameters()]
    assert found["total"] == sum(p.numel() for p in model.parameters())
    assert sum(g["numel"] for g in found["groups"]) == found["total"]
    assert sum(g["tensors"] for g in found["groups"]) == len(found["parameters"])
    assert sum(g["share"] for g in found["groups"]) == pytest.approx(1.0)
    kinds = {(g["group"], g["algorithm"]) for g in found["groups"]}
    assert kinds == {("matrix", "Muon"), ("embed", "AdamW"), ("router", "AdamW"), ("scalar", "AdamW")}
    qkv = next(r for r in found["parameters"] if r["name"] == "blocks.0.qkv.weight")
    assert qkv == {
        "name": "blocks.0.qkv.weight",
        "shape": [384, 128],
        "numel": 49152,
        "group": "matrix",
        "algorithm": "Muon",
        "lr": 0.002,
        "weight_decay": 0.1,
        "blocks": [128, 128, 128],
        "why": "384x128 hidden matrix of fused blocks (128, 128, 128)",
    }


def test_text_has_a_line_per_parameter_and_totals(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole names even in a pipe; flags change the configuration as everywhere."""
    assert main(["params", run_file, "--optim.kind", "md", "--optim.matrix_lr", "0.03"]) == 0
    out = capsys.readouterr().out
    model = build_model("moe-tiny", 8, 0, device="meta")
    lines = out.splitlines()
    for name, p in model.named_parameters():
        line = next(x for x in lines if f" {name} " in x)
        assert f"{p.numel():,}" in line
        if p.ndim > 1 and name != "embed.weight":
            assert "MD" in line and "0.03" in line
    total = next(x for x in lines if " all " in x)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in total and "100.0%" in total


def test_a_preset_takes_no_memory() -> None:
    """Eight billion parameters are counted without being made."""
    config = RunConfig.from_toml('[model]\npreset = "8b"\nsequence_length = 8\n[optim]\nkind = "md"')
    model = model_of(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    rows = explain(model, config)
    assert sum(r.numel for r in rows) > 6e9
    assert [g["group"] for g in totals(rows)] == ["matrix", "embed", "head", "scalar"]


def test_a_users_own_model_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By its factory's name."""
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nfactory = "{__name__}:odd_model"\n')
    assert main(["params", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["parameters"]
    assert [(r["name"], r["group"]) for r in rows] == [
        ("0.weight", "embed"),
        ("1.weight", "matrix"),
        ("1.bias", "scalar"),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.kind", "mouon"], "did you mean 'muon'"),
        (["--optim.kind", "sgd", "--optim.betas", "[0.9, 0.9]"], "optim.betas is not used"),
        (["--model.preset", "moe-tny"], "did you mean 'moe-tiny'"),
        (["--optim.blocks", "{qkv = 7}"], "blocks is 7: it does not divide the 384 rows"),
    ],
)
def test_a_wrong_configuration_is_exit_code_2(
    run_file: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same words as training would use."""
    assert main(["params", run_file, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_md_cannot_train_is_refused_here_too() -> None:
    """Its forward does not scale the embedding; the table changes no model that does."""
    with pytest.raises(ConfigError, match="give it an attribute embed_scale"):
        explain(odd_model(), {"kind": "md"})
    model = build_model("nano", 8, seed=0)
    explain(model, {"kind": "md"})
    assert model.embed_scale == 1.0
