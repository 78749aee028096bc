"""A model whose training step lasts a set time, of which each layer has its share: `model.factory = "wire_model:make"`.

The steps are real and cheap; what is left of the set time is slept, so that many workers on few cores do not slow one
another down and a slow network is what a measurement sees. Evaluation is not slowed.

Environment: WIRE_STEP_S, seconds per step (0: as fast as it goes); WIRE_PRESET, the preset; WIRE_LENGTH, the sequence
length it is built for.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diloco.worker.model import ModelConfig, Transformer, preset_config

FORWARD = 0.4  # of a step; the rest is backward, as in the model of the link


class _Until(torch.autograd.Function):
    """The identity that returns no sooner than `forward_at`, and whose gradient passes no sooner than `backward_at`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_at: float, backward_at: float) -> Tensor:
        ctx.backward_at = backward_at
        _sleep_until(forward_at)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        _sleep_until(ctx.backward_at)
        return gradients[0], None, None


def _sleep_until(when: float) -> None:
    if (left := when - time.monotonic()) > 0:
        time.sleep(left)


class Paced(Transformer):
    """A Transformer whose layers take equal shares of `step_s`. A layer's gradients are there when its time is over,
    so that an all-reduce can begin with the last layer while the others still compute."""

    def __init__(self, config: ModelConfig, step_s: float) -> None:
        super().__init__(config)
        self.step_s = step_s

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.step_s or not self.training or not torch.is_grad_enabled():
            return super().forward(tokens)
        begun, layers, T = time.monotonic(), len(self.blocks), self.step_s
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            backward = FORWARD + (1 - FORWARD) * (layers - i) / layers
            x = _Until.apply(x, begun + T * FORWARD * i / layers, begun + T * backward)
            x = block(x, cos, sin)
        _sleep_until(begun + T * FORWARD)
        return F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)


def make() -> Paced:
    length = int(os.environ["WIRE_LENGTH"])
    return Paced(preset_config(os.environ["WIRE_PRESET"], length), float(os.environ["WIRE_STEP_S"]))
