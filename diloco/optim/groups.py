"""Sorting a model's parameters into matrix, embed, head, router and scalar groups. Optimizers are built in `build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
_ROUTERS = {"router", "gate"}
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one parameter goes and why; `blocks`, `stacked` and `normalized` are for the matrix group."""

    name: str
    group: str
    why: str
    blocks: tuple[int, ...] | int = 1
    stacked: bool | None = None
    normalized: bool = False


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
    router: str | None = None,
    normalized: Sequence[str] = ("auto",),
    normalized_decay: float = 0.0,
) -> list[ParamGroup]:
    """Groups for torch optimizers: every trainable parameter in exactly one.

    matrix   hidden weights of two or more dimensions: lr `matrix_lr` (default `lr`), decay `weight_decay`. Stacked
             experts ``[E, r, c]`` are E matrices; convolutions are flattened. One group per block layout.
    embed    token and position embeddings, and a tied head: lr times d_model/`d_base` (1 without `d_base`), no decay.
    head     an untied output projection, known by its usual names or by `head`: lr, decay `head_weight_decay`.
    router   a mixture's gate of one row per expert: lr, no decay. Modules called "router", or "gate" beside as many
             experts, or `router`.
    scalar   fewer than two dimensions: lr, no decay.

    Args:
        blocks: fused weights by (part of) their name: number of equal blocks along dim 0, or the block sizes.
            ``in_proj_weight`` of torch's MultiheadAttention is known to be three. Default: what the model itself
            says in an attribute ``fused_blocks``.
        normalized: parts of the names of matrices directly followed by a normalisation; "auto" adds those that are
            found by name or order (`followed_by_norm`), and is the default. They decay by `normalized_decay`: ordinary
            decay there makes gradient norms grow late in training (arXiv 2506.02285). For matrices that AdamW trains:
            give ``()`` to let all decay alike.

    Each group has `name`, `params`, `param_names`, `normalized` (of matrices), and `why`: one sentence per parameter.
    Empty groups are left out.

    Raises:
        ConfigError: no trainable parameter, or a name in `blocks`, `head`, `router` or `normalized` that matches none.
    """
    placements = place(model, blocks=blocks, head=head, router=router, normalized=normalized)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    multiplier = _width(model) / d_base if d_base else 1.0
    settings = {
        "matrix": (lr if matrix_lr is None else matrix_lr, weight_decay),
        "embed": (lr * multiplier, 0.0),
        "head": (lr, head_weight_decay),
        "router": (lr, 0.0),
        "scalar": (lr, 0.0),
    }
    groups: dict[tuple[object, ...], ParamGroup] = {}
    for kind, (rate, decay) in settings.items():
        for placement in (x for x in placements if x.group == kind):
            key = (kind, placement.blocks, placement.stacked, placement.normalized)
            if key not in groups:
                groups[key] = {"name": kind, "params": [], "param_names": [], "why": []}
                groups[key].update(lr=rate, weight_decay=decay)
                if kind == "matrix":
                    groups[key].update(blocks=placement.blocks, stacked=placement.stacked)
                    groups[key]["normalized"] = placement.normalized
                if placement.normalized:
                    groups[key]["weight_decay"] = normalized_decay
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
    model: nn.Module,
    *,
    blocks: Mapping[str, Blocks] | None = None,
    head: str | None = None,
    router: str | None = None,
    normalized: Sequence[str] = (),
) -> list[Placement]:
    """One `Placement` per trainable parameter, in model order, under the first of its names."""
    uses: dict[int, list[tuple[str, nn.Module, Parameter]]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                uses.setdefault(id(p), []).append((f"{path}.{name}" if path else name, module, p))
    if not uses:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: nothing to optimise")
    if blocks is None:
        blocks = getattr(bare(model), "fused_blocks", {})
    names = [name for users in uses.values() for name, _, _ in users]
    patterns = [x for x in normalized if x != "auto"]
    for wanted in [*blocks, *patterns, *(x for x in (head, router) if x)]:
        if not any(wanted in name for name in names):
            raise ConfigError(f"{wanted!r} is part of no parameter's name: see model.named_parameters()")
    before_norm = {name for name in names if any(x in name for x in patterns)}
    if "auto" in normalized:
        before_norm |= followed_by_norm(model)
    gates = {name for name in names if _is_router(model, name, router)}
    return [_place(users, blocks, head, gates, before_norm) for users in uses.values()]


def followed_by_norm(model: nn.Module) -> set[str]:
    """Names of the weights that a normalisation visibly follows: heuristic, since only the forward knows.

    In an `nn.Sequential` a weight whose next module is a norm; elsewhere the query and key projections (``q_proj``,
    ``wq``, ``q``, ...) of a module that has ``q_norm`` and ``k_norm``.
    """
    found = set()
    for path, module in model.named_modules():
        children = dict(module.named_children())
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Sequential):
            ordered = list(children.items())
            pairs = pairwise(ordered)
            follow = [name for (name, _), (_, after) in pairs if isinstance(after, _NORMS)]
        else:
            normed = [x for x in "qk" if f"{x}_norm" in children]
            follow = [n for x in normed for n in (x, f"{x}_proj", f"w{x}", f"to_{x}") if n in children]
        for name in follow:
            if isinstance(getattr(children[name], "weight", None), Parameter):
                found.add(f"{prefix}{name}.weight")
    return found


def _is_router(model: nn.Module, name: str, given: str | None) -> bool:
    """A "router" is one; a "gate" only with one output per expert, since gated feed-forward layers have gates too."""
    path, _, leaf = name.rpartition(".")
    p = model.get_parameter(name)
    if p.ndim != 2:
        return False
    if given is not None:
        return given in name
    parent, _, module = (path if leaf == "weight" else name).rpartition(".")
    if module not in _ROUTERS:
        return False
    return module == "router" or p.shape[0] in _expert_counts(model.get_submodule(parent))


def _expert_counts(module: nn.Module) -> set[int]:
    lists = (len(m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and "expert" in n)
    return {p.shape[0] for n, p in module.named_parameters() if p.ndim == 3 and "expert" in n} | set(lists)


def _place(
    users: list[tuple[str, nn.Module, Parameter]],
    blocks: Mapping[str, Blocks],
    head: str | None,
    routers: set[str],
    normalized: set[str],
) -> Placement:
    name, module, p = users[0]
    if p.ndim < 2:
        return Placement(name, "scalar", f"{name}: {'vector' if p.ndim else 'number'}, a gain, bias or gate")
    tied = [n for n, _, _ in users[1:]]
    for n, m, _ in users:
        if _is_embedding(n, m):
            also = f", tied with {', '.join(x for x, _, _ in users if x != n)}" if tied else ""
            return Placement(name, "embed", f"{n}: embedding{also}")
    for n, _, _ in users:
        if head in n if head else _HEADS.intersection(n.split(".")[-2:]):
            return Placement(name, "head", f"{n}: output projection, not tied to an embedding")
    if name in routers:
        return Placement(name, "router", f"{name}: router, one row per expert")
    shape = "x".join(map(str, p.shape))
    before_norm = name in normalized
    if isinstance(module, _CONVOLUTIONS):
        why = f"{name}: {shape} convolution, flattened to a matrix"
        return Placement(name, "matrix", why, stacked=False, normalized=before_norm)
    layout: Blocks = 3 if name.endswith("in_proj_weight") else 1
    for part, given in blocks.items():
        if part in name:
            layout = given
    fused = "" if layout == 1 else f" of fused blocks {layout}"
    kind = "hidden matrix" if p.ndim == 2 else "stack of matrices"
    sizes = layout if isinstance(layout, int) else tuple(layout)
    why = f"{name}: {shape} {kind}{fused}{', before a norm' if before_norm else ''}"
    return Placement(name, "matrix", why, sizes, True if p.ndim > 2 else None, before_norm)


def bare(model: nn.Module) -> nn.Module:
    """The user's own module inside torch's wrappers (compiled, data parallel)."""
    for attribute in ("_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and type(model).__module__.startswith("torch."):
            return bare(inner)
    return model


def _is_embedding(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    last = name.split(".")[-2:]
    return not isinstance(module, nn.Linear) and any("emb" in x or x in _EMBEDDINGS for x in last)


def width(model: nn.Module) -> int | None:
    """d_model: the columns of the first embedding, or None without one."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
    return None


def _width(model: nn.Module) -> int:
    found = width(model)
    if found is None:
        raise ConfigError(
            "d_base was given, but the model has no nn.Embedding to take d_model from: leave d_base out"
        )
    return found
