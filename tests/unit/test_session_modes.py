"""`diloco.DiLoCo` in every overlap mode, two workers on threads of one process: it trains, and ends in agreement."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import diloco
from diloco.config import RunConfig
from diloco.coordinator.inprocess import local_hub

torch.set_num_threads(1)

STEPS = 18
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "delay_corrected": {"stream": {"tau": 3}},
    "delayed": {"codec": {"down": "q4_ef", "up": "e3m0"}},
    "eager": {"codec": {"down": "mean_q", "up": "int8"}},
    "async": {"codec": {"down": "g_fp32"}, "fault": {"s_max": 20}, "weights": {"dn_N": 2}},
    "eager with dylu": {"weights": {"dylu": True}},
}


def run(name: str) -> tuple[list[str], list[float], str]:
    """Digests, and the loss of the value that each worker ends with; the coordinator's digest."""
    sections = {"outer": {"lr": 0.7, "momentum": 0.0}, "topology": {"workers": 2}, **MODES[name]}
    sections["run"] = {"inner_steps_total": STEPS}
    sections["stream"] = {"H": 5, "alpha": 0.0, **sections.get("stream", {}), "overlap": name.split()[0]}
    config = RunConfig.from_dict(sections)
    hub = local_hub(config)
    digests, losses, errors = ["", ""], [9.0, 9.0], []

    def work(index: int) -> None:
        try:
            torch.manual_seed(0)
            model = nn.Linear(6, 1, bias=False)
            generator = torch.Generator().manual_seed(index)
            inner = torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer = diloco.DiLoCo(model, inner, hub.connect(), config=config, worker=f"w{index}")
            while optimizer.inner_step < STEPS:
                batch = torch.randn(16, 6, generator=generator)
                optimizer.zero_grad()
                (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
                optimizer.step(tokens=16)
            optimizer.flush()
            digests[index] = optimizer.digest()
            losses[index] = float((model.weight.detach() - 1.0).square().mean())
            optimizer.close()
        except Exception as error:  # noqa: BLE001 - told by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    machine: Any = hub.thread.machine
    hub.close()
    assert not errors and hub.thread.error is None, errors or hub.thread.error
    return digests, losses, machine.global_digest()


@pytest.mark.parametrize("name", MODES)
def test_two_workers_train_in_every_mode(name: str) -> None:
    """The distance to the target shrinks; where rounds are in common, both hold the committed value bit for bit."""
    digests, losses, committed = run(name)
    assert max(losses) < 0.5  # it starts at about 1
    if name == "async":
        assert committed in digests
    else:
        assert digests == [committed, committed]
