"""bfloat16 parameters trained in float32: the two ways of keeping the rest, and what may go inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import (
    GPA,
    MD,
    SNOO,
    AdamW,
    AnytimeAverage,
    Combined,
    Hyperball,
    Master,
    Muon,
    ScheduleFreeAdamW,
    ScheduleFreePlus,
)
from diloco.optim.state import EvalModeError

torch.set_num_threads(1)
Make = Callable[[Any], torch.optim.Optimizer]
INSIDE: dict[str, Make] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, nesterov=True),
    "torch-adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True),
    "adamw": lambda ps: AdamW(ps, lr=1e-4),
    "muon": lambda ps: Muon(ps, lr=1e-4),
    "hyperball": lambda ps: Hyperball(ps, lr=1e-4),
    "md": lambda ps: MD(ps, lr=1e-4),
    "schedule-free": lambda ps: ScheduleFreeAdamW(ps, lr=1e-4),
    "snoo-muon": lambda ps: SNOO(Muon(ps, lr=1e-4), k=2),
    "snoo-md": lambda ps: SNOO(MD(ps, lr=1e-4), k=2),
    "gpa-adamw": lambda ps: GPA(torch.optim.AdamW(ps, lr=1e-4), mu_x=0.9),
    "anytime-sgd": lambda ps: AnytimeAverage(torch.optim.SGD(ps, lr=1e-3)),
}
inside = pytest.mark.parametrize("make", INSIDE.values(), ids=INSIDE.keys())
modes = pytest.mark.parametrize("mode", ["remainder", "master"])


def truncated(w: Tensor) -> Tensor:
    """float32 with its lower 16 bits set to zero."""
    return (w.detach().view(torch.int32) & -65536).view(torch.float32)


def weights() -> list[Parameter]:
    """Three matrices that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return [Parameter(truncated(torch.randn(4, 6, generator=generator))) for _ in range(3)]


def narrow(ps: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().bfloat16()) for p in ps]


def loss(ps: list[Tensor]) -> Tensor:
    a, b, c = (p.float() for p in ps)
    total: Tensor = ((a * b).sin() - c).square().mean() + 0.1 * a.square().mean()
    return total


def train(optimizer: torch.optim.Optimizer, ps: list[Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(list(ps))
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def reference(make: Make, steps: int) -> list[Parameter]:
    """float32 training whose forward sees the rounded weights and whose gradients pass through bfloat16."""
    ps = weights()
    optimizer = make(ps)
    for _ in range(steps):
        seen = [truncated(p).bfloat16().requires_grad_() for p in ps]
        grads = torch.autograd.grad(loss(seen), seen)
        for p, g in zip(ps, grads, strict=True):
            p.grad = g.float()
        optimizer.step()
    return ps


def wide(optimizer: Master) -> list[Tensor]:
    """The float32 weights, in the parameters' order."""
    with optimizer.working() as inner:
        return [p.detach().clone() for g in inner.param_groups for p in g["params"]]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@inside
@modes
def test_training_is_float32_training_with_rounded_weights_in_the_forward(make: Make, mode: Any) -> None:
    """Bit for bit, in both modes, though single steps are far below bfloat16's resolution."""
    expected = reference(make, 7)
    ps = narrow(weights())
    optimizer = Master(make, ps, mode)
    train(optimizer, ps, 7)
    assert same(wide(optimizer), expected)
    assert same([p.detach().float() for p in ps], [truncated(w) for w in expected])
    assert not same(expected, [truncated(w) for w in expected])


def test_small_steps_are_not_lost() -> None:
    """A hundred steps of a thousandth of the resolution move a weight that bfloat16 alone would keep."""
    for mode, expected in (("remainder", 1.0 - 100 * 2**-16), ("master", 1.0 - 100 * 2**-16)):
        p = Parameter(torch.ones(2, dtype=torch.bfloat16))
        optimizer = Master(lambda ps: torch.optim.SGD(ps, lr=2.0**-16), [p], mode)  # type: ignore[arg-type]
        alone = Parameter(torch.ones(2, dtype=torch.bfloat16))
        plain = torch.optim.SGD([alone], lr=2.0**-16)
        for _ in range(100):
            p.grad, alone.grad = torch.ones_like(p), torch.ones_like(p)
            optimizer.step()
            plain.step()
        assert wide(optimizer)[0].tolist() == [expected] * 2
        assert alone.tolist() == [1.0, 1.0]


def test_the_halves_are_the_bit_pattern() -> None:
    """bfloat16 parameter and int16 remainder, side by side, are the float32 weight's bits, signs included."""
    ps = narrow(weights())
    optimizer = Master(INSIDE["muon"], ps)
    train(optimizer, ps, 3)
    state = optimizer.state_dict()["state"]
    for i, (p, w) in enumerate(zip(ps, wide(optimizer), strict=True)):
        low = state[i]["master_low"]
        assert low.dtype == torch.int16 and low.shape == p.shape and bool(low.any())
        upper = p.detach().view(torch.int16).to(torch.int32) * 65536
        assert torch.equal(upper + low.to(torch.int32) % 65536, w.view(torch.int32))


def test_remainder_mode_holds_no_float32_weights_between_steps() -> None:
    """Their memory exists during a step only; the master's stays."""
    for mode, size in (("remainder", 0), ("master", 4 * 24)):
        ps = narrow(weights())
        optimizer = Master(INSIDE["sgd"], ps, mode)  # type: ignore[arg-type]
        train(optimizer, ps, 2)
        held = [p for g in optimizer.optimizer.param_groups for p in g["params"]]
        assert [p.untyped_storage().nbytes() for p in held] == [size] * 3
        assert all(p.grad is None for p in held)


@inside
@pytest.mark.parametrize(
    "modes_", [("remainder", "remainder"), ("master", "remainder"), ("remainder", "master")]
)
def test_a_state_of_either_mode_continues_bit_for_bit_in_either(make: Make, modes_: tuple[Any, Any]) -> None:
    """Whichever of weights and state is loaded first."""
    for weights_first in (True, False):
        a = narrow(weights())
        one = Master(make, a, modes_[0])
        train(one, a, 3)
        b = narrow([Parameter(torch.ones(4, 6)) for _ in range(3)])
        two = Master(make, b, modes_[1])
        saved, values = one.state_dict(), [p.detach().clone() for p in a]
        for load_weights in (weights_first, not weights_first):
            if load_weights:
                with torch.no_grad():
                    for p, v in zip(b, values, strict=True):
                        p.copy_(v)
            else:
                two.load_state_dict(saved)
        train(one, a, 3)
        train(two, b, 3)
        assert same(wide(one), wide(two)) and same(a, b)


@modes
def test_schedulers_and_clipping_reach_the_optimizer_inside(mode: Any) -> None:
    """A scheduler on the wrapper changes the step that is taken; groups hold the model's own parameters."""
    ps = narrow(weights())
    groups: list[dict[str, Any]] = [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.5}]
    optimizer = Master(INSIDE["sgd"], groups, mode)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 0.5]
    assert all(
        q is p for q, p in zip((q for g in optimizer.param_groups for q in g["params"]), ps, strict=True)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.0)
    before = wide(optimizer)
    train(optimizer, ps, 1)
    scheduler.step()
    assert same(before, wide(optimizer))
    assert {g["lr"] for g in optimizer.optimizer.param_groups} == {0.0}


@modes
def test_an_outside_write_replaces_the_upper_half(mode: Any) -> None:
    """A merge that writes bfloat16 weights is seen by the next step, the same way in both modes."""
    ps = narrow(weights())
    optimizer = Master(INSIDE["muon"], ps, mode)
    train(optimizer, ps, 2)
    low = [w.view(torch.int32) & 0xFFFF for w in wide(optimizer)]
    with torch.no_grad():
        ps[0].fill_(3.0)
    written = wide(optimizer)[0]
    assert torch.equal(truncated(written), torch.full((4, 6), 3.0))
    assert torch.equal(written.view(torch.int32) & 0xFFFF, low[0])


@modes
def test_gradients_are_neither_kept_nor_written(mode: Any) -> None:
    """`p.grad` keeps its dtype and bits; a parameter without one is left alone."""
    ps = narrow(weights())
    optimizer = Master(INSIDE["adamw"], ps, mode)
    loss(list(ps)).backward()  # type: ignore[no-untyped-call]
    ps[2].grad = None
    before = [None if p.grad is None else p.grad.clone() for p in ps]
    start = wide(optimizer)
    optimizer.step()
    assert ps[0].grad is not None and ps[0].grad.dtype == torch.bfloat16
    assert all(
        p.grad is None or torch.equal(p.grad, g) for p, g in zip(ps, before, strict=True) if g is not None
    )
    after = wide(optimizer)
    assert torch.equal(start[2], after[2]) and not torch.equal(start[0], after[0])
    ps[0].grad = None
    ps[1].grad = None
    optimizer.step()  # the gradients of the last step are gone from inside, too
    assert same(after, wide(optimizer))


@modes
def test_float32_parameters_pass_through(mode: Any) -> None:
    """Norm gains are often kept in float32: the optimizer inside has the parameter itself."""
    gain = Parameter(torch.ones(5))
    ps: list[Tensor] = [narrow(weights())[0], gain]
    optimizer = Master(lambda g: torch.optim.SGD(g, lr=0.1), ps, mode)
    assert optimizer.optimizer.param_groups[0]["params"][1] is gain
    gain.grad = torch.ones(5)
    optimizer.step()
    assert torch.allclose(gain, torch.full((5,), 0.9))
    assert set(optimizer.state_dict()["state"]) == {0}


def test_averages_inside_are_evaluated_and_trained_through_the_wrapper() -> None:
    """eval() puts the rounded average into the parameters, train() brings the weights back; steps wait."""
    ps = narrow(weights())
    optimizer = Master(INSIDE["gpa-adamw"], ps)
    train(optimizer, ps, 5)
    y = wide(optimizer)
    optimizer.eval()
    x = wide(optimizer)
    assert not same(x, y) and same([p.detach().float() for p in ps], [truncated(w) for w in x])
    with pytest.raises(EvalModeError):
        optimizer.step()
    assert same(x, wide(optimizer))
    optimizer.train()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(y, wide(optimizer), strict=True))


def test_what_the_optimizer_inside_cannot_do_is_not_offered() -> None:
    """Loops ask with hasattr: a plain optimizer has no modes and no sphere; SNOO inside can close a round."""
    ps = narrow(weights())
    plain = Master(INSIDE["sgd"], ps)
    assert not any(hasattr(plain, n) for n in ("eval", "train", "reanchor", "outer_step"))
    assert hasattr(Master(INSIDE["md"], ps), "reanchor")
    snoo = Master(lambda g: SNOO(torch.optim.SGD(g, lr=0.1), k=5, lr=0.5, momentum=0.0), ps)
    start = wide(snoo)
    train(snoo, ps, 2)
    fast = wide(snoo)
    snoo.outer_step()
    half = [s - 0.5 * (s - f) for s, f in zip(start, fast, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wide(snoo), half, strict=True))


def test_wrappers_inside_are_more_exact_than_around() -> None:
    """SNOO inside rounds nothing; around, every outer step rounds theta to bfloat16."""
    expected = [w.detach() for w in reference(INSIDE["snoo-muon"], 8)]
    a, b = narrow(weights()), narrow(weights())
    around = Master(INSIDE["muon"], b)
    inside = Master(INSIDE["snoo-muon"], a)
    train(inside, a, 8)
    train(SNOO(around, k=2), b, 8)
    assert same(wide(inside), expected)
    errors = [float((x - y).abs().max()) for x, y in zip(wide(around), expected, strict=True)]
    assert max(errors) > 1e-4


def test_averages_cannot_wrap_a_master_of_averages() -> None:
    """The modes of the optimizer inside are seen through the wrapper."""
    with pytest.raises(ConfigError, match="averages its weights itself"):
        SNOO(Master(INSIDE["gpa-adamw"], narrow(weights())))
    with pytest.raises(ConfigError, match="sphere"):
        GPA(Master(INSIDE["md"], narrow(weights())))


def test_the_loss_reaches_an_optimizer_that_needs_it() -> None:
    """Given or from the closure, through Combined and Master alike."""
    ps = narrow(weights())
    optimizer = Master(lambda g: Combined(ScheduleFreePlus(g)), ps)
    assert optimizer.needs_loss
    value = loss(list(ps))
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step(loss=value)
    before = wide(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(list(ps))
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    expected = float(loss(list(ps)).detach())
    assert optimizer.step(closure) == expected
    assert not same(before, wide(optimizer))
    assert not Master(INSIDE["sgd"], ps).needs_loss


@modes
def test_options_that_the_optimizer_inside_changes_stay_changed(mode: Any) -> None:
    """Counters and modes that live in groups are not overwritten by the wrapper's at the next step."""
    ps = narrow(weights())
    optimizer = Master(lambda g: ScheduleFreePlus(g, anneal_steps=4), ps, mode)
    for _ in range(3):
        loss(list(ps)).backward()  # type: ignore[no-untyped-call]
        optimizer.step(loss=1.0)
    for groups in (optimizer.param_groups, optimizer.optimizer.param_groups):
        assert [g["k"] for g in groups] == [3]
    optimizer.eval()
    optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"] is False


def test_groups_made_inside_are_those_outside() -> None:
    """When `make` sorts parameters into groups of its own, the wrapper's groups follow."""
    ps = narrow(weights())
    optimizer = Master(
        lambda groups: Combined(
            Muon(groups[0]["params"][1:], lr=0.1), torch.optim.AdamW(groups[0]["params"][:1], lr=0.2)
        ),
        ps,
    )
    held = [(g["lr"], g["params"]) for g in optimizer.param_groups]
    assert [lr for lr, _ in held] == [0.1, 0.2]
    assert held[0][1][0] is ps[1] and held[1][1][0] is ps[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Master(INSIDE["sgd"], narrow(weights()), "reminder"), "did you mean 'remainder'"),  # type: ignore[arg-type]
        (lambda: Master(INSIDE["sgd"], [Parameter(torch.ones(2).half())]), "is float16: use bfloat16"),
        (lambda: Master(INSIDE["sgd"], []), "no parameters"),
        (
            lambda: Master(INSIDE["sgd"], narrow(weights())).add_param_group({"params": weights()}),
            "no further groups",
        ),
        (
            lambda: Master(INSIDE["sgd"], narrow(weights())).load_state_dict(
                INSIDE["sgd"](narrow(weights())).state_dict()
            ),
            "no master_",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Any], message: str) -> None:
    """The error names the value and the fix."""
    with pytest.raises(ConfigError, match=message):
        make()
