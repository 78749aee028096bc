"""Sorting parameters into groups, and building optimizers from a configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.optim import (
    SNOO,
    AdamW,
    Combined,
    Muon,
    NorMuon,
    build_optimizer,
    param_groups,
)
from diloco.optim.build import explain
from diloco.optim.groups import followed_by_norm
from diloco.optim_section import AVERAGING, KINDS, uses
from diloco.worker.model import build_model
from tests.nets import net, train


def names(groups: list[dict[str, Any]], kind: str) -> set[str]:
    return {n for g in groups if g["name"] == kind for n in g["param_names"]}


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(tied: bool) -> None:
    """Groups partition the trainable parameters, and each placement is explained by name."""
    model = net(tied)
    groups = param_groups(model)
    placed = [id(p) for g in groups for p in g["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert len(group["why"]) == len(group["params"]) == len(group["param_names"])


def test_groups_follow_the_use_of_a_parameter() -> None:
    """Hidden matrices, experts and convolutions; embeddings; the head; and everything below two dimensions."""
    groups = param_groups(net())
    assert names(groups, "embed") == {"wte.weight", "pos_emb"}
    assert names(groups, "head") == {"lm_head.weight"}
    per_block = {"qkv.weight", "experts", "conv.weight"}
    assert names(groups, "matrix") == {f"blocks.{i}.{n}" for i in range(2) for n in per_block}
    assert all(p.ndim < 2 for g in groups if g["name"] == "scalar" for p in g["params"])


def test_a_tied_head_belongs_to_embed_once() -> None:
    """Also when the head is registered before the embedding."""
    groups = param_groups(net(tied=True))
    assert not names(groups, "head")
    assert names(groups, "embed") == {"lm_head.weight", "pos_emb"}
    assert any("tied with lm_head.weight" in w for g in groups if g["name"] == "embed" for w in g["why"])


def test_rates_and_decay_follow_the_table() -> None:
    """Only matrices decay, only the embedding lr is multiplied by d_model/d_base."""
    groups = param_groups(net(), lr=0.01, matrix_lr=0.02, weight_decay=0.3, d_base=4, head_weight_decay=0.1)
    table = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert table == {"matrix": (0.02, 0.3), "embed": (0.02, 0.0), "head": (0.01, 0.1), "scalar": (0.01, 0.0)}


def test_layouts_reach_the_matrix_optimizer() -> None:
    """Fused, stacked and flattened weights are separate matrix groups with their options."""
    groups = [g for g in param_groups(net(), blocks={"qkv": 3}) if g["name"] == "matrix"]
    layout = {g["param_names"][0].split(".")[2]: (g["blocks"], g["stacked"]) for g in groups}
    assert layout == {"qkv": (3, None), "experts": (1, True), "conv": (1, False)}
    attention = param_groups(nn.MultiheadAttention(8, 2))
    assert attention[0]["blocks"] == 3 and attention[0]["param_names"] == ["in_proj_weight"]


def test_frozen_parameters_are_left_out() -> None:
    """A parameter that does not require a gradient is in no group."""
    model = net()
    model.wte.weight.requires_grad_(False)
    assert names(param_groups(model), "embed") == {"pos_emb"}


def test_an_unusual_head_can_be_named() -> None:
    """`head` overrides the list of usual names; a name that matches nothing is an error."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    assert names(param_groups(model), "head") == set()
    assert names(param_groups(model, head="2.weight"), "head") == {"2.weight"}
    for wrong in ({"head": "3.weight"}, {"blocks": {"qkv": 3}}):
        with pytest.raises(ConfigError, match="part of no parameter's name"):
            param_groups(model, **wrong)


def test_what_cannot_be_grouped_is_refused() -> None:
    """No trainable parameters; a width multiplier without an embedding."""
    with pytest.raises(ConfigError, match="no trainable parameter"):
        param_groups(nn.ReLU())
    with pytest.raises(ConfigError, match=r"no nn\.Embedding"):
        param_groups(nn.Linear(3, 3), d_base=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_built_optimizer_trains_every_parameter(kind: str, tied: bool) -> None:
    """Of every kind: two steps move everything, with SNOO around it where that is allowed."""
    model = net(tied)
    blocks = {"blocks": {"qkv": 3}} if uses(kind, "blocks") else {}
    built = build_optimizer(model, {"kind": kind, "lr": 0.01} | blocks, total_steps=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = built if kind in AVERAGING else SNOO(built, k=2)
    train(model, optimizer, 2)
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]


def test_kinds_choose_their_classes_and_options() -> None:
    """muon and normuon take the matrices, AdamW the rest; options reach their owner; None means the default."""
    options = {"kind": "muon", "lr": 0.02, "betas": (0.8, 0.9), "momentum": 0.9, "scale": None}
    built = build_optimizer(net(), options | {"iteration_dtype": "float32"})
    assert isinstance(built, Combined)
    matrix, rest = built.optimizers
    assert isinstance(matrix, Muon) and isinstance(rest, torch.optim.AdamW)
    assert {g["momentum"] for g in matrix.param_groups} == {0.9}
    assert {g["iteration_dtype"] for g in matrix.param_groups} == {"float32"}
    assert {g["scale"] for g in matrix.param_groups} == {"match_rms"}
    assert {g["betas"] for g in rest.param_groups} == {(0.8, 0.9)}
    assert isinstance(build_optimizer(net(), RunConfig()), torch.optim.AdamW)
    only = build_optimizer(nn.Linear(3, 3, bias=False), {"kind": "normuon", "variant": "speedrun"})
    assert isinstance(only, NorMuon)
    assert isinstance(build_optimizer(net(), {}), torch.optim.AdamW)


def test_a_section_or_a_whole_configuration_is_accepted() -> None:
    """Anything with model_dump(), and a configuration whose `optim` part is the section."""
    section = SimpleNamespace(model_dump=lambda: {"kind": "adamw", "lr": 0.5})
    whole = SimpleNamespace(model_dump=lambda: {"optim": {"lr": 0.5}, "run": {"seed": 1}})
    for config in (section, whole):
        assert build_optimizer(net(), config).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mouon"}, "did you mean 'muon'"),
        ({"kind": "scion", "betas": (0.9, 0.9)}, r"optim\.betas is not used by optim\.kind = 'scion'.*adamw"),
        ({"kind": "muown"}, r"give optim\.total_steps"),
        ({"kind": "sgd", "momentum": 0.0, "nesterov": True}, "give a momentum"),
        ({"momentun": 0.9}, "did you mean 'momentum'"),
        ({"kind": "muon", "iteration_dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_wrong_keys_are_refused(options: dict[str, Any], message: str) -> None:
    """Each error suggests the nearest valid name."""
    with pytest.raises(ConfigError, match=message):
        build_optimizer(net(), options)


def test_matrix_kinds_need_a_matrix() -> None:
    """A model of vectors alone is told to use AdamW."""
    with pytest.raises(ConfigError, match="use 'adamw'"):
        build_optimizer(nn.LayerNorm(4), {"kind": "muon"})


def test_combined_takes_no_groups_later() -> None:
    """It would not be clear whose they are; and it needs at least one member."""
    built = build_optimizer(net(), {"kind": "muon"})
    with pytest.raises(ConfigError, match="before combining"):
        built.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    with pytest.raises(ConfigError, match="at least one"):
        Combined()


# ---- mixtures of experts ----


def test_a_router_is_a_group_of_its_own_and_experts_are_stacks() -> None:
    """Under muon the router has AdamW without decay and the experts are matrices; under md its rows are unit."""
    model = build_model("moe-tiny", 8, 0, device="meta")
    rows = {r.name: r for r in explain(model, {"kind": "muon"})}
    router = rows["blocks.0.experts.router.weight"]
    assert (router.group, router.algorithm, router.weight_decay) == ("router", "AdamW", 0.0)
    stack = rows["blocks.0.experts.gate_up"]
    assert (stack.group, stack.algorithm, stack.blocks, stack.weight_decay) == ("matrix", "Muon", 2, 0.1)
    small = build_model("moe-tiny", 8, 0)
    group = next(g for g in build_optimizer(small, {"kind": "md"}).param_groups if g["name"] == "router")
    assert (group["sphere"], group["gains"], group["base"]) == ("row", True, "muon")
    assert torch.allclose(small.get_parameter(router.name).norm(dim=1), torch.ones(8))


class Gated(nn.Module):
    """A gate of `gate` rows beside three experts."""

    def __init__(self, gate: int, stacked: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(4, gate, bias=False)
        stack, separate = nn.Parameter(torch.zeros(3, 4, 4)), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.experts: nn.Parameter | nn.ModuleList = stack if stacked else separate


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(("rows", "group"), [(3, "router"), (8, "matrix")])
def test_a_gate_is_a_router_only_with_one_row_per_expert(stacked: bool, rows: int, group: str) -> None:
    """Gated feed-forward layers have a gate too."""
    assert "gate.weight" in names(param_groups(Gated(rows, stacked)), group)


def test_an_unusual_router_can_be_named() -> None:
    """`router` overrides the usual names."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    assert names(param_groups(model, router="1.weight"), "router") == {"1.weight"}
    with pytest.raises(ConfigError, match="part of no parameter's name"):
        param_groups(model, router="switch")


# ---- decay before a normalisation ----


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)


def test_weights_before_a_norm_are_found() -> None:
    """By order in a Sequential, by name for query and key norms."""
    ordered = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU())
    assert followed_by_norm(ordered) == {"0.weight"}
    assert followed_by_norm(nn.Sequential(Attention())) == {"0.q_proj.weight", "0.k_proj.weight"}


def test_weights_before_a_norm_are_found_unless_told_otherwise() -> None:
    """Groups leave them without decay; so does a built AdamW, while Muon decays all its matrices."""
    model = nn.Sequential(Attention(), nn.Linear(4, 4))
    found = {
        n: g["weight_decay"] for g in param_groups(model) for n in g["param_names"] if g["name"] == "matrix"
    }
    expected = {"0.q_proj.weight": 0.0, "0.k_proj.weight": 0.0, "0.v_proj.weight": 0.1, "1.weight": 0.1}
    assert found == expected
    assert {g["weight_decay"] for g in param_groups(model, normalized=()) if g["name"] == "matrix"} == {0.1}
    for kind, decays in (("adamw", expected), ("muon", dict.fromkeys(expected, 0.1))):
        rows = explain(model, {"kind": kind})
        assert {r.name: r.weight_decay for r in rows if r.group == "matrix"} == decays


def test_weights_before_a_norm_do_not_decay_under_adamw() -> None:
    """The default cure; the names may be given, found, or both."""
    model = nn.Sequential(Attention(), nn.Linear(4, 4))
    config = {"kind": "adamw", "normalized": ["auto", "1.weight"]}
    decay = {r.name: r.weight_decay for r in explain(model, config) if r.group == "matrix"}
    assert decay == {"0.q_proj.weight": 0, "0.k_proj.weight": 0, "0.v_proj.weight": 0.1, "1.weight": 0}
    with pytest.raises(ConfigError, match="'2.weight' is part of no parameter's name"):
        explain(model, {"normalized": ["2.weight"]})


def test_adamc_corrects_the_decay_there_instead() -> None:
    """With names: those alone. Without: every hidden matrix, and never the head."""
    model = nn.Sequential(Attention(), nn.Linear(4, 4))
    built = build_optimizer(model, {"decay": "adamc", "normalized": ["auto"]})
    assert isinstance(built, AdamW)
    how = {n: (g["decay"], g["weight_decay"]) for g in built.param_groups for n in g["param_names"]}
    assert how["0.q_proj.weight"] == ("adamc", 0.1)
    assert how["0.v_proj.weight"] == ("decoupled", 0.1)
    everywhere = build_optimizer(net(), {"decay": "adamc", "head_weight_decay": 0.1}).param_groups
    assert {g["name"]: g["decay"] for g in everywhere} == {
        "matrix": "adamc",
        "embed": "decoupled",
        "head": "decoupled",
        "scalar": "decoupled",
    }
    cautious = build_optimizer(net(), {"decay": "cautious"}).param_groups
    assert {g["decay"] for g in cautious} == {"cautious"}
