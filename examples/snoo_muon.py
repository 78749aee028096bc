"""SNOO around Muon and AdamW in a plain training loop on one machine: an outer Nesterov step every k steps.

python examples/snoo_muon.py                    trains a small Transformer on the source of argparse
python examples/snoo_muon.py --k 0              the same without SNOO
"""

from __future__ import annotations

import argparse
import inspect

import torch
from torch import nn

import diloco
from diloco.optim import Combined, Muon, param_groups
from diloco.schedules import scheduler
from diloco.worker.model import build_model

LENGTH, BATCH = 64, 16


def make_optimizer(model: nn.Module, k: int) -> torch.optim.Optimizer:
    """Muon for the hidden matrices, AdamW for embeddings, head and gains, and SNOO around both."""
    groups = param_groups(model, lr=3e-3, matrix_lr=0.01, weight_decay=0.1)
    matrices = [group for group in groups if group["name"] == "matrix"]
    rest = [group for group in groups if group["name"] != "matrix"]
    inner = Combined(Muon(matrices), torch.optim.AdamW(rest, betas=(0.9, 0.95)))
    return diloco.SNOO(inner, k=k, lr=0.68, momentum=0.37) if k else inner


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--k", type=int, default=28, help="inner steps per outer step; 0: no outer steps")
    arguments = parser.parse_args()

    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8).long()
    train, heldout = text[: -len(text) // 10], text[-len(text) // 10 :]
    windows, heldout = train.unfold(0, LENGTH + 1, 1), heldout.unfold(0, LENGTH + 1, LENGTH)
    order = torch.Generator().manual_seed(0)

    model = build_model("nano", LENGTH, seed=0, vocab_size=256)
    optimizer = make_optimizer(model, arguments.k)
    schedule = scheduler(optimizer, "linear", arguments.steps, arguments.steps // 20)

    def evaluate() -> float:
        """At the slow weights: the place from which the next round starts."""
        if isinstance(optimizer, diloco.SNOO):
            optimizer.eval()
        with torch.no_grad():
            loss = model.loss(heldout).item()
        if isinstance(optimizer, diloco.SNOO):
            optimizer.train()
        return loss

    print(f"held-out loss before: {evaluate():.3f} nats/byte")
    for step in range(1, arguments.steps + 1):
        loss = model.loss(windows[torch.randint(len(windows), (BATCH,), generator=order)])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4d}: loss {loss.item():.3f}")
    if isinstance(optimizer, diloco.SNOO) and arguments.steps % arguments.k:
        optimizer.outer_step()  # the last, shorter round counts too
    print(f"held-out loss after:  {evaluate():.3f} nats/byte")


if __name__ == "__main__":
    main()
