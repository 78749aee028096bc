"""Workers that lie: what they send instead of their update, and the honest clusters they are set into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diloco.comms.codec import Codec, Payload
from diloco.config import RunConfig
from tests.toy import Cluster, ToyModel, config

Lie = Callable[[Tensor], Tensor]
CENTRE = 2.0


def _noise(delta: Tensor) -> Tensor:
    # Seeded by what it replaces, so that a run is one run.
    seed = int(delta.view(torch.int32).sum().item()) & 0xFFFFFFFF
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed))
    return noise * (10.0 * float(delta.norm()) / float(noise.norm()))


LIES: dict[str, Lie] = {
    "-10x": lambda d: d * -10.0,
    "noise": _noise,
    "1e6x": lambda d: d * 1e6,
    "nan": lambda d: d * float("nan"),
    "zeros": torch.zeros_like,
}


class LyingCodec:
    """A codec that encodes `lie(delta)`; it reads what others send as it is, and sends NaN if the lie holds it."""

    def __init__(self, inner: Codec, lie: Lie, active: Callable[[], bool] = lambda: True) -> None:
        self.inner, self.lie, self.active = inner, lie, active

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, delta: Tensor, key: tuple[int, ...] = ()) -> bytes:
        said = self.lie(delta) if self.active() else delta
        if bool(torch.isfinite(said).all()):
            return self.inner.encode(said, key)
        return np.full(delta.numel(), np.nan, dtype="<f4").tobytes()  # fp32 as it lies on the wire

    def norm(self, payload: Payload, n: int) -> float:
        raw = np.frombuffer(payload, dtype="<f4") if self.inner.name == "fp32" else np.zeros(1)
        return 1.0 if np.isnan(raw).any() else self.inner.norm(payload, n)


def iid(cluster: Cluster) -> Cluster:
    """Every worker draws from the same distribution around CENTRE, each its own samples."""
    for number, worker in enumerate(cluster.workers):

        def train(step: int, model: ToyModel = worker.model, number: int = number) -> None:
            generator = torch.Generator().manual_seed(10_000 * number + step)
            for tensor in model.tensors.values():
                tensor.sub_(0.1 * (tensor - CENTRE - torch.randn(tensor.shape, generator=generator)))

        worker.model.train_step = train  # type: ignore[method-assign]
    return cluster


def loss(cluster: Cluster) -> float:
    """Expected loss of the run's parameters: half the mean square distance to a sample."""
    values = torch.cat(list(cluster.values().values())).double()
    return 0.5 * (1.0 + float((values - CENTRE).square().mean()))


def settings(workers: int, **sections: Any) -> RunConfig:
    raw: dict[str, dict[str, Any]] = {
        "run": {"inner_steps_total": 100},
        "outer": {"lr": 0.7, "momentum": 0.5},
        "topology": {"workers": workers},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return config(**raw)


def with_liar(
    c: RunConfig, lie: str, position: int = 1, active: Callable[[Cluster], bool] = lambda cluster: True
) -> Cluster:
    """A cluster of `topology.workers`, one of which lies."""
    cluster = iid(Cluster(c, flavours=(0,) * c.topology.workers))
    replica = cluster.workers[position].replica
    replica.codecs = [LyingCodec(codec, LIES[lie], lambda: active(cluster)) for codec in replica.codecs]
    return cluster
