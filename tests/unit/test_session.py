"""`diloco.DiLoCo` around a plain model, with a coordinator in the same process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import diloco
from diloco.errors import ConfigError
from diloco.optim import Combined, Hyperball, ScheduleFreeAdamW
from diloco.worker.timeline import load


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def data() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(6, 4, generator=generator)


def wrapped(model: nn.Module, steps: int = 10, **stream: object) -> diloco.DiLoCo:
    config = {
        "run": {"inner_steps_total": steps},
        "stream": {"H": 5, "tau": 0, "alpha": 0.0, **stream},
        "outer": {"kind": "sgd", "lr": 1.0},
        "codec": {"up": "fp32", "down": "g_fp32"},
    }
    return diloco.DiLoCo(
        model, torch.optim.SGD(model.parameters(), lr=0.1), diloco.local(config), worker="w0"
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for batch, _ in zip(data(), range(steps), strict=False):
        (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_one_worker_that_averages_with_itself_is_plain_training() -> None:
    """M=1, lr 1, momentum 0, tau 0: the same parameters as without the wrapper, to rounding."""
    plain, model = small(), small()
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 10)
    optimizer = wrapped(model)
    train(model, optimizer, 10)
    optimizer.flush()
    optimizer.close()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_schedulers_reach_the_inner_optimizer() -> None:
    model = small()
    optimizer = wrapped(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.close("interrupted")


def test_after_the_flush_the_run_is_over() -> None:
    """A second flush does nothing, a further step is refused: neither waits for an answer that never comes."""
    model = small()
    optimizer = wrapped(model, tau=1, alpha=0.5)
    train(model, optimizer, 7)
    optimizer.flush()
    digest = optimizer.digest()
    optimizer.flush()
    with pytest.raises(ConfigError, match="after flush"):
        optimizer.step()
    assert optimizer.digest() == digest
    optimizer.close()


def test_global_parameters_are_lent_and_given_back() -> None:
    model = small()
    optimizer = wrapped(model, tau=1, alpha=0.5)
    train(model, optimizer, 3)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.global_parameters():
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.close("interrupted")


def test_every_round_is_recorded_with_its_wait() -> None:
    """12 steps, H 5: as many as there were commits, the last one by the flush; waits lie between sending and merge."""
    model = small()
    optimizer = wrapped(model, steps=12, tau=1)
    train(model, optimizer, 12)
    optimizer.flush()
    found = optimizer.recorder.read()
    slots = optimizer.replica.slots
    assert {f: t.rounds for f, t in found.totals.items()} == {s.index: s.version for s in slots}
    assert [(r.step, r.due, r.final) for r in found.rounds] == [
        (5, 6, False),
        (10, 11, False),
        (12, 12, True),
    ]
    for r in found.rounds:
        assert r.sent <= r.answered <= r.merged and r.outcome == "merged-in"
        assert 0 <= r.exposed <= r.merged - r.sent
    assert found.spans[0].first == 1 and found.spans[-1].last == 12
    optimizer.close()
    assert optimizer.replica.leaving is not None
    said = load(optimizer.replica.leaving.timeline)
    assert said is not None and len(said.rounds) == len(found.rounds)
    assert optimizer.facts()["fragments"] == found.totals


def test_weights_on_a_sphere_are_back_on_it_after_every_merge() -> None:
    """An outer step leaves the sphere; what was merged is taken up by the inner optimizer."""
    model = small()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    inner = Combined(Hyperball(matrices, lr=0.05), torch.optim.SGD(vectors, lr=0.1))
    radii = [float(p.detach().norm()) for p in matrices]
    config = {
        "run": {"inner_steps_total": 10},
        "stream": {"H": 5, "tau": 0, "alpha": 0.0},
        "outer": {"kind": "sgd", "lr": 0.5},
        "codec": {"up": "fp32", "down": "g_fp32"},
    }
    optimizer = diloco.DiLoCo(model, inner, diloco.local(config), worker="w0")
    train(model, optimizer, 5)  # the last step merges
    merged = [p.detach().clone() for p in matrices]
    anchors = optimizer.replica.slots[0].shard
    optimizer.close()
    assert [float(p.norm()) for p in merged] == pytest.approx(radii, rel=1e-5)
    assert anchors is not None and anchors.version == 1


def test_an_optimizer_that_averages_itself_is_refused() -> None:
    model = small()
    inner = ScheduleFreeAdamW(model.parameters())
    with pytest.raises(ConfigError, match="averages its weights itself"):
        diloco.DiLoCo(model, inner, diloco.local({"run": {"inner_steps_total": 10}, "stream": {"H": 5}}))
