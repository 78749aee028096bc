"""AdamP, Scion and MARS against their definitions written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import MARS, AdamP, Muon, Scion, orthogonalize

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


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_mars_leaves_vectors_to_adamw(base: Any) -> None:
    """No correction on tensors of one dimension."""
    p, q = Parameter(random(5, seed=9)), Parameter(random(5, seed=9))
    run(MARS([p], lr=0.02, base=base), p, 4)
    run(torch.optim.AdamW([q], lr=0.02, betas=(0.95, 0.99), weight_decay=0.1), q, 4)
    assert torch.allclose(p, q, atol=1e-12)


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
