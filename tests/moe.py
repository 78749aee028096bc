"""A small mixture of experts and its inputs, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from diloco.worker.model import ModelConfig, Transformer
from diloco.worker.moe import Experts

CONFIG = ModelConfig(64, 16, 2, 2, 2, 24, 16, experts=5, experts_per_token=2, d_expert=12, balance=0.3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int, vocab: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def layer(k: int = 2, experts: int = 5, seed: int = 0) -> Experts:
    made = Experts(8, 12, experts, k, 0.5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    return made


def seeded(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model
