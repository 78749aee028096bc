"""Muon and NorMuon against torch.optim.Muon, written-out float64 references and their invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.errors import ConfigError
from diloco.optim import Muon, NorMuon, orthogonalize

FLOAT64: dict[str, Any] = {"iteration_dtype": torch.float64}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(
    optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int, *, spread: bool = False
) -> None:
    """Steps on seeded gradients; `spread` gives the rows scales over two decades and flips the direction once."""
    for t in range(steps):
        for i, p in enumerate(params):
            g = random(*p.shape, seed=100 * i + t)
            if spread:
                g = (
                    g
                    * torch.logspace(-1, 1, p.shape[0], dtype=torch.float64)[:, None]
                    * (-1 if t >= 2 else 1)
                )
            p.grad = g.to(p.dtype)
        optimizer.step()


def matrix(*shape: int, seed: int = 50, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(random(*shape, seed=seed).to(dtype) * 0.1)


def relative(a: Tensor, b: Tensor, origin: Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / (b.double() - origin.double()).norm())


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), [("original", "original"), ("match_rms_adamw", "match_rms")])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_muon_follows_torch(nesterov: bool, theirs: str, ours: str, shape: tuple[int, int]) -> None:
    """With quintic5 and bfloat16 iterations ours stays within the rounding of torch's, for both update scales."""
    a, b = matrix(*shape), matrix(*shape)
    start = a.detach().clone()
    reference = torch.optim.Muon([a], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs)
    optimizer = Muon([b], lr=0.02, weight_decay=0.1, nesterov=nesterov, scale=ours, coefficients="quintic5")
    run(reference, [a], 6)
    run(optimizer, [b], 6)
    assert relative(b, a.detach(), start) < 0.03


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_with_a_float32_iteration(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running torch's own iteration in float32 too, the weights agree to 1e-4 of the displacement."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    a, b = matrix(10, 24), matrix(10, 24)
    start = a.detach().clone()
    run(torch.optim.Muon([a], lr=0.02, nesterov=nesterov), [a], 8, spread=True)
    settings: dict[str, Any] = {
        "scale": "original",
        "coefficients": "quintic5",
        "iteration_dtype": torch.float32,
    }
    run(Muon([b], lr=0.02, nesterov=nesterov, **settings), [b], 8, spread=True)
    assert relative(b, a.detach(), start) < 1e-4


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_moving_average_equals_the_heavy_ball(nesterov: bool) -> None:
    """M = beta M + g with u = g + beta M gives the same weights as the EMA form."""
    p = matrix(6, 9, dtype=torch.float64)
    q, M = p.detach().clone(), torch.zeros(6, 9, dtype=torch.float64)
    for t in range(5):
        g = random(6, 9, seed=t)
        M = 0.9 * M + g
        u = g + 0.9 * M if nesterov else M
        q = q * (1 - 0.02 * 0.1) - 0.02 * 0.6 * orthogonalize(u, dtype=torch.float64)
    run(Muon([p], lr=0.02, momentum=0.9, nesterov=nesterov, **FLOAT64), [p], 5)
    assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("match_rms", 0.2 * math.sqrt(12)),
        ("original", 1.0),
        ("spectral", math.sqrt(1 / 3)),
        ("shape_up", math.sqrt(3)),
    ],
)
@pytest.mark.parametrize("tall", [False, True])
def test_every_scale_multiplies_the_orthogonal_update(scale: str, factor: float, tall: bool) -> None:
    """The first update of a 4 x 12 (12 x 4) matrix is lr * scale(r, c) * orth(g)."""
    if tall and scale in ("original", "spectral"):
        factor = math.sqrt(3)
    p = Parameter(torch.zeros(12, 4) if tall else torch.zeros(4, 12))
    run(Muon([p], lr=0.5, scale=scale, **FLOAT64), [p], 1)
    expected = -0.5 * factor * orthogonalize(random(*p.shape), dtype=torch.float64)
    assert torch.allclose(p.double(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_match_rms_gives_updates_of_rms_a_fifth(shape: tuple[int, int]) -> None:
    """RMS 0.2 +- 0.03 whatever the shape."""
    p = Parameter(torch.zeros(shape))
    run(Muon([p], lr=1.0), [p], 1)
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_muon_can_make_the_rms_exactly_a_fifth(dtype: torch.dtype) -> None:
    """`rms_exact` is 0.2 sqrt(r c) O/||O|| per matrix, decay as ever; zero gradients give zero updates."""
    p = Parameter(torch.full((3, 5, 8), 2.0))
    optimizer = Muon([p], lr=0.5, scale="rms_exact", weight_decay=0.1, iteration_dtype=dtype)
    p.grad = random(3, 5, 8).float()
    p.grad[2] = 0.0
    optimizer.step()
    update = (2.0 * 0.95 - p.detach()) / 0.5
    rms = update.square().mean(dim=(1, 2)).sqrt()
    assert torch.allclose(rms, torch.tensor([0.2, 0.2, 0.0]), atol=1e-6)
    direction = orthogonalize(random(3, 5, 8)[:1], dtype=dtype).float()
    tolerance = 1e-5 if dtype == torch.float64 else 0.01
    assert torch.allclose(update[:1], direction * 0.2 / direction.square().mean().sqrt(), atol=tolerance)


def test_fused_blocks_equal_separate_parameters() -> None:
    """A fused [q; k; v] with `blocks` gets bit-equal updates to three parameters, equal or unequal blocks."""
    for kind in (Muon, NorMuon):
        for sizes in ([4, 4, 4], [8, 2, 2]):
            fused = matrix(12, 6)
            parts = [Parameter(x.clone()) for x in torch.split(fused.detach(), sizes)]
            a = kind([{"params": [fused], "blocks": 3 if sizes[0] == 4 else sizes}], lr=0.02)
            b = kind(parts, lr=0.02)
            for t in range(3):
                fused.grad = random(12, 6, seed=t).float()
                for p, g in zip(parts, torch.split(fused.grad, sizes), strict=True):
                    p.grad = g.clone()
                a.step()
                b.step()
            assert torch.equal(fused, torch.cat([p.detach() for p in parts]))


def test_stacked_experts_equal_separate_matrices() -> None:
    """[E, r, c] is E matrices by default, with fused blocks inside each; `stacked=False` flattens it."""
    for kind in (Muon, NorMuon):
        stack = matrix(3, 4, 6)
        experts = [Parameter(x.clone()) for x in stack.detach()]
        a, b = (
            kind([{"params": [stack], "blocks": 2}], lr=0.02),
            kind([{"params": experts, "blocks": 2}], lr=0.02),
        )
        for t in range(3):
            stack.grad = random(3, 4, 6, seed=t).float()
            for p, g in zip(experts, stack.grad, strict=True):
                p.grad = g.clone()
            a.step()
            b.step()
        assert torch.equal(stack, torch.stack([p.detach() for p in experts]))


@pytest.mark.parametrize(("shape", "stacked"), [((4, 3, 2), False), ((4, 3, 2, 2), None)])
def test_convolutions_are_flattened(shape: tuple[int, ...], stacked: bool | None) -> None:
    """A convolution's weight is one [d0, prod(rest)] matrix, and its scale uses that shape."""
    conv = matrix(*shape)
    flat = Parameter(conv.detach().reshape(shape[0], -1).clone())
    a, b = Muon([conv], stacked=stacked), Muon([flat])
    conv.grad = random(*shape).float()
    flat.grad = conv.grad.reshape(shape[0], -1).clone()
    a.step()
    b.step()
    assert torch.equal(conv.reshape(shape[0], -1), flat)


def test_bfloat16_parameters_keep_float32_state() -> None:
    """The momentum is float32, also after a state round trip, and the weights follow the float32 run."""
    p, q = matrix(8, 12, dtype=torch.bfloat16), matrix(8, 12)
    origin = q.detach().clone()
    a, b = Muon([p], lr=0.02), Muon([q], lr=0.02)
    run(a, [p], 4)
    run(b, [q], 4)
    assert relative(p, q.detach(), origin) < 0.2
    again = Muon([p], lr=0.02)
    again.load_state_dict(a.state_dict())
    M = again.state[p]["momentum"]
    assert M.dtype == torch.float32 and torch.equal(M, a.state[p]["momentum"])
    assert M.data_ptr() != a.state[p]["momentum"].data_ptr()


@pytest.mark.parametrize("cautious", [False, True])
def test_decay_alone_shrinks_by_its_factor(cautious: bool) -> None:
    """Zero gradients leave p (1 - lr wd)^t, whether or not decay is cautious (an update of 0 agrees with all)."""
    for kind in (Muon, NorMuon):
        p = matrix(3, 5)
        expected = p.detach() * (1 - 0.1 * 0.5) ** 4
        optimizer = kind([p], lr=0.1, weight_decay=0.5, cautious=cautious)
        for _ in range(4):
            p.grad = torch.zeros(3, 5)
            optimizer.step()
        assert torch.allclose(p, expected)


def test_cautious_decay_keeps_the_precision_of_float64() -> None:
    """The factor 1 - lr wd is not rounded to float32 on the way."""
    p = Parameter(torch.full((2, 3), 1.0, dtype=torch.float64))
    optimizer = Muon([p], lr=1e-3, weight_decay=0.1, cautious=True, **FLOAT64)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert float((p.detach() - (1 - 1e-4)).abs().max()) < 1e-15


def test_cautious_decay_spares_entries_that_grow() -> None:
    """Only entries whose update and weight agree in sign are decayed."""
    p, q, plain = matrix(4, 6), matrix(4, 6), matrix(4, 6)
    run(Muon([p], lr=0.1, weight_decay=0.5, cautious=True), [p], 1)
    run(Muon([plain], lr=0.1, weight_decay=0.0), [plain], 1)
    agree = (q - plain) * q >= 0
    assert 0 < int(agree.sum()) < 24
    assert torch.allclose(p, torch.where(agree, plain - 0.05 * q, plain), atol=1e-7)


@pytest.mark.parametrize("shape", [(10, 24), (24, 10)])
def test_normuon_follows_its_formula(shape: tuple[int, int]) -> None:
    """Eight steps on rows of very different scale match the definition written out in float64."""
    p = matrix(*shape)
    w = start = p.detach().double()
    M, v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], 1, dtype=torch.float64)
    for t in range(8):
        scales = torch.logspace(-1, 1, shape[0], dtype=torch.float64)[:, None]
        g = random(*shape, seed=t) * scales * (-1 if t >= 2 else 1)
        M = 0.95 * M + 0.05 * g
        O = orthogonalize(0.05 * g + 0.95 * M, "quintic5", dtype=torch.float64)
        v = 0.95 * v + 0.05 * O.square().mean(dim=1, keepdim=True)
        N = O / (v.sqrt() + 1e-10)
        N = N * O.norm() / (N.norm() + 1e-10)
        w = w * (1 - 0.02 * 2.0) - 0.02 * math.sqrt(max(1, shape[0] / shape[1])) * N
    run(
        NorMuon([p], lr=0.02, weight_decay=2.0, scale="original", coefficients="quintic5", **FLOAT64),
        [p],
        8,
        spread=True,
    )
    assert relative(p, w, start) < 1e-5


def test_the_speedrun_variant_reduces_over_the_other_side_when_wide() -> None:
    """v is [r, 1] for tall and [1, c] for wide matrices; decay is cautious with factor lr^2 wd."""
    wide, tall = matrix(4, 10), matrix(10, 4)
    w = wide.detach().double()
    optimizer = NorMuon([wide, tall], variant="speedrun", **FLOAT64)
    run(optimizer, [wide, tall], 1)
    assert optimizer.state[wide]["v"].shape == (1, 1, 10) and optimizer.state[tall]["v"].shape == (1, 10, 1)
    O = orthogonalize(random(4, 10).float(), dtype=torch.float64)
    N = O / (0.1 * O.square().mean(dim=0, keepdim=True)).clamp_min(1e-10).sqrt()
    N = N * O.norm() / N.norm()
    expected = w * (1 - 0.023**2 * 1.2 * (N * w >= 0)) - 0.023 * N
    assert torch.allclose(wide.double(), expected, atol=1e-6)


def test_normuon_keeps_muons_update_norm() -> None:
    """For the same input ||update|| is Muon's; `rms_exact` makes the RMS exactly 0.2 lr."""
    a, b, c = (Parameter(torch.zeros(20, 12)) for _ in range(3))
    run(Muon([a], lr=1.0, **FLOAT64), [a], 1)
    run(NorMuon([b], lr=1.0, **FLOAT64), [b], 1)
    run(NorMuon([c], lr=1.0, scale="rms_exact", **FLOAT64), [c], 1)
    assert float(b.detach().norm()) == pytest.approx(float(a.detach().norm()), rel=1e-6)
    assert float(c.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=1e-6)
    assert relative(a, b.detach(), torch.zeros(())) > 0.01


def test_a_constant_factor_on_the_second_moment_cancels() -> None:
    """With v frozen (beta2 next to 1), multiplying it by 7 changes nothing beyond rounding."""
    p, q = matrix(6, 9), matrix(6, 9)
    a, b = NorMuon([p], beta2=0.5, **FLOAT64), NorMuon([q], beta2=0.5, **FLOAT64)
    run(a, [p], 2)
    run(b, [q], 2)
    p.grad = q.grad = random(6, 9, seed=9).float()
    for optimizer, p_, k in ((a, p, 1.0), (b, q, 7.0)):
        optimizer.param_groups[0]["beta2"] = 1 - 1e-12
        optimizer.state[p_]["v"].mul_(k)
        optimizer.step()
    assert torch.allclose(p, q, atol=1e-7)


def test_rows_become_equal_on_constant_input() -> None:
    """After v has converged on one gradient, all rows of the update have the same RMS; zero rows stay zero."""
    p = Parameter(torch.zeros(6, 4))
    optimizer = NorMuon([p], lr=1.0, weight_decay=0.0, **FLOAT64)
    g = random(6, 4).float() * torch.logspace(-1, 1, 6)[:, None]
    g[2] = 0
    for _ in range(200):
        p.grad = g
        before = p.detach().clone()
        optimizer.step()
    rms = (p.detach() - before).square().mean(dim=1).sqrt()
    live = torch.arange(6) != 2
    assert float(rms[2]) == 0.0
    assert float(rms[live].max() / rms[live].min()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"scale": "match_rsm"}, "did you mean 'match_rms'"),
        ({"coefficients": "you"}, "did you mean 'you5'"),
        ({"blocks": 5}, "blocks is 5"),
        ({"blocks": [3, 4]}, "blocks is \\[3, 4\\]"),
        ({"params": [Parameter(torch.zeros(3))]}, "shape \\(3,\\)"),
        (
            {"params": [{"params": [Parameter(torch.zeros(3, 3))], "momentun": 0.9}]},
            "did you mean 'momentum'",
        ),
        ({"params": [Parameter(torch.zeros(2, 3, 4, 5).transpose(1, 3))]}, "not contiguous"),
        ({"form": "gram", "coefficients": "polar8"}, "bfloat16"),
    ],
)
@pytest.mark.parametrize("kind", [Muon, NorMuon])
def test_wrong_options_are_refused_when_made(kind: Any, change: dict[str, Any], message: str) -> None:
    """The error names the option, its value and the fix, before any training."""
    with pytest.raises(ConfigError, match=message):
        kind(**{"params": [Parameter(torch.zeros(6, 8))], **change})


def test_an_unknown_variant_is_refused() -> None:
    """A misspelt variant is answered with the nearest."""
    with pytest.raises(ConfigError, match="did you mean 'rows'"):
        NorMuon([Parameter(torch.zeros(2, 2))], variant="row")  # type: ignore[arg-type]
