"""The mixture of experts as a layer and in the decoder: routing, the load-balance loss, determinism, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diloco.errors import ConfigError
from diloco.fragments import build_plan
from diloco.worker.model import (
    PRESETS,
    ModelConfig,
    build_model,
    cross_entropy,
    next_token_loss,
)
from diloco.worker.moe import Experts, load_balance, route, take_balance_loss
from tests.moe import layer, random, seeded, tokens

torch.set_num_threads(1)


def written_out(moe: Experts, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in x.flatten(0, -2):
        p = (moe.router.weight @ token).softmax(0)
        best = p.argsort(descending=True)[: moe.k]
        total = torch.zeros_like(token)
        for e in best:
            gate, up = (moe.gate_up[e] @ token).chunk(2)
            total = total + p[e] / p[best].sum() * (moe.out[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_it_is_the_weighted_sum_of_the_chosen_experts(k: int) -> None:
    """Outputs and every gradient equal the definition evaluated token by token."""
    moe, x = layer(k), random(2, 7, 8, seed=1).requires_grad_()
    inputs = [x, *moe.parameters()]
    result, expected = moe(x), written_out(moe, x)
    torch.testing.assert_close(result, expected)
    weight = random(2, 7, 8, seed=2)
    ours = torch.autograd.grad((result * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_routed_weights_sum_to_one_and_are_in_the_ratio_of_the_probabilities() -> None:
    """Mass is conserved for every k, whatever was not chosen; the chosen are the most probable ones."""
    p = random(50, 6).softmax(dim=-1)
    for k in range(1, 7):
        weights, chosen = route(p, k)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(50))
        picked = p.gather(1, chosen)
        torch.testing.assert_close(weights / weights[:, :1], picked / picked[:, :1])
        rest = p.scatter(1, chosen, 0.0)
        assert bool((rest.amax(dim=-1) <= picked.amin(dim=-1)).all())


def test_identical_experts_are_one_expert() -> None:
    """If all experts hold the same weights, the router does not matter: no mass is lost or added."""
    moe, x = layer(), random(3, 5, 8)
    with torch.no_grad():
        moe.gate_up.copy_(moe.gate_up[:1].clone().expand_as(moe.gate_up))
        moe.out.copy_(moe.out[:1].clone().expand_as(moe.out))
        gate, up = F.linear(x, moe.gate_up[0]).chunk(2, dim=-1)
        torch.testing.assert_close(moe(x), F.linear(F.silu(gate) * up, moe.out[0]))


def test_the_order_of_experts_does_not_matter() -> None:
    """Permuting router rows and experts together changes nothing beyond rounding."""
    moe, x = layer(), random(3, 5, 8)
    other = layer()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(moe.get_parameter(name)[order])
        torch.testing.assert_close(other(x), moe(x))


def test_the_load_balance_loss_is_least_when_uniform() -> None:
    """1 for uniform routing, E when one expert gets all, above 1 when probabilities follow the load."""
    uniform = torch.full((12, 4), 0.25)
    assert float(load_balance(uniform, torch.tensor([3, 3, 3, 3]))) == pytest.approx(1.0)
    assert float(load_balance(uniform, torch.tensor([12, 0, 0, 0]))) == pytest.approx(1.0)
    alone = F.one_hot(torch.zeros(12, dtype=torch.long), 4).float()
    assert float(load_balance(alone, torch.tensor([12, 0, 0, 0]))) == pytest.approx(4.0)
    for seed in range(20):
        p = random(200, 4, seed=seed).mul(0.1).add(random(4, seed=100 + seed)).softmax(dim=-1)
        counts = torch.bincount(p.argmax(dim=-1), minlength=4)
        assert float(load_balance(p, counts)) > 1.0


def test_descending_the_load_balance_loss_spreads_the_load() -> None:
    """Trained on it alone, a router that sent everything to one expert comes to use all of them about equally."""
    moe, x = layer(k=1, experts=4), random(256, 8, seed=3)
    x[:, 0] = 1.0
    with torch.no_grad():
        moe.router.weight.mul_(0.1)
        moe.router.weight[2, 0] += 3.0

    def shares() -> Tensor:
        return torch.bincount(moe.router(x).argmax(dim=-1), minlength=4) / 256

    assert float(shares()[2]) > 0.9
    optimizer = torch.optim.SGD([moe.router.weight], lr=1.0)
    for _ in range(100):
        moe(x)
        loss = take_balance_loss(moe)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(shares().max()) < 0.5 and float(shares().min()) > 0.05


def test_the_training_loss_holds_the_balance_and_the_evaluation_loss_does_not() -> None:
    """In train mode: cross entropy plus balance times the sum over blocks; in eval mode or without gradients none."""
    model, rows = seeded(), tokens(2, 17)
    seen: list[float] = []
    for block in model.blocks:
        experts = block.get_submodule("experts")

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, Experts)
            p = module.router(inputs[0].flatten(0, 1)).softmax(dim=-1)
            counts = torch.bincount(p.topk(2).indices.flatten(), minlength=5)
            seen.append(float((5 * (counts / counts.sum() * p.mean(dim=0)).sum()).detach()))

        experts.register_forward_hook(note)
    with torch.no_grad():
        entropy = float(cross_entropy(model(rows[:, :-1]), rows))
        assert float(next_token_loss(model, rows)) == pytest.approx(entropy)
    seen.clear()
    total = float(next_token_loss(model, rows).detach())
    assert len(seen) == 2 and min(seen) >= 0.99
    assert total == pytest.approx(entropy + 0.3 * sum(seen), rel=1e-5)
    model.eval()
    assert float(next_token_loss(model, rows).detach()) == pytest.approx(entropy)
    assert take_balance_loss(model) is None


class Hidden(nn.Module):
    """What a data-parallel wrapper does: the model's `loss` is out of sight."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.module(rows)
        return logits


def test_a_wrapper_that_is_called_for_its_logits_keeps_the_balance_loss() -> None:
    """next_token_loss of a wrapped model is that of the model, gradients of the router included."""
    model, rows = seeded(), tokens(2, 17)
    gradients = []
    for forward in (model, Hidden(model)):
        model.zero_grad()
        loss = next_token_loss(forward, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters()])
        assert take_balance_loss(model) is None
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_gradients_reach_the_router_and_every_used_expert_and_no_other() -> None:
    """Experts without a token have a gradient of exactly zero; all others, and the router, do not."""
    moe, x = layer(experts=5), random(6, 8).abs()
    with torch.no_grad():
        moe.router.weight[4] = -100.0  # never chosen for positive inputs
    moe(x).square().sum().backward()
    used = set(moe.router(x).topk(2).indices.flatten().tolist())
    assert 4 not in used and len(used) >= 2
    for p in (moe.gate_up, moe.out):
        assert p.grad is not None
        assert {e for e in range(5) if bool(p.grad[e].any())} == used
    assert moe.router.weight.grad is not None and bool(moe.router.weight.grad.any())


def test_the_same_input_gives_the_same_bits() -> None:
    """Forward and backward twice: no order of additions is left to chance."""
    runs = []
    for _ in range(2):
        model = seeded()
        loss = next_token_loss(model, tokens(3, 17))
        loss.backward()  # type: ignore[no-untyped-call]
        runs.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*runs, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_no_future_token_is_seen() -> None:
    """Logits before a changed token stay, up to the rounding of differently grouped products."""
    model, before = seeded(), tokens(2, 16)
    after = before.clone()
    after[:, 9] = (after[:, 9] + 1) % 64
    with torch.no_grad():
        first, second = model(before), model(after)
    torch.testing.assert_close(first[:, :9], second[:, :9], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(first[:, 9:], second[:, 9:], rtol=1e-4, atol=1e-6)


def test_it_runs_in_bfloat16() -> None:
    """Weights in bfloat16, and autocast around float32 weights, give a loss near the float32 one."""
    model, rows = seeded(), tokens(2, 17)
    exact = float(next_token_loss(model, rows).detach())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = next_token_loss(model, rows)
    mixed.backward()  # type: ignore[no-untyped-call]
    assert float(mixed.detach()) == pytest.approx(exact, abs=0.05)
    low = next_token_loss(model.to(torch.bfloat16), rows)
    assert low.dtype == torch.float32 and float(low.detach()) == pytest.approx(exact, abs=0.05)


def test_the_preset_has_experts_in_every_block_under_block_names() -> None:
    """1 to 3 million parameters; fragments hold whole blocks; the first loss is a uniform guess plus the balance."""
    model = build_model("moe-tiny", 64, 0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    for i in range(4):
        assert shapes[f"blocks.{i}.experts.router.weight"] == (8, 128)
        assert shapes[f"blocks.{i}.experts.gate_up"] == (8, 192, 128)
        assert shapes[f"blocks.{i}.experts.out"] == (8, 128, 96)
    plan = build_plan(shapes, 30, frag_layers=2)
    for fragment in plan.fragments:
        blocks = {s.name.split(".")[1] for s in fragment.spans if s.name.startswith("blocks.")}
        inside = [n for n in shapes if n.startswith("blocks.") and n.split(".")[1] in blocks]
        assert {s.name for s in fragment.spans} >= set(inside)
    assert plan.numel == sum(p.numel() for p in model.parameters())
    loss = float(next_token_loss(model, tokens(4, 65, 256)).detach())
    assert loss == pytest.approx(5.55 + 4 * PRESETS["moe-tiny"].balance, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 6}, "experts_per_token = 6"),
        ({"experts_per_token": 0}, "experts_per_token = 0"),
        ({"d_expert": 0}, "d_expert = 0"),
    ],
)
def test_impossible_mixtures_are_refused(change: dict[str, Any], message: str) -> None:
    """The error names key and value."""
    sizes: dict[str, Any] = {"experts": 5, "experts_per_token": 2, "d_expert": 12}
    with pytest.raises(ConfigError, match=message):
        ModelConfig(64, 16, 2, 2, 2, 24, 16, **{**sizes, **change})
