"""RowNorm: rows of unit norm after every step of any optimizer, without getting in its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import GPA, SNOO, Combined, Hyperball, Muon, RowNorm

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer: torch.optim.Optimizer, p: Parameter, steps: int) -> None:
    for t in range(steps):
        p.grad = random(*p.shape, seed=t).to(p.dtype)
        optimizer.step()


def row_norms(p: Tensor) -> Tensor:
    norms: Tensor = p.detach().double().flatten(0, -2).norm(dim=-1)
    return norms


INNER: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1),
    "muon": lambda ps: Muon(ps, lr=0.05),
    "combined": lambda ps: Combined(Muon(ps, lr=0.05)),
}


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())
def test_rows_have_unit_norm_from_the_start_and_after_every_step(
    inner: Any, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Within the rounding of the parameter's dtype, whatever the optimizer, in stacks of experts too."""
    p = Parameter((3 * random(*shape, seed=9)).to(dtype))
    optimizer = RowNorm(inner([p]), [p])
    for _ in range(4):
        assert (row_norms(p) - 1).abs().max() <= 6 * torch.finfo(dtype).eps
        before = p.detach().clone()
        run(optimizer, p, 1)
        assert not torch.equal(p, before)
    assert (row_norms(p) - 1).abs().max() <= 6 * torch.finfo(dtype).eps


def test_row_norm_is_the_inner_step_then_a_division() -> None:
    """Explicitly: p = project(adamw(p)), with AdamW's own moments; other parameters are left to AdamW."""
    p, v = Parameter(random(4, 6, seed=9)), Parameter(random(6, seed=8))
    q, w = Parameter(torch.nn.functional.normalize(p.detach(), dim=1)), Parameter(v.detach().clone())
    optimizer = RowNorm(torch.optim.AdamW([p, v], lr=0.05), [p])
    reference = torch.optim.AdamW([q, w], lr=0.05)
    for t in range(5):
        for a, b in ((p, q), (v, w)):
            a.grad = random(*a.shape, seed=t)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
        with torch.no_grad():
            q.div_(q.norm(dim=1, keepdim=True))
    assert torch.allclose(p, q, atol=1e-13) and torch.equal(v, w)


def test_row_norm_finds_its_matrices() -> None:
    """By group name, by the option, and by parameter name; vectors and other groups are not touched."""
    names = ["a", "b", "c", "bias"]

    def made() -> list[Parameter]:
        return [Parameter(2 * random(*shape, seed=i)) for i, shape in enumerate([(3, 3)] * 3 + [(3,)])]

    def unit(ps: list[Parameter]) -> list[bool]:
        return [bool(((row_norms(p[None] if p.ndim == 1 else p) - 1).abs() < 1e-9).all()) for p in ps]

    ps = made()
    groups: list[dict[str, Any]] = [
        {"params": [ps[0], ps[3]], "name": "matrix"},
        {"params": [ps[1]], "normalize": True},
        {"params": [ps[2]], "name": "head"},
    ]
    RowNorm(torch.optim.AdamW(groups))
    assert unit(ps) == [True, True, False, False]
    ps = made()
    RowNorm(torch.optim.AdamW(list(zip(names, ps, strict=True))), ["c"])
    assert unit(ps) == [False, False, True, False]


def test_projecting_twice_is_projecting_once() -> None:
    """Rows at norm 1 up to rounding keep their bits, so a wrapper made around loaded weights continues exactly."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        p = Parameter((3 * random(40, 33, seed=9)).to(dtype))
        optimizer = RowNorm(torch.optim.AdamW([p]), [p])
        once = p.detach().clone()
        optimizer.reanchor()
        assert torch.equal(p, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norm_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    """The state is AdamW's own and can be loaded before or after the weights."""
    p = Parameter(random(4, 6, seed=9).to(dtype))
    one = RowNorm(torch.optim.AdamW([p], lr=0.05), [p])
    run(one, p, 3)
    q = Parameter(p.detach().clone())
    two = RowNorm(torch.optim.AdamW([q], lr=0.05), [q])
    two.load_state_dict(one.state_dict())
    run(one, p, 3)
    run(two, q, 3)
    assert torch.equal(p, q)


def test_row_norm_composes() -> None:
    """SNOO projects after its outer step, Combined can hold it and reload it, GPA refuses it."""
    p, other = Parameter(random(4, 6, seed=9)), Parameter(random(3, 3, seed=8))
    snoo = SNOO(RowNorm(torch.optim.AdamW([p], lr=0.2), [p]), k=2)
    run(snoo, p, 4)
    assert torch.allclose(row_norms(p), torch.ones(4, dtype=torch.float64)) and torch.equal(snoo.slow[p], p)
    combined = Combined(Muon([other]), RowNorm(torch.optim.AdamW([p], lr=0.2), [p]))
    combined.load_state_dict(combined.state_dict())
    combined.param_groups[1]["lr"] = 0.0
    before = p.detach().clone()
    run(combined, p, 1)
    assert torch.equal(p, before)  # the learning rate set from outside reached AdamW
    with pytest.raises(ConfigError, match="sphere"):
        GPA(RowNorm(torch.optim.AdamW([p]), [p]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: RowNorm(torch.optim.AdamW(p)), "give params"),
        (
            lambda p: RowNorm(torch.optim.AdamW(p), [Parameter(torch.ones(2, 2))]),
            "no matrix of the optimizer",
        ),
        (lambda p: RowNorm(torch.optim.AdamW([("head", p[0])]), ["haed"]), "did you mean 'head'"),
        (lambda p: RowNorm(Hyperball(p), p), "sphere itself"),
        (lambda p: RowNorm(SNOO(torch.optim.AdamW(p)), p), "averages its weights itself"),
        (lambda p: RowNorm(torch.optim.AdamW([q := Parameter(torch.zeros(2, 2))]), [q]), "row of norm 0"),
    ],
)
def test_unusable_row_norms_are_refused(make: Any, message: str) -> None:
    """The error says what to give or to wrap instead."""
    with pytest.raises(ConfigError, match=message):
        make([Parameter(torch.ones(3, 3))])
