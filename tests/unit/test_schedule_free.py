"""Schedule-Free AdamW and ScheduleFree+: the library, the formulas written out, modes, resuming and combinations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from schedulefree import AdamWScheduleFree
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError, DilocoError, NonFiniteError
from diloco.optim import GPA, SNOO, AnytimeAverage, ScheduleFreeAdamW, ScheduleFreePlus

torch.set_num_threads(1)
SHAPES = ((3, 4), (4,))
Either = ScheduleFreeAdamW | ScheduleFreePlus
BOTH: dict[str, Callable[[Any], Either]] = {
    "adamw": lambda ps: ScheduleFreeAdamW(ps, lr=0.05, weight_decay=0.1, warmup_steps=3),
    "adamw-loops": lambda ps: ScheduleFreeAdamW(ps, lr=0.05, weight_decay=0.1, foreach=False),
    "plus": lambda ps: ScheduleFreePlus(
        ps, lr=0.5, weight_decay=2.0, anneal_steps=6, c_warmup=2, l1_decay=0.5
    ),
}


def params(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def objective(ps: list[Parameter] | list[Tensor]) -> Tensor:
    """Smooth, positive, and with a gradient that depends on the weights, so that wrong weights cannot hide."""
    total: Tensor = (ps[0] * ps[1].cos() - 1).square().mean() + 0.1 * ps[1].square().mean()
    return total


def backward(optimizer: torch.optim.Optimizer, ps: list[Parameter]) -> float:
    optimizer.zero_grad()
    value = objective(ps)
    value.backward()  # type: ignore[no-untyped-call]
    return float(value.detach())


def advance(optimizer: Either) -> None:
    """One step on the gradients that are there; the loss is 1."""
    if isinstance(optimizer, ScheduleFreePlus):
        optimizer.step(loss=1.0)
    else:
        optimizer.step()


def train(optimizer: Either, ps: list[Parameter], steps: int) -> None:
    for _ in range(steps):
        backward(optimizer, ps)
        advance(optimizer)


def values(ps: list[Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in ps]).clone()


def exact(state: dict[str, Any]) -> Any:
    """A state dictionary with tensors as lists, to compare every bit."""
    return {
        i: {k: v.tolist() if isinstance(v, Tensor) else v for k, v in s.items()}
        for i, s in state["state"].items()
    }


def iterate(optimizer: Either) -> Tensor:
    """z, from the saved state."""
    state = optimizer.state_dict()["state"]
    return torch.cat([state[i]["z"].flatten() for i in range(len(SHAPES))]).clone()


@pytest.mark.parametrize("foreach", [True, False])
def test_schedule_free_adamw_goes_where_the_library_goes(foreach: bool) -> None:
    """100 steps in float64, with decay, warm-up, polynomial weights and a lowered lr: y and x agree to 1e-12."""
    options: dict[str, Any] = {
        "lr": 0.03,
        "weight_decay": 0.1,
        "warmup_steps": 7,
        "r": 1.5,
        "foreach": foreach,
    }
    a, b = params(), params()
    library, ours = AdamWScheduleFree(a, **options), ScheduleFreeAdamW(b, **options)
    library.train()
    for t in range(100):
        if t == 40:
            library.param_groups[0]["lr"] = ours.param_groups[0]["lr"] = 0.01
        backward(library, a)
        library.step()
        train(ours, b, 1)
        assert float((values(a) - values(b)).abs().max()) < 1e-12
    library.eval()
    ours.eval()
    assert float((values(a) - values(b)).abs().max()) < 1e-12
    assert float((values(b) - values(params())).abs().max()) > 0.1


def test_schedule_free_adamw_follows_its_definition() -> None:
    """Explicit x, y and z sequences in the definition's three-tensor form give the same y and x."""
    lr, b1, b2, wd, W, r, power = 0.04, 0.85, 0.99, 0.2, 4, 1.0, 1.5
    ps = params()
    optimizer = ScheduleFreeAdamW(
        ps, lr, (b1, b2), weight_decay=wd, warmup_steps=W, r=r, weight_lr_power=power
    )
    x = [p.detach().clone() for p in ps]
    z = [p.detach().clone() for p in ps]
    v = [torch.zeros_like(p) for p in z]
    total = 0.0
    for t in range(1, 21):
        train(optimizer, ps, 1)
        y = [(b1 * xi + (1 - b1) * zi).requires_grad_() for xi, zi in zip(x, z, strict=True)]
        grads = torch.autograd.grad(objective(y), y)
        lr_t = lr * min(1, t / W)
        w = t**r * lr_t**power
        total += w
        for i, g in enumerate(grads):
            v[i] = b2 * v[i] + (1 - b2) * g**2
            d = g / ((v[i] / (1 - b2**t)).sqrt() + 1e-8) + wd * y[i].detach()
            z[i] = z[i] - lr_t * d
            x[i] = (1 - w / total) * x[i] + w / total * z[i]
        now = torch.cat([(b1 * xi + (1 - b1) * zi).flatten() for xi, zi in zip(x, z, strict=True)])
        assert torch.allclose(values(ps), now, rtol=0, atol=1e-12)
    optimizer.eval()
    assert torch.allclose(values(ps), torch.cat([t.flatten() for t in x]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOTH)
def test_after_the_first_step_the_average_is_the_iterate(name: str) -> None:
    """c_1 = 1, so the starting point has no weight in x."""
    ps = params()
    optimizer = BOTH[name](ps)
    train(optimizer, ps, 1)
    optimizer.eval()
    assert torch.allclose(values(ps), iterate(optimizer), rtol=0, atol=1e-14)
    assert not torch.allclose(values(ps), values(params()), atol=1e-3)


@pytest.mark.parametrize(("r", "power", "warmup"), [(0.0, 2.0, 0), (2.0, 2.0, 5), (1.0, 0.0, 5)])
def test_the_average_is_the_weighted_mean_of_the_iterates(r: float, power: float, warmup: int) -> None:
    """Weights t^r lr_max^p; with constant lr and r = 0 the mean is uniform."""
    ps = params()
    optimizer = ScheduleFreeAdamW(ps, 0.05, r=r, weight_lr_power=power, warmup_steps=warmup)
    seen = []
    for _ in range(9):
        train(optimizer, ps, 1)
        seen.append(iterate(optimizer))
    optimizer.eval()
    weights = torch.tensor(
        [t**r * (min(1.0, t / warmup) if warmup else 1.0) ** power for t in range(1, 10)], dtype=torch.float64
    )
    if r == 0 and not warmup:
        assert torch.equal(weights, torch.ones(9, dtype=torch.float64))
    mean = (weights[:, None] * torch.stack(seen)).sum(0) / weights.sum()
    assert torch.allclose(values(ps), mean, rtol=0, atol=1e-13)


def test_plus_averages_its_iterates_by_the_largest_squared_step() -> None:
    """x is the mean of z_t, t > c_warmup, weighted by (running max of a)^2."""
    ps = params()
    optimizer = ScheduleFreePlus(ps, lr=0.5, c_warmup=3, anneal_steps=4)
    seen, weights, largest = [], [], 0.0
    for t in range(1, 11):
        optimizer.step(loss=backward(optimizer, ps))
        largest = max(largest, optimizer.param_groups[0]["scheduled_lr"])
        if t > 3:
            seen.append(iterate(optimizer))
            weights.append(largest**2)
    optimizer.eval()
    mean = sum(w * z for w, z in zip(weights, seen, strict=True)) / sum(weights)
    assert torch.allclose(values(ps), torch.as_tensor(mean), rtol=0, atol=1e-13)


def test_gpa_with_the_averaging_weights_is_schedule_free() -> None:
    """mu_x = 1 - c_t and mu_y = b1 around Adam without first moment (the same base): same y at each step, same x."""
    a, b = params(), params()
    lr, W = 0.05, 4
    free = ScheduleFreeAdamW(a, lr, (0.9, 0.99), warmup_steps=W)
    base = torch.optim.Adam(b, lr, (0.0, 0.99))
    gpa = GPA(base, mu_y=0.9)
    total = 0.0
    for t in range(1, 31):
        base.param_groups[0]["lr"] = lr * min(1, t / W)
        total += base.param_groups[0]["lr"] ** 2
        gpa.mu_x = 1 - base.param_groups[0]["lr"] ** 2 / total
        train(free, a, 1)
        backward(gpa, b)
        gpa.step()
        assert torch.allclose(values(a), values(b), rtol=0, atol=1e-12)
    free.eval()
    gpa.eval()
    assert torch.allclose(values(a), values(b), rtol=0, atol=1e-12)


class Written:
    """ScheduleFree+ in numpy, one number at a time, with x, y and z kept apart."""

    def __init__(self, start: np.ndarray[Any, Any], **options: float) -> None:
        self.o = options
        self.x, self.y, self.z = start.copy(), start.copy(), start.copy()
        self.m, self.v = np.zeros_like(start), np.zeros_like(start)
        self.k = 0
        self.ema = self.lr_max = self.total = 0.0
        self.steps: list[float] = []

    def step(self, F: float, g: np.ndarray[Any, Any]) -> None:
        o, k, t = self.o, self.k, self.k + 1
        q = min(k / o["anneal_steps"], 1.0)
        b = 1 - math.exp((1 - q) * math.log(1 - o["beta"]) + q * math.log(1 - o["beta_max"]))
        inner = norm = 0.0
        for i in range(len(g)):
            inner += b * g[i] * (self.z[i] - self.x[i])
            norm += abs(g[i])
        self.ema = o["l1_decay"] * self.ema + (1 - o["l1_decay"]) * norm * math.sqrt(math.pi / 2)
        a = o["lr"] * max(0.0, F + inner) / (self.ema / (1 - o["l1_decay"] ** t))
        self.steps.append(a)
        self.lr_max = max(self.lr_max, a)
        c = 1.0
        if t > o["c_warmup"]:
            self.total += t ** o["r"] * self.lr_max**2
            c = t ** o["r"] * self.lr_max**2 / self.total
        for i in range(len(g)):
            self.z[i] -= a * a * o["weight_decay"] * self.y[i]
            self.m[i] = 0.9 * self.m[i] + 0.1 * g[i]
            self.v[i] = 0.95 * self.v[i] + 0.05 * g[i] ** 2
            self.z[i] -= a * (self.m[i] / (1 - 0.9**t)) / (math.sqrt(self.v[i] / (1 - 0.95**t)) + 1e-8)
            self.x[i] = (1 - c) * self.x[i] + c * self.z[i]
            self.y[i] = b * self.x[i] + (1 - b) * self.z[i]
        self.k += 1


@pytest.mark.parametrize(("l1_decay", "c_warmup", "r", "wd"), [(0.0, 0, 0.0, 2.0), (0.6, 5, 1.0, 3.0)])
def test_plus_follows_its_definition(l1_decay: float, c_warmup: int, r: float, wd: float) -> None:
    """50 steps in float64 on two parameters in two groups: y to 1e-9 at each step, the steps a_t, and x."""
    options: dict[str, Any] = {
        "lr": 0.7,
        "beta": 0.9,
        "beta_max": 0.965,
        "anneal_steps": 30,
        "weight_decay": wd,
        "c_warmup": c_warmup,
        "l1_decay": l1_decay,
        "r": r,
    }
    ps = params()
    optimizer = ScheduleFreePlus([{"params": [p]} for p in ps], **options)
    written = Written(values(ps).numpy(), **options)
    for _ in range(50):
        F = backward(optimizer, ps)
        g = torch.cat([p.grad.flatten() for p in ps if p.grad is not None]).numpy().copy()
        optimizer.step(loss=F)
        written.step(F, g)
        assert float((values(ps) - torch.from_numpy(written.y)).abs().max()) < 1e-9
        assert optimizer.param_groups[1]["scheduled_lr"] == pytest.approx(written.steps[-1], rel=1e-9)
    optimizer.eval()
    assert float((values(ps) - torch.from_numpy(written.x)).abs().max()) < 1e-9
    assert len({round(a, 6) for a in written.steps}) > 10
    assert float((values(ps) - values(params())).abs().max()) > 0.1


def test_plus_takes_the_loss_from_a_closure_or_from_the_caller() -> None:
    """Both ways give the same bits, and the step returns the loss."""
    a, b = params(), params()
    by_closure, by_value = BOTH["plus"](a), BOTH["plus"](b)
    assert isinstance(by_closure, ScheduleFreePlus) and isinstance(by_value, ScheduleFreePlus)
    for _ in range(5):
        F = backward(by_value, b)
        assert by_value.step(loss=torch.tensor(F, dtype=torch.float64)) == F
        assert by_closure.step(lambda: backward(by_closure, a)) == F
        assert torch.equal(values(a), values(b))


def test_plus_refuses_a_step_without_one_clear_loss() -> None:
    """No loss, two losses, or one that is no number: the error says what to do and nothing has moved."""
    ps = params()
    optimizer = ScheduleFreePlus(ps)
    F = backward(optimizer, ps)
    optimizer.step(loss=F)
    before, saved = values(ps), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match="pass a closure that returns it, or loss="):
        optimizer.step()
    with pytest.raises(ConfigError, match="a closure and a loss"):
        optimizer.step(lambda: F, loss=F)
    with pytest.raises(NonFiniteError, match="loss nan"):
        optimizer.step(loss=math.nan)
    assert ps[0].grad is not None
    ps[0].grad[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="must be finite"):
        optimizer.step(loss=F)
    assert torch.equal(values(ps), before)
    assert exact(optimizer.state_dict()) == exact(saved)
    assert (
        optimizer.param_groups[0]["k"] == 1
        and optimizer.param_groups[0]["l1_ema"] == saved["param_groups"][0]["l1_ema"]
    )


def test_plus_stands_still_where_the_loss_bound_is_reached() -> None:
    """F + I <= 0, and likewise a zero gradient, makes a step of length 0, not NaN and not ascent."""
    ps = params()
    optimizer = ScheduleFreePlus(ps, weight_decay=20.0)
    start = values(ps)
    for p in ps:
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    backward(optimizer, ps)
    optimizer.step(loss=-1.0)
    assert torch.equal(values(ps), start)
    optimizer.eval()
    assert torch.equal(values(ps), start)


def test_plus_on_shards_steps_as_on_the_whole() -> None:
    """With the hook giving the global sums, an optimizer of one parameter moves it as the one of both does."""
    whole, part = params(), params()
    totals: list[Tensor] = []
    shares: list[Tensor] = []
    everything = ScheduleFreePlus(
        whole, lr=0.5, anneal_steps=5, all_reduce=lambda t: totals.append(t.clone())
    )

    def exchange(t: Tensor) -> Tensor:
        shares.append(t.clone())
        return totals[-1]

    shard = ScheduleFreePlus(part[:1], lr=0.5, anneal_steps=5, all_reduce=exchange)
    for _ in range(6):
        F = backward(everything, whole)
        assert whole[0].grad is not None and whole[1].grad is not None
        part[0].grad = whole[0].grad.clone()
        norm = float(whole[1].grad.abs().sum())
        everything.step(loss=F)
        shard.step(loss=F)
        assert torch.equal(whole[0], part[0])
        assert float(totals[-1][0]) == F
        assert float(totals[-1][2] - shares[-1][2]) == pytest.approx(norm)


@pytest.mark.parametrize("sharded", [False, True])
def test_plus_reduces_over_ranks_by_mean_or_by_sum(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks: the loss is the mean; equal gradients keep their norm, shards add theirs. First step: I = 0."""
    ps = params()
    optimizer = ScheduleFreePlus(ps, reduce=True, sharded=sharded)
    F = backward(optimizer, ps)
    norm = sum(float(p.grad.abs().sum()) for p in ps if p.grad is not None)
    peer_loss, peer_norm = F + 3.0, 2 * norm if sharded else norm

    def exchange(totals: Tensor) -> None:
        """What the other rank adds, prepared as it would by the same rule."""
        totals += torch.tensor([peer_loss / 2 if sharded else peer_loss, 0.0, peer_norm], dtype=totals.dtype)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", exchange)
    optimizer.step(loss=F)
    size = math.sqrt(math.pi / 2) * norm * (3 if sharded else 1)
    expected = (F + 1.5) / size
    assert optimizer.param_groups[0]["l1_ema"] == pytest.approx(size, rel=1e-12)
    assert optimizer.param_groups[0]["scheduled_lr"] == pytest.approx(expected, rel=1e-12)


def test_plus_reduces_nothing_without_a_process_group() -> None:
    """`reduce=True` is harmless on one process."""
    a, b = params(), params()
    train(ScheduleFreePlus(a, reduce=True), a, 3)
    train(ScheduleFreePlus(b), b, 3)
    assert torch.equal(values(a), values(b))


@pytest.mark.parametrize("name", BOTH)
def test_modes_round_trip_and_are_idempotent(name: str) -> None:
    """Starts in train mode; eval() and train() twice are once; there and back restores y up to rounding."""
    ps = params()
    optimizer = BOTH[name](ps)
    assert optimizer.training
    start = values(ps)
    optimizer.eval()
    optimizer.train()
    assert torch.equal(values(ps), start)
    train(optimizer, ps, 6)
    y = values(ps)
    optimizer.eval()
    assert not optimizer.training
    x = values(ps)
    optimizer.eval()
    assert torch.equal(values(ps), x) and not torch.allclose(x, y, atol=1e-4)
    optimizer.train()
    optimizer.train()
    assert torch.allclose(values(ps), y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", BOTH)
def test_stepping_in_eval_mode_is_an_error(name: str) -> None:
    """The step is refused with the cure, and nothing has moved."""
    ps = params()
    optimizer = BOTH[name](ps)
    train(optimizer, ps, 2)
    optimizer.eval()
    before = values(ps)
    with pytest.raises(DilocoError, match=r"call train\(\) first"):
        advance(optimizer)
    assert torch.equal(values(ps), before)
    optimizer.train()
    train(optimizer, ps, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOTH)
def test_gradients_are_left_as_they_are(name: str, dtype: torch.dtype) -> None:
    """After a step each p.grad is the same tensor with the same bits."""
    ps = params(dtype)
    optimizer = BOTH[name](ps)
    for _ in range(2):
        backward(optimizer, ps)
        grads = [p.grad for p in ps]
        before = [g.clone() for g in grads if g is not None]
        advance(optimizer)
        for p, g, b in zip(ps, grads, before, strict=True):
            assert g is not None and p.grad is g and torch.equal(g, b)


@pytest.mark.parametrize("name", BOTH)
def test_a_parameter_without_gradient_waits(name: str) -> None:
    """No state and no movement; its first step, later, is a full first step: |z - start| = lr, and x = z."""
    ps = params()
    optimizer = BOTH[name](ps)
    for group in optimizer.param_groups:
        group["weight_decay"], group["warmup_steps"] = 0.0, 0
    start = ps[1].detach().clone()
    for _ in range(20):
        ps[0].grad = torch.ones_like(ps[0])
        advance(optimizer)
    assert torch.equal(ps[1], start) and ps[1] not in optimizer.state
    train(optimizer, ps, 1)
    z = optimizer.state[ps[1]]["z"]
    lr = torch.full_like(z, optimizer.param_groups[0]["scheduled_lr"])
    assert torch.allclose((z - start).abs(), lr, rtol=1e-5, atol=0)
    optimizer.eval()
    assert torch.allclose(ps[1], z, rtol=0, atol=1e-14)


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOTH)
def test_resuming_continues_bit_for_bit(name: str, dtype: torch.dtype, evaluating: bool) -> None:
    """k steps, save, load elsewhere, k steps equals 2k steps, also when saved in eval mode; state stays float32."""
    a = params(dtype)
    one = BOTH[name](a)
    start = values(a)
    train(one, a, 4)
    if evaluating:
        one.eval()
    saved = copy.deepcopy(one.state_dict())
    b = [Parameter(p.detach().clone()) for p in a]
    two = BOTH[name](b)
    two.load_state_dict(one.state_dict())
    assert two.training is not evaluating
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            loaded = two.state[b[index]][key]
            if isinstance(value, Tensor):
                assert loaded.dtype == torch.float32 and torch.equal(loaded, value), key
            else:
                assert loaded == value, key
    two.train()
    train(two, b, 4)
    two.eval()
    assert exact(one.state_dict()) == exact(saved)  # the two share no tensors
    one.train()
    train(one, a, 4)
    one.eval()
    assert torch.equal(values(a), values(b))
    assert not torch.equal(values(a), start)


@pytest.mark.parametrize("name", BOTH)
def test_sixteen_bit_parameters_are_updated_in_float32_and_rounded_once(name: str) -> None:
    """From the same gradients, z equals that of a float32 model bit for bit while y differs by its rounding only."""
    a = params(torch.bfloat16)
    b = [Parameter(p.detach().float()) for p in a]
    half, full = BOTH[name](a), BOTH[name](b)
    for group in (*half.param_groups, *full.param_groups):
        group["weight_decay"] = 0.0  # decay reads y, which is rounded in one of them
    backward(half, a)
    for p, q in zip(a, b, strict=True):
        assert p.grad is not None
        q.grad = p.grad.float()
    advance(half)
    advance(full)
    assert torch.equal(iterate(half), iterate(full))
    assert torch.equal(values(a), values(b).bfloat16())
    assert all(
        v.dtype == torch.float32 for s in half.state.values() for v in s.values() if isinstance(v, Tensor)
    )


@pytest.mark.parametrize("name", BOTH)
def test_a_group_added_later_is_in_the_present_mode(name: str) -> None:
    """Added while evaluating, it is switched with the others, and then trains."""
    ps = params()
    optimizer = BOTH[name](ps[:1])
    ps[0].grad = torch.ones_like(ps[0])
    advance(optimizer)
    optimizer.eval()
    optimizer.add_param_group({"params": ps[1:]})
    assert [g["train_mode"] for g in optimizer.param_groups] == [False, False]
    optimizer.train()
    before = values(ps)
    train(optimizer, ps, 2)
    assert bool((values(ps) != before).all())


WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "SNOO": SNOO,
    "GPA": GPA,
    "AnytimeAverage": AnytimeAverage,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", BOTH)
def test_no_second_average_goes_around_schedule_free(name: str, wrapper: str) -> None:
    """The wrappers refuse it and say whose average there is."""
    with pytest.raises(ConfigError, match=f"{wrapper} cannot wrap ScheduleFree.*averages its weights itself"):
        WRAPPERS[wrapper](BOTH[name](params()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: ScheduleFreeAdamW(p, lr=-1.0), r"lr is -1.0: give 0 or more"),
        (lambda p: ScheduleFreeAdamW(p, betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\): give two numbers"),
        (lambda p: ScheduleFreeAdamW(p, betas=(0.0, 0.9)), r"betas\[0\] is 0: give the weight"),
        (lambda p: ScheduleFreeAdamW(p, warmup_steps=-1), "warmup_steps is -1: give a count"),
        (lambda p: ScheduleFreeAdamW([{"params": p, "warmup_step": 3}]), "did you mean 'warmup_steps'"),
        (lambda p: ScheduleFreePlus(p, lr=-1.0), "lr is -1.0: give 0 or more"),
        (lambda p: ScheduleFreePlus(p, betas=(1.0, 0.9)), r"betas is \(1.0, 0.9\)"),
        (lambda p: ScheduleFreePlus(p, beta=0.0), "beta is 0.0: give the weight"),
        (lambda p: ScheduleFreePlus(p, beta_max=1.0), "beta_max is 1.0: give the weight"),
        (lambda p: ScheduleFreePlus(p, anneal_steps=-1), "anneal_steps is -1: give a count"),
        (lambda p: ScheduleFreePlus(p, c_warmup=-2), "c_warmup is -2: give a count"),
        (lambda p: ScheduleFreePlus(p, l1_decay=1.0), "l1_decay is 1.0: give a number"),
        (lambda p: ScheduleFreePlus(p, sharded=True), "give reduce=True as well"),
        (lambda p: ScheduleFreePlus(p, reduce=True, all_reduce=lambda t: t), "both given: use one"),
        (lambda p: ScheduleFreePlus([{"params": p, "beta_mx": 0.9}]), "did you mean 'beta_max'"),
    ],
)
def test_unusable_options_are_refused(make: Callable[[list[Parameter]], Any], message: str) -> None:
    """The error names the option, its value and what to give."""
    with pytest.raises(ConfigError, match=message):
        make(params())
