"""The parts of the wire benchmark that its numbers rest on; the measurement itself is no test."""

from __future__ import annotations

import importlib
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diloco.comms.link import Link
from diloco.config import RunConfig

torch.set_num_threads(1)
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of the benchmarks."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_every_byte_between_two_gloo_ranks_passes_the_link(module: Any) -> None:
    """A ring all-reduce of N bytes between two moves N bytes each way: the relay must have seen them."""
    parallel = module("wire_parallel")
    meeting, numel = dist.HashStore(), 50_000  # type: ignore[attr-defined]
    results: dict[int, torch.Tensor] = {}
    traffic: dict[int, int] = {}
    stores: list[Any] = []
    groups: list[Any] = []

    def rank(number: int) -> None:
        group, store = parallel.ring(meeting, number, 2, timedelta(seconds=60), Link())
        values = torch.full((numel,), float(number + 1))
        group.allreduce([values]).wait()
        group.barrier().wait()  # what the peer has answered to has passed
        results[number], traffic[number] = values, store.traffic()
        stores.append(store)
        groups.append(group)  # a group that is gone closes its connections

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for store in stores:
        store.close()
    assert all(torch.equal(results[i], torch.full((numel,), 3.0)) for i in range(2))
    assert traffic[0] == 0 and 8 * numel <= traffic[1] < 8.2 * numel


def test_a_paced_step_lasts_its_time_and_computes_the_same(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients have the bits of the model at full speed; evaluation is not slowed."""
    paced = module("wire_model")
    for name, value in (("WIRE_PRESET", "nano"), ("WIRE_LENGTH", "16")):
        monkeypatch.setenv(name, value)
    tokens = torch.arange(34).view(2, 17)
    grads, seconds = [], []
    for step_s in ("0", "0.5"):
        monkeypatch.setenv("WIRE_STEP_S", step_s)
        model = paced.make()
        model.reset_parameters(torch.Generator().manual_seed(1))
        begun = time.monotonic()
        loss = model.loss(tokens)
        loss.backward()
        seconds.append(time.monotonic() - begun)
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert seconds[1] >= 0.5
    with torch.no_grad():
        assert torch.equal(model.loss(tokens), grads[0][0])


def test_all_methods_are_runs_that_differ_in_communication_alone(module: Any) -> None:
    """Same model, data, optimizers and H; every configuration is accepted, and each cell has a prediction."""
    plan = module("wire_plan")
    runs = [
        RunConfig.from_dict(plan.raw_config(method, M, plan.STEPS))
        for method in plan.METHODS
        for M in plan.WORKERS
    ]
    for section in ("run", "model", "data", "train", "optim", "schedule", "outer", "fault"):
        assert len({repr(getattr(c, section)) for c in runs}) == 1, section
    assert {c.stream.H for c in runs} == {plan.H}
    for cell in plan.cells(plan.WORKERS, ["0.25Mbit", "64Mbit"], plan.METHODS):
        steps = plan.steps_for(cell)
        assert not cell.link or 0 < plan.predicted(cell, steps, plan.STEP_S) <= 1
    slow, fast = (plan.Cell(plan.OURS, 2, link) for link in ("0.25Mbit", "64Mbit"))
    assert plan.predicted(slow, 500, plan.STEP_S) < 0.9 < plan.predicted(fast, 500, plan.STEP_S)


def test_the_headline_is_read_where_data_parallel_is_down_to_a_tenth(module: Any) -> None:
    """The fastest such link counts, medians over runs are what is compared, and what is missed is said."""
    wire, plan = module("wire"), module("wire_plan")
    done: dict[str, dict[str, Any]] = {}
    measured = {"64Mbit": (0.5, 1.0), "4Mbit": (0.08, 0.97), "1Mbit": (0.02, 0.6)}
    ends = {plan.PARALLEL: 2.0, plan.DILOCO: 2.1, plan.OURS: 2.105}
    cells = [plan.Cell(m, 2, link) for link in measured for m in ends] + [plan.Cell(plan.PARALLEL, 2, "")]
    for cell in cells:
        for run, off in enumerate((-0.01, 0.0, 0.2)):
            ours = cell.method != plan.PARALLEL
            row = {
                "method": cell.method,
                "workers": 2,
                "link": cell.link,
                "steps": plan.STEPS if ours or not cell.link else 10,
                "step_s": 0.08,
                "utilisation": measured.get(cell.link, (1.0, 1.0))[ours] + off,
                "bytes_per_worker_step": 80.0 if ours else 10_000.0,
                "loss": ends[cell.method] if ours or not cell.link else None,
            }
            if ours:
                row |= {
                    "bytes_per_worker_step_whole": 90.0,
                    "utilisation_whole": 0.9,
                    "peak_over_mean": [1.2, 1.7],
                }
            done[plan.key_of(cell, run)] = row
    found = wire.headline(2, wire.table(cells, done, 3))
    assert found["link"] == "4Mbit" and found["data_parallel"] == 0.08 and found["ours"] == 0.97
    assert found["fewer_bytes"] == pytest.approx(10_000 / 90)
    assert found["loss_over_diloco"] == pytest.approx(0.00238, abs=1e-5)
    assert list(found["met"].values()) == [True, True, True, False]
