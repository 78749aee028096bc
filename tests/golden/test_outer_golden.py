"""Outer optimizers against published numbers, torch's own, and each other."""

from __future__ import annotations

import pytest
import torch

from diloco.errors import ConfigError
from diloco.outer import Adam, Gpa, Nesterov, OuterOptimizer, OuterShard, Sgd, SgdM, make


def path(optimizer: OuterOptimizer, rounds: int, n: int = 1) -> list[float]:
    shard = OuterShard.start(optimizer, torch.zeros(n))
    values = []
    for _ in range(rounds):
        shard.apply(torch.ones(n))
        values.append(float(shard.params[0]))
    return values


@pytest.mark.parametrize(
    ("lr", "mu", "expected"),
    [
        (0.7, 0.9, [-1.33, -3.227, -5.6343, -8.50087]),
        (0.4, 0.9, [-0.76, -1.844, -3.2196, -4.85764]),
    ],
)
def test_nesterov_gives_the_golden_numbers(lr: float, mu: float, expected: list[float]) -> None:
    """D = 1 for four rounds from G = 0 (section 11)."""
    assert path(Nesterov(lr, mu), 4) == pytest.approx(expected, rel=1e-6)


def test_nesterov_is_torchs_sgd_with_nesterov() -> None:
    """The same as torch.optim.SGD(nesterov=True, dampening=0) on the same gradients."""
    generator = torch.Generator().manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(50, generator=generator))
    ours = OuterShard.start(Nesterov(0.7, 0.9), theirs.detach())
    sgd = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(30):
        gradient = torch.randn(50, generator=generator)
        theirs.grad = gradient.clone()
        sgd.step()
        ours.apply(gradient)
    torch.testing.assert_close(ours.params, theirs.detach(), rtol=1e-5, atol=1e-5)
    assert ours.version == 30


def test_sgd_and_momentum_by_hand() -> None:
    """lr 1 SGD is averaging; SGD-M moves by lr times the buffer."""
    assert path(Sgd(1.0), 3) == [-1.0, -2.0, -3.0]
    assert path(SgdM(0.5, 0.5), 3) == pytest.approx([-0.5, -1.25, -2.125])


def test_adam_moves_by_its_rate_on_a_steady_gradient() -> None:
    """With D = 1 the corrected moments are 1: each round moves lr / (1 + eps)."""
    assert path(Adam(0.3, eps=0.1), 4) == pytest.approx([-0.3 / 1.1 * k for k in (1, 2, 3, 4)], rel=1e-5)


@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.9), (0.4, 0.5)])
def test_i10_gpa_with_equal_mus_is_nesterov(lr: float, mu: float) -> None:
    """mu_x = mu_y = mu and eta_z = eta/(1-mu): y follows Nesterov(eta, mu)."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(20, generator=generator, dtype=torch.float64)
    gpa = OuterShard.start(Gpa(lr / (1 - mu), mu, mu), start)
    nesterov = OuterShard.start(Nesterov(lr, mu), start)
    for _ in range(40):
        mean = torch.randn(20, generator=generator, dtype=torch.float64)
        gpa.apply(mean)
        nesterov.apply(mean)
        torch.testing.assert_close(gpa.params, nesterov.params, rtol=1e-9, atol=1e-9)


def test_i10_gpa_without_averaging_is_sgd_and_with_full_averaging_stands_still() -> None:
    """mu_x = 0 is plain SGD with eta_z whatever mu_y; mu_x = 1 freezes x."""
    assert path(Gpa(0.5, 0.0, 0.8), 3) == pytest.approx([-0.5, -1.0, -1.5])
    shard = OuterShard.start(Gpa(0.5, 1.0, 0.8), torch.zeros(2))
    shard.apply(torch.ones(2))
    assert torch.equal(shard.state["x"], torch.zeros(2))


@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.9), (0.4, 0.9), (0.4, 0.0)])
def test_i13_steady_updates_move_by_eta_over_one_minus_mu(lr: float, mu: float) -> None:
    """With a constant D the movement of a round tends to eta/(1-mu) D: 7 and 4 for the usual settings."""
    values = path(Nesterov(lr, mu), 200)
    assert values[-2] - values[-1] == pytest.approx(lr / (1 - mu), rel=1e-3)


def test_updates_leave_the_mean_alone_and_state_is_fresh_per_fragment() -> None:
    """A step must not write into the mean that others still read, and two fragments never share a buffer."""
    for optimizer in (Sgd(), SgdM(), Nesterov(), Adam(), Gpa()):
        first, second = (OuterShard.start(optimizer, torch.zeros(3)) for _ in range(2))
        mean = torch.ones(3)
        first.apply(mean)
        assert torch.equal(mean, torch.ones(3))
        for name, tensor in second.state.items():
            assert torch.equal(tensor, optimizer.init(torch.zeros(3))[name])


def test_a_shard_owns_its_values() -> None:
    """Starting from a tensor copies it."""
    start = torch.zeros(3)
    shard = OuterShard.start(Sgd(), start)
    shard.apply(torch.ones(3))
    assert torch.equal(start, torch.zeros(3))


def test_loading_continues_bit_for_bit() -> None:
    """Value, state and version carried to another shard give the same next steps."""
    generator = torch.Generator().manual_seed(2)
    for kind in ("sgd", "sgdm", "nesterov", "adam", "gpa"):
        optimizer = make(kind, lr=0.5, momentum=0.9, gpa_lr=3.0, gpa_mu_x=0.8, gpa_mu_y=0.9)
        one = OuterShard.start(optimizer, torch.randn(8, generator=generator))
        for _ in range(3):
            one.apply(torch.randn(8, generator=generator))
        other = OuterShard.start(optimizer, torch.zeros(8))
        other.load(one.params, one.state, one.version)
        mean = torch.randn(8, generator=generator)
        one.apply(mean)
        other.apply(mean)
        assert torch.equal(one.params, other.params) and one.version == other.version == 4


def test_an_unknown_kind_is_refused() -> None:
    """The key, the value and the choices are named."""
    with pytest.raises(ConfigError, match=r"outer.kind = 'lion'.*nesterov"):
        make("lion", lr=1, momentum=0, gpa_lr=1, gpa_mu_x=0.9, gpa_mu_y=0.9)
