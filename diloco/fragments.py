"""Which parameters travel together, and when: spans, fragments and the plan that every node derives alike.

No tensors are kept here; `gather` and `scatter` copy between a model's tensors and one flat fp32 buffer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.errors import ConfigError

ROLES = ("matrix", "embed", "head", "router", "scalar")  # as `diloco.optim.groups.place` sorts parameters
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of the row-major flattened tensor `name`, at `offset` in its fragment's buffer.

    `role` is one of `ROLES` where the plan tells roles, else empty.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    role: str = ""


@dataclass(frozen=True, slots=True)
class Fragment:
    index: int
    spans: tuple[Span, ...]
    first_step: int  # t_p: the offset of its turns within H

    @property
    def numel(self) -> int:
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True, slots=True)
class FragmentPlan:
    """The partition of a model into fragments and the schedule of their turns (2501.18512)."""

    fragments: tuple[Fragment, ...]
    H: int
    first_round: str = "short"

    def due(self, step: int) -> tuple[int, ...]:
        """Fragments that are sent after inner step `step` (counted from 1)."""
        return tuple(f.index for f in self.fragments if self._sends(f, step))

    def _sends(self, fragment: Fragment, step: int) -> bool:
        since = step - fragment.first_step
        if step <= 0 or since < 0 or since % self.H:
            return False
        return not (since == 0 and self.first_round == "full")

    def round_of(self, fragment: int, step: int) -> int:
        """The number of the round that `fragment` sends at `step`: the same on every node."""
        return (step - self.fragments[fragment].first_step) // self.H

    def flush_round(self, fragment: int, step: int) -> int:
        """The number of the extra round that ends a run of `step` inner steps."""
        return self.round_of(fragment, step) + 1

    @property
    def numel(self) -> int:
        return sum(fragment.numel for fragment in self.fragments)

    def describe(self) -> str:
        """The whole plan as canonical JSON: what a joining worker shows and `from_description` reads."""
        fragments = [
            {"first_step": f.first_step, "spans": [_described(span) for span in f.spans]}
            for f in self.fragments
        ]
        plan = {"H": self.H, "first_round": self.first_round, "fragments": fragments}
        return json.dumps(plan, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of the description: peers with another plan are refused."""
        return hashlib.sha256(self.describe().encode()).hexdigest()

    @classmethod
    def from_description(cls, text: str) -> FragmentPlan:
        """Inverse of `describe`. Raises ConfigError on anything that is not a whole plan."""
        try:
            raw = json.loads(text)
            fragments = tuple(
                _fragment(
                    i,
                    int(f["first_step"]),
                    [
                        (str(s[0]), tuple(map(int, s[1])), int(s[2]), int(s[3]), str(s[4]) if s[4:] else "")
                        for s in f["spans"]
                    ],
                )
                for i, f in enumerate(raw["fragments"])
            )
            plan = cls(fragments, int(raw["H"]), str(raw["first_round"]))
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise ConfigError(f"the fragment plan cannot be read: {error!r}") from None
        if not plan.fragments or plan.H < 1 or any(f.numel < 1 for f in plan.fragments):
            raise ConfigError("the fragment plan is empty or has an empty fragment")
        if plan.first_round not in ("short", "full"):
            raise ConfigError(
                f"the fragment plan's first_round = {plan.first_round!r} is not 'short' or 'full'"
            )
        if unknown := {s.role for f in plan.fragments for s in f.spans} - {*ROLES, ""}:
            raise ConfigError(f"the fragment plan has tensors of the unknown role {min(unknown)!r}")
        if any(not 0 <= f.first_step < plan.H for f in plan.fragments):
            raise ConfigError(f"a fragment's first_step lies outside 0..H-1 = {plan.H - 1}")
        _require_whole(plan)
        return plan

    def difference(self, other: FragmentPlan) -> str:
        """In words, the first thing in which two plans differ: for the worker that is refused."""
        ours = {s.name: s.shape for f in self.fragments for s in f.spans}
        theirs = {s.name: s.shape for f in other.fragments for s in f.spans}
        for name, shape in ours.items():
            if name not in theirs:
                return f"tensor {name!r} of the run is missing in the worker's model"
            if theirs[name] != shape:
                return f"tensor {name!r} has shape {list(theirs[name])} in the worker's model and {list(shape)} in the run"
        for name in theirs:
            if name not in ours:
                return f"tensor {name!r} of the worker's model does not exist in the run"
        roles = {s.name: s.role for f in other.fragments for s in f.spans}
        for span in (s for f in self.fragments for s in f.spans):
            if roles[span.name] != span.role:
                return (
                    f"tensor {span.name!r} has role {roles[span.name]!r} in the worker's model and {span.role!r} in the "
                    "run, and so another codec"
                )
        if len(self.fragments) != len(other.fragments):
            return f"the worker has {len(other.fragments)} fragments and the run {len(self.fragments)}"
        return "the fragments' order, ranges or schedule differ: use the same [stream] settings"


def _described(span: Span) -> list[object]:
    role = [span.role] if span.role else []
    return [span.name, list(span.shape), span.start, span.stop, *role]


def _fragment(
    index: int, first_step: int, parts: Iterable[tuple[str, tuple[int, ...], int, int, str]]
) -> Fragment:
    spans, offset = [], 0
    for name, shape, start, stop, role in parts:
        spans.append(Span(name, shape, start, stop, offset, role))
        offset += stop - start
    return Fragment(index, tuple(spans), first_step)


def _require_whole(plan: FragmentPlan) -> None:
    """ConfigError unless the fragments hold every element of every tensor exactly once."""
    spans: dict[str, list[Span]] = {}
    for span in (s for f in plan.fragments for s in f.spans):
        spans.setdefault(span.name, []).append(span)
    for name, parts in spans.items():
        shape, end = parts[0].shape, 0
        if any(d < 1 for d in shape) or any(p.shape != shape for p in parts):
            raise ConfigError(f"the plan's tensor {name!r} has no single valid shape: {shape}")
        whole = True
        for part in sorted(parts, key=lambda p: p.start):
            whole = whole and part.start == end < part.stop
            end = part.stop
        if not whole or end != math.prod(shape):
            raise ConfigError(f"the plan does not cover tensor {name!r} of shape {shape} exactly once")


def block_of(name: str) -> int | None:
    """The transformer block a tensor belongs to: the first number in its dotted name, as in ``blocks.3.wq``."""
    found = _BLOCK.search(name)
    return int(found.group(1)) if found else None


def build_plan(
    shapes: Mapping[str, Sequence[int]],
    H: int,
    *,
    layout: str = "strided",
    frag_layers: int = 3,
    offsets: str | Sequence[int] = "auto",
    first_round: str = "short",
    roles: Mapping[str, str] | None = None,
) -> FragmentPlan:
    """Cut a model into fragments of whole blocks (2501.18512 section 2.1).

    `shapes` maps each trainable tensor once (a tied tensor under one name) to its shape, in declaration order.
    ``strided`` puts block l into fragment l mod ceil(L / frag_layers), ``sequential`` puts neighbours together,
    ``balanced`` packs tensors greedily by size (2604.21428), ``single`` makes one fragment. Tensors outside
    the blocks (embedding, head, final norm) form one more fragment. `roles` are the tensors' roles, for runs in which
    codecs depend on them: they become part of the plan and its digest. Raises ConfigError on an empty model,
    an unknown layout, or offsets that do not fit.
    """
    if not shapes:
        raise ConfigError("the model has no trainable tensor: nothing to train across workers")
    bins = _BINS[layout](shapes, frag_layers) if layout in _BINS else None
    if bins is None:
        raise ConfigError(f"stream.layout = {layout!r} is unknown; use one of {', '.join(_BINS)}")
    bins = [names for names in bins if names]
    count = len(bins)
    if isinstance(offsets, str):
        first_steps = [p * max(1, H // count) % H for p in range(count)]
    else:
        first_steps = list(offsets)
        if len(first_steps) != count or any(not 0 <= t < H for t in first_steps):
            raise ConfigError(
                f"stream.offsets = {first_steps} must hold {count} steps (one per fragment) from 0 to H-1 = {H - 1}"
            )
    return FragmentPlan(
        tuple(
            _fragment(
                p,
                first_steps[p],
                [(n, tuple(shapes[n]), 0, math.prod(shapes[n]), roles[n] if roles else "") for n in names],
            )
            for p, names in enumerate(bins)
        ),
        H,
        first_round,
    )


def _by_block(shapes: Mapping[str, Sequence[int]], frag_layers: int, strided: bool) -> list[list[str]]:
    order = sorted({b for b in map(block_of, shapes) if b is not None})
    rank = {block: i for i, block in enumerate(order)}
    count = -(-len(order) // frag_layers)
    bins: list[list[str]] = [[] for _ in range(count + 1)]
    for name in shapes:
        block = block_of(name)
        if block is None:
            bins[count].append(name)
        else:
            bins[rank[block] % count if strided else rank[block] // frag_layers].append(name)
    return bins


def _balanced(shapes: Mapping[str, Sequence[int]], frag_layers: int) -> list[list[str]]:
    count = len([b for b in _by_block(shapes, frag_layers, True) if b])
    loads = [0] * count
    chosen: dict[str, int] = {}
    for name in sorted(shapes, key=lambda n: (-math.prod(shapes[n]), n)):
        lightest = loads.index(min(loads))
        chosen[name] = lightest
        loads[lightest] += math.prod(shapes[name])
    return [[n for n in shapes if chosen[n] == p] for p in range(count)]


_BINS: dict[str, Callable[[Mapping[str, Sequence[int]], int], list[list[str]]]] = {
    "strided": lambda shapes, k: _by_block(shapes, k, True),
    "sequential": lambda shapes, k: _by_block(shapes, k, False),
    "balanced": _balanced,
    "single": lambda shapes, k: [list(shapes)],
}


def gather(fragment: Fragment, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
    """Copy a fragment's elements into one flat fp32 CPU buffer [numel]."""
    flat = torch.empty(fragment.numel, dtype=torch.float32) if out is None else out
    for span in fragment.spans:
        part = tensors[span.name].detach().reshape(-1)[span.start : span.stop]
        flat[span.offset : span.offset + span.stop - span.start].copy_(part)
    return flat


def scatter(fragment: Fragment, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Copy a flat buffer [numel] back into the tensors, in their own dtype and on their own device."""
    with torch.no_grad():
        for span in fragment.spans:
            tensor = tensors[span.name]
            part = flat[span.offset : span.offset + span.stop - span.start]
            if span.stop - span.start == tensor.numel():
                tensor.copy_(part.view(tensor.shape))
            else:
                tensor.view(-1)[span.start : span.stop].copy_(part)
