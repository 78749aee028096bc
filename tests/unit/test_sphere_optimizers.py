"""Hyperball and MD: constant norms, the split gradient, and weights that somebody else wrote."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import softplus

from diloco.errors import ConfigError
from diloco.optim import GPA, MD, SNOO, Combined, Hyperball, orthogonalize

EXACT: dict[str, Any] = {"iteration_dtype": torch.float64}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer: torch.optim.Optimizer, p: Parameter, steps: int) -> None:
    for t in range(steps):
        p.grad = random(*p.shape, seed=t).to(p.dtype)
        optimizer.step()


def norm(x: Tensor) -> float:
    return float(x.detach().norm())


@pytest.mark.parametrize("base", ["muon", "normuon", "adam"])
def test_hyperball_keeps_the_initial_norm(base: Any) -> None:
    """||p|| stays what it was at the first step, per fused block too."""
    p = Parameter(random(8, 6) * torch.linspace(1, 3, 8, dtype=torch.float64)[:, None])
    before = [norm(x) for x in p.detach().chunk(2)]
    run(Hyperball([{"params": [p], "blocks": 2}], lr=0.1, base=base), p, 5)
    assert [norm(x) for x in p.detach().chunk(2)] == pytest.approx(before, rel=1e-6)


def test_hyperball_follows_its_formula() -> None:
    """One Muon step: q = p - lr R u/||u||, p = R q/||q||, whatever the scale of u."""
    p = Parameter(random(5, 7, seed=9))
    w, R = p.detach().clone(), norm(p)
    u = orthogonalize(random(5, 7), dtype=torch.float64)
    run(Hyperball([p], lr=0.1, **EXACT), p, 1)
    q = w - 0.1 * R * u / u.norm()
    assert torch.allclose(p, R * q / q.norm(), atol=1e-10)


def test_hyperball_adam_follows_its_formula() -> None:
    """The first Adam direction is g/(|g| + eps)."""
    p = Parameter(random(5, 7, seed=9))
    w, R, g = p.detach().clone(), norm(p), random(5, 7)
    run(Hyperball([p], lr=0.1, base="adam"), p, 1)
    u = g / (g.abs() + 1e-8)
    q = w - 0.1 * R * u / u.norm()
    assert torch.allclose(p, R * q / q.norm(), atol=1e-10)


def test_a_zero_gradient_leaves_hyperball_weights_alone() -> None:
    """u = 0 is no step, bit for bit."""
    p = Parameter(random(3, 4).float())
    before = p.detach().clone()
    optimizer = Hyperball([p])
    p.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(p, before)


def test_an_outer_step_returns_to_the_sphere() -> None:
    """SNOO re-projects Hyperball weights, also inside Combined, and its slow copy follows."""
    p = Parameter(random(6, 6))
    before = norm(p)
    optimizer = SNOO(Combined(Hyperball([p], lr=0.3)), k=2)
    run(optimizer, p, 4)
    assert norm(p) == pytest.approx(before, rel=1e-6)
    assert torch.equal(optimizer.slow[p], p)


@pytest.mark.parametrize("make", [Hyperball, MD])
def test_zero_weights_and_averages_are_refused(make: Any) -> None:
    """A zero matrix has no direction to keep; GPA's averages leave the sphere."""
    with pytest.raises(ConfigError, match="norm 0"):
        make([Parameter(torch.zeros(3, 3))])
    with pytest.raises(ConfigError, match="sphere"):
        GPA(make([Parameter(torch.ones(3, 3))]))
    with pytest.raises(ConfigError, match="did you mean 'muon'"):
        make([Parameter(torch.ones(3, 3))], base="mouon")


@pytest.mark.parametrize(
    ("radius", "d_model", "expected"),
    [("shape", None, math.sqrt(10)), ("init", 8, math.sqrt(6 * 10 / 8)), (3.0, None, 3.0)],
)
def test_md_scales_the_weights_to_their_radius(radius: Any, d_model: int | None, expected: float) -> None:
    """sqrt(max(r, c)), sqrt(r c/d_model) or a number, at construction; the first Muon step is lr R long."""
    p = Parameter(random(6, 10, seed=3))
    optimizer = MD([p], lr=1e-4, gain_lr=0.0, radius=radius, d_model=d_model, coefficients="polar8", **EXACT)
    assert norm(p) == pytest.approx(expected, rel=1e-6)
    before = p.detach().clone()
    p.grad = torch.linalg.qr(random(10, 6)).Q.T
    p.grad = p.grad - before * (p.grad * before).sum() / before.norm() ** 2
    optimizer.step()
    assert norm(p.detach() - before) == pytest.approx(1e-4 * expected, rel=0.02)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
@pytest.mark.parametrize("shrink", [1.0, 1 / math.sqrt(8)])
@pytest.mark.parametrize("radius", ["shape", "init"])
def test_mds_muon_step_has_the_length_of_the_radius(
    radius: Any, shrink: float, shape: tuple[int, int]
) -> None:
    """||update|| = R whatever the shape: in "init" mode shape_up orth is also multiplied by sqrt(min(r, c)/d_model)."""
    p = Parameter(random(*shape, seed=3))
    full = math.sqrt(max(shape)) if radius == "shape" else math.sqrt(shape[0] * shape[1] / 4)
    options: dict[str, Any] = {"radius": radius, "d_model": 4, "shrink": shrink, "gain_lr": 0.0}
    optimizer = MD([p], lr=0.5, coefficients="polar12", **options, **EXACT)
    R = full * shrink
    D = p.detach().clone()
    assert norm(D) == pytest.approx(R, rel=1e-9)
    p.grad = random(*shape, seed=4)
    U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
    optimizer.step()
    step = 0.5 * R * U @ Vh / math.sqrt(min(shape))  # of norm 0.5 R
    assert torch.allclose(p, R * (D - step) / (D - step).norm(), atol=1e-9)


@pytest.mark.parametrize("base", ["muon", "adam"])
@pytest.mark.parametrize("sphere", ["matrix", "row"])
def test_a_shrunk_md_run_is_the_full_one_scaled(base: Any, sphere: Any) -> None:
    """R and update times s: on gradients that do not depend on the weights, W of the shrunk run is s W of the full one."""
    runs = []
    for shrink in (1.0, 0.25):
        p = Parameter(random(5, 8, seed=3))
        group = {"params": [p], "shrink": shrink, "gains": False}
        run(MD([group], lr=0.1, base=base, sphere=sphere, **EXACT), p, 5)
        runs.append(p.detach())
    assert torch.allclose(runs[1], 0.25 * runs[0], atol=1e-12)


def test_outside_writes_restore_the_shrunk_radius() -> None:
    """reanchor() knows of `shrink`: W is kept, ||D|| is shrink R."""
    p = Parameter(random(4, 6, seed=3))
    optimizer = MD([p], lr=0.05, shrink=0.5)
    run(optimizer, p, 2)
    with torch.no_grad():
        p.mul_(1.7)
    optimizer.reanchor()
    row, col = gains(optimizer, p)
    assert norm(p / row / col) == pytest.approx(0.5 * math.sqrt(6), rel=1e-9)


def gains(optimizer: MD, p: Parameter) -> tuple[Tensor, Tensor]:
    return softplus(optimizer.state[p]["raw_row"][0]), softplus(optimizer.state[p]["raw_col"][0])


def test_md_keeps_the_direction_norm_under_moving_gains() -> None:
    """||W/g_row/g_col|| = R after every step, per block, while ||W|| itself moves."""
    p = Parameter(random(8, 6, seed=3))
    optimizer = MD([{"params": [p], "blocks": 2}], lr=0.05, gain_lr=0.05)
    for t in range(5):
        p.grad = random(8, 6, seed=t)
        optimizer.step()
        row, col = gains(optimizer, p)
        D = (p / row / col).detach()
        assert [norm(x) for x in D.chunk(2)] == pytest.approx([math.sqrt(6)] * 2, rel=1e-6)
    assert abs(norm(p) - math.sqrt(12)) > 1e-3


def test_md_splits_the_gradient_as_autograd_does() -> None:
    """Adam base: one step equals Adam on D, raw_row and raw_col of the factored form, then projection."""
    p = Parameter(random(4, 6, seed=3))
    optimizer = MD([p], base="adam", lr=0.02, gain_lr=0.03)
    raw_row = Parameter(torch.full((4, 1), math.log(math.e - 1), dtype=torch.float64))
    raw_col = Parameter(torch.full((1, 6), math.log(math.e - 1), dtype=torch.float64))
    D = Parameter(p.detach().clone())
    reference = torch.optim.Adam(
        [{"params": [D], "lr": 0.02}, {"params": [raw_row, raw_col], "lr": 0.03}], betas=(0.9, 0.95)
    )
    target = random(4, 6, seed=8)
    for _ in range(6):
        for weights, o in ((p, optimizer), (None, reference)):
            o.zero_grad()
            W = weights if weights is not None else softplus(raw_row) * D * softplus(raw_col)
            (W - target).pow(3).abs().sum().backward()  # type: ignore[no-untyped-call]
            o.step()
        with torch.no_grad():
            D.mul_(math.sqrt(6) / D.norm())
    assert torch.allclose(p, softplus(raw_row) * D * softplus(raw_col), atol=1e-8)


def test_md_row_sphere_without_gains_is_adam_on_unit_rows() -> None:
    """Embedding rows: Adam, then every row has norm 1; no gain state."""
    p = Parameter(random(5, 4, seed=3))
    optimizer = MD([{"params": [p], "sphere": "row", "gains": False, "base": "adam"}], lr=0.1)
    run(optimizer, p, 3)
    assert torch.allclose(p.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert "raw_row" not in optimizer.state[p]


@pytest.mark.parametrize("sphere", ["matrix", "row"])
def test_md_takes_up_outside_writes(sphere: Any) -> None:
    """reanchor() keeps W and restores ||D|| = R through the row gains."""
    p = Parameter(random(4, 6, seed=3))
    optimizer = MD([p], lr=0.05, sphere=sphere)
    run(optimizer, p, 2)
    with torch.no_grad():
        p.mul_(1.7)
    written = p.detach().clone()
    optimizer.reanchor()
    row, col = gains(optimizer, p)
    D = (p / row / col).detach()
    assert torch.equal(p, written)
    if sphere == "row":
        assert torch.allclose(D.norm(dim=1), torch.ones(4, dtype=torch.float64))
    else:
        assert norm(D) == pytest.approx(math.sqrt(6), rel=1e-9)


def test_md_gains_follow_the_learning_rate_schedule() -> None:
    """A learning rate of zero freezes W, gains included; a zero gain lr leaves the gains at 1."""
    p = Parameter(random(4, 6, seed=3))
    optimizer = MD([p], lr=0.05, gain_lr=0.05)
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, p, 2)
    assert torch.allclose(p, before)
    q = Parameter(random(4, 6, seed=3))
    frozen = MD([q], lr=0.05, gain_lr=0.0)
    run(frozen, q, 2)
    assert torch.allclose(gains(frozen, q)[0], torch.ones(4, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": "init"}, "give d_model"),
        ({"radius": -1.0}, "radius is -1.0"),
        ({"sphere": "rows"}, "did you mean 'row'"),
        ({"shrink": 0.0}, "shrink is 0.0"),
    ],
)
def test_wrong_md_options_are_refused(options: dict[str, Any], message: str) -> None:
    """The error names the option and the fix."""
    with pytest.raises(ConfigError, match=message):
        MD([Parameter(torch.ones(3, 3))], **options)
