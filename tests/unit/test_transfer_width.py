"""Settings carried to a wider model: what each rule changes, for which optimizers, and that it does what it says."""

from __future__ import annotations

import math

import pytest
import torch

from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.optim import Muon, param_groups
from diloco.transfer import RULES, transfer


def run(**optim: object) -> RunConfig:
    schedule = {"kind": "constant"} if str(optim.get("kind", "")).startswith("schedule-free") else {}
    return RunConfig.from_dict({"optim": optim, "schedule": schedule, "run": {"run_id": "narrow"}})


def rates(config: RunConfig, width: int) -> dict[str, tuple[float, float]]:
    """(lr, decay) that each parameter group of a model of this width gets."""
    o = config.optim
    model = torch.nn.ModuleDict(
        {
            "wte": torch.nn.Embedding(8, width),
            "fc": torch.nn.Linear(width, width),
            "head": torch.nn.Linear(width, 8),
        }
    )
    groups = param_groups(
        model,
        lr=o.lr,
        matrix_lr=o.matrix_lr,
        weight_decay=o.weight_decay,
        head_weight_decay=o.head_weight_decay or 0.0,
        d_base=o.d_base,
    )
    return {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}


def test_the_embedding_rule_raises_embeddings_alone() -> None:
    """Four times as wide: four times the embeddings' learning rate, all else equal."""
    config = run(kind="adamw", lr=0.002, weight_decay=0.1)
    wide, said = transfer(config, 64, 256, "embed")
    before, after = rates(config, 64), rates(wide, 256)
    assert after.pop("embed") == pytest.approx((4 * before.pop("embed")[0], 0.0))
    assert after == before
    assert wide.optim.d_base == 64 and "d_base = 64" in said[0]
    assert wide.run.run_id == "narrow"


def test_embeddings_that_already_have_a_multiplier_keep_its_base() -> None:
    """A second transfer starts from the width of the first: the multiplier is d_model/d_base as it stands."""
    config = run(kind="adamw", d_base=32)
    same, said = transfer(config, 64, 256, "embed")
    assert same == config and "from 2 to 8 times" in said[0]


def test_mup_for_adam_divides_matrices_and_head_and_leaves_embeddings() -> None:
    """One lr for all falls by m, and the multiplier gives embeddings theirs back."""
    config = run(kind="adamw", lr=0.002, weight_decay=0.1)
    wide, said = transfer(config, 64, 256, "mup")
    before, after = rates(config, 64), rates(wide, 256)
    assert after["matrix"] == pytest.approx((before["matrix"][0] / 4, 0.1))
    assert after["head"][0] == pytest.approx(before["head"][0] / 4)
    assert after["embed"][0] == pytest.approx(before["embed"][0])
    assert any("attention logits" in s for s in said) and any("gains and biases" in s for s in said)


@pytest.mark.parametrize("rule", ["mup", "decay"])
def test_a_base_width_that_is_set_still_leaves_embeddings_where_they_were(rule: str) -> None:
    """lr/m times d_model/d_base is what it was."""
    config = run(kind="adamw", lr=0.002, d_base=32)
    wide, _ = transfer(config, 64, 256, rule)
    assert rates(wide, 256)["embed"][0] == pytest.approx(rates(config, 64)["embed"][0])


def test_the_decay_rule_keeps_learning_rate_times_decay() -> None:
    """As mup, with decay raised by as much as the learning rate falls, on every decayed weight."""
    config = run(kind="adamw", lr=0.002, weight_decay=0.1, head_weight_decay=0.05)
    wide, said = transfer(config, 64, 256, "decay")
    before, after = rates(config, 64), rates(wide, 256)
    assert after["matrix"] == pytest.approx((0.0005, 0.4))
    for name in ("matrix", "head"):
        assert math.prod(after[name]) == pytest.approx(math.prod(before[name]))
    assert sum("instead of" in s and "decay" in s.split("=")[0] for s in said) == 2


@pytest.mark.parametrize(
    ("optim", "factor"),
    [
        ({"kind": "muon"}, 0.5),
        ({"kind": "normuon", "scale": "rms_exact"}, 0.5),
        ({"kind": "mars-m"}, 0.5),
        ({"kind": "muon", "scale": "spectral"}, 1.0),
        ({"kind": "muon", "scale": "original"}, 1.0),
        ({"kind": "normuon", "variant": "speedrun"}, 1.0),
        ({"kind": "hyperball"}, 1.0),
        ({"kind": "md"}, 1.0),
    ],
)
def test_orthogonal_updates_need_a_root_or_nothing(optim: dict[str, object], factor: float) -> None:
    """Four times as wide: half the matrices' learning rate where the update has a fixed RMS; lr stays everywhere."""
    config = run(**optim)
    assert config.optim.matrix_lr is not None
    for rule in ("mup", "decay"):
        wide, _ = transfer(config, 64, 256, rule)
        assert wide.optim.matrix_lr == pytest.approx(factor * config.optim.matrix_lr)
        assert wide.optim.lr == config.optim.lr and wide.optim.d_base is None
        if rule == "decay" and factor != 1:
            assert wide.optim.weight_decay == pytest.approx(config.optim.weight_decay / factor)


@pytest.mark.parametrize("scale", ["match_rms", "spectral", "original"])
def test_the_transferred_rate_moves_a_wider_layer_by_as_much(scale: str) -> None:
    """What the powers are for: the spectral norm of one real step is the same at both widths."""
    moved = []
    for width in (16, 64):
        config = run(kind="muon", scale=scale, matrix_lr=0.01)
        if width == 64:
            config, _ = transfer(config, 16, 64, "mup")
        weight = torch.nn.Parameter(torch.zeros(width, width))
        assert config.optim.matrix_lr is not None
        optimizer = Muon(
            [weight],
            lr=config.optim.matrix_lr,
            scale=scale,
            weight_decay=0.0,
            coefficients="newton12",
            iteration_dtype=torch.float64,
        )
        weight.grad = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[
            0
        ]
        optimizer.step()
        moved.append(torch.linalg.matrix_norm(weight.detach(), 2).item())
    assert moved[0] == pytest.approx(moved[1], rel=1e-3) and moved[0] > 1e-3


def test_spheres_transfer_by_themselves() -> None:
    """The md rule changes nothing and says why; for other optimizers it does not apply."""
    config = run(kind="md")
    same, said = transfer(config, 64, 256, "md")
    assert same == config and "relative to the norm" in said[0]
    with pytest.raises(ConfigError, match="rule 'md'.*'adamw'"):
        transfer(run(kind="adamw"), 64, 256, "md")
    with pytest.raises(ConfigError, match="rule 'embed'.*'md'"):
        transfer(config, 64, 256, "embed")


@pytest.mark.parametrize("rule", ["mup", "decay"])
@pytest.mark.parametrize("kind", ["sgd", "freon", "kaon", "schedule-free-plus"])
def test_no_rule_is_made_up_for_other_kinds(kind: str, rule: str) -> None:
    """Where nothing is known it says so; the embedding rule is offered instead."""
    with pytest.raises(ConfigError, match=f"no rule is known for optim.kind = '{kind}'"):
        transfer(run(kind=kind), 64, 256, rule)


@pytest.mark.parametrize("rule", ["embed", "mup", "decay"])
@pytest.mark.parametrize(
    "kind", ["adamw", "adamp", "mars", "schedule-free", "muon", "normuon", "mars-m", "muown"]
)
def test_there_and_back_is_where_it_began(kind: str, rule: str) -> None:
    """Powers of the ratio cancel; the new configuration is a valid one each time."""
    config = run(kind=kind)
    wide, _ = transfer(config, 64, 256, rule)
    back, _ = transfer(wide, 256, 64, rule)
    for name, value in rates(config, 64).items():
        assert rates(back, 64)[name] == pytest.approx(value)
    assert transfer(config, 64, 64, rule)[0].optim.lr == config.optim.lr


@pytest.mark.parametrize("rule", RULES)
def test_it_says_that_the_model_is_not_its_business(rule: str) -> None:
    """The width itself is the model's to change; the sentence names the keys."""
    _, said = transfer(run(kind="md" if rule == "md" else "adamw"), 64, 256, rule)
    assert "256 wide" in said[-1] and "model.preset" in said[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((64, 256, "mupp"), "did you mean 'mup'"),
        ((0, 256, "mup"), "from_width is 0"),
        ((64, -1, "mup"), "to_width is -1"),
    ],
)
def test_mistakes_are_named(arguments: tuple[int, int, str], named: str) -> None:
    """The error names the argument and its value."""
    with pytest.raises(ConfigError, match=named):
        transfer(run(kind="adamw"), *arguments)
