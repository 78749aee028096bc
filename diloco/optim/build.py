"""From a configuration to an optimizer: which class serves which parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from diloco.errors import ConfigError, nearest
from diloco.optim.combine import Combined
from diloco.optim.groups import param_groups
from diloco.optim.hyperball import Hyperball
from diloco.optim.muon import Muon
from diloco.optim.normuon import NorMuon
from diloco.optim.state import ParamGroup

KINDS = ("adamw", "muon", "normuon", "hyperball")
_GROUPING = ("lr", "matrix_lr", "weight_decay", "head_weight_decay", "d_base", "blocks", "head")
_ADAMW = ("betas", "eps")
_ORTH = ("momentum", "nesterov", "coefficients", "iteration_dtype", "form", "start")
_MATRIX = {
    "muon": (*_ORTH, "scale", "cautious"),
    "normuon": (*_ORTH, "scale", "cautious", "variant", "beta2"),
    "hyperball": (*_ORTH, "base", "beta2"),
}
_KNOWN = tuple(dict.fromkeys(("kind", *_GROUPING, *_ADAMW, *(k for keys in _MATRIX.values() for k in keys))))


class Section(Protocol):
    """What a pydantic model offers."""

    def model_dump(self) -> dict[str, Any]: ...


def build_optimizer(model: nn.Module, config: Mapping[str, Any] | Section) -> torch.optim.Optimizer:
    """The optimizer that the configuration's [optim] section asks for, over all trainable parameters.

    `config` is the section (or a whole configuration with an `optim` part), as a mapping or a pydantic model. `kind`
    is adamw (default), muon, normuon or hyperball; these take the matrix group and AdamW the rest, as one `Combined`.
    AdamW has betas (0.9, 0.95) and eps 1e-8. A value of None counts as not given. `iteration_dtype` may be a name.

    Raises:
        ConfigError: unknown kind, key or dtype, or a model without trainable parameters.
    """
    options = _options(config)
    kind = options.pop("kind", "adamw")
    if kind not in KINDS:
        raise ConfigError(f"optim.kind is {kind!r}: known are {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
    groups = param_groups(model, **{k: options[k] for k in _GROUPING if k in options})
    adam: dict[str, Any] = {"betas": (0.9, 0.95), **{k: options[k] for k in _ADAMW if k in options}}
    if kind == "adamw":
        return torch.optim.AdamW([_without(g, "blocks", "stacked") for g in groups], **adam)
    matrices = [g for g in groups if g["name"] == "matrix"]
    rest = [_without(g, "blocks", "stacked") for g in groups if g["name"] != "matrix"]
    if not matrices:
        raise ConfigError(f"optim.kind is {kind!r}, but the model has no matrix for it: use 'adamw'")
    chosen = {k: options[k] for k in _MATRIX[kind] if k in options}
    matrix: torch.optim.Optimizer
    if kind == "muon":
        matrix = Muon(matrices, **chosen)
    elif kind == "normuon":
        matrix = NorMuon(matrices, **chosen)
    else:
        matrix = Hyperball([_without(g, "weight_decay") for g in matrices], **chosen)
    return Combined(matrix, torch.optim.AdamW(rest, **adam)) if rest else matrix


def _options(config: Mapping[str, Any] | Section) -> dict[str, Any]:
    mapping = config if isinstance(config, Mapping) else config.model_dump()
    section = mapping["optim"] if isinstance(mapping.get("optim"), Mapping) else mapping
    for key in section:
        if key not in _KNOWN:
            raise ConfigError(
                f"optim has no key {key!r}: known are {', '.join(_KNOWN)}{nearest(key, _KNOWN)}"
            )
    return {k: v for k, v in section.items() if v is not None}


def _without(group: ParamGroup, *keys: str) -> ParamGroup:
    return {k: v for k, v in group.items() if k not in keys}
