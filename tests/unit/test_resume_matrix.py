"""Resuming: every optimizer, under every outer one that may go around it, in float32 and in bfloat16.

k steps, save as a worker does (safetensors and JSON), load into fresh objects, k steps: the bits of 2k steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from diloco.optim import GPA, MARS, SNOO, AdamW, AnytimeAverage, Master, RowNorm, build_optimizer
from diloco.optim_section import KINDS, composition_problem
from diloco.worker.checkpoint import flatten_optimizer, unflatten_optimizer
from tests.nets import Net, net

torch.set_num_threads(1)
Optimizer = torch.optim.Optimizer
STEPS = 3

VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "adamw-adamc": {"kind": "adamw", "decay": "adamc"},
    "adamw-cautious": {"kind": "adamw", "decay": "cautious"},
    "muon-gram-heavy": {
        "kind": "muon",
        "form": "gram",
        "nesterov": False,
        "cautious": True,
        "blocks": {"qkv": 3},
    },
    "normuon-speedrun": {"kind": "normuon", "variant": "speedrun", "blocks": {"qkv": [8, 12, 4]}},
    "hyperball-normuon": {"kind": "hyperball", "base": "normuon"},
    "hyperball-adam": {"kind": "hyperball", "base": "adam"},
    "scion-unconstrained": {"kind": "scion", "constrained": False, "embed_norm": "col"},
    "sgd-nesterov": {"kind": "sgd", "nesterov": True},
    "schedule-free-warm": {"kind": "schedule-free", "warmup": 5},
    "schedule-free-plus-annealed": {"kind": "schedule-free-plus", "anneal_steps": 4, "c_warmup": 2},
}
# SNOO's and GPA's own steps fall between saving and the end, not on it.
OUTERS: dict[str, Callable[[Optimizer], Optimizer]] = {
    "none": lambda o: o,
    "snoo": lambda o: SNOO(o, k=2),
    "gpa": lambda o: GPA(o, mu_x=0.9),
    "anytime": lambda o: AnytimeAverage(o, half_life=0.3),
}
ALLOWED = [
    (variant, outer)
    for variant, config in VARIANTS.items()
    for outer in OUTERS
    if composition_problem(config["kind"], outer) is None
]


def gradients(steps: range, dtype: torch.dtype) -> Iterator[tuple[int, list[torch.Tensor]]]:
    shapes = [p.shape for p in net().parameters()]
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        yield t, [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def train(model: Net, optimizer: Optimizer, steps: range) -> None:
    """Steps on gradients that depend on step and weights, so that neither can be wrong unnoticed."""
    for t, grads in gradients(steps, model.pos_emb.dtype):
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g + p.detach()
        if getattr(optimizer, "needs_loss", False):
            optimizer.step(loss=1.0 + 0.1 * t)  # type: ignore[call-overload]
        else:
            optimizer.step()


def through_bytes(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights and the optimizer's state after being safetensors and JSON."""
    tensors, meta = flatten_optimizer(optimizer.state_dict())
    written = save({k: v.detach().contiguous().clone() for k, v in tensors.items()})
    weights = load(save({k: v.detach().clone() for k, v in model.named_parameters()}))
    return weights, unflatten_optimizer(load(written), json.loads(json.dumps(meta)))


def resumed_equals_uninterrupted(make: Callable[[Net], Optimizer], dtype: torch.dtype) -> None:
    whole = net().to(dtype)
    one = make(whole)
    train(whole, one, range(STEPS))
    weights, state = through_bytes(whole, one)
    train(whole, one, range(STEPS, 2 * STEPS))

    second = net().to(dtype)
    two = make(second)
    second.load_state_dict(weights)
    two.load_state_dict(state)
    train(second, two, range(STEPS, 2 * STEPS))
    pairs = list(zip(whole.named_parameters(), second.parameters(), strict=True))
    assert [n for (n, p), q in pairs if not torch.equal(p, q)] == []
    assert [n for (n, p), _ in pairs if torch.equal(p, weights[n])] == []
    left, right = (flatten_optimizer(o.state_dict()) for o in (one, two))
    assert left[0].keys() == right[0].keys()
    assert [k for k, v in left[0].items() if not torch.equal(v, right[0][k])] == []
    assert left[1]["numbers"] == right[1]["numbers"]


@pytest.mark.parametrize(("variant", "outer"), ALLOWED, ids=["-".join(pair) for pair in ALLOWED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resuming_gives_the_bits_of_the_uninterrupted_run(
    variant: str, outer: str, dtype: torch.dtype
) -> None:
    """Also between outer steps; bfloat16 models through Master with their 16-bit remainders."""

    def make(model: Net) -> Optimizer:
        config = VARIANTS[variant]
        # Large, so that bfloat16 shows every step; the Polyak step's lr is a factor.
        config = {"lr": 20.0 if config["kind"] == "schedule-free-plus" else 0.05} | config
        built = build_optimizer(model, config, total_steps=2 * STEPS, wrap=OUTERS[outer])
        assert isinstance(built, Master) is (dtype == torch.bfloat16)
        return built

    resumed_equals_uninterrupted(make, dtype)


@pytest.mark.parametrize("outer", [name for name in OUTERS if name != "gpa"])
def test_row_norms_resume_too(outer: str) -> None:
    """The wrapper that no kind of the configuration makes."""

    def make(model: Net) -> Optimizer:
        groups = [{"params": [p], "normalize": p.ndim == 2} for p in model.parameters()]
        return OUTERS[outer](RowNorm(torch.optim.AdamW(groups, lr=0.01)))

    resumed_equals_uninterrupted(make, torch.float32)


def test_master_mode_resumes_too() -> None:
    """With the whole float32 weight in the state."""

    def make(model: Net) -> Optimizer:
        return Master(lambda ps: SNOO(AdamW(ps), k=2), model.parameters(), "master")

    resumed_equals_uninterrupted(make, torch.bfloat16)


def test_exact_mars_resumes_too() -> None:
    """Its state holds the previous weights, at which the next batch's gradient is taken again."""

    def run(model: Net, optimizer: Optimizer, steps: range) -> None:
        for _, grads in gradients(steps, torch.float32):

            def closure(grads: list[torch.Tensor] = grads) -> float:
                for p, g in zip(model.parameters(), grads, strict=True):
                    p.grad = g + p.detach()
                return 0.0

            optimizer.step(closure)

    whole, second = net(), net()
    one, two = (MARS(m.parameters(), exact=True) for m in (whole, second))
    run(whole, one, range(STEPS))
    weights, state = through_bytes(whole, one)
    second.load_state_dict(weights)
    two.load_state_dict(state)
    run(whole, one, range(STEPS, 2 * STEPS))
    run(second, two, range(STEPS, 2 * STEPS))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


def test_every_kind_and_every_outer_is_in_the_matrix() -> None:
    """16 kinds; the table's empty cells are the averaging kinds under anything and the spheres under GPA."""
    assert {v for v, o in ALLOWED if o == "none"} == set(VARIANTS)
    missing = {(k, o) for k in KINDS for o in OUTERS} - set(ALLOWED)
    assert missing == {
        (k, o) for k in ("schedule-free", "schedule-free-plus") for o in ("snoo", "gpa", "anytime")
    } | {(k, "gpa") for k in ("hyperball", "md", "md-adam", "muown")}
