"""Every kind of the [optim] section: its classes, its rates, and what it does with each group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diloco.errors import ConfigError
from diloco.optim import (
    MARS,
    MD,
    SNOO,
    AdamP,
    Combined,
    Freon,
    Hyperball,
    Kaon,
    Master,
    Muon,
    Muown,
    NorMuon,
    ScheduleFreeAdamW,
    ScheduleFreePlus,
    Scion,
    build_optimizer,
)
from diloco.optim.build import explain
from diloco.optim_section import KINDS
from diloco.worker.model import build_model
from tests.nets import net, train

torch.set_num_threads(1)


# ---- every kind ----

WHOLE: dict[str, type] = {
    "adamw": torch.optim.AdamW,
    "adamp": AdamP,
    "scion": Scion,
    "mars": MARS,
    "schedule-free": ScheduleFreeAdamW,
    "schedule-free-plus": ScheduleFreePlus,
    "sgd": torch.optim.SGD,
}
MATRIX: dict[str, type] = {
    "muon": Muon,
    "normuon": NorMuon,
    "hyperball": Hyperball,
    "md": MD,
    "md-adam": MD,
    "muown": Muown,
    "mars-m": MARS,
    "freon": Freon,
    "kaon": Kaon,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_class(kind: str) -> None:
    """One optimizer for all, or one for the matrices before AdamW for the rest; no kind is left out."""
    built = build_optimizer(net(), {"kind": kind}, total_steps=4)
    if kind in WHOLE:
        assert type(built) is WHOLE[kind]
    else:
        assert isinstance(built, Combined)
        assert [type(o) for o in built.optimizers] == [MATRIX[kind], torch.optim.AdamW]
    assert sum(len(g["params"]) for g in built.param_groups) == len(list(net().parameters()))


@pytest.mark.parametrize(
    ("config", "lr", "matrix_lr"),
    [
        ({"kind": "adamw"}, 1e-3, 1e-3),
        ({"kind": "muon"}, 1e-3, 1e-3),
        ({"kind": "hyperball"}, 1e-3, 0.018),
        ({"kind": "hyperball", "lr": 2e-3}, 2e-3, 0.036),
        ({"kind": "md"}, 2e-3, 0.02),
        ({"kind": "md", "base": "adam"}, 2e-3, 0.005),
        ({"kind": "md-adam"}, 2e-3, 0.005),
        ({"kind": "md", "matrix_lr": 0.03}, 2e-3, 0.03),
        ({"kind": "normuon", "variant": "speedrun"}, 1e-3, 0.023),
        ({"kind": "scion"}, 2.0**-12, 2.0**-12),
        ({"kind": "sgd"}, 0.1, 0.1),
    ],
)
def test_rates_left_out_are_those_of_the_kind(config: dict[str, Any], lr: float, matrix_lr: float) -> None:
    """And a given lr scales the matrices' rate with it."""
    rates = {r.group: r.lr for r in explain(net(), config)}
    assert rates["scalar"] == pytest.approx(lr) and rates["matrix"] == pytest.approx(matrix_lr)


def test_md_puts_each_group_on_its_sphere() -> None:
    """Matrices by Frobenius norm, rows of embedding and head at 1, the head with gains; vectors have Adam alone."""
    model = net()
    built = build_optimizer(model, {"kind": "md", "lr": 0.002})
    assert isinstance(built, Combined)
    table = {
        g["name"]: (g["sphere"], g["gains"], g["base"], g["lr"]) for g in built.optimizers[0].param_groups
    }
    assert table == {
        "matrix": ("matrix", True, "muon", 0.02),
        "embed": ("row", False, "adam", 0.002),
        "head": ("row", True, "adam", 0.002),
    }
    assert {(g["name"], g["weight_decay"]) for g in built.optimizers[1].param_groups} == {("scalar", 0.0)}
    assert {g["gain_lr"] for g in built.optimizers[0].param_groups} == {0.002}
    assert torch.allclose(model.wte.weight.norm(dim=1), torch.ones(11))
    assert model.embed_scale == pytest.approx(8**0.5)
    # The radius that N(0, 1/d_model) would have: sqrt(r c/d_model).
    assert float(model.blocks[0].get_parameter("qkv.weight").detach().norm()) == pytest.approx(24**0.5)


def test_md_asks_for_a_forward_that_scales_its_embedding() -> None:
    """Rows of norm 1 would silently make activations sqrt(d_model) too small."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="embed_scale = 1.0 that its forward multiplies by"):
        build_optimizer(model, {"kind": "md"})


def test_the_decoder_scales_its_embedding_under_md() -> None:
    """Unit rows times sqrt(d_model) enter the blocks."""
    model = build_model("nano", 8, 0)
    build_optimizer(model, {"kind": "md"})
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.arange(8)[None])
    assert torch.allclose(seen[0].square().mean(dim=-1), torch.ones(1, 8), atol=1e-5)


def test_scion_chooses_a_norm_per_group() -> None:
    """Spectral with rho 50 for matrices, sign with 3000 for embedding and head, rms with 1 for vectors."""
    groups = build_optimizer(net(), {"kind": "scion", "rho": 40.0, "embed_norm": "row"}).param_groups
    assert {(g["name"], g["norm"], g["rho"]) for g in groups} == {
        ("matrix", "spectral", 40.0),
        ("embed", "row", 3000.0),
        ("head", "row", 3000.0),
        ("scalar", "bias", 1.0),
    }


def test_our_decoder_says_which_weights_are_fused() -> None:
    """Queries, keys and values of unequal height, and gate and up, are blocks without being configured."""
    layouts = {
        r.name.removeprefix("blocks.0."): r.blocks
        for r in explain(build_model("1b", 8, 0, device="meta"), {"kind": "muon"})
    }
    assert layouts["qkv.weight"] == (2048, 512, 512) and layouts["gate_up.weight"] == 2
    assert layouts["attn_out.weight"] == 1


# ---- what the table says is what happens ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_explanation_is_what_is_built(kind: str) -> None:
    """One row per trainable parameter in model order, with the built group's rate, decay, name and class."""
    model = net()
    model.pos_emb.requires_grad_(False)
    rows = explain(model, {"kind": kind}, total_steps=4)
    assert [r.name for r in rows] == [n for n, p in model.named_parameters() if p.requires_grad]
    built = build_optimizer(model, {"kind": kind}, total_steps=4)
    members = built.optimizers if isinstance(built, Combined) else (built,)
    found = {
        n: (g["name"], type(o).__name__, g["lr"], g.get("weight_decay", 0.0))
        for o in members
        for g in o.param_groups
        for n in g["param_names"]
    }
    assert found == {r.name: (r.group, r.algorithm.split(" ")[0], r.lr, r.weight_decay) for r in rows}
    assert all(r.why and r.numel == model.get_parameter(r.name).numel() for r in rows)


# ---- 16 bits ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_is_trained_in_float32(kind: str) -> None:
    """Every kind goes inside a Master, and its steps are those of a float32 optimizer from the same weights."""
    narrow = net().bfloat16()
    built = build_optimizer(narrow, {"kind": kind, "lr": 1e-4}, total_steps=4)
    assert isinstance(built, Master) and built.mode == "remainder"
    before = {n: p.detach().clone() for n, p in narrow.named_parameters()}
    train(narrow, built, 3)
    low = [s["master_low"] for s in built.state_dict()["state"].values()]
    assert len(low) == len(before) and any(bool(x.any()) for x in low)


def test_float16_parameters_keep_float32_moments() -> None:
    """eps = 1e-8 and small second moments do not exist in 16 bits."""
    model = net().half()
    built = build_optimizer(model, {"kind": "adamw"})
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-4)
    built.step()
    moments = {v.dtype for s in built.state.values() for k, v in s.items() if k != "step"}
    assert moments == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_wrapper_goes_inside_the_master() -> None:
    """`wrap` sees the float32 optimizer, whatever the model's dtype."""
    for model in (net(), net().bfloat16()):
        seen: list[torch.dtype] = []

        def wrap(o: torch.optim.Optimizer, seen: list[torch.dtype] = seen) -> torch.optim.Optimizer:
            seen.extend(p.dtype for g in o.param_groups for p in g["params"])
            return SNOO(o, k=2)

        built = build_optimizer(model, {"kind": "muon"}, wrap=wrap)
        assert set(seen) == {torch.float32}
        assert isinstance(built.optimizer if isinstance(built, Master) else built, SNOO)
