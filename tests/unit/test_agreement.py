"""Long trajectories beside torch's own optimizers, on gradients that depend on the weights reached.

Distances are relative to the displacement from the start. Schedule-Free beside its library is in `test_schedule_free`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.optim import SNOO, AdamW, Muon, NorMuon
from diloco.outer import Nesterov

torch.set_num_threads(1)
Optimizer = torch.optim.Optimizer
LR, DECAY, STEPS = 0.02, 2.0, 120  # lr times decay is 0.04, so that missing decay would show
QUINTIC = (3.4445, -4.7750, 2.0315)
SHAPES = [(10, 24), (24, 10), (16, 16)]


def start(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [Parameter(torch.randn(s, generator=generator).to(dtype) * 0.1) for s in SHAPES]


def put_gradients(ps: list[Parameter], t: int) -> None:
    """A pull to 0, and noise whose rows have scales over two decades and which turns round after two steps."""
    generator = torch.Generator().manual_seed(1000 + t // 3)  # a direction that lasts for some steps
    for p in ps:
        scales = torch.logspace(-1, 1, p.shape[0])[:, None]
        noise = torch.randn(p.shape, generator=generator) * scales
        p.grad = (noise * (-1 if t >= 2 else 1)).to(p.dtype) + p.detach()


def run(optimizer: Optimizer, ps: list[Parameter], steps: int = STEPS) -> list[Tensor]:
    for t in range(steps):
        put_gradients(ps, t)
        optimizer.step()
    return [p.detach().double() for p in ps]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    origin = [p.detach().double() for p in start()]
    return max(float((x - y).norm() / (y - o).norm()) for x, y, o in zip(a, b, origin, strict=True))


def angle_and_ratio(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """The smallest cosine and the norm ratio farthest from 1 of the displacements."""
    origin = [p.detach().double() for p in start()]
    moves = [(x - o, y - o) for x, y, o in zip(a, b, origin, strict=True)]
    cosines = [float((x * y).sum() / (x.norm() * y.norm())) for x, y in moves]
    ratios = [float(x.norm() / y.norm()) for x, y in moves]
    return min(cosines), max(ratios, key=lambda r: abs(r - 1))


class Transcribed(torch.optim.Optimizer):
    """torch.optim.Muon written out, with the dtype of its iteration free."""

    def __init__(self, ps: list[Parameter], dtype: torch.dtype, nesterov: bool, adjust: str) -> None:
        super().__init__(ps, {"lr": LR})
        self.dtype, self.nesterov, self.adjust = dtype, nesterov, adjust

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        a, b, c = QUINTIC
        for p in self.param_groups[0]["params"]:
            M = self.state[p].setdefault("M", torch.zeros_like(p))
            M.lerp_(p.grad, 0.05)
            X = (p.grad.lerp(M, 0.95) if self.nesterov else M).to(self.dtype, copy=True)
            tall = X.shape[0] > X.shape[1]
            X = X.T if tall else X
            X = X / X.norm().clamp(min=1e-7)
            for _ in range(5):
                A = X @ X.T
                X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
            rows, columns = p.shape
            scale = math.sqrt(max(1.0, rows / columns))
            if self.adjust == "match_rms_adamw":
                scale = 0.2 * math.sqrt(max(rows, columns))
            p.mul_(1 - LR * DECAY).add_(X.T if tall else X, alpha=-LR * scale)


def torch_muon(ps: list[Parameter], nesterov: bool, adjust: str) -> Optimizer:
    return torch.optim.Muon(ps, lr=LR, weight_decay=DECAY, nesterov=nesterov, adjust_lr_fn=adjust)


def ours(ps: list[Parameter], nesterov: bool, adjust: str, **options: Any) -> Muon:
    scale = {"original": "original", "match_rms_adamw": "match_rms"}[adjust]
    quintic = {"coefficients": "quintic5", "scale": scale} | options
    return Muon(ps, lr=LR, weight_decay=DECAY, nesterov=nesterov, **quintic)


both = pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
adjustments = pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])


@both
@adjustments
def test_the_transcription_is_torchs_muon(nesterov: bool, adjust: str) -> None:
    """With its bfloat16 iteration, bit for bit over the whole trajectory: the reference below is torch's rule."""
    a, b = start(), start()
    theirs = run(torch_muon(a, nesterov, adjust), a)
    written = run(Transcribed(b, torch.bfloat16, nesterov, adjust), b)
    assert all(torch.equal(x, y) for x, y in zip(theirs, written, strict=True))


@both
@adjustments
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_muon_follows_torchs_rule_without_16_bit_rounding(
    nesterov: bool, adjust: str, dtype: torch.dtype
) -> None:
    """120 steps with the iteration in the parameters' dtype agree to 1e-4; another beta, decay or coefficient set would not."""
    a, b = start(dtype), start(dtype)
    theirs = run(Transcribed(a, dtype, nesterov, adjust), a)
    assert distance(run(ours(b, nesterov, adjust, iteration_dtype=dtype), b), theirs) < 1e-4
    for wrong in ({"momentum": 0.9}, {"cautious": True}, {"coefficients": "you5"}):
        c = start(dtype)
        assert distance(run(ours(c, nesterov, adjust, iteration_dtype=dtype, **wrong), c), theirs) > 3e-3


@both
@adjustments
def test_muon_stays_beside_torchs_in_bfloat16(nesterov: bool, adjust: str) -> None:
    """120 steps, each with its own rounding: within 0.10, cosine 0.99, norm ratio 1 +- 0.02."""
    a, b = start(), start()
    theirs = run(torch_muon(a, nesterov, adjust), a)
    found = run(ours(b, nesterov, adjust), b)
    cosine, ratio = angle_and_ratio(found, theirs)
    assert distance(found, theirs) < 0.10
    assert cosine > 0.99 and ratio == pytest.approx(1.0, abs=0.02)


def test_normuon_does_not_pass_for_muon() -> None:
    """The same inputs tell the two apart by far more than rounding does."""
    a, b = start(), start()
    muon = run(ours(a, True, "original"), a)
    normuon = run(NorMuon(b, lr=LR, weight_decay=DECAY, scale="original", coefficients="quintic5"), b)
    assert distance(normuon, muon) > 0.2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_adamw_follows_torchs(fused: bool, scheduled: bool) -> None:
    """120 steps to 1e-5, also while a scheduler changes the rate."""
    options: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": DECAY}
    ends = []
    makes: list[Callable[..., Optimizer]] = [torch.optim.AdamW, AdamW]
    for make in makes:
        ps = start()
        optimizer = make(ps, fused=fused, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / STEPS)
        for t in range(STEPS):
            put_gradients(ps, t)
            optimizer.step()
            if scheduled:
                scheduler.step()
        ends.append([p.detach().double() for p in ps])
    assert distance(ends[1], ends[0]) < 1e-5


def test_the_outer_nesterov_follows_torchs_sgd() -> None:
    """120 outer steps on pseudo-gradients: to 1e-6."""
    theirs = start()
    sgd = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, nesterov=True)
    ps = [p.detach().clone() for p in start()]
    outer = Nesterov(lr=0.05, momentum=0.9)
    states = [outer.init(p.flatten()) for p in ps]
    for t in range(STEPS):
        put_gradients(theirs, t)
        sgd.step()
        mine = [Parameter(p) for p in ps]
        put_gradients(mine, t)
        for p, m, state in zip(ps, mine, states, strict=True):
            assert m.grad is not None
            outer.step(p.view(-1), m.grad.flatten(), state)
    assert distance([p.double() for p in ps], [p.detach().double() for p in theirs]) < 1e-6


@pytest.mark.parametrize("k", [1, 4])
def test_snoo_follows_torchs_nesterov_on_its_slow_weights(k: int) -> None:
    """120 inner steps: after every k-th the weights are torch SGD's, with theta - p as the gradient."""
    ps, fast, slow = start(), start(), start()
    snoo = SNOO(torch.optim.SGD(ps, lr=0.01), k=k, lr=0.7, momentum=0.9)
    inner = torch.optim.SGD(fast, lr=0.01)
    outer = torch.optim.SGD(slow, lr=0.7, momentum=0.9, nesterov=True)
    for t in range(STEPS):
        put_gradients(ps, t)
        snoo.step()
        put_gradients(fast, t)
        inner.step()
        if (t + 1) % k == 0:
            with torch.no_grad():
                for s, f in zip(slow, fast, strict=True):
                    s.grad = s - f
                outer.step()
                for s, f in zip(slow, fast, strict=True):
                    f.copy_(s)
    found, theirs = ([p.detach().double() for p in x] for x in (ps, fast))
    assert distance(found, theirs) < 1e-5
