"""AdamP, Scion and MARS against their definitions written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import MARS, SNOO, AdamP, Muon, Scion, orthogonalize

EXACT: dict[str, Any] = {"iteration_dtype": torch.float64}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer: torch.optim.Optimizer, p: Parameter, steps: int) -> None:
    for t in range(steps):
        p.grad = random(*p.shape, seed=t)
        optimizer.step()


def test_adamp_is_adamw_when_the_gradient_has_a_radial_part() -> None:
    """With delta = 0 nothing is projected, and vectors never are."""
    for shape, delta in (((4, 5), 0.0), ((6,), 10.0)):
        p, q = Parameter(random(*shape, seed=9)), Parameter(random(*shape, seed=9))
        run(AdamP([p], lr=0.02, delta=delta), p, 5)
        run(torch.optim.AdamW([q], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1), q, 5)
        assert torch.allclose(p, q, atol=1e-12)


def test_adamp_drops_the_radial_part_of_tangential_gradients() -> None:
    """With g orthogonal to p the step is orthogonal to p, and decay is a tenth."""
    p = Parameter(random(4, 5, seed=9))
    w = p.detach().clone()
    g = random(4, 5, seed=1)
    p.grad = g - w * (g * w).sum() / w.square().sum()
    u = p.grad / (p.grad.abs() + 1e-8)
    assert abs(float((u * w).sum())) > 0.1
    AdamP([p], lr=0.02, weight_decay=0.5).step()
    tangential = u - w * (u * w).sum() / w.square().sum()
    assert torch.allclose(p, w * (1 - 0.02 * 0.5 * 0.1) - 0.02 * tangential, atol=1e-10)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("norm", ["spectral", "sign", "col", "row", "bias"])
def test_scion_follows_its_formula(norm: Any, constrained: bool) -> None:
    """m = 0.9 m + 0.1 g and p = (1-lr) p - lr rho L(m) for each norm, over three steps."""
    p = Parameter(random(4, 9, seed=9))
    w, m = p.detach().clone(), torch.zeros(4, 9, dtype=torch.float64)
    run(Scion([p], lr=0.01, norm=norm, rho=3.0, constrained=constrained, **EXACT), p, 3)
    for t in range(3):
        m = 0.9 * m + 0.1 * random(4, 9, seed=t)
        direction = {
            "spectral": math.sqrt(4 / 9) * orthogonalize(m, dtype=torch.float64),
            "sign": m.sign() / 9,
            "col": m / (m.norm(dim=0, keepdim=True) / 2 + 1e-8),
            "row": m / (m.norm(dim=1, keepdim=True) * 3 + 1e-8),
            "bias": m / (m.square().mean().sqrt() + 1e-8),
        }[norm]
        w = w * (0.99 if constrained else 1.0) - 0.01 * 3.0 * direction
    assert torch.allclose(p, w, atol=1e-10)


def test_scions_spectral_factor_can_be_at_least_one() -> None:
    """`spectral_max` matters for wide matrices only."""
    for shape, factor in (((4, 9), 1.0), ((9, 4), 1.5)):
        p = Parameter(torch.zeros(shape, dtype=torch.float64))
        run(Scion([p], lr=1.0, rho=1.0, spectral_max=True, **EXACT), p, 1)
        assert torch.allclose(p, -factor * orthogonalize(random(*shape), dtype=torch.float64))


def test_scion_takes_vectors_only_as_bias() -> None:
    """A vector has no spectral norm; the bias norm takes any shape."""
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        Scion([Parameter(torch.zeros(3))])
    p = Parameter(torch.zeros(3, dtype=torch.float64))
    run(Scion([p], lr=1.0, rho=2.0, norm="bias"), p, 1)
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(2.0)


def corrected(t: int, shape: tuple[int, ...], weight: float) -> Tensor:
    previous = random(*shape, seed=t - 1) if t else torch.zeros(shape, dtype=torch.float64)
    g = random(*shape, seed=t)
    c = g + weight * (g - previous)
    return c / max(1.0, float(c.norm()))


def test_mars_is_adamw_on_corrected_gradients() -> None:
    """c = g + gamma b1/(1-b1) (g - g_prev), clipped per tensor, g_prev = 0 first (factor 1.475)."""
    assert 0.025 * 0.95 / 0.05 == pytest.approx(0.475)
    p, q = Parameter(random(3, 4, seed=9)), Parameter(random(3, 4, seed=9))
    optimizer = MARS([p], lr=0.02)
    reference = torch.optim.AdamW([q], lr=0.02, betas=(0.95, 0.99), weight_decay=0.1)
    for t in range(5):
        p.grad, q.grad = random(3, 4, seed=t), corrected(t, (3, 4), 0.475)
        optimizer.step()
        reference.step()
        p.grad.zero_()  # the previous gradient must have been copied
    assert torch.allclose(p, q, atol=1e-12)


def test_mars_muon_is_muon_on_corrected_gradients() -> None:
    """MARS-M is the moving average without Nesterov, match_rms and decoupled decay."""
    p, q = Parameter(random(3, 6, seed=9)), Parameter(random(3, 6, seed=9))
    optimizer = MARS([p], lr=0.02, base="muon", **EXACT)
    reference = Muon([q], lr=0.02, nesterov=False, weight_decay=0.1, **EXACT)
    for t in range(5):
        p.grad, q.grad = random(3, 6, seed=t), corrected(t, (3, 6), 0.475)
        optimizer.step()
        reference.step()
    assert torch.allclose(p, q, atol=1e-12)


@pytest.mark.parametrize("options", [{"blocks": [2, 4]}, {}], ids=["fused", "stacked"])
def test_mars_muon_clips_each_matrix_on_its_own(options: dict[str, Any]) -> None:
    """Fused and stacked matrices move as separate parameters would, though only one of them has a large gradient."""
    shape, cut = ((6, 4), [2, 4]) if options else ((2, 3, 4), [1, 1])
    p = Parameter(random(*shape, seed=9))
    parts = [Parameter(x.clone().reshape(-1, 4)) for x in torch.split(p.detach(), cut)]
    whole = MARS([p], lr=0.02, base="muon", **options, **EXACT)
    separate = MARS(parts, lr=0.02, base="muon", **EXACT)
    for t in range(4):
        p.grad = random(*shape, seed=t) * 0.1
        p.grad[: cut[0]] *= 100.0 * (t + 1)
        for part, g in zip(parts, torch.split(p.grad, cut), strict=True):
            part.grad = g.reshape(-1, 4).clone()
        whole.step()
        separate.step()
    assert torch.allclose(p.detach().reshape(-1, 4), torch.cat([x.detach() for x in parts]), atol=1e-12)


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_mars_leaves_vectors_to_adamw(base: Any) -> None:
    """No correction on tensors of one dimension."""
    p, q = Parameter(random(5, seed=9)), Parameter(random(5, seed=9))
    run(MARS([p], lr=0.02, base=base), p, 4)
    run(torch.optim.AdamW([q], lr=0.02, betas=(0.95, 0.99), weight_decay=0.1), q, 4)
    assert torch.allclose(p, q, atol=1e-12)


def quartic(p: Parameter, x: Tensor) -> Tensor:
    loss: Tensor = ((p * x).sum(dim=-1) - 1).pow(4).sum()
    return loss


def batches(optimizer: torch.optim.Optimizer, p: Parameter, seeds: list[int]) -> list[float]:
    """One exact step per batch; the losses that came back."""
    losses = []
    for x in [random(*p.shape, seed=seed) for seed in seeds]:

        def closure(x: Tensor = x) -> float:
            value = quartic(p, x)
            value.backward()  # type: ignore[no-untyped-call]
            return float(value.detach())

        loss = optimizer.step(closure)
        assert loss is not None
        losses.append(loss)
    return losses


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_exact_mars_on_one_batch_is_the_approximate_one(base: Any) -> None:
    """When the batch never changes, the last gradient is the gradient at the last weights: both modes agree bit for bit."""
    p, q = Parameter(random(3, 4, seed=9)), Parameter(random(3, 4, seed=9))
    exact = batches(MARS([p], lr=0.02, base=base, exact=True), p, [1] * 6)
    optimizer = MARS([q], lr=0.02, base=base)
    plain = []
    for _ in range(6):
        optimizer.zero_grad()
        plain += batches(optimizer, q, [1])
    assert torch.equal(p, q) and exact == plain


def test_exact_mars_takes_the_current_batch_at_the_previous_weights() -> None:
    """AdamW on c = g(w, x) + 0.475 (g(w, x) - g(w_prev, x)), clipped; p.grad and the loss are those at w."""
    p, q = Parameter(random(3, 4, seed=9)), Parameter(random(3, 4, seed=9))
    optimizer = MARS([p], lr=0.02, exact=True)
    reference = torch.optim.AdamW([q], lr=0.02, betas=(0.95, 0.99), weight_decay=0.1)
    previous: Tensor | None = None
    for t in range(6):
        x = random(3, 4, seed=t)
        value = quartic(q, x)
        (g,) = torch.autograd.grad(value, q)
        before = torch.zeros_like(g)
        if previous is not None:
            (before,) = torch.autograd.grad(quartic(earlier := Parameter(previous), x), earlier)
        c = g + 0.475 * (g - before)
        q.grad = c / max(1.0, float(c.norm()))
        previous = q.detach().clone()
        reference.step()
        assert batches(optimizer, p, [t]) == pytest.approx([float(value.detach())], rel=1e-12)
        assert p.grad is not None and torch.allclose(p.grad, g, rtol=1e-10)
    assert torch.allclose(p, q, atol=1e-12)


def test_exact_mars_corrects_nothing_where_the_gradient_ignores_the_weights() -> None:
    """On a linear loss g(w_prev, x) = g(w, x), however the batches vary: AdamW on clipped gradients after step one."""
    p, q = Parameter(random(3, 4, seed=9)), Parameter(random(3, 4, seed=9))
    optimizer = MARS([p], lr=0.02, exact=True)
    reference = torch.optim.AdamW([q], lr=0.02, betas=(0.95, 0.99), weight_decay=0.1)
    for t in range(5):
        x = random(3, 4, seed=t)

        def closure(x: Tensor = x) -> float:
            optimizer.zero_grad(set_to_none=False)
            (p * x).sum().backward()  # type: ignore[no-untyped-call]
            return 0.0

        optimizer.step(closure)
        c = x * (1.475 if t == 0 else 1.0)
        q.grad = c / max(1.0, float(c.norm()))
        reference.step()
    assert torch.allclose(p, q, atol=1e-12)


def test_both_evaluations_of_exact_mars_draw_the_same_random_numbers() -> None:
    """Dropout must hit the same entries at both weights; afterwards the stream has moved on once."""
    p = Parameter(random(3, 4, seed=9))
    optimizer = MARS([p], lr=0.02, exact=True)
    drawn: list[Tensor] = []

    def closure() -> float:
        drawn.append(torch.rand(3, 4, dtype=torch.float64))
        (p * drawn[-1]).sum().backward()  # type: ignore[no-untyped-call]
        return 0.0

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.step(closure)
    first, second, second_again, third, third_again = (x for x in [drawn[0], *drawn[1:]])
    assert torch.equal(second, second_again) and torch.equal(third, third_again)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_exact_mars_resumes_bit_for_bit() -> None:
    """The previous weights are part of the state, for vectors too, and a failing closure leaves the weights in place."""
    for shape in ((3, 4), (5,)):
        p = Parameter(random(*shape, seed=9))
        one = MARS([p], lr=0.02, exact=True)
        batches(one, p, [0, 1])
        q = Parameter(p.detach().clone())
        two = MARS([q], lr=0.02, exact=True)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        batches(one, p, [2, 3])
        batches(two, q, [2, 3])
        assert torch.equal(p, q)

        def failing() -> float:
            raise ArithmeticError("no gradient")

        before = p.detach().clone()
        with pytest.raises(ArithmeticError):
            one.step(failing)
        assert torch.equal(p, before)


def test_exact_mars_needs_a_closure() -> None:
    """The message says what to call."""
    p = Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    with pytest.raises(ConfigError, match=r"step\(closure\)"):
        MARS([p], exact=True).step()


def test_exact_mars_works_inside_snoo() -> None:
    """The closure reaches it; the outer step moves the weights, not the batch."""
    p = Parameter(random(3, 4, seed=9))
    losses = batches(SNOO(MARS([p], lr=0.02, exact=True), k=2), p, [1] * 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamP(p, betas=(0.9, 1.0)), "betas is"),
        (lambda p: Scion([{"params": p, "norm": "spectrl"}]), "did you mean 'spectral'"),
        (lambda p: Scion(p, momentum=0.0), "momentum is 0.0"),
        (lambda p: MARS([{"params": p, "base": "adam"}]), "did you mean 'adamw'"),
    ],
)
def test_wrong_options_are_refused(make: Any, message: str) -> None:
    """The error names the option and the nearest valid value."""
    with pytest.raises(ConfigError, match=message):
        make([Parameter(torch.ones(3, 3))])
