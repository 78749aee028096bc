"""From a configuration to an optimizer: which class serves which parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from diloco.errors import ConfigError, nearest
from diloco.optim.combine import Combined
from diloco.optim.groups import param_groups
from diloco.optim.muon import Muon
from diloco.optim.normuon import NorMuon
from diloco.optim.state import ParamGroup

KINDS = ("adamw", "muon", "normuon")
_GROUPING = ("lr", "matrix_lr", "weight_decay", "head_weight_decay", "d_base", "blocks", "head")
_ADAMW = ("betas", "eps")
_MATRIX = ("momentum", "nesterov", "scale", "cautious", "coefficients", "iteration_dtype", "form", "start")
_NORMUON = ("variant", "beta2")
_KNOWN = ("kind", *_GROUPING, *_ADAMW, *_MATRIX, *_NORMUON)
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}


class Section(Protocol):
    """What a pydantic model offers."""

    def model_dump(self) -> dict[str, Any]: ...


def build_optimizer(model: nn.Module, config: Mapping[str, Any] | Section) -> torch.optim.Optimizer:
    """The optimizer that the configuration's [optim] section asks for, over all trainable parameters.

    `config` is the section (or a whole configuration with an `optim` part), as a mapping or a pydantic model. `kind`
    is adamw (default), muon or normuon; the last two take the matrix group and AdamW the rest, as one `Combined`.
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
        return torch.optim.AdamW([_plain(g) for g in groups], **adam)
    matrices = [g for g in groups if g["name"] == "matrix"]
    rest = [_plain(g) for g in groups if g["name"] != "matrix"]
    if not matrices:
        raise ConfigError(f"optim.kind is {kind!r}, but the model has no matrix for it: use 'adamw'")
    chosen = {k: options[k] for k in (*_MATRIX, *(_NORMUON if kind == "normuon" else ())) if k in options}
    matrix: torch.optim.Optimizer = (
        Muon(matrices, **chosen) if kind == "muon" else NorMuon(matrices, **chosen)
    )
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


def _plain(group: ParamGroup) -> ParamGroup:
    """AdamW takes a matrix as it is: the layout options mean nothing to it."""
    return {k: v for k, v in group.items() if k not in ("blocks", "stacked")}
