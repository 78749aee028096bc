"""The SNOO and GPA wrappers: their special cases, the identity that joins them, modes, schedulers and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError, DilocoError
from diloco.optim import GPA, SNOO, Muon, wrapping

Base = Callable[[list[Parameter]], torch.optim.Optimizer]
BASES: dict[str, Base] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.02, weight_decay=0.1),
    "muon": lambda ps: Muon(ps, lr=0.02, iteration_dtype=torch.float32),
}
TARGET = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


def params() -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [Parameter(torch.randn(4, 6, generator=generator)) for _ in range(2)]


def loss(ps: list[Parameter]) -> Tensor:
    """A smooth loss whose gradient depends on the weights, so that wrong weights cannot hide."""
    total: Tensor = ((ps[0] * ps[1].cos() - TARGET) ** 2).mean() + 0.1 * ps[1].square().mean()
    return total


def train(optimizer: torch.optim.Optimizer, ps: list[Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(ps).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def values(ps: list[Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in ps]).clone()


@pytest.mark.parametrize("name", BASES)
def test_gpa_with_mu_x_zero_is_the_base(name: str) -> None:
    """x = y = z: the same weights bit for bit, and evaluation changes nothing beyond rounding."""
    a, b = params(), params()
    wrapped = GPA(BASES[name](b), mu_x=0.0, mu_y=0.7)
    train(BASES[name](a), a, 6)
    train(wrapped, b, 6)
    assert torch.equal(values(a), values(b))
    wrapped.eval()
    assert torch.allclose(values(a), values(b), atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_snoo_with_unit_lr_and_no_momentum_is_the_base(name: str) -> None:
    """eta = 1, mu = 0 copies the fast weights back, whatever k is."""
    for k in (1, 3):
        a, b = params(), params()
        train(BASES[name](a), a, 7)
        train(SNOO(BASES[name](b), k=k, lr=1.0, momentum=0.0), b, 7)
        assert torch.allclose(values(a), values(b), atol=1e-5)


@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_snoo_with_k_one_equals_gpa_with_a_larger_step(mu: float) -> None:
    """Without decay, SNOO(K=1, eta, mu) has the weights of GPA's y with mu_x = mu_y = mu and lr eta/(1-mu)."""
    eta, lr = 0.6, 0.01
    for kind in (torch.optim.SGD, torch.optim.Adam):
        a, b = (([Parameter(p.detach().double()) for p in params()]) for _ in range(2))
        start = values(a)
        train(SNOO(kind(a, lr=lr), k=1, lr=eta, momentum=mu), a, 10)
        train(GPA(kind(b, lr=lr * eta / (1 - mu)), mu_x=mu, mu_y=mu), b, 10)
        assert float((values(a) - values(b)).norm() / (values(a) - start).norm()) < 1e-10


def test_snoo_is_torch_nesterov_on_the_pseudo_gradient() -> None:
    """After steps K, 2K (not 1, K+1) the slow weights take a Nesterov step with grad = theta - p."""
    ps = params()
    optimizer = SNOO(BASES["sgd"](ps), k=3, lr=0.7, momentum=0.9)
    theta = [Parameter(p.detach().clone()) for p in ps]
    outer = torch.optim.SGD(theta, lr=0.7, momentum=0.9, nesterov=True)
    inner = [Parameter(p.detach().clone()) for p in ps]
    reference = BASES["sgd"](inner)
    for step in range(1, 10):
        train(optimizer, ps, 1)
        train(reference, inner, 1)
        if step % 3 == 0:
            for t, p in zip(theta, inner, strict=True):
                t.grad = t.detach() - p.detach()
            outer.step()
            with torch.no_grad():
                for t, p in zip(theta, inner, strict=True):
                    p.copy_(t)
        assert torch.allclose(values(ps), values(inner), atol=1e-6)


def test_snoo_closes_a_partial_round_on_request() -> None:
    """outer_step() after two of five inner steps applies lr (1 + mu) D to the slow copy."""
    ps = params()
    start = values(ps)
    optimizer = SNOO(BASES["sgd"](ps), k=5, lr=0.7, momentum=0.9)
    train(optimizer, ps, 2)
    fast = values(ps)
    optimizer.outer_step()
    assert torch.allclose(values(ps), start - 0.7 * 1.9 * (start - fast), atol=1e-6)


def test_offloaded_copies_give_the_same_weights() -> None:
    """`offload` changes where the copies live, not the result."""
    a, b = params(), params()
    train(SNOO(BASES["adamw"](a), k=2), a, 6)
    train(SNOO(BASES["adamw"](b), k=2, offload=True), b, 6)
    assert torch.equal(values(a), values(b))


@pytest.mark.parametrize("name", BASES)
def test_gpa_follows_its_definition(name: str) -> None:
    """Explicit x, y, z sequences in the definition's form agree with the two-tensor form."""
    ps = params()
    optimizer = GPA(BASES[name](ps), mu_x=0.8, mu_y=0.6)
    z = [Parameter(p.detach().clone()) for p in ps]
    x = [p.detach().clone() for p in ps]
    base = BASES[name](z)
    for _ in range(8):
        train(optimizer, ps, 1)
        y = [Parameter(0.6 * xi + 0.4 * zi.detach()) for xi, zi in zip(x, z, strict=True)]
        grads = torch.autograd.grad(loss(y), y)
        for zi, g in zip(z, grads, strict=True):
            zi.grad = g
        base.step()
        x = [0.8 * xi + 0.2 * zi.detach() for xi, zi in zip(x, z, strict=True)]
    y_end = [0.6 * xi + 0.4 * zi.detach() for xi, zi in zip(x, z, strict=True)]
    assert torch.allclose(values(ps), torch.cat([t.flatten() for t in y_end]), atol=2e-5)
    optimizer.eval()
    assert torch.allclose(values(ps), torch.cat([t.flatten() for t in x]), atol=2e-5)


def test_gpa_is_whole_after_its_base_failed() -> None:
    """A base that raises leaves z where it was; the weights are the next average, as after a step that moves nothing."""
    ps = params()
    base = BASES["sgd"](ps)
    optimizer = GPA(base, mu_x=0.8, mu_y=0.6)
    train(optimizer, ps, 3)
    z = [optimizer.z[p].clone() for p in ps]
    y = [p.detach().clone() for p in ps]

    def fail(*_: object) -> None:
        raise RuntimeError("no step")

    hook = base.register_step_pre_hook(fail)
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    hook.remove()
    for p, zi, yi in zip(ps, z, y, strict=True):
        x = (yi - 0.4 * zi) / 0.6
        assert torch.allclose(optimizer.z[p], zi)
        assert torch.allclose(p, 0.6 * (0.8 * x + 0.2 * zi) + 0.4 * zi, atol=1e-5)


def test_uniform_averaging_keeps_x_in_the_hull() -> None:
    """With mu_x = 1 - 1/t the average is the mean of z_1..z_t, as in Schedule-Free with constant steps."""
    ps = params()
    base = BASES["sgd"](ps)
    optimizer = GPA(base, mu_x=0.0, mu_y=0.9)
    seen = []
    for t in range(1, 8):
        optimizer.mu_x = 1 - 1 / t
        train(optimizer, ps, 1)
        state = optimizer.state_dict()["state"]
        seen.append(torch.cat([state[i]["gpa_z"].flatten() for i in range(2)]).clone())
    optimizer.eval()
    assert torch.allclose(values(ps), torch.stack(seen).mean(dim=0), atol=1e-5)


def test_modes_round_trip_and_are_idempotent() -> None:
    """eval() and train() twice are once; back and forth restores y up to rounding; before any step both do nothing."""
    ps = params()
    optimizer = GPA(BASES["adamw"](ps), mu_x=0.9)
    start = values(ps)
    optimizer.eval()
    optimizer.train()
    assert torch.equal(values(ps), start)
    train(optimizer, ps, 5)
    y = values(ps)
    optimizer.eval()
    x = values(ps)
    optimizer.eval()
    assert torch.equal(values(ps), x) and not torch.allclose(x, y, atol=1e-4)
    optimizer.train()
    optimizer.train()
    assert torch.allclose(values(ps), y, atol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_snoo_is_evaluated_at_the_slow_copy(offload: bool) -> None:
    """Between outer steps eval() shows the weights of the last outer step; train() restores the fast ones bit for bit."""
    ps = params()
    optimizer = SNOO(BASES["adamw"](ps), k=3, offload=offload)
    start = values(ps)
    optimizer.eval()  # before any step there is one set of weights only
    assert torch.equal(values(ps), start)
    optimizer.train()
    train(optimizer, ps, 2)
    fast = values(ps)
    optimizer.eval()
    optimizer.eval()
    assert torch.equal(values(ps), start) and not torch.equal(fast, start)
    optimizer.train()
    optimizer.train()
    assert torch.equal(values(ps), fast)
    train(optimizer, ps, 1)
    slow = values(ps)
    optimizer.eval()
    assert torch.equal(values(ps), slow), "right after an outer step there is nothing to swap"
    optimizer.train()
    train(optimizer, ps, 1)
    optimizer.eval()
    assert torch.equal(values(ps), slow)


def test_snoo_restores_bfloat16_parameters_exactly() -> None:
    """The slow copy is float32; the fast weights come back as they were, not by way of it."""
    ps = [Parameter(p.detach().bfloat16()) for p in params()]
    optimizer = SNOO(torch.optim.SGD(ps, lr=0.5), k=4)
    train(optimizer, ps, 2)
    fast = values(ps)
    optimizer.eval()
    assert not torch.equal(values(ps), fast)
    optimizer.train()
    assert torch.equal(values(ps), fast)
    train(optimizer, ps, 2)
    optimizer.eval()
    for p in ps:
        assert torch.equal(p.detach(), optimizer.slow[p].bfloat16())


def test_snoo_takes_no_outer_step_in_eval_mode() -> None:
    """There the parameters hold theta, so that the difference would be none."""
    ps = params()
    optimizer = SNOO(BASES["sgd"](ps), k=5)
    train(optimizer, ps, 2)
    optimizer.eval()
    with pytest.raises(DilocoError, match=r"call train\(\) first"):
        optimizer.outer_step()


def test_a_parameter_that_is_unfrozen_joins_at_the_next_round() -> None:
    """Its slow copy starts from the weights at the start of that round; frozen ones have none and do not move."""
    ps = params()
    ps[1].requires_grad_(False)
    frozen = ps[1].detach().clone()
    optimizer = SNOO(BASES["sgd"](ps), k=2, lr=0.5, momentum=0.0)
    train(optimizer, ps, 3)
    assert torch.equal(ps[1], frozen) and ps[1] not in optimizer.slow
    ps[1].requires_grad_(True)
    train(optimizer, ps, 1)
    joined = ps[1].detach().clone()
    assert not torch.equal(joined, frozen) and ps[1] not in optimizer.slow
    train(optimizer, ps, 1)
    assert torch.equal(optimizer.slow[ps[1]], joined)


def test_a_group_added_within_a_round_takes_part_in_it() -> None:
    """Its slow copy is what it was when it came."""
    ps = params()
    optimizer = SNOO(torch.optim.SGD(ps[:1], lr=0.05), k=4)
    train(optimizer, ps, 2)
    optimizer.add_param_group({"params": ps[1:], "lr": 0.05})
    before = ps[1].detach().clone()
    train(optimizer, ps, 1)
    assert torch.equal(optimizer.slow[ps[1]], before)


@pytest.mark.parametrize("wrapper", ["snoo", "gpa"])
def test_batches_of_parameters_do_not_change_the_result(
    wrapper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter at a time, or all of both dtypes at once, give the same bits."""
    found = []
    for limit in (1, 1 << 26):
        monkeypatch.setattr(wrapping.batches, "__defaults__", (limit,))
        ps = params()
        ps[1] = Parameter(ps[1].detach().double())
        optimizer = WRAPPERS[wrapper](torch.optim.AdamW(ps, lr=0.02))
        train(optimizer, ps, 7)
        optimizer.eval()
        found.append(values(ps))
    assert torch.equal(*found)
    assert [len(batch) for batch in wrapping.batches(params(), 30)] == [1, 1]
    assert [len(batch) for batch in wrapping.batches(params(), 48)] == [2]
    assert [len(batch) for batch in wrapping.batches(params(), 1)] == [1, 1]
    assert list(wrapping.batches([])) == []


def test_gpa_trains_bfloat16_parameters_with_a_float32_average() -> None:
    """y and the average stay where float32 puts them, to bfloat16's rounding."""
    a = params()
    b = [Parameter(p.detach().bfloat16()) for p in a]
    for ps in (a, b):
        optimizer = GPA(torch.optim.SGD(ps, lr=0.5), mu_x=0.9)
        train(optimizer, ps, 4)
        assert all(z.dtype == torch.float32 for z in optimizer.z.values())
    assert torch.allclose(values(a), values(b).float(), atol=0.03)


WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], SNOO | GPA]] = {
    "snoo": lambda base: SNOO(base, k=3),
    "snoo-offload": lambda base: SNOO(base, k=3, offload=True),
    "gpa": lambda base: GPA(base, mu_x=0.9),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_stepping_in_eval_mode_is_an_error(wrapper: str) -> None:
    """The step is refused with the cure, and nothing has moved."""
    ps = params()
    optimizer = WRAPPERS[wrapper](BASES["sgd"](ps))
    train(optimizer, ps, 2)
    optimizer.eval()
    before = values(ps)
    with pytest.raises(DilocoError, match=r"call train\(\) first"):
        optimizer.step()
    assert torch.equal(values(ps), before)
    optimizer.train()
    train(optimizer, ps, 1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("evaluating", [False, True])
def test_resuming_continues_bit_for_bit(wrapper: str, name: str, evaluating: bool) -> None:
    """k steps, save, load elsewhere, k steps equals 2k steps; also when saved in eval mode, between outer steps."""
    a = params()
    one = WRAPPERS[wrapper](BASES[name](a))
    train(one, a, 4)
    if evaluating:
        one.eval()
    saved = copy.deepcopy(one.state_dict())
    b = [Parameter(p.detach().clone()) for p in a]
    two = WRAPPERS[wrapper](BASES[name](b))
    two.load_state_dict(saved)
    assert two.training is not evaluating
    for optimizer in (one, two):
        optimizer.train()
    train(one, a, 4)
    train(two, b, 4)
    assert torch.equal(values(a), values(b))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_optimizers_loaded_from_one_state_do_not_share_it(wrapper: str) -> None:
    """Loading copies: training the copy leaves the original's state alone."""
    a, b = params(), params()
    one, two = WRAPPERS[wrapper](BASES["adamw"](a)), WRAPPERS[wrapper](BASES["adamw"](b))
    train(one, a, 4)
    before = copy.deepcopy(one.state_dict())
    two.load_state_dict(one.state_dict())
    train(two, b, 4)
    after = one.state_dict()
    for i in before["state"]:
        for key, value in before["state"][i].items():
            assert torch.equal(value, after["state"][i][key]), key


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_foreign_state_is_refused(wrapper: str) -> None:
    """A bare optimizer's state is not silently taken for the wrapper's."""
    ps = params()
    with pytest.raises(ConfigError, match="load it into the inner optimizer"):
        WRAPPERS[wrapper](BASES["sgd"](ps)).load_state_dict(BASES["sgd"](ps).state_dict())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_schedulers_closures_and_new_groups_reach_the_base(wrapper: str) -> None:
    """It is a torch optimizer whose groups are the base's own."""
    ps = params()
    base = torch.optim.AdamW(ps[:1], lr=1.0)
    optimizer = WRAPPERS[wrapper](base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.add_param_group({"params": ps[1:], "lr": 0.5})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.1 / (s + 1))
    calls: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(ps)
        value.backward()  # type: ignore[no-untyped-call]
        calls.append(float(value.detach()))
        return calls[-1]

    before = values(ps)
    assert optimizer.step(closure) == calls[0]
    scheduler.step()
    assert [g["lr"] for g in base.param_groups] == pytest.approx([0.05, 0.025])
    assert bool((values(ps) != before).all())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_parameter_without_gradient_is_left_alone(wrapper: str) -> None:
    """No state, no movement, and it can join later."""
    ps = params()
    optimizer = WRAPPERS[wrapper](BASES["adamw"](ps))
    before = ps[1].detach().clone()
    for _ in range(3):
        ps[0].grad = torch.ones(4, 6)
        optimizer.step()
    assert torch.equal(ps[1], before)
    train(optimizer, ps, 3)
    assert not torch.equal(ps[1], before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: SNOO(base, k=0), "k is 0"),
        (lambda base: SNOO(base, k=1.5), "k is 1.5"),  # type: ignore[arg-type]
        (lambda base: SNOO(base, lr=-0.1), "lr is -0.1"),
        (lambda base: SNOO(base, momentum=1.0), "momentum is 1.0"),
        (lambda base: GPA(base, mu_x=1.5), "mu_x is 1.5"),
        (lambda base: GPA(base, mu_y=0.0), "mu_y is 0.0"),
        (lambda base: SNOO(GPA(base)), "cannot wrap GPA"),
        (lambda base: GPA(SNOO(base)), "cannot wrap SNOO"),
    ],
)
def test_unusable_settings_are_refused(make: Callable[[torch.optim.Optimizer], Any], message: str) -> None:
    """The error names the option and its value, or the combination."""
    with pytest.raises(ConfigError, match=message):
        make(BASES["sgd"](params()))
