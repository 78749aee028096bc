"""Training a mixture of experts: parameter groups, every kind of optimizer, and the worker's own loop."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

from diloco.config import RunConfig
from diloco.coordinator.inprocess import local_hub
from diloco.optim import MD, Combined, Muon, NorMuon, param_groups
from diloco.worker.loop import Trainer, make_optimizer
from diloco.worker.model import build_model, next_token_loss
from tests.moe import layer, random, seeded, tokens

torch.set_num_threads(1)


def test_stacked_experts_are_in_the_matrix_group() -> None:
    """param_groups knows [E, r, c] as E matrices, whatever the experts hold."""
    groups = param_groups(seeded())
    stacked = {n for g in groups if g["name"] == "matrix" and g["stacked"] for n in g["param_names"]}
    assert stacked == {f"blocks.{i}.experts.{n}" for i in range(2) for n in ("gate_up", "out")}


def test_stacked_experts_under_muon_are_separate_experts_under_muon() -> None:
    """Three steps on the gradients of a real mixture: the stack's bits are those of one parameter per expert."""
    moe = layer()
    separate = [Parameter(e.detach().clone()) for p in (moe.gate_up, moe.out) for e in p]
    a, b = Muon([moe.gate_up, moe.out], lr=0.05), Muon(separate, lr=0.05)
    for t in range(3):
        a.zero_grad()
        moe(random(20, 8, seed=t)).square().mean().backward()
        grads = [g for p in (moe.gate_up, moe.out) if p.grad is not None for g in p.grad]
        for expert, g in zip(separate, grads, strict=True):
            expert.grad = g.clone()
        a.step()
        b.step()
    assert torch.equal(
        torch.cat([moe.gate_up.flatten(), moe.out.flatten()]), torch.cat([p.flatten() for p in separate])
    )


def sorted_params(model: nn.Module) -> tuple[list[dict[str, Any]], list[Parameter], list[Parameter]]:
    """Muon-ready matrix groups, routers, and the rest."""
    matrices: list[dict[str, Any]] = [
        {"params": [p], "stacked": True if p.ndim == 3 else None}
        for n, p in model.named_parameters()
        if n.startswith("blocks.") and p.ndim > 1 and "router" not in n
    ]
    routers = [p for n, p in model.named_parameters() if "router" in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or n.startswith("embed")]
    return matrices, routers, rest


def fall(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> None:
    rows, losses = tokens(4, 17), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = next_token_loss(model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_normuon_gives_every_expert_updates_of_its_own_norm() -> None:
    """With rms_exact each expert's update has RMS 0.2 lr, however many tokens it saw; the loss falls."""
    model = seeded()
    matrices, routers, rest = sorted_params(model)
    options: dict[str, Any] = {"scale": "rms_exact", "weight_decay": 0.0}
    optimizer = Combined(NorMuon(matrices, lr=0.02, **options), torch.optim.AdamW([*routers, *rest], lr=3e-3))
    fall(model, optimizer)
    stack = model.get_parameter("blocks.0.experts.gate_up")
    before = stack.detach().clone()
    optimizer.zero_grad()
    next_token_loss(model, tokens(4, 17)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    rms = (stack.detach() - before).square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(rms, torch.full((5,), 0.2 * 0.02), rtol=1e-3, atol=0.0)
    assert optimizer.state[stack]["v"].shape == (5, 24, 1)


def test_md_keeps_every_expert_and_every_router_row_on_its_sphere() -> None:
    """||D|| = sqrt(max(r, c)) per expert and 1 per router row, after the gains are divided out; the loss falls."""
    model = seeded()
    matrices, routers, rest = sorted_params(model)
    md = MD([*matrices, {"params": routers, "sphere": "row"}], lr=0.03)
    fall(model, Combined(md, torch.optim.AdamW(rest, lr=3e-3)))
    for name, norms in (("gate_up", torch.full((5,), 24**0.5)), ("out", torch.full((5,), 16**0.5))):
        p = model.get_parameter(f"blocks.1.experts.{name}")
        row, col = (F.softplus(md.state[p][raw]) for raw in ("raw_row", "raw_col"))
        torch.testing.assert_close((p.detach() / row / col).norm(dim=(1, 2)), norms, rtol=1e-4, atol=0.0)
    row, col = (F.softplus(md.state[routers[0]][raw]) for raw in ("raw_row", "raw_col"))
    D = (routers[0].detach() / row / col)[0]
    torch.testing.assert_close(D.norm(dim=1), torch.ones(5), rtol=1e-4, atol=0.0)


def run_config(kind: str, steps: int, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"inner_steps_total": steps},
            "model": {"preset": "moe-tiny", "sequence_length": 32},
            "train": {"batch_size": 4, "eval_batches": 2, "device": "cpu", "threads": 1, **train},
            "optim": {"kind": kind, "lr": 3e-3},
            "stream": {"H": 5, "tau": 0, "alpha": 0.0},
            "topology": {"workers": 1},
        }
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_configured_optimizers_train_the_preset(kind: str) -> None:
    """Ten steps on one batch lower the training loss by more than half a nat, and move every parameter."""
    model = build_model("moe-tiny", 32, 0)
    optimizer = make_optimizer(run_config(kind, 10), model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows, losses = tokens(4, 33, 256), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = next_token_loss(model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_a_worker_trains_the_preset_through_fragments(tmp_path: Path) -> None:
    """The real worker and coordinator: ten steps and two outer rounds lower the held-out loss."""
    config = run_config("adamw", 10)
    hub = local_hub(config)
    trainer = Trainer(
        config, hub.connect(), name="w0", run_dir=tmp_path, stop=threading.Event(), say=lambda text: None
    )
    final = trainer.run()
    hub.close()
    assert final is not None and final < trainer.eval_start - 0.3
