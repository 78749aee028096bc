"""A worker that stops and goes on from its checkpoint computes the same bits as one that never stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diloco.config import RunConfig
from diloco.coordinator.inprocess import local_hub
from diloco.worker import checkpoint
from diloco.worker.loop import Trainer

STEPS = 24


class StopAt(threading.Event):
    """Set by itself once `trainer` has made `step` inner steps: a Ctrl+C at an exact place."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.trainer: Trainer | None = None

    def is_set(self) -> bool:
        return self.trainer is not None and self.trainer.optimizer.inner_step >= self.step


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _config(folder: Path, **codec: str) -> RunConfig:
    words = np.random.default_rng(3).choice(np.array(["river", "stone", "light", "house"]), 3000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return RunConfig.from_dict(
        {
            "run": {"inner_steps_total": STEPS},
            "model": {"preset": "nano", "sequence_length": 16},
            "data": {"source": str(folder / "text.txt")},
            "train": {"batch_size": 2, "threads": 1, "eval_batches": 1},
            "stream": {"H": 6, "frag_layers": 2, "tau": 1, "alpha": 0.5},
            "outer": {"lr": 0.7, "momentum": 0.5},
            "codec": codec,
            "topology": {"workers": 1},
        }
    )


def _train(config: RunConfig, folder: Path, stops: list[int]) -> dict[str, Tensor]:
    """Train to the end with a new Trainer after each of `stops`; the tensors of the final checkpoint."""
    hub, tensors = local_hub(config), dict[str, Tensor]()
    try:
        for step in [*stops, STEPS]:
            stop = StopAt(step) if step < STEPS else threading.Event()
            trainer = Trainer(
                config, hub.connect(), name="w0", run_dir=folder, stop=stop, say=lambda text: None
            )
            if isinstance(stop, StopAt):
                stop.trainer = trainer
            final = trainer.run()
            assert (final is None) == (step < STEPS)
            found = checkpoint.load(folder / "workers" / "w0" / "checkpoint")
            assert found is not None and found[1]["replica"]["step"] == step
            tensors, meta = found
            if step in stops:
                assert any("flight" in slot for slot in meta["replica"]["slots"]), "nothing was in flight"
        return tensors
    finally:
        hub.close()


@pytest.mark.parametrize(
    "codec",
    [{"up": "e3m0", "down": "relay"}, {"up": "int4", "down": "q4_ef", "ef": "on"}],
    ids=["relay", "q4_ef"],
)
def test_stopping_with_a_fragment_in_flight_changes_no_bit(tmp_path: Path, codec: dict[str, str]) -> None:
    """12 steps, checkpoint, new process state, 12 steps = 24 steps: parameters, anchors, inner state, residuals.

    Fragments are sent after steps 6k, 6k+2 and 6k+4 and merged one step later with alpha = 0.5: after steps 8 and 12
    one is in flight.
    """
    config = _config(tmp_path, **codec)
    straight = _train(config, tmp_path / "straight", [])
    resumed = _train(config, tmp_path / "resumed", [8, 12])
    assert straight.keys() == resumed.keys()
    assert any(name.startswith("inner/") for name in straight)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
