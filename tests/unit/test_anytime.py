"""The anytime average: its formula, that it leaves training alone, modes and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError, DilocoError
from diloco.optim import GPA, MD, SNOO, AdamW, AnytimeAverage, Muon

torch.set_num_threads(1)
Base = Callable[[list[Parameter]], torch.optim.Optimizer]
BASES: dict[str, Base] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: AdamW(ps, lr=0.02),
    "muon": lambda ps: Muon(ps, lr=0.02, iteration_dtype=torch.float32),
    "md": lambda ps: MD(ps, lr=0.02),
}


def params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [Parameter(torch.randn(4, 6, generator=generator).to(dtype)) for _ in range(2)]


def train(optimizer: torch.optim.Optimizer, ps: list[Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (ps[0] * ps[1].cos() - 1).square().mean() + 0.1 * ps[1].square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def values(ps: list[Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in ps]).clone()


def exact(state: dict[str, Any]) -> Any:
    """A state dictionary with tensors as lists, to compare every bit."""
    return {
        i: {k: v.tolist() if isinstance(v, Tensor) else v for k, v in s.items()}
        for i, s in state["state"].items()
    }


@pytest.mark.parametrize("half_life", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("name", BASES)
def test_the_average_follows_its_formula_and_training_does_not_notice(name: str, half_life: float) -> None:
    """avg += (1 - 2^(-1/(h t))) (theta - avg), and avg = theta while h t < 1; theta is that of the bare optimizer."""
    a, b = params(), params()
    optimizer, bare = AnytimeAverage(BASES[name](a), half_life), BASES[name](b)
    average = values(b).double()
    for t in range(1, 31):
        train(optimizer, a, 1)
        train(bare, b, 1)
        assert torch.equal(values(a), values(b))
        tau = 1.0 if half_life * t < 1 else 1 - 2 ** (-1 / (half_life * t))
        average += tau * (values(b).double() - average)
        optimizer.eval()
        assert torch.allclose(values(a).double(), average, rtol=0, atol=1e-6)
        optimizer.train()
    assert not torch.allclose(values(a).double(), average, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_round_trip_exactly_and_are_idempotent(dtype: torch.dtype) -> None:
    """train() restores theta bit for bit; twice is once; before any step both do nothing; the average is float32."""
    ps = params(dtype)
    optimizer = AnytimeAverage(BASES["adamw"](ps), 0.25)
    start = values(ps)
    optimizer.eval()
    optimizer.train()
    assert torch.equal(values(ps), start)
    train(optimizer, ps, 20)
    theta = values(ps)
    optimizer.eval()
    average = values(ps)
    optimizer.eval()
    assert torch.equal(values(ps), average) and not torch.allclose(average, theta, atol=1e-4)
    optimizer.train()
    optimizer.train()
    assert torch.equal(values(ps), theta)
    state = optimizer.state_dict()["state"]
    assert [state[i]["anytime_average"].dtype for i in range(2)] == [torch.float32] * 2
    assert "anytime_theta" not in state[0]


def test_stepping_in_eval_mode_is_an_error() -> None:
    """The step is refused with the cure, and nothing has moved."""
    ps = params()
    optimizer = AnytimeAverage(BASES["sgd"](ps), 0.25)
    train(optimizer, ps, 12)
    optimizer.eval()
    before = values(ps)
    with pytest.raises(DilocoError, match=r"call train\(\) first"):
        optimizer.step()
    assert torch.equal(values(ps), before)
    optimizer.train()
    train(optimizer, ps, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_resuming_continues_bit_for_bit(name: str, evaluating: bool, dtype: torch.dtype) -> None:
    """k steps, save, load elsewhere, k steps equals 2k steps, in theta and average, also when saved in eval mode."""
    a = params(dtype)
    one = AnytimeAverage(BASES[name](a), 0.2)
    train(one, a, 8)
    if evaluating:
        one.eval()
    saved = copy.deepcopy(one.state_dict())
    b = params(dtype)
    two = AnytimeAverage(BASES[name](b), 0.2)
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)  # after MD has normalised the fresh weights
    two.load_state_dict(one.state_dict())
    assert two.training is not evaluating
    two.train()
    train(two, b, 4)
    assert exact(one.state_dict()) == exact(saved)  # the two share no tensors
    one.train()
    train(one, a, 4)
    assert torch.equal(values(a), values(b))
    one.eval()
    two.eval()
    assert torch.equal(values(a), values(b))


def test_a_parameter_without_gradient_costs_nothing_and_can_join() -> None:
    """Until its first gradient it has no state; then its average is that of its whole, so far constant, past."""
    ps = params()
    optimizer = AnytimeAverage(BASES["adamw"](ps), 0.2)
    start = ps[1].detach().clone()
    for _ in range(9):
        ps[0].grad = torch.ones(4, 6)
        optimizer.step()
    assert torch.equal(ps[1], start)
    assert "anytime_average" not in optimizer.state_dict()["state"].get(1, {})
    ps[1].grad = torch.ones(4, 6)
    optimizer.step()
    theta = ps[1].detach().clone()
    optimizer.eval()
    tau = 1 - 2 ** (-1 / (0.2 * 10))
    assert torch.allclose(ps[1], start + tau * (theta - start), rtol=0, atol=1e-7)


def test_schedulers_closures_and_new_groups_reach_the_wrapped_optimizer() -> None:
    """It is a torch optimizer whose groups are the wrapped one's own, and gradients keep their bits."""
    ps = params()
    base = AdamW(ps[:1], lr=1.0)
    optimizer = AnytimeAverage(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.add_param_group({"params": ps[1:], "lr": 0.5})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.1 / (s + 1))
    before = values(ps)

    def closure() -> float:
        assert torch.is_grad_enabled()
        for p in ps:
            p.grad = torch.ones(4, 6)
        return 7.5

    assert optimizer.step(closure) == 7.5
    scheduler.step()
    assert [g["lr"] for g in base.param_groups] == pytest.approx([0.05, 0.025])
    assert bool((values(ps) != before).all())
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones(4, 6)) for p in ps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: AnytimeAverage(base, 0.0), "half_life is 0.0: give a fraction"),
        (lambda base: AnytimeAverage(base, 1.5), "half_life is 1.5: give a fraction"),
        (lambda base: AnytimeAverage(GPA(base)), "cannot wrap GPA, which averages"),
        (lambda base: AnytimeAverage(SNOO(base)), "cannot wrap SNOO, which averages"),
        (lambda base: AnytimeAverage(AnytimeAverage(base)), "cannot wrap AnytimeAverage"),
        (lambda base: GPA(AnytimeAverage(base)), "GPA cannot wrap AnytimeAverage"),
        (lambda base: SNOO(AnytimeAverage(base)), "SNOO cannot wrap AnytimeAverage"),
        (lambda base: AnytimeAverage(base).load_state_dict(base.state_dict()), "into the inner optimizer"),
    ],
)
def test_unusable_settings_and_states_are_refused(
    make: Callable[[torch.optim.Optimizer], Any], message: str
) -> None:
    """The error names the option and its value, or the combination, or where the state belongs."""
    with pytest.raises(ConfigError, match=message):
        make(BASES["sgd"](params()))
