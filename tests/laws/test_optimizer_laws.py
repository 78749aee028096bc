"""What every optimizer here must do, whatever its rule: one suite over all of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import (
    GPA,
    MARS,
    MD,
    SNOO,
    AdamP,
    AnytimeAverage,
    Combined,
    Hyperball,
    Muon,
    Muown,
    NorMuon,
    RowNorm,
    Scion,
)

Make = Callable[[list[Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "muon": lambda ps: Muon(ps, lr=0.02),
    "muon-plain": lambda ps: Muon(ps, lr=0.02, nesterov=False, scale="spectral", cautious=True),
    "muon-gram": lambda ps: Muon(ps, lr=0.02, form="gram", iteration_dtype=torch.float16),
    "normuon": lambda ps: NorMuon(ps, lr=0.02),
    "normuon-speedrun": lambda ps: NorMuon(ps, variant="speedrun"),
    "hyperball-muon": lambda ps: Hyperball(ps),
    "hyperball-normuon": lambda ps: Hyperball(ps, base="normuon"),
    "hyperball-adam": lambda ps: Hyperball(ps, base="adam"),
    "md-muon": lambda ps: MD(ps, gain_lr=0.01),
    "md-adam": lambda ps: MD(ps, base="adam", radius=2.0),
    "md-row": lambda ps: MD([{"params": ps, "sphere": "row", "gains": False}], base="adam"),
    "adamp": lambda ps: AdamP(ps, lr=0.02),
    "scion-spectral": lambda ps: Scion(ps, lr=0.01, rho=3.0, spectral_max=True),
    "scion-sign": lambda ps: Scion(ps, lr=0.01, norm="sign", rho=10.0, constrained=False),
    "scion-col": lambda ps: Scion(ps, lr=0.01, norm="col", rho=3.0),
    "scion-row": lambda ps: Scion(ps, lr=0.01, norm="row", rho=10.0),
    "scion-bias": lambda ps: Scion(ps, lr=0.01, norm="bias", rho=3.0),
    "mars-adamw": lambda ps: MARS(ps, lr=0.02),
    "mars-muon": lambda ps: MARS(ps, lr=0.02, base="muon"),
    "snoo-hyperball": lambda ps: SNOO(Hyperball(ps), k=2),
    "snoo-md": lambda ps: SNOO(MD(ps, lr=0.005), k=2, momentum=0.5),
    "combined": lambda ps: Combined(Muon(ps[:2], lr=0.02), torch.optim.AdamW(ps[2:], lr=0.02)),
    "snoo-combined": lambda ps: SNOO(
        Combined(Muon(ps[:2], lr=0.02), torch.optim.AdamW(ps[2:], lr=0.02)), k=2
    ),
    "anytime-muon": lambda ps: AnytimeAverage(Muon(ps, lr=0.02)),
    "row-norm": lambda ps: RowNorm(torch.optim.AdamW(ps, lr=0.02), ps[:2]),
    "muown": lambda ps: Muown(ps, lr=0.02, total_steps=20),
    "snoo-muon": lambda ps: SNOO(Muon(ps, lr=0.02), k=2),
    "snoo-adamw": lambda ps: SNOO(torch.optim.AdamW(ps, lr=0.02), k=2),
    "gpa-normuon": lambda ps: GPA(NorMuon(ps, lr=0.02), mu_x=0.9),
    "gpa-adamw": lambda ps: GPA(torch.optim.AdamW(ps, lr=0.02), mu_x=0.9),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 6), (6, 4), (4, 6), (5, 5))
    return [Parameter(torch.randn(shape, generator=generator).to(dtype) * 0.3) for shape in shapes]


def write(source: list[Parameter], target: list[Parameter]) -> None:
    with torch.no_grad():
        for s, t in zip(source, target, strict=True):
            t.copy_(s)


def copies(ps: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in ps]


def loss(ps: list[Parameter]) -> Tensor:
    a, b, c, d = (p.float() for p in ps)
    total: Tensor = ((a @ b).sin() @ c - 1).square().mean() + (d @ d - 1).square().mean()
    return total


def train(optimizer: torch.optim.Optimizer, ps: list[Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(ps).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def same(a: list[Parameter], b: list[Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every
def test_it_is_deterministic(make: Make) -> None:
    """Two runs from one start agree bit for bit and have moved every parameter."""
    a, b = params(), params()
    train(make(a), a, 4)
    train(make(b), b, 4)
    assert same(a, b)
    assert not any(torch.equal(x, y) for x, y in zip(a, params(), strict=True))


@every
def test_training_makes_progress(make: Make) -> None:
    """The loss of a small smooth problem falls clearly."""
    ps = params()
    optimizer = make(ps)
    before = float(loss(ps).detach())
    train(optimizer, ps, 40)
    assert float(loss(ps).detach()) < 0.9 * before


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_resuming_continues_bit_for_bit(make: Make, dtype: torch.dtype, steps: int) -> None:
    """Steps, save, load into a fresh optimizer, three more steps equals the uninterrupted run."""
    a = params(dtype)
    one = make(a)
    train(one, a, steps)
    saved = copy.deepcopy(one.state_dict())
    b = params(dtype)
    two = make(b)
    two.load_state_dict(saved)
    write(a, b)
    train(one, a, 3)
    train(two, b, 3)
    assert same(a, b)


@every
def test_loading_does_not_share_tensors(make: Make) -> None:
    """An optimizer loaded from a live state dictionary leaves the other's run unchanged."""
    a, undisturbed = params(), params()
    one, reference = make(a), make(undisturbed)
    train(one, a, 3)
    train(reference, undisturbed, 3)
    b = copies(a)
    two = make(b)
    two.load_state_dict(one.state_dict())
    train(two, b, 3)
    train(one, a, 3)
    train(reference, undisturbed, 3)
    assert same(a, undisturbed)


@every
def test_a_copy_continues_alone_bit_for_bit(make: Make) -> None:
    """Parameters and optimizer copied together, as torch's own allow, go the same way and leave the original alone."""
    ps = params()
    optimizer = make(ps)
    train(optimizer, ps, 3)
    twins, twin = copy.deepcopy((ps, optimizer))
    before = copies(ps)
    train(twin, twins, 3)
    assert same(ps, before) and not same(ps, twins)
    train(optimizer, ps, 3)
    assert same(ps, twins)


@every
def test_gradients_are_not_written(make: Make) -> None:
    """`p.grad` is the same tensor with the same bits after the step."""
    ps = params()
    optimizer = make(ps)
    for _ in range(3):
        loss(ps).backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in ps]
        before = [g.clone() for g in grads if g is not None]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(ps, grads, strict=True))
        assert all(torch.equal(g, h) for g, h in zip(grads, before, strict=True) if g is not None)
        optimizer.zero_grad()


@every
def test_a_parameter_without_gradient_is_skipped(make: Make) -> None:
    """No movement (not even decay), no state; the others move as if it were not there."""
    a, b = params(), params()
    without, alone = make(a), make(b[:3])
    start = a[3].detach().clone()
    for optimizer, ps in ((without, a), (alone, b)):
        for _ in range(3):
            loss(ps).backward()  # type: ignore[no-untyped-call]
            ps[3].grad = None
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(a[3], start)
    assert same(a[:3], b[:3])
    assert not without.state.get(a[3])


@every
def test_a_zero_learning_rate_is_the_identity(make: Make) -> None:
    """With lr = 0 on every group nothing moves beyond rounding."""
    ps = params()
    optimizer = make(ps)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copies(ps)
    train(optimizer, ps, 5)
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(ps, before, strict=True))


@every
def test_schedulers_and_closures_work(make: Make) -> None:
    """A scheduler changes the step that is taken, and a closure's loss comes back with gradients enabled."""
    a, b = params(), params()
    scheduled, manual = make(a), make(b)
    peak = scheduled.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda s: 1 / (s + 1))

    def closure() -> float:
        scheduled.zero_grad()
        value = loss(a)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    for s in range(3):
        expected = float(loss(a).detach())
        assert scheduled.step(closure) == expected
        scheduler.step()
        for group in manual.param_groups:
            group["lr"] = peak / (s + 1)
        train(manual, b, 1)
    assert same(a, b)


@every
def test_groups_can_be_written_as_json(make: Make) -> None:
    """Settings in a state dictionary survive JSON, so no checkpoint needs to run code to be read."""
    ps = params()
    optimizer = make(ps)
    train(optimizer, ps, 2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        restored = json.loads(json.dumps(group))
        group.clear()
        group.update(restored)
    again = params()
    resumed = make(again)
    resumed.load_state_dict(copy.deepcopy(saved))
    write(ps, again)
    train(optimizer, ps, 2)
    train(resumed, again, 2)
    assert same(ps, again)


@every
def test_hooks_run_around_the_step(make: Make) -> None:
    """torch's step hooks, on which profilers and distributed wrappers rely, are called once per step."""
    ps = params()
    optimizer = make(ps)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, ps, 2)
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize("kind", [Muon, NorMuon])
def test_sparse_gradients_are_refused(kind: type[Muon | NorMuon]) -> None:
    """The error names the parameter's shape."""
    p = Parameter(torch.zeros(3, 4))
    p.grad = torch.eye(3, 4).to_sparse()
    with pytest.raises(ConfigError, match=r"\(3, 4\) has a sparse gradient"):
        kind([p]).step()
