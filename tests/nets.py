"""A small network with every sort of parameter that optimizers tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.experts = nn.Parameter(torch.randn(2, width, 4) * 0.1)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.conv((q * k * v).mT).mT
        out: Tensor = x + (x @ self.experts[0]) @ self.experts[1].mT
        return out


class Net(nn.Module):
    embed_scale = 1.0

    def __init__(self, tied: bool, width: int = 8) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, 11, bias=False)
        self.wte = nn.Embedding(11, width)
        self.pos_emb = nn.Parameter(torch.full((5, width), 0.01))
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_scale * (self.wte(tokens) + self.pos_emb)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.lm_head(x)
        return out


def net(tied: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(tied)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.arange(5)[None]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens)[0].float(), tokens[0])
        loss.backward()  # type: ignore[no-untyped-call]
        if getattr(optimizer, "needs_loss", False):
            optimizer.step(loss=loss)  # type: ignore[call-overload]
        else:
            optimizer.step()
