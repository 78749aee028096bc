"""What the wrappers `snoo` and `gpa` share: their state inside the wrapped optimizer's, and work on many parameters.

A wrapper adds prefixed entries, per parameter and per group, so that anything that can store a torch optimizer can
store it, and takes them out again before the wrapped optimizer loads the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.kernels import ops
from diloco.optim.sharded import local
from diloco.optim.state import StateDict, params_in_order

BATCH = 1 << 26  # elements: temporaries of one batched operation stay below 256 MiB


def batches(params: Iterable[Tensor], limit: int = BATCH) -> Iterator[list[Tensor]]:
    """`params` in order, those of equal device and dtype together, for torch's `_foreach` operations.

    At most `limit` elements at a time; a larger parameter comes alone.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        alike.setdefault((p.device, p.dtype), []).append(p)
    for group in alike.values():
        taken: list[Tensor] = []
        count = 0
        for p in group:
            if taken and count + p.numel() > limit:
                yield taken
                taken, count = [], 0
            taken.append(p)
            count += p.numel()
        yield taken


def swap_lerp(pairs: Iterable[tuple[Tensor, Tensor]], weight: float) -> None:
    """``(a, b) <- (b, a + weight*(b - a))`` for each pair, in place, computed in the wider dtype of the two.

    One pass over both on a CPU in float32, by `diloco.kernels.ops.swap_lerp`; else torch's `_foreach` operations.
    """
    others: dict[Tensor, Tensor] = {}
    for a, b in pairs:
        a, b = local(a.detach()), local(b.detach())
        if all(
            t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() and not t.is_sparse
            for t in (a, b)
        ):
            ops.swap_lerp(a.view(-1), b.view(-1), weight)
        else:
            others[a] = b
    for ones in batches(others):
        twos = [others[a] for a in ones]
        wide = torch.promote_types(ones[0].dtype, twos[0].dtype)
        us, vs = ([t.to(wide) for t in ts] for ts in (ones, twos))
        mixed = torch._foreach_lerp(us, vs, weight)
        torch._foreach_copy_(ones, twos)
        torch._foreach_copy_(twos, mixed)


def own_state(
    inherited: Mapping[str, Any], wrapper: torch.optim.Optimizer, names: Iterable[str]
) -> dict[str, Any]:
    """For ``__getstate__``, so that copies and pickles of an optimizer are whole: torch's part and these attributes."""
    return {**inherited, **{name: getattr(wrapper, name) for name in names}}


def add_entries(
    inner: torch.optim.Optimizer,
    per_param: Mapping[str, Mapping[Tensor, Tensor]],
    per_group: Mapping[str, Any],
) -> StateDict:
    """The inner optimizer's state dictionary with ``per_param[name][p]`` and `per_group` added; inputs unchanged."""
    saved: StateDict = inner.state_dict()
    state: dict[int, dict[str, Any]] = {i: dict(s) for i, s in saved["state"].items()}
    for i, p in enumerate(params_in_order(inner.param_groups)):
        for name, tensors in per_param.items():
            if p in tensors:
                state.setdefault(i, {})[name] = tensors[p]
    return {**saved, "state": state, "param_groups": [{**g, **per_group} for g in saved["param_groups"]]}


def take_entries(saved: Mapping[str, Any], prefix: str, owner: str) -> tuple[StateDict, dict[str, Any]]:
    """Split `saved` into a copy without the prefixed entries, for the inner optimizer, and the group entries.

    Raises:
        ConfigError: there are no such entries, so the state is not this wrapper's.
    """
    own = {key: value for key, value in saved["param_groups"][0].items() if key.startswith(prefix)}
    if not own:
        raise ConfigError(
            f"{owner}: the state has no {prefix}* entries: load it into the inner optimizer instead"
        )
    state: dict[int, dict[str, Any]] = {}
    for i, entries in saved["state"].items():
        # torch shares loaded tensors with the dictionary; a copy keeps two optimizers apart.
        kept = {
            k: v.clone() if isinstance(v, Tensor) else v
            for k, v in entries.items()
            if not k.startswith(prefix)
        }
        if kept:
            state[i] = kept
    groups = [{k: v for k, v in g.items() if not k.startswith(prefix)} for g in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}, own


def param_entries(
    inner: torch.optim.Optimizer, saved: Mapping[str, Any], name: str, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has the entry `name` in `saved`, with a copy of it on `device` (default: p's own)."""
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    for i, p in zip(indices, params_in_order(inner.param_groups), strict=True):
        value = saved["state"].get(i, {}).get(name)
        if value is not None:
            yield p, value.detach().to(device=device or p.device, copy=True)
