"""Freon and Kaon: powers of the spectrum against numpy's singular values, and the chaotic map."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import Freon, Kaon, Muon
from diloco.optim.freon import spectral_power
from diloco.optim.kaon import scramble

torch.set_num_threads(1)
KINDS: list[Any] = [Freon, Kaon]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer: torch.optim.Optimizer, p: Parameter, steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        p.grad = random(*p.shape, seed=t).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("q", [0.25, 0.5, 1.0, 1.5, 2.0])
def test_a_spectral_power_is_its_definition(method: Any, shape: tuple[int, int], q: float) -> None:
    """(G G^T)^(-e) G with e = 1 - q/2 after division by the Schatten-q norm, from numpy's decompositions."""
    G = random(*shape).numpy()
    S = np.linalg.svd(G, compute_uv=False)
    G = G / (S**q).sum() ** (1 / q)
    U, squares, _ = np.linalg.svd(G @ G.T)
    rank = min(shape)
    power = (U[:, :rank] * squares[:rank] ** (q / 2 - 1)) @ U[
        :, :rank
    ].T  # the pseudo-inverse power for tall G
    np.testing.assert_allclose(
        spectral_power(random(*shape), q, method=method).numpy(),
        power @ G,
        rtol=0,
        atol=1e-9 * np.abs(power @ G).max(),
    )


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_its_ends_are_normalised_sgd_and_the_polar_factor(method: Any) -> None:
    """q = 2 gives G/||G||, q = 1 gives U V^T; the scale of G does not matter for any q, not even extreme ones."""
    G = random(4, 7)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert torch.allclose(spectral_power(G, 2.0, method=method), G / G.norm(), atol=1e-12)
    assert torch.allclose(spectral_power(G, 1.0, method=method), U @ Vh, atol=1e-12)
    for factor in (1e-180, 1e180):
        scaled = spectral_power(factor * G, 0.5, method=method)
        assert torch.allclose(scaled, spectral_power(G, 0.5, method=method), rtol=1e-9)


def test_the_dual_norm_of_the_update_is_one() -> None:
    """For q > 1 the Schatten-q/(q-1) norm of the result is 1: it is the steepest direction in the Schatten-q ball."""
    for q in (1.25, 1.5, 1.9):
        S = torch.linalg.svdvals(spectral_power(random(5, 8), q))
        p = q / (q - 1)
        assert float(S.pow(p).sum().pow(1 / p)) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_missing_directions_stay_missing(method: Any) -> None:
    """A matrix of rank 2 gets a finite update of rank 2, in the quasi-norm regime too; zero gives zero."""
    G = random(6, 2) @ random(2, 8, seed=1)
    O = spectral_power(G, 0.5, method=method)
    S = torch.linalg.svdvals(O)
    assert bool((S[2:] < 1e-6 * S[0]).all()) and float(S[1]) > 1.0
    assert torch.equal(spectral_power(torch.zeros(3, 4), 0.5, method=method), torch.zeros(3, 4).double())


def test_freon_with_q_one_is_exact_muon() -> None:
    """Momentum, Nesterov, scale and decay are Muon's: with q = 1 and a converged iteration the weights agree."""
    for nesterov in (False, True):
        p, r = Parameter(random(5, 8, seed=9)), Parameter(random(5, 8, seed=9))
        run(Freon([p], lr=0.02, q=1.0, weight_decay=0.1, nesterov=nesterov), p, 6)
        reference = Muon(
            [r], lr=0.02, nesterov=nesterov, coefficients="polar12", iteration_dtype=torch.float64
        )
        run(reference, r, 6)
        assert torch.allclose(p, r, atol=1e-9)


def test_freon_follows_its_formula_over_a_run() -> None:
    """Eight steps of M = 0.9 M + 0.1 g, p = p (1 - lr wd) - lr scale O in numpy, for q = 0.5."""
    p = Parameter(random(4, 9, seed=9))
    W, M = p.detach().numpy().copy(), np.zeros((4, 9))
    for t in range(8):
        M = 0.9 * M + 0.1 * random(4, 9, seed=t).numpy()
        U, S, Vt = np.linalg.svd(M, full_matrices=False)
        O = (U * (S / np.sqrt(S).sum() ** 2) ** -0.5) @ Vt
        W = W * (1 - 0.01 * 0.2) - 0.01 * math.sqrt(4 / 9) * O
    run(Freon([p], lr=0.01, q=0.5, momentum=0.9, weight_decay=0.2, scale="spectral"), p, 8)
    np.testing.assert_allclose(p.detach().numpy(), W, rtol=0, atol=1e-9)


def chaotic(s: np.ndarray[Any, Any], iterations: int) -> np.ndarray[Any, Any]:
    for _ in range(iterations):
        s = 4.1 * (1 - s**2) ** 2 * s
    return s / 1.175


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
@pytest.mark.parametrize("iterations", [1, 5, 8])
def test_kaon_maps_singular_values_by_the_chaotic_map(shape: tuple[int, int], iterations: int) -> None:
    """U diag(f(...f(S/||S||)))/1.175 V^T with f(s) = 4.1 (1 - s^2)^2 s; all end in [0, 1]."""
    M = random(*shape).numpy()
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    values = chaotic(S / np.linalg.norm(S), iterations)
    result = scramble(random(*shape), iterations, dtype=torch.float64)
    np.testing.assert_allclose(result.numpy(), (U * values) @ Vt, rtol=0, atol=1e-8)
    assert values.min() >= 0 and values.max() <= 1


def test_kaon_shuffles_the_spectrum() -> None:
    """The order of the singular values is lost and they spread over the interval: it is no smooth filter."""
    before = np.linspace(0.05, 1.0, 40)
    after = np.diag(scramble(torch.diag(torch.from_numpy(before)), 8, dtype=torch.float64).numpy())
    assert abs(np.corrcoef(before, after)[0, 1]) < 0.5
    assert after.min() < 0.35 and after.max() > 0.9


def test_kaon_stays_bounded_however_long_and_in_every_precision() -> None:
    """Rounding does not push singular values out of the map's interval, where they would explode; zero gives zero."""
    for dtype in (torch.float32, torch.float64):
        largest = torch.linalg.svdvals(scramble(random(16, 24), 200, dtype=dtype)).max()
        assert float(largest) <= 1.0 + 1e-3
    assert torch.equal(scramble(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_kaon_follows_its_formula_over_a_run() -> None:
    """Six steps in numpy, momentum 0.95 and match_rms."""
    p = Parameter(random(4, 9, seed=9))
    W, M = p.detach().numpy().copy(), np.zeros((4, 9))
    for t in range(6):
        M = 0.95 * M + 0.05 * random(4, 9, seed=t).numpy()
        U, S, Vt = np.linalg.svd(M, full_matrices=False)
        W = W - 0.01 * 0.2 * 3 * (U * chaotic(S / np.linalg.norm(S), 3)) @ Vt
    run(Kaon([p], lr=0.01, iterations=3, iteration_dtype=torch.float64), p, 6)
    np.testing.assert_allclose(p.detach().numpy(), W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_and_blocks_equal_separate_parameters(kind: Any) -> None:
    """[E, r, c] with two fused blocks gets the bits of 2 E parameters."""
    stack = Parameter(random(3, 4, 6, seed=50).float())
    parts = [Parameter(x.clone()) for e in stack.detach() for x in e.chunk(2)]
    a, b = kind([stack], lr=0.02, blocks=2), kind(parts, lr=0.02)
    for t in range(3):
        stack.grad = random(3, 4, 6, seed=t).float()
        for p, g in zip(parts, (x for e in stack.grad for x in e.chunk(2)), strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    assert torch.equal(stack.flatten(0, 1), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact_and_gradients_are_left_alone(kind: Any) -> None:
    """Save and load continues bit for bit; p.grad keeps its bits; None is skipped without state."""
    p, idle = Parameter(random(4, 6, seed=50).float()), Parameter(random(4, 6).float())
    one = kind([p, idle], lr=0.02)
    run(one, p, 3)
    q, other = Parameter(p.detach().clone()), Parameter(idle.detach().clone())
    two = kind([q, other], lr=0.02)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    run(one, p, 3, start=3)
    run(two, q, 3, start=3)
    assert torch.equal(p, q) and not torch.equal(p, random(4, 6, seed=50).float())
    assert p.grad is not None and torch.equal(p.grad, random(4, 6, seed=5).float())
    assert torch.equal(idle, random(4, 6).float()) and not one.state.get(idle)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Freon(p, q=0.0), "q is 0.0"),
        (lambda p: Freon(p, q=2.5), "q is 2.5"),
        (lambda p: Freon([{"params": p, "method": "grm"}]), "did you mean 'gram'"),
        (lambda p: Freon(p, iteration_dtype="bfloat16"), "decomposed in float32 or float64"),
        (lambda p: Freon(p, scale="spectrl"), "did you mean 'spectral'"),
        (lambda p: Freon(p, momentum=1.0), "momentum is 1.0"),
        (lambda p: Freon([{"params": p, "coefficients": "you5"}]), "no option 'coefficients'"),
        (lambda p: Kaon(p, iterations=0), "iterations is 0"),
        (lambda p: Kaon(p, iteration_dtype="int8"), "iteration_dtype is 'int8'"),
        (lambda p: Kaon(p, blocks=2), "blocks is 2"),
        (lambda p: Kaon([Parameter(torch.ones(3))]), r"shape \(3,\)"),
    ],
)
def test_wrong_options_are_refused_when_made(make: Any, message: str) -> None:
    """The error names the option, its value and the fix."""
    with pytest.raises(ConfigError, match=message):
        make([Parameter(torch.ones(3, 3))])
