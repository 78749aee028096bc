"""What must not be combined or configured: every empty cell of the table, and every class's own refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from diloco.config import RunConfig, check_distributed
from diloco.errors import ConfigError
from diloco.optim import (
    GPA,
    MARS,
    MD,
    SNOO,
    AdamP,
    AdamW,
    AnytimeAverage,
    Combined,
    Freon,
    Hyperball,
    Kaon,
    Master,
    Muon,
    Muown,
    NorMuon,
    RowNorm,
    ScheduleFreeAdamW,
    ScheduleFreePlus,
    Scion,
    build_optimizer,
)
from diloco.optim.build import OUTERS, check_composition
from diloco.optim.state import EvalModeError
from diloco.optim_section import KINDS
from tests.nets import net

torch.set_num_threads(1)
Optimizer = torch.optim.Optimizer
WRAPPERS: dict[str, Callable[[Optimizer], Optimizer]] = {"snoo": SNOO, "gpa": GPA, "anytime": AnytimeAverage}
AVERAGING = ("schedule-free", "schedule-free-plus")
SPHERES = ("hyperball", "md", "md-adam", "muown")
# The table of what may go around what.
REFUSED = {(kind, outer) for kind in AVERAGING for outer in ("snoo", "gpa", "anytime", "diloco")} | {
    (kind, "gpa") for kind in SPHERES
}
CELLS = [(kind, outer) for kind in KINDS for outer in OUTERS]


def matrix(*shape: int) -> Parameter:
    return Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


# ---- the table ----


@pytest.mark.parametrize(("kind", "outer"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_each_cell_of_the_table(kind: str, outer: str) -> None:
    """Refused cells say why, name both sides and what to use; the wrapper's own check agrees with the table."""

    def make() -> Optimizer:
        built = build_optimizer(net(), {"kind": kind}, total_steps=4)
        return WRAPPERS[outer](built) if outer in WRAPPERS else built

    if (kind, outer) not in REFUSED:
        check_composition(kind, outer)
        make()
        return
    with pytest.raises(ConfigError, match=rf"optim\.kind = '{kind}' .*'{outer}'.*: use .* such as '\w+'"):
        check_composition(kind, outer)
    if outer in WRAPPERS:
        with pytest.raises(ConfigError, match="cannot wrap"):
            make()


@pytest.mark.parametrize(
    ("inner", "outer", "message"),
    [("mouon", "none", "did you mean 'muon'"), ("muon", "snow", "did you mean 'snoo'")],
)
def test_unknown_sides_of_a_combination_are_refused(inner: str, outer: str, message: str) -> None:
    """With the nearest name."""
    with pytest.raises(ConfigError, match=message):
        check_composition(inner, outer)


@pytest.mark.parametrize(("kind", "outer"), sorted(cell for cell in REFUSED if cell[1] != "diloco"))
def test_a_configuration_for_one_node_is_refused_when_read(kind: str, outer: str) -> None:
    """`train.outer` and `optim.kind` are looked at together, before anything starts."""
    with pytest.raises(ConfigError, match=rf"optim\.kind = '{kind}'"):
        RunConfig.from_dict(
            {"optim": {"kind": kind}, "train": {"outer": outer}, "schedule": {"kind": "constant"}}
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", ["nesterov", "gpa"])
def test_a_distributed_run_refuses_what_it_cannot_average(kind: str, outer: str) -> None:
    """Workers and coordinator ask; the same file is fine for one node."""
    config = RunConfig.from_dict(
        {"optim": {"kind": kind}, "outer": {"kind": outer}, "schedule": {"kind": "constant"}}
    )
    if (kind, "gpa" if outer == "gpa" else "diloco") in REFUSED:
        with pytest.raises(ConfigError, match="diloco train"):
            check_distributed(config)
    else:
        check_distributed(config)


def test_averages_do_not_stack() -> None:
    """Each averaging wrapper refuses every other, and what averages by itself; order does not matter."""
    inner = {
        "SNOO": lambda: SNOO(torch.optim.SGD([matrix(2, 3)], lr=0.1)),
        "GPA": lambda: GPA(torch.optim.SGD([matrix(2, 3)], lr=0.1)),
        "AnytimeAverage": lambda: AnytimeAverage(torch.optim.SGD([matrix(2, 3)], lr=0.1)),
        "ScheduleFreeAdamW": lambda: ScheduleFreeAdamW([matrix(2, 3)]),
        "ScheduleFreePlus": lambda: ScheduleFreePlus([matrix(2, 3)]),
        "Combined": lambda: Combined(ScheduleFreeAdamW([matrix(2, 3)])),
        "Master": lambda: Master(ScheduleFreeAdamW, [Parameter(torch.ones(2, 3).bfloat16())]),
    }
    for name, make in inner.items():
        for wrap in (SNOO, GPA, AnytimeAverage, RowNorm):
            with pytest.raises(ConfigError, match=f"cannot wrap {name}, which averages its weights"):
                wrap(make())  # type: ignore[no-untyped-call]


# ---- the [optim] section ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('kind = "mouon"', r"optim\.kind is 'mouon': known are adamw, .*did you mean 'muon'"),
        ('kind = "muon"\nscale = "match_rsm"', r"optim\.scale is 'match_rsm'.*did you mean 'match_rms'"),
        ('decay = "adamd"', r"optim\.decay is 'adamd'.*did you mean 'adamc'"),
        ('kind = "muon"\nform = "gramm"', "did you mean 'gram'"),
        ('kind = "muon"\niteration_dtype = "bfloat"', "did you mean 'bfloat16'"),
        ('kind = "normuon"\nvariant = "row"', "did you mean 'rows'"),
        ('kind = "md"\nbase = "normuon"', "'hyperball' has normuon"),
        ('kind = "scion"\nembed_norm = "cool"', "did you mean 'col'"),
        ('kind = "muon"\nmomentun = 0.9', "did you mean 'momentum'"),
        ("lr = 0.0", r"optim\.lr = 0\.0: .*greater than 0"),
        ("lr = -0.1", r"optim\.lr = -0\.1"),
        ("lr = nan", r"optim\.lr = nan"),
        ("lr = {a = 1}", r"optim\.lr = \{'a': 1\}"),
        ("betas = [0.9, 1.0]", r"optim\.betas is \[0\.9, 1\.0\]: give two numbers in \[0, 1\)"),
        ("betas = [0.9]", r"optim\.betas"),
        ('kind = "muon"\nmomentum = 1.0', r"optim\.momentum is 1\.0: give a number in \[0, 1\)"),
        ('kind = "muon"\nmatrix_lr = -1.0', r"optim\.matrix_lr = -1\.0"),
        ('kind = "md"\nradius = 0.0', r"optim\.radius is 0\.0: give 'init', 'shape' or a positive number"),
        ('kind = "md"\nradius = "innit"', r"optim\.radius is 'innit'"),
        ('kind = "kaon"\nscale = "rms_exact"', "of the kinds 'muon' and 'normuon': use 'match_rms'"),
        ('kind = "freon"\nq = 2.5', r"optim\.q = 2\.5"),
        ("weight_decay = -0.1", r"optim\.weight_decay = -0\.1"),
        ('kind = "schedule-free"', r"set schedule\.kind = 'constant'"),
        (
            'kind = "muon"\nrho = 3.0\nq = 0.5',
            r"optim\.rho is not used .*scion; optim\.q is not used .*freon",
        ),
    ],
)
def test_wrong_settings_name_key_value_and_cure(text: str, message: str) -> None:
    """As TOML, where users write them."""
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_toml(f"[optim]\n{text}")


@pytest.mark.parametrize(
    ("kind", "key", "users"),
    [
        ("adamw", "momentum = 0.9", "muon, normuon, hyperball, md, muown, scion, mars-m, freon, kaon, sgd"),
        ("muon", "gain_lr = 0.1", "md, md-adam"),
        ("muon", "beta2 = 0.9", "normuon, hyperball"),
        ("hyperball", "weight_decay = 0.1", "adamw, muon, normuon, adamp, mars"),
        ("md", "nesterov = true", "muon, normuon, hyperball"),
        ("scion", "eps = 1e-8", "adamw, muon"),
        ("sgd", "matrix_lr = 0.1", "muon, normuon"),
        ("schedule-free-plus", "warmup = 10", "schedule-free"),
        ("schedule-free", "beta_max = 0.97", "schedule-free-plus"),
    ],
)
def test_a_setting_that_the_kind_does_not_use_is_refused(kind: str, key: str, users: str) -> None:
    """Never ignored; the kinds that use it are listed."""
    name = key.split(" ")[0]
    expected = rf"optim\.{name} is not used by optim\.kind = '{kind}': remove it, or use one of {users}"
    with pytest.raises(ConfigError, match=expected):
        RunConfig.from_toml(f'[optim]\nkind = "{kind}"\n{key}\n[schedule]\nkind = "constant"')


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_can_be_read_again_from_what_it_was_written_as(kind: str) -> None:
    """Defaults that were filled in are not taken for settings that the kind does not use."""
    config = RunConfig.from_dict({"optim": {"kind": kind}, "schedule": {"kind": "constant"}})
    assert RunConfig.from_dict(config.model_dump()) == config
    assert RunConfig.from_dict(json.loads(config.model_dump_json())) == config


# ---- the classes ----

CLASSES: dict[str, Callable[..., Optimizer]] = {
    "AdamW": AdamW,
    "AdamP": AdamP,
    "Muon": Muon,
    "NorMuon": NorMuon,
    "Hyperball": Hyperball,
    "MD": MD,
    "Muown": lambda ps, **o: Muown(ps, **({"total_steps": 5} | o)),
    "Scion": Scion,
    "MARS": MARS,
    "MARS-M": lambda ps, **o: MARS(ps, base="muon", **o),
    "ScheduleFreeAdamW": ScheduleFreeAdamW,
    "ScheduleFreePlus": ScheduleFreePlus,
    "Freon": Freon,
    "Kaon": Kaon,
}
WITH_BETAS = ("AdamW", "AdamP", "MD", "Muown", "MARS", "ScheduleFreeAdamW", "ScheduleFreePlus")
MATRICES_ONLY = ("Muon", "NorMuon", "Hyperball", "MD", "Muown", "Scion", "Freon", "Kaon")
NONZERO = ("Hyperball", "MD", "Muown")


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_refuses_a_negative_rate_and_unknown_options(name: str) -> None:
    """When it is made, and when a group is added; the nearest option is suggested."""
    make = CLASSES[name]
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"lr is {wrong}"):
            make([matrix(2, 3)], lr=wrong)
    with pytest.raises(ConfigError, match="has no option 'lrr'; did you mean 'lr'"):
        make([{"params": [matrix(2, 3)], "lrr": 0.1}])
    optimizer = make([matrix(2, 3)])
    with pytest.raises(ConfigError, match="lr is -1"):
        optimizer.add_param_group({"params": [matrix(2, 3)], "lr": -1.0})


@pytest.mark.parametrize("name", WITH_BETAS)
@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.9), (0.9,)])
def test_betas_out_of_range_are_refused(name: str, betas: Any) -> None:
    """Two numbers in [0, 1)."""
    with pytest.raises(ConfigError, match=r"betas is .*: give two numbers in \[0, 1\)"):
        CLASSES[name]([matrix(2, 3)], betas=betas)


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "Hyperball", "MD", "Muown", "MARS-M", "Freon", "Kaon"])
@pytest.mark.parametrize("momentum", [1.0, -0.5])
def test_momenta_out_of_range_are_refused(name: str, momentum: float) -> None:
    """A number in [0, 1)."""
    with pytest.raises(ConfigError, match=rf"momentum is {momentum}: give a number in \[0, 1\)"):
        CLASSES[name]([matrix(2, 3)], momentum=momentum)


@pytest.mark.parametrize("name", MATRICES_ONLY)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_matrix_optimizers_refuse_vectors(name: str, shape: tuple[int, ...]) -> None:
    """Fewer than two dimensions hold no matrix: the error says whom they belong to."""
    with pytest.raises(ConfigError, match="give vectors and scalars to AdamW"):
        CLASSES[name]([Parameter(torch.ones(shape))])


@pytest.mark.parametrize("name", MATRICES_ONLY)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
def test_matrix_optimizers_refuse_what_has_no_elements(name: str, shape: tuple[int, ...]) -> None:
    """There is no direction to step in, and shape factors divide by a side."""
    with pytest.raises(ConfigError, match="has no elements: leave it out"):
        CLASSES[name]([Parameter(torch.ones(shape))])


@pytest.mark.parametrize(
    ("name", "key"),
    [("MD", "gain_lr"), ("MARS", "gamma"), ("AdamP", "delta"), ("AdamP", "wd_ratio"), ("Scion", "rho")],
)
def test_negative_factors_are_refused(name: str, key: str) -> None:
    """They would turn a step or a decay around without a word."""
    with pytest.raises(ConfigError, match=f"{key} is -1.0: give 0 or more"):
        CLASSES[name]([matrix(2, 3)], **{key: -1.0})


@pytest.mark.parametrize("name", NONZERO)
def test_weights_without_a_norm_are_refused_where_the_norm_is_kept(name: str) -> None:
    """A matrix of zeros can never leave 0, and its direction does not exist."""
    with pytest.raises(ConfigError, match="norm 0"):
        CLASSES[name]([Parameter(torch.zeros(3, 4))])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SNOO(torch.optim.SGD([p], lr=0.1)),
        lambda p: GPA(torch.optim.SGD([p], lr=0.1)),
        lambda p: AnytimeAverage(torch.optim.SGD([p], lr=0.1)),
        lambda p: ScheduleFreeAdamW([p]),
        lambda p: ScheduleFreePlus([p]),
        lambda p: Combined(ScheduleFreeAdamW([p])),
    ],
    ids=["SNOO", "GPA", "AnytimeAverage", "ScheduleFreeAdamW", "ScheduleFreePlus", "Combined"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stepping_in_eval_mode_is_an_error_and_moves_nothing(make: Any, dtype: torch.dtype) -> None:
    """bfloat16 through Master."""
    p = Parameter(matrix(3, 4).detach().to(dtype))
    optimizer = Master(lambda gs: make(gs[0]["params"][0]), [p]) if dtype == torch.bfloat16 else make(p)

    def step() -> None:
        p.grad = torch.ones_like(p)
        if getattr(optimizer, "needs_loss", False):
            optimizer.step(loss=1.0)
        else:
            optimizer.step()

    step()
    optimizer.eval()
    before = p.detach().clone()
    with pytest.raises(EvalModeError, match=r"call train\(\) first"):
        step()
    assert torch.equal(p, before)
    optimizer.train()
    step()
    assert not torch.equal(p, before)
