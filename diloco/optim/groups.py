"""Sorting a model's parameters into matrix, embed, head and scalar groups. Building optimizers is in `build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim.state import ParamGroup

Blocks = int | Sequence[int]
_HEADS = {
    "lm_head",
    "head",
    "output",
    "unembed",
    "unembedding",
    "embed_out",
    "output_projection",
    "to_logits",
}
_EMBEDDINGS = {"wte", "wpe"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one parameter goes and why; `blocks` and `stacked` are for the matrix group."""

    name: str
    group: str
    why: str
    blocks: tuple[int, ...] | int = 1
    stacked: bool | None = None


def param_groups(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    matrix_lr: float | None = None,
    weight_decay: float = 0.1,
    head_weight_decay: float = 0.0,
    d_base: int | None = None,
    blocks: Mapping[str, Blocks] | None = None,
    head: str | None = None,
) -> list[ParamGroup]:
    """Groups for torch optimizers: every trainable parameter in exactly one.

    matrix   hidden weights of two or more dimensions: lr `matrix_lr` (default `lr`), decay `weight_decay`. Stacked
             experts ``[E, r, c]`` are E matrices; convolutions are flattened. One group per block layout.
    embed    token and position embeddings, and a tied head: lr times d_model/`d_base` (1 without `d_base`), no decay.
    head     an untied output projection, known by its usual names or by `head`: lr, decay `head_weight_decay`.
    scalar   fewer than two dimensions: lr, no decay.

    Args:
        blocks: fused weights by (part of) their name: number of equal blocks along dim 0, or the block sizes.
            ``in_proj_weight`` of torch's MultiheadAttention is known to be three.

    Each group has `name`, `params`, `param_names`, and `why`: one sentence per parameter. Empty groups are left out.

    Raises:
        ConfigError: no trainable parameter, or a name in `blocks` or `head` that matches none.
    """
    placements = place(model, blocks=blocks, head=head)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    multiplier = _width(model) / d_base if d_base else 1.0
    settings = {
        "matrix": (lr if matrix_lr is None else matrix_lr, weight_decay),
        "embed": (lr * multiplier, 0.0),
        "head": (lr, head_weight_decay),
        "scalar": (lr, 0.0),
    }
    groups: dict[tuple[object, ...], ParamGroup] = {}
    for kind, (rate, decay) in settings.items():
        for placement in (x for x in placements if x.group == kind):
            key = (kind, placement.blocks, placement.stacked)
            if key not in groups:
                groups[key] = {"name": kind, "params": [], "param_names": [], "why": []}
                groups[key].update(lr=rate, weight_decay=decay)
                if kind == "matrix":
                    groups[key].update(blocks=placement.blocks, stacked=placement.stacked)
            groups[key]["params"].append(by_name[placement.name])
            groups[key]["param_names"].append(placement.name)
            groups[key]["why"].append(placement.why)
    placed = [id(p) for group in groups.values() for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(placed) == len(set(placed)) and set(placed) == trainable, (
        "a parameter is missing or placed twice"
    )
    return list(groups.values())


def place(
    model: nn.Module, *, blocks: Mapping[str, Blocks] | None = None, head: str | None = None
) -> list[Placement]:
    """One `Placement` per trainable parameter, in model order, under the first of its names."""
    uses: dict[int, list[tuple[str, nn.Module, Parameter]]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                uses.setdefault(id(p), []).append((f"{path}.{name}" if path else name, module, p))
    if not uses:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: nothing to optimise")
    names = [name for users in uses.values() for name, _, _ in users]
    for wanted in [*(blocks or {}), *([head] if head else [])]:
        if not any(wanted in name for name in names):
            raise ConfigError(f"{wanted!r} is part of no parameter's name: see model.named_parameters()")
    return [_place(users, blocks or {}, head) for users in uses.values()]


def _place(
    users: list[tuple[str, nn.Module, Parameter]], blocks: Mapping[str, Blocks], head: str | None
) -> Placement:
    name, module, p = users[0]
    if p.ndim < 2:
        return Placement(name, "scalar", f"{name}: {p.ndim} dimensions, a gain, bias or gate")
    tied = [n for n, _, _ in users[1:]]
    for n, m, _ in users:
        if _is_embedding(n, m):
            also = f", tied with {', '.join(x for x, _, _ in users if x != n)}" if tied else ""
            return Placement(name, "embed", f"{n}: embedding{also}")
    for n, _, _ in users:
        if head in n if head else _HEADS.intersection(n.split(".")[-2:]):
            return Placement(name, "head", f"{n}: output projection, not tied to an embedding")
    shape = "x".join(map(str, p.shape))
    if isinstance(module, _CONVOLUTIONS):
        return Placement(name, "matrix", f"{name}: {shape} convolution, flattened to a matrix", stacked=False)
    layout: Blocks = 3 if name.endswith("in_proj_weight") else 1
    for part, given in blocks.items():
        if part in name:
            layout = given
    fused = "" if layout == 1 else f" of fused blocks {layout}"
    kind = "hidden matrix" if p.ndim == 2 else "stack of matrices"
    sizes = layout if isinstance(layout, int) else tuple(layout)
    return Placement(name, "matrix", f"{name}: {shape} {kind}{fused}", sizes, True if p.ndim > 2 else None)


def _is_embedding(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    last = name.split(".")[-2:]
    return not isinstance(module, nn.Linear) and any("emb" in x or x in _EMBEDDINGS for x in last)


def _width(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
    raise ConfigError(
        "d_base was given, but the model has no nn.Embedding to take d_model from: leave d_base out"
    )
