"""Roles and shard sizes of a real model, as `diloco.DiLoCo` and the training loop find and tell them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diloco
from diloco.comms.mixed import Mixed
from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.worker.loop import Trainer
from diloco.worker.session import DiLoCo, ModelParameters

torch.set_num_threads(1)


class Little(nn.Module):
    """An embedding whose name says nothing, a block with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))])
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks[0](self.tokens(ids)))
        return out


CODEC: dict[str, Any] = {
    "up": "e3m0",
    "block": 16,
    "ef": "on",
    "stochastic": True,
    "roles": {"embed": "int8", "scalar": "fp32"},
}


def settings(**sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"inner_steps_total": 8},
        "stream": {"H": 4, "layout": "single"},
        "codec": CODEC,
        "topology": {"workers": 1},
        **sections,
    }


def wrap(config: dict[str, Any], **options: Any) -> tuple[Little, DiLoCo]:
    model = Little()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, diloco.DiLoCo(model, inner, diloco.local(config), worker="w0", **options)


def train(model: Little, optimizer: DiLoCo, steps: int) -> None:
    ids = torch.arange(11)
    for _ in range(steps):
        nn.functional.cross_entropy(model(ids), ids).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def test_roles_come_from_the_model_and_not_from_names() -> None:
    """An nn.Embedding is one under any name; the plan tells roles only where a codec depends on them."""
    plan = ModelParameters(Little(), RunConfig.from_dict(settings())).plan
    roles = {span.name: span.role for fragment in plan.fragments for span in fragment.spans}
    assert roles == {
        "tokens.weight": "embed",
        "blocks.0.0.weight": "matrix",
        "blocks.0.0.bias": "scalar",
        "blocks.0.1.weight": "scalar",
        "blocks.0.1.bias": "scalar",
        "head.weight": "head",
    }
    plain = ModelParameters(Little(), RunConfig.from_dict(settings(codec={}))).plan
    assert {span.role for fragment in plain.fragments for span in fragment.spans} == {""}


@pytest.mark.parametrize("down", ["relay", "mean_q", "q4_ef"])
def test_a_run_with_a_codec_for_each_role_ends_like_any_other(down: str) -> None:
    """Threads, real model, both directions: worker and coordinator hold the same bits at the end."""
    model, optimizer = wrap(settings(codec={**CODEC, "down": down}))
    assert isinstance(optimizer.replica.codecs[0], Mixed) and optimizer.replica.codecs[0].stochastic
    before = nn.functional.cross_entropy(model(torch.arange(11)), torch.arange(11)).item()
    train(model, optimizer, 8)
    optimizer.flush()
    assert optimizer.replica.versions() == (3,)
    after = nn.functional.cross_entropy(model(torch.arange(11)), torch.arange(11)).item()
    optimizer.close()
    assert after < before


def test_shard_weights_need_the_size_of_the_shard() -> None:
    """Said before anything is trained on, with what to give; with it the run goes on."""
    config = settings(weights={"mode": "shard"})
    model, optimizer = wrap(config)
    with pytest.raises(ConfigError, match=r"DiLoCo\(\.\.\., shard=number of tokens\)"):
        train(model, optimizer, 1)
    optimizer.close("interrupted")
    model, optimizer = wrap(config, shard=500)
    train(model, optimizer, 5)
    assert optimizer.replica.shard == 500 and optimizer.replica.versions() == (1,)
    optimizer.close("interrupted")


def test_the_training_loop_tells_the_tokens_of_its_own_part(tmp_path: Path) -> None:
    """Of three parts of the corpus, in whole windows: about a third, and exactly what an epoch reads."""
    text = "".join(f"line {i}: some words to learn from, and some more of them\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    config = RunConfig.from_dict(
        {
            "run": {"inner_steps_total": 2},
            "stream": {"H": 2, "tau": 0},
            "model": {"preset": "tiny", "sequence_length": 16},
            "data": {"source": str(tmp_path / "text.txt"), "shards": 3},
            "train": {"batch_size": 1, "eval_batches": 1, "device": "cpu", "threads": 1},
            "weights": {"mode": "shard"},
            "topology": {"workers": 1},
        }
    )
    trainer = Trainer(
        config,
        diloco.local(config),
        name="w0",
        run_dir=tmp_path,
        stop=threading.Event(),
        say=lambda text: None,
    )
    assert trainer.run() is not None
    windows = (len(trainer.inner.corpus.train) - 1) // 16
    assert trainer.optimizer.replica.shard == 16 * -(-windows // 3)
