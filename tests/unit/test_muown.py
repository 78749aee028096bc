"""Muown against its formulas written out in numpy, and what its row gains promise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import GPA, SNOO, Combined, Muown

Array = npt.NDArray[np.float64]
EXACT: dict[str, Any] = {"iteration_dtype": torch.float64}

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer: torch.optim.Optimizer, p: Parameter, steps: Sequence[int]) -> None:
    for t in steps:
        p.grad = random(*p.shape, seed=t).to(p.dtype)
        optimizer.step()


def polar(G: Array) -> Array:
    """U V^T: twelve iterations of the polar list reach it to about 1e-12 for matrices as well conditioned as here."""
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    return np.asarray(U @ Vt)


def written_out(
    W: Array, grads: Sequence[Array], *, T: int, n_target: float, lr: float = 3.5e-3, blocks: int = 1
) -> list[Array]:
    """The weights after each step, from the definition, with V kept as a variable of its own."""
    r, c = W.shape
    g = np.linalg.norm(W, axis=1, keepdims=True)
    n0 = n = g.copy()
    M, m, v = np.zeros_like(W), np.zeros_like(g), np.zeros_like(g)
    seen = []
    for t, G in enumerate(grads, start=1):
        U = W / g
        V = U * n
        dg = (G * U).sum(axis=1, keepdims=True)
        dV = (g / n) * (G - U * dg)
        M = 0.95 * M + dV
        O = np.concatenate([polar(x) for x in np.split(dV + 0.95 * M, blocks)])
        V = V - lr * 0.2 * np.sqrt(max(r // blocks, c)) * O
        m = 0.9 * m + 0.1 * dg
        v = 0.95 * v + 0.05 * dg**2
        g = g - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        W = g * V / np.linalg.norm(V, axis=1, keepdims=True)
        x = min((t - 1) / max(T - 1, 1), 1.0)
        n = n0 + (3 * x**2 - 2 * x**3) * (n_target - n0)
        seen.append(W)
    return seen


@pytest.mark.parametrize(("shape", "blocks"), [((4, 9), 1), ((9, 4), 1), ((8, 5), 2)])
def test_it_follows_its_formula_over_a_whole_run(shape: tuple[int, int], blocks: int) -> None:
    """Every step of twelve agrees to 1e-9, growing norm, momentum, gains and fused blocks included."""
    p = Parameter(random(*shape, seed=50) * 0.3)
    grads = [random(*shape, seed=t) for t in range(12)]
    expected = written_out(
        p.detach().numpy().copy(), [g.numpy() for g in grads], T=12, n_target=2.5, lr=0.05, blocks=blocks
    )
    optimizer = Muown([p], lr=0.05, total_steps=12, n_target=2.5, blocks=blocks, **EXACT)
    for g, W in zip(grads, expected, strict=True):
        p.grad = g
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), W, rtol=0, atol=1e-9)


def test_a_float32_run_stays_near_the_float64_one() -> None:
    """Default precision for the iteration aside, float32 weights and state follow within 1e-4 of the displacement."""
    start = random(6, 10, seed=50) * 0.3
    grads = [random(6, 10, seed=t) for t in range(20)]
    expected = written_out(start.numpy(), [g.numpy() for g in grads], T=20, n_target=2.688)[-1]
    p = Parameter(start.float())
    run(Muown([p], total_steps=20, iteration_dtype=torch.float32), p, range(20))
    moved = np.linalg.norm(expected - start.numpy())
    assert np.linalg.norm(p.detach().numpy() - expected) < 1e-4 * moved


def test_gradients_along_the_rows_move_only_the_gains() -> None:
    """G = diag(a) W has no part that turns a row: rows keep their direction and change their length by lr."""
    p = Parameter(random(4, 6, seed=50))
    before = p.detach().clone()
    optimizer = Muown([p], lr=0.01, total_steps=10, **EXACT)
    p.grad = before * torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=torch.float64)
    # What rounding leaves of the turning part would be blown up to an orthogonal matrix: keep it below the eps.
    optimizer.param_groups[0]["orth_eps"] = 1e3
    optimizer.step()
    norms, old = p.detach().norm(dim=1), before.norm(dim=1)
    assert torch.allclose(p.detach() / norms[:, None], before / old[:, None], atol=1e-12)
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(norms, old - 0.01 * sign, atol=1e-8)


def test_a_growing_direction_norm_turns_rows_less() -> None:
    """The same gradient turns a row about n_target/n0 times less at the end of the schedule than with n kept at n0."""
    angles = []
    for target in (1.0, 4.0):
        p = Parameter(torch.nn.functional.normalize(random(4, 8, seed=50), dim=1))
        optimizer = Muown([p], lr=1e-3, total_steps=3, n_target=target, momentum=0.0, **EXACT)
        run(optimizer, p, range(3))
        before = torch.nn.functional.normalize(p.detach(), dim=1)
        run(optimizer, p, [7])
        after = torch.nn.functional.normalize(p.detach(), dim=1)
        angles.append(float((after - before).norm()))
    assert angles[0] / angles[1] == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("total", [1, 3])
def test_the_norm_stays_at_its_target_after_the_last_step(total: int) -> None:
    """Steps beyond total_steps do not extrapolate the schedule."""
    p = Parameter(random(3, 5, seed=50))
    start = p.detach().numpy().copy()
    run(Muown([p], lr=0.05, total_steps=total, n_target=4.0, **EXACT), p, range(8))
    grads = [random(3, 5, seed=t).numpy() for t in range(8)]
    expected = written_out(start, grads, T=total, n_target=4.0, lr=0.05)[-1]
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-9)


def test_stacked_matrices_and_blocks_equal_separate_parameters() -> None:
    """[E, r, c] with two fused blocks gets the bits of E separate matrices with blocks, and of 2 E parts."""
    stack = Parameter((random(3, 4, 6, seed=50) * 0.3).float())
    experts = [Parameter(x.clone()) for x in stack.detach()]
    halves = [Parameter(x.clone()) for e in stack.detach() for x in e.chunk(2)]
    kinds = [
        Muown([stack], lr=0.02, total_steps=5, blocks=2),
        Muown(experts, lr=0.02, total_steps=5, blocks=2),
        Muown(halves, lr=0.02, total_steps=5),
    ]
    for t in range(5):
        G = random(3, 4, 6, seed=t).float()
        stack.grad = G
        for p, g in zip(experts, G, strict=True):
            p.grad = g.clone()
        for p, g in zip(halves, (x for e in G for x in e.chunk(2)), strict=True):
            p.grad = g.clone()
        for optimizer in kinds:
            optimizer.step()
    assert torch.equal(stack, torch.stack([p.detach() for p in experts]))
    assert torch.equal(stack.flatten(0, 1), torch.cat([p.detach() for p in halves]))


def test_resuming_continues_bit_for_bit_in_the_middle_of_the_schedule() -> None:
    """Three steps, save, load into a fresh optimizer, and the rest equals the uninterrupted run; state is not shared."""
    p = Parameter(random(4, 6, seed=50).bfloat16())
    one = Muown([p], lr=0.02, total_steps=8)
    run(one, p, range(3))
    saved = copy.deepcopy(one.state_dict())
    q = Parameter(random(4, 6, seed=50).bfloat16())
    two = Muown([q], lr=0.02, total_steps=8)
    two.load_state_dict(saved)
    with torch.no_grad():
        q.copy_(p)
    run(one, p, range(3, 8))
    run(two, q, range(3, 8))
    assert torch.equal(p, q) and two.state[q]["momentum"].dtype == torch.float32


def test_gradients_are_left_alone_and_none_is_skipped() -> None:
    """p.grad keeps its bits; a parameter without gradient gets no state and does not move."""
    p, idle = Parameter(random(4, 6, seed=50)), Parameter(random(4, 6, seed=51))
    before = idle.detach().clone()
    optimizer = Muown([p, idle], total_steps=4)
    g = random(4, 6)
    p.grad = g.clone()
    optimizer.step()
    assert torch.equal(p.grad, g)
    assert torch.equal(idle, before) and not optimizer.state.get(idle)


def test_outside_writes_are_taken_up_by_the_gains() -> None:
    """reanchor() keeps W, and the next step is that of gains set to the new row norms with their signs."""
    p = Parameter(random(4, 6, seed=50))
    optimizer = Muown([p], lr=0.02, total_steps=10, **EXACT)
    run(optimizer, p, range(2))
    state = optimizer.state[p]
    state["gain"][0, 1].neg_()  # a row whose gain has crossed zero
    with torch.no_grad():
        p[1].neg_()
        p.add_(random(4, 6, seed=9), alpha=0.1)
    written = p.detach().clone()
    optimizer.reanchor()
    assert torch.equal(p, written)
    norms = written.norm(dim=1) * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(state["gain"][0, :, 0], norms)
    U = written / norms[:, None]
    assert torch.allclose(U.norm(dim=1), torch.ones(4, dtype=torch.float64))
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, p, [5])
    assert torch.allclose(p, written)


def test_a_row_written_to_zero_outside_comes_back() -> None:
    """Nothing becomes NaN, and the row moves again."""
    p = Parameter(random(4, 6, seed=50))
    optimizer = Muown([p], lr=0.02, total_steps=10)
    run(optimizer, p, range(2))
    with torch.no_grad():
        p[2].zero_()
    optimizer.reanchor()
    run(optimizer, p, range(2, 5))
    assert bool(torch.isfinite(p).all()) and float(p.detach()[2].norm()) > 1e-3


def test_a_gain_that_lands_on_zero_goes_on() -> None:
    """Its row keeps its direction, so that the next steps find a way out instead of dividing by zero."""
    p = Parameter(torch.tensor([[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    optimizer = Muown([p], lr=0.5, total_steps=10, betas=(0.0, 0.0), eps=0.0)
    for _ in range(3):
        p.grad = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3]])
        optimizer.step()
        assert bool(torch.isfinite(p).all())
    assert float(p.detach()[0].norm()) > 0.1


def test_an_outer_step_reanchors_it_and_averaging_wrappers_refuse_it() -> None:
    """SNOO leaves gains equal to the row norms, also inside Combined; GPA's averages are not for it."""
    p = Parameter(random(4, 6, seed=50))
    inner = Muown([p], lr=0.05, total_steps=10)
    run(SNOO(Combined(inner), k=2), p, range(4))
    gain = inner.state[p]["gain"]
    assert torch.allclose(gain[0, :, 0].abs(), p.detach().norm(dim=1))
    with pytest.raises(ConfigError, match="Muown"):
        GPA(Muown([p], total_steps=10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [Parameter(torch.eye(3) * torch.tensor([[1.0], [0.0], [1.0]]))]}, "row of norm 0"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"n_target": 0.0}, "n_target is 0.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"coefficients": "polr8"}, "did you mean 'polar8'"),
        ({"blocks": 2}, "blocks is 2"),
        ({"params": [Parameter(torch.ones(3))]}, r"shape \(3,\)"),
        ({"params": [{"params": [Parameter(torch.eye(3))], "n_targt": 1.0}]}, "did you mean 'n_target'"),
    ],
)
def test_wrong_options_are_refused_when_made(change: dict[str, Any], message: str) -> None:
    """The error names the option, its value and the fix, before any training."""
    with pytest.raises(ConfigError, match=message):
        Muown(**{"params": [Parameter(torch.eye(3))], "total_steps": 10, **change})
