"""AdamW and its kinds of decay against torch and the formulas written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import GPA, SNOO, AdamW

torch.set_num_threads(1)
KINDS: tuple[Any, ...] = ("decoupled", "adamc", "cautious")
SHAPES = ((5, 7), (7,), (2, 3, 4, 4))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(random(*shape, seed=50 + i).to(dtype)) for i, shape in enumerate(SHAPES)]


def train(optimizer: torch.optim.Optimizer, ps: list[Parameter], steps: int, first: int = 0) -> None:
    """Steps on seeded gradients that depend on the weights; seed by step, from `first` on."""
    for t in range(first, first + steps):
        for i, p in enumerate(ps):
            p.grad = (p.detach().double() * 0.3 + random(*p.shape, seed=100 * i + t)).to(p.dtype)
        optimizer.step()


def values(ps: list[Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in ps]).clone()


def exact(state: dict[str, Any]) -> Any:
    """A state dictionary with tensors as lists, to compare every bit."""
    return {
        i: {k: v.tolist() if isinstance(v, Tensor) else v for k, v in s.items()}
        for i, s in state["state"].items()
    }


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_decoupled_decay_is_torchs_adamw(fused: bool | None, dtype: torch.dtype, tolerance: float) -> None:
    """50 steps with any kernel; relative to the displacement."""
    a, b = params(dtype), params(dtype)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.3}
    train(torch.optim.AdamW(a, **options), a, 50)
    train(AdamW(b, **options, fused=fused), b, 50)
    moved = (values(a) - values(params(dtype))).norm()
    assert float((values(a) - values(b)).norm() / moved) < tolerance


def test_the_defaults_are_those_of_language_models() -> None:
    """betas (0.9, 0.95), eps 1e-8, decay 0.1."""
    a, b = params(), params()
    train(torch.optim.AdamW(a, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True), a, 5)
    train(AdamW(b), b, 5)
    assert torch.equal(values(a), values(b))


def lr_at(t: int) -> float:
    return 0.02 * min((t + 1) / 4, 1.0) * (1 - t / 20)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_decay_follows_its_formula(kind: Any, fused: bool) -> None:
    """12 steps in float64 under a schedule, with beta2 raised half way: weights agree to 1e-13."""
    b1, wd, peak = 0.9, 2.0, 0.02
    ps = params(torch.float64)
    optimizer = AdamW(ps, peak, (b1, 0.95), weight_decay=wd, decay=kind, fused=fused)
    state = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in ps]
    skipped = 0
    for t in range(12):
        b2 = 0.95 if t < 6 else 0.99
        optimizer.param_groups[0].update(lr=lr_at(t), betas=(b1, b2))
        train(optimizer, ps, 1, first=t)
        for i, (p, m, v) in enumerate(state):
            g = p * 0.3 + random(*p.shape, seed=100 * i + t)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            u = (m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + 1e-8)
            rate = torch.full_like(p, lr_at(t) * wd)
            if kind == "adamc":
                rate = rate * (lr_at(t) / peak)
            elif kind == "cautious":
                rate = rate * (u * p >= 0).double()
                skipped += int((rate == 0).sum())
            state[i] = (p * (1 - rate) - lr_at(t) * u, m, v)
    expected = torch.cat([p.flatten() for p, _, _ in state])
    assert torch.allclose(values(ps), expected, rtol=0, atol=1e-13)
    assert skipped > 100 or kind != "cautious"


def test_adamc_at_constant_lr_is_adamw_bit_for_bit() -> None:
    """And at another lr it is not."""
    a, b = params(), params()
    plain, adamc = AdamW(a, 0.01), AdamW(b, 0.01, decay="adamc")
    train(plain, a, 20)
    train(adamc, b, 20)
    assert torch.equal(values(a), values(b))
    for optimizer, ps in ((plain, a), (adamc, b)):
        optimizer.param_groups[0]["lr"] = 0.005
        train(optimizer, ps, 1, first=20)
    assert not torch.equal(values(a), values(b))


def test_the_peak_is_the_groups_first_lr_unless_given() -> None:
    """A scheduler that starts low does not lower it, and it survives saving; a later group has its own."""
    ps = params()
    optimizer = AdamW(ps[:1], 0.01, decay="adamc")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (s + 1) / 10)
    optimizer.add_param_group({"params": ps[1:2], "lr": 0.03})
    optimizer.add_param_group({"params": ps[2:], "lr": 0.03, "lr_max": 0.06})
    train(optimizer, ps, 2)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.001)
    fresh = params()
    again = AdamW([{"params": [p]} for p in fresh], 0.5, decay="adamc")
    again.load_state_dict(optimizer.state_dict())
    for o in (optimizer, again):
        assert [g["lr_max"] for g in o.param_groups] == [0.01, 0.03, 0.06]


def test_decay_alone_shrinks_by_the_product_of_its_factors() -> None:
    """With zero gradients: (1 - lr wd), (1 - lr^2/lr_max wd), and everything is in agreement with a zero update."""
    for kind, factor in (("decoupled", 0.9), ("adamc", 0.95), ("cautious", 0.9)):
        p = Parameter(random(6))
        start = p.detach().clone()
        optimizer = AdamW([p], 0.1, weight_decay=1.0, decay=kind, lr_max=0.2)  # type: ignore[arg-type]
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert torch.allclose(p, start * factor**3, rtol=1e-14, atol=0)


def test_cautious_decay_sees_the_sign_of_tiny_numbers() -> None:
    """Where update and weight disagree in sign but their product underflows, there is no decay."""
    p = Parameter(torch.tensor([1e-30, 1e-30]))
    optimizer = AdamW([p], 1e-38, eps=0.0, weight_decay=1e37, decay="cautious")
    p.grad = torch.tensor([-1e-18, 1e-18])
    optimizer.step()
    assert torch.allclose(p, torch.tensor([1e-30, 0.9e-30]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_strides_of_gradients_and_parameters_do_not_matter(kind: Any, fused: bool) -> None:
    """A transposed gradient and a channels-last weight are updated as their contiguous copies are."""
    a, b = params(), params()
    with torch.no_grad():
        b[2].data = b[2].data.contiguous(memory_format=torch.channels_last)
    one, two = AdamW(a, 0.01, decay=kind, fused=fused), AdamW(b, 0.01, decay=kind, fused=fused)
    for t in range(3):
        for p, q in zip(a, b, strict=True):
            p.grad = random(*p.shape, seed=t).float()
            q.grad = p.grad.clone()
            if q.ndim == 2:
                q.grad = p.grad.t().contiguous().t()
                assert not q.grad.is_contiguous()
        one.step()
        two.step()
    assert torch.allclose(values(a), values(b), rtol=0, atol=1e-6)
    for p, q in zip(a, b, strict=True):
        assert torch.allclose(one.state[p]["exp_avg"], two.state[q]["exp_avg"], rtol=0, atol=1e-6)


def test_a_transposed_gradient_alone_takes_the_fused_path_correctly() -> None:
    """Without other reasons to leave the fused kernel, it still pairs each weight with its own gradient."""
    p, q = Parameter(torch.zeros(5, 7)), Parameter(torch.zeros(5, 7))
    p.grad = random(5, 7).float()
    q.grad = p.grad.t().contiguous().t()
    one, two = AdamW([p], fused=True), AdamW([q], fused=True)
    one.step()
    two.step()
    assert torch.equal(one.state[p]["exp_avg"], two.state[q]["exp_avg"]) and torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_left_as_they_are_and_absent_ones_skipped(kind: Any, dtype: torch.dtype) -> None:
    """p.grad keeps its bits; a parameter without gradient gets no state and no decay, and starts at step 1 later."""
    ps = params(dtype)
    optimizer = AdamW(ps, 0.01, decay=kind)
    before = ps[1].detach().clone()
    for t in range(3):
        ps[0].grad = random(*ps[0].shape, seed=t).to(dtype)
        saved = ps[0].grad.clone()
        optimizer.step()
        assert torch.equal(ps[0].grad, saved)
    assert torch.equal(ps[1], before) and ps[1] not in optimizer.state
    train(optimizer, ps, 1)
    assert [int(optimizer.state[p]["step"]) for p in ps] == [4, 1, 1]
    assert not torch.equal(ps[1], before)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_parameters_are_updated_in_float32_and_rounded_once(kind: Any) -> None:
    """The state is float32 and equals that of a float32 model; the weights are its rounded ones."""
    a = params(torch.bfloat16)
    b = [Parameter(p.detach().float()) for p in a]
    half, full = AdamW(a, 0.01, decay=kind), AdamW(b, 0.01, decay=kind)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        p.grad = random(*p.shape, seed=i).bfloat16()
        q.grad = p.grad.float()
    half.step()
    full.step()
    assert torch.equal(values(a), values(b).bfloat16())
    for p, q in zip(a, b, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert half.state[p][key].dtype == torch.float32
            assert torch.equal(half.state[p][key], full.state[q][key])


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_continues_bit_for_bit(kind: Any, dtype: torch.dtype, fused: bool | None) -> None:
    """k steps, save, load elsewhere, k steps equals 2k steps; the two share no tensors."""
    a = params(dtype)
    one = AdamW(a, 0.01, decay=kind, fused=fused, lr_max=0.04)
    train(one, a, 4)
    saved = copy.deepcopy(one.state_dict())
    b = [Parameter(p.detach().clone()) for p in a]
    two = AdamW(b, 0.5, fused=fused)
    two.load_state_dict(one.state_dict())
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            assert value.dtype == torch.float32 and torch.equal(two.state[b[index]][key], value)
    train(two, b, 4, first=4)
    assert exact(one.state_dict()) == exact(saved)
    train(one, a, 4, first=4)
    assert torch.equal(values(a), values(b))


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_of_torchs_adamw_can_be_continued(fused: bool) -> None:
    """Loaded after four steps, the next four are torch's."""
    a = params()
    theirs = torch.optim.AdamW(a, lr=0.01, betas=(0.9, 0.95), weight_decay=0.3, fused=fused)
    train(theirs, a, 4)
    b = [Parameter(p.detach().clone()) for p in a]
    ours = AdamW(b)
    ours.load_state_dict(theirs.state_dict())
    train(theirs, a, 4, first=4)
    train(ours, b, 4, first=4)
    assert torch.allclose(values(a), values(b), rtol=0, atol=1e-7)
    assert ours.param_groups[0]["decay"] == "decoupled" and ours.param_groups[0]["lr_max"] == 0.01


@pytest.mark.parametrize("make", [lambda base: SNOO(base, k=2), lambda base: GPA(base, mu_x=0.5)])
def test_wrappers_and_closures_work_around_it(make: Callable[[torch.optim.Optimizer], Any]) -> None:
    """It is a torch optimizer: SNOO and GPA step it as they step torch's, and a closure's loss comes back."""
    a, b = params(), params()
    train(make(AdamW(a, 0.01)), a, 4)
    train(
        make(torch.optim.AdamW(b, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)), b, 4
    )
    assert torch.equal(values(a), values(b))
    assert AdamW(a).step(lambda: 2.5) == 2.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW(p, lr=-1.0), "lr is -1.0: give 0 or more"),
        (lambda p: AdamW(p, betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\): give two numbers"),
        (lambda p: AdamW(p, weight_decay=-0.1), "weight_decay is -0.1"),
        (
            lambda p: AdamW([{"params": p, "decay": "adamC"}]),
            "decay is 'adamC': known are .*did you mean 'adamc'",
        ),
        (lambda p: AdamW([{"params": p, "decay": "cautios"}]), "did you mean 'cautious'"),
        (lambda p: AdamW([{"params": p, "amsgrad": True}]), "no option 'amsgrad'"),
        (lambda p: AdamW(p, lr=0.0, decay="adamc"), "lr_max is 0.0: adamc divides by the peak"),
    ],
)
def test_unusable_options_are_refused(make: Callable[[list[Parameter]], Any], message: str) -> None:
    """The error names the option, its value and what to give."""
    with pytest.raises(ConfigError, match=message):
        make(params())
