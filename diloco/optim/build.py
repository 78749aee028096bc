"""From a configuration to an optimizer: which class serves which parameter group.

The settings and their defaults are in `diloco.optim_section`, the sorting of parameters in `groups`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from diloco.config import RunConfig
from diloco.errors import ConfigError, nearest
from diloco.optim.adamp import AdamP
from diloco.optim.adamw import AdamW
from diloco.optim.combine import Combined
from diloco.optim.freon import Freon
from diloco.optim.groups import bare, param_groups, width
from diloco.optim.hyperball import Hyperball
from diloco.optim.kaon import Kaon
from diloco.optim.mars import MARS
from diloco.optim.master import Master
from diloco.optim.matrices import split
from diloco.optim.md import MD
from diloco.optim.muon import Muon
from diloco.optim.muown import Muown
from diloco.optim.normuon import NorMuon
from diloco.optim.schedule_free import ScheduleFreeAdamW
from diloco.optim.schedule_free_plus import ScheduleFreePlus
from diloco.optim.scion import Scion
from diloco.optim.state import ParamGroup
from diloco.optim_section import KINDS, Optim, composition_problem, uses

OUTERS = ("none", "snoo", "gpa", "anytime", "diloco")
_ORTH = ("momentum", "coefficients", "iteration_dtype", "form", "start")
_DECAYED = ("nesterov", "scale", "cautious")


class Section(Protocol):
    """What a pydantic model offers."""

    def model_dump(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One optimizer to be: its class, its groups in torch's form, and options common to them."""

    make: Callable[..., torch.optim.Optimizer]
    groups: list[ParamGroup]
    options: dict[str, Any]

    @property
    def algorithm(self) -> str:
        base = self.options.get("base")
        return self.make.__name__ + (f" ({base})" if base else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One trainable parameter and what trains it; `weight_decay` is 0 where the algorithm has none."""

    name: str
    shape: tuple[int, ...]
    numel: int
    group: str
    algorithm: str
    lr: float
    weight_decay: float
    blocks: int | tuple[int, ...]
    why: str


def build_optimizer(
    model: nn.Module,
    config: Mapping[str, Any] | Section,
    *,
    total_steps: int | None = None,
    wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that the configuration's [optim] section asks for, over all trainable parameters.

        adamw, adamp, mars, sgd, schedule-free, schedule-free-plus    one optimizer for everything
        muon, normuon, hyperball, muown, mars-m, freon, kaon          for the matrices; AdamW for the rest
        md, md-adam    matrices on spheres; embedding and head rows on unit spheres, the head's and routers' with
                       gains; AdamW without decay for the rest. Sets `model.embed_scale` to sqrt(d_model)
        scion          spectral for matrices, `embed_norm` for embeddings and head, rms for vectors

    Two optimizers come as one `Combined`. For bfloat16 parameters everything, `wrap` included, goes inside a `Master`
    in remainder mode. Make the optimizer before the first forward: md scales the weights.

    Args:
        config: the section, or a whole configuration with an `optim` part, as a mapping or a pydantic model. A value
            of None counts as not given; `iteration_dtype` may be a torch dtype.
        total_steps: length of the run, for kinds that need it; default `optim.total_steps`, then
            `run.inner_steps_total` of a whole configuration.
        wrap: applied to the inner optimizer, such as ``lambda o: SNOO(o, k=10)``.

    Raises:
        ConfigError: unknown kind or key, value out of range, a key that the kind does not use, or a model that the
            kind cannot train.
    """
    section, steps = _section(config)
    _check_embeddings(model, section)
    if section.kind in ("md", "md-adam") and (d_model := width(model)):
        # Rows of norm 1 make activations of rms 1/sqrt(d_model), which the forward has to undo.
        bare(model).embed_scale = math.sqrt(d_model)  # type: ignore[assignment]
    members = plan(model, section, total_steps=total_steps or section.total_steps or steps)

    def make(groups: list[ParamGroup]) -> torch.optim.Optimizer:
        remaining = iter(groups)
        made = [m.make([next(remaining) for _ in m.groups], **m.options) for m in members]
        inner = made[0] if len(made) == 1 else Combined(*made)
        return wrap(inner) if wrap else inner

    groups = [group for member in members for group in member.groups]
    if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return Master(make, groups, mode="remainder")
    return make(groups)


def check_composition(inner: str, outer: str) -> None:
    """Refuse an outer optimizer (none, snoo, gpa, anytime, diloco) that cannot go around inner ones of this kind.

    Raises:
        ConfigError: an unknown name, or a combination that has no meaning, with the reason and what to use.
    """
    for name, value, known in (("optim.kind", inner, KINDS), ("outer", outer, OUTERS)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}: known are {', '.join(known)}{nearest(value, known)}")
    problem = composition_problem(inner, outer)
    if problem:
        raise ConfigError(problem)


def explain(
    model: nn.Module, config: Mapping[str, Any] | Section, *, total_steps: int | None = None
) -> list[Row]:
    """What `build_optimizer` would do with every trainable parameter, in model order. Works on the meta device."""
    section, steps = _section(config)
    _check_embeddings(model, section)
    rows: dict[str, Row] = {}
    for member in plan(model, section, total_steps=total_steps or section.total_steps or steps):
        for group in member.groups:
            if "blocks" in group:
                for p in group["params"]:
                    split(p.detach(), group)  # refuses blocks that do not fit, as the optimizer would
            for name, p, why in zip(group["param_names"], group["params"], group["why"], strict=True):
                decay = group.get("weight_decay", 0.0)
                layout = group.get("blocks", 1)
                rows[name] = Row(
                    name,
                    tuple(p.shape),
                    p.numel(),
                    group["name"],
                    member.algorithm,
                    float(group["lr"]),
                    float(decay),
                    layout,
                    why.removeprefix(f"{name}: "),
                )
    return [rows[name] for name, _ in model.named_parameters() if name in rows]


def plan(model: nn.Module, section: Optim, *, total_steps: int | None = None) -> list[Member]:
    """The optimizers that serve the model, matrices first; together their groups hold every trainable parameter once."""
    kind = section.kind
    adamc = section.decay == "adamc"
    groups = param_groups(
        model,
        lr=section.lr,
        matrix_lr=section.matrix_lr,
        weight_decay=section.weight_decay,
        normalized_decay=section.weight_decay if adamc else 0.0,
        normalized=_normalized(section),
        **_given(section, "head_weight_decay", "d_base", "blocks", "head", "router"),
    )
    if kind in _WHOLE:
        return [_WHOLE[kind](groups, section)]
    if kind == "scion":
        return [_scion(groups, section)]
    matrices = [_without(g, "normalized") for g in groups if g["name"] == "matrix"]
    rest = [g for g in groups if g["name"] != "matrix"]
    if not matrices:
        raise ConfigError(f"optim.kind is {kind!r}, but the model has no matrix for it: use 'adamw'")
    if kind in ("md", "md-adam"):
        return _md(matrices, rest, section, width(model))
    if kind in ("hyperball", "muown"):
        matrices = [_without(g, "weight_decay") for g in matrices]
    first = _matrices(kind, matrices, section, total_steps)
    return [first, _adamw(rest, section)] if rest else [first]


def _normalized(section: Optim) -> tuple[str, ...]:
    """Names of weights that a normalisation follows, found by themselves unless given: it is Adam's kinds that care."""
    if section.normalized is not None:
        return section.normalized
    return ("auto",) if uses(section.kind, "normalized") else ()


def _matrices(kind: str, groups: list[ParamGroup], section: Optim, total_steps: int | None) -> Member:
    match kind:
        case "muon":
            return Member(Muon, groups, _given(section, *_ORTH, *_DECAYED))
        case "normuon":
            return Member(NorMuon, groups, _given(section, *_ORTH, *_DECAYED, "variant", "beta2"))
        case "hyperball":
            return Member(Hyperball, groups, _given(section, *_ORTH, "nesterov", "base", "beta2"))
        case "mars-m":
            return Member(MARS, groups, {"base": "muon", **_given(section, *_ORTH, "gamma")})
        case "freon":
            freon = ("momentum", "iteration_dtype", *_DECAYED, "q", "method")
            return Member(Freon, groups, _given(section, *freon))
        case "kaon":
            return Member(
                Kaon, groups, _given(section, "momentum", "iteration_dtype", *_DECAYED, "iterations")
            )
    if total_steps is None:
        raise ConfigError("optim.kind is 'muown', whose row norms grow over the run: give optim.total_steps")
    return Member(Muown, groups, {"total_steps": total_steps, **_given(section, *_ORTH, "n_target")})


def _adamw(groups: list[ParamGroup], section: Optim) -> Member:
    groups = [_without(g, "blocks", "stacked", "normalized") for g in groups]
    params = [p for g in groups for p in g["params"]]
    if any(p.dtype == torch.float16 for p in params):  # torch's would keep its moments in 16 bits too
        return Member(AdamW, groups, {"betas": section.betas, "eps": section.eps})
    # One kernel per step instead of one per parameter and operation, which on a CPU is most of the time.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    return Member(torch.optim.AdamW, groups, {"betas": section.betas, "eps": section.eps, "fused": fused})


def _adamw_whole(groups: list[ParamGroup], section: Optim) -> Member:
    if section.decay in (None, "decoupled"):
        return _adamw(groups, section)
    # Without names every hidden matrix counts as normalised, as in pre-norm models (arXiv 2506.02285).
    everything = not section.normalized
    marked = []
    for g in groups:
        corrected = g["name"] == "matrix" and (everything or g["normalized"])
        how = section.decay if section.decay == "cautious" or corrected else "decoupled"
        marked.append(_without(g, "blocks", "stacked", "normalized") | {"decay": how})
    return Member(AdamW, marked, {"betas": section.betas, "eps": section.eps})


def _simple(make: Callable[..., torch.optim.Optimizer], *keys: str) -> Callable[..., Member]:
    """A class that takes every group as it is, and these settings."""

    def member(groups: list[ParamGroup], section: Optim) -> Member:
        plain = [_without(g, "blocks", "stacked", "normalized") for g in groups]
        return Member(make, plain, _given(section, *keys))

    return member


def _mars(groups: list[ParamGroup], section: Optim) -> Member:
    groups = [_without(g, "normalized") for g in groups]
    return Member(MARS, groups, {"base": "adamw", **_given(section, "betas", "eps", "gamma")})


def _schedule_free(groups: list[ParamGroup], section: Optim) -> Member:
    options = _given(section, "betas", "eps") | {"warmup_steps": section.warmup or 0}
    return Member(
        ScheduleFreeAdamW, [_without(g, "blocks", "stacked", "normalized") for g in groups], options
    )


def _sgd(groups: list[ParamGroup], section: Optim) -> Member:
    momentum = 0.9 if section.momentum is None else section.momentum
    if section.nesterov and momentum == 0:
        raise ConfigError("optim.nesterov is true with optim.momentum = 0: give a momentum, such as 0.9")
    groups = [_without(g, "blocks", "stacked", "normalized") for g in groups]
    return Member(torch.optim.SGD, groups, {"momentum": momentum, "nesterov": bool(section.nesterov)})


_PLUS = ("betas", "eps", "beta", "beta_max", "anneal_steps", "c_warmup")
_WHOLE: dict[str, Callable[[list[ParamGroup], Optim], Member]] = {
    "adamw": _adamw_whole,
    "adamp": _simple(AdamP, "betas", "eps", "delta", "wd_ratio"),
    "mars": _mars,
    "schedule-free": _schedule_free,
    "schedule-free-plus": _simple(ScheduleFreePlus, *_PLUS),
    "sgd": _sgd,
}


def _scion(groups: list[ParamGroup], section: Optim) -> Member:
    embed = {"norm": section.embed_norm or "sign", "rho": section.embed_rho or 3000.0}
    hidden = {"norm": "spectral", "rho": section.rho or 50.0}
    # A gain starts at 1, on the surface of the ball of radius 1 in the rms norm.
    of = {"embed": embed, "head": embed, "scalar": {"norm": "bias", "rho": 1.0}}
    chosen = [_without(g, "weight_decay", "normalized") | of.get(g["name"], hidden) for g in groups]
    return Member(Scion, chosen, _given(section, *_ORTH, "constrained", "spectral_max"))


def _md(
    matrices: list[ParamGroup], rest: list[ParamGroup], section: Optim, d_model: int | None
) -> list[Member]:
    base = "adam" if section.kind == "md-adam" else section.base or "muon"
    assert section.matrix_lr is not None
    gain_lr = section.matrix_lr / 10 if section.gain_lr is None else section.gain_lr
    radius = section.radius or ("shape" if d_model is None else "init")
    groups = [_without(g, "weight_decay") | {"base": base} for g in matrices]
    for g in rest:
        if g["name"] == "router":
            row = {"base": base, "lr": section.matrix_lr, "sphere": "row", "gains": True}
        else:
            row = {"base": "adam", "sphere": "row", "gains": g["name"] == "head"}
        if g["name"] != "scalar":
            groups.append(_without(g, "weight_decay") | row)
    options = _given(section, *_ORTH, "betas", "eps")
    options.update(gain_lr=gain_lr, radius=radius, d_model=d_model)
    scalars = [g for g in rest if g["name"] == "scalar"]
    first = Member(MD, groups, options)
    return [first, _adamw(scalars, section)] if scalars else [first]


def _check_embeddings(model: nn.Module, section: Optim) -> None:
    own = bare(model)
    spheres = section.kind in ("md", "md-adam") and width(model) is not None
    if spheres and not hasattr(own, "embed_scale"):
        raise ConfigError(
            f"optim.kind 'md' keeps embedding rows at norm 1, so that {type(own).__name__} must multiply the embedding "
            "by sqrt(d_model): give it an attribute embed_scale = 1.0 that its forward multiplies by"
        )


def _section(config: Mapping[str, Any] | Section) -> tuple[Optim, int | None]:
    if isinstance(config, Optim):
        return config, None
    if isinstance(config, RunConfig):
        return config.optim, config.run.inner_steps_total
    whole = config if isinstance(config, Mapping) else config.model_dump()
    given = whole["optim"] if isinstance(whole.get("optim"), Mapping) else whole
    run = whole.get("run")
    steps = run.get("inner_steps_total") if isinstance(run, Mapping) else None
    plain = {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in given.items()}
    return RunConfig.from_dict({"optim": plain, "schedule": {"kind": "constant"}}).optim, steps


def _given(section: Optim, *keys: str) -> dict[str, Any]:
    found = {key: getattr(section, key) for key in keys}
    return {key: _lists(value) for key, value in found.items() if value is not None}


def _lists(value: Any) -> Any:
    """Groups hold lists of coefficients, as a state dictionary read from JSON does."""
    return (
        [list(v) for v in value]
        if isinstance(value, tuple) and value and isinstance(value[0], tuple)
        else value
    )


def _without(group: ParamGroup, *keys: str) -> ParamGroup:
    return {k: v for k, v in group.items() if k not in keys}
