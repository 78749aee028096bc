"""A run on leased data over gRPC: it trains to the end, and goes on after a worker and a coordinator were restarted."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import diloco
from diloco.comms.connect import connect
from diloco.comms.metrics import CoordinatorCollector
from diloco.config import RunConfig
from diloco.coordinator.service import CoordinatorService
from diloco.errors import ConfigError
from diloco.live import render
from diloco.ranges import count, parsed
from diloco.worker import drawing
from diloco.worker.data import load_corpus
from diloco.worker.drawing import Blocks
from diloco.worker.loop import Trainer
from diloco.worker.train import LocalTrainer

torch.set_num_threads(1)

STEPS, LENGTH, BATCH = 24, 16, 2


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("every block of this text is leased to one worker at a time " * 120)
    return path


def config_for(corpus: Path, mode: str = "leased", workers: int = 1) -> RunConfig:
    return RunConfig.from_dict(
        {
            "run": {"inner_steps_total": STEPS},
            "model": {"preset": "nano", "sequence_length": LENGTH},
            "data": {"source": str(corpus), "mode": mode, "shards": 3 if mode == "deficit" else None},
            "train": {"batch_size": BATCH, "grad_accum": 2, "eval_batches": 1, "threads": 1},
            "stream": {"H": 4},
            "topology": {"workers": workers, "fsync": False},
        }
    )


def trainer(
    config: RunConfig, port: int, name: str, run_dir: Path, stop: threading.Event | None = None
) -> Trainer:
    return Trainer(
        config,
        connect(f"127.0.0.1:{port}"),
        name=name,
        run_dir=run_dir,
        stop=stop or threading.Event(),
        say=lambda text: None,
    )


def committed(run_dir: Path) -> list[tuple[int, int]]:
    lines = (run_dir / "journal" / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    ranges = [r for record in records if record["type"] == "commit" for r in record.get("ranges", ())]
    return [(s, at) for held in ranges for s, lo, hi in parsed(held) for at in range(lo, hi)]


@pytest.mark.parametrize("mode", ["leased", "deficit"])
def test_two_workers_share_one_corpus_to_the_end(mode: str, corpus: Path, tmp_path: Path) -> None:
    """Each step's blocks are committed once, and status and metrics say so."""
    config = config_for(corpus, mode, workers=2)
    service = CoordinatorService(config, tmp_path, listen="127.0.0.1:0")
    try:
        port = service.start()
        finals: dict[str, float | None] = {}

        def work(name: str) -> None:
            finals[name] = trainer(config, port, name, tmp_path).run()

        threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert service.wait(60) and all(loss is not None for loss in finals.values()) and len(finals) == 2
        facts = service.status()["data"]
        view = Console(record=True, width=100, file=io.StringIO())
        view.print(render(service.status()))
        metrics = {
            (sample.name, *sample.labels.values()): sample.value
            for metric in CoordinatorCollector(service.status).collect()
            for sample in metric.samples
        }
    finally:
        service.close()
    done, all_blocks = committed(tmp_path), 2 * STEPS * BATCH * 2
    assert len(done) == len(set(done)) == all_blocks
    assert facts["mode"] == mode and facts["committed"] == all_blocks and facts["leased"] == 0
    assert sum(facts["tokens"]) == all_blocks * LENGTH
    assert f"{all_blocks} committed" in view.export_text()
    assert metrics["diloco_data_blocks", "committed"] == all_blocks
    assert metrics["diloco_data_consumed_tokens_total", "0"] == facts["tokens"][0]
    if mode == "leased":
        assert sorted(done) == [(0, at) for at in range(all_blocks)]


def test_worker_and_coordinator_restart_in_the_middle(corpus: Path, tmp_path: Path) -> None:
    """The worker goes on from its checkpoint with a new lease life; the coordinator from its journal."""
    config = config_for(corpus)
    service = CoordinatorService(config, tmp_path, listen="127.0.0.1:0")
    stop = threading.Event()
    try:
        first = trainer(config, service.start(), "w", tmp_path, stop)
        step = first._step

        def until_the_middle() -> float:
            if first.optimizer.inner_step == 10:
                stop.set()
            return step()

        first._step = until_the_middle  # type: ignore[method-assign]
        assert first.run() is None
        before = service.status()["data"]
    finally:
        service.close()
    middle = committed(tmp_path)
    assert 0 < before["committed"] == len(middle) < STEPS * BATCH * 2
    service = CoordinatorService(config, tmp_path, listen="127.0.0.1:0", resume=True)
    try:
        resumed = service.status()["data"]
        assert resumed == before
        assert trainer(config, service.start(), "w", tmp_path).run() is not None
        assert service.wait(60)
        after = service.status()["data"]
    finally:
        service.close()
    done = committed(tmp_path)
    assert done[: len(middle)] == middle and len(done) == len(set(done)) == after["committed"]
    assert after["leased"] == 0 and after["committed"] + after["free"] >= STEPS * BATCH * 2


def test_blocks_are_the_windows_of_the_corpus_each_once_an_epoch(corpus: Path) -> None:
    """All shards together, whatever their number, in an order that depends on seed and epoch alone."""
    tokens = len(load_corpus(str(corpus), "auto", "bytes").train)
    for mode in ("leased", "deficit"):
        blocks = Blocks(config_for(corpus, mode), tokens)
        epoch = tuple((shard, 0, size) for shard, size in enumerate(blocks.sizes))
        starts = blocks.windows(epoch)[:, 0]
        assert sorted(starts.tolist()) == [LENGTH * w for w in range((tokens - 1) // LENGTH)]
        assert count(epoch) == len(starts) and starts.tolist() != sorted(starts.tolist())
        following = tuple((shard, size, 2 * size) for shard, size in enumerate(blocks.sizes))
        again = blocks.windows(following)[:, 0]
        assert sorted(again.tolist()) == sorted(starts.tolist()) and again.tolist() != starts.tolist()
        parts = [blocks.windows(((0, at, at + 1),)) for at in range(5)]
        assert np.array_equal(np.concatenate(parts), blocks.windows(((0, 0, 5),)))


def test_one_node_has_nobody_to_lease_from(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a coordinator"):
        LocalTrainer(
            config_for(corpus), run_dir=tmp_path, resume=False, stop=threading.Event(), say=lambda text: None
        )


def test_an_own_loop_takes_its_blocks_by_lease() -> None:
    """`lease` before `join`, `draw` before each step: four blocks a step, each once."""
    raw: dict[str, Any] = {
        "data": {"mode": "leased"},
        "model": {"sequence_length": 8},
        "run": {"inner_steps_total": 20},
        "stream": {"H": 2},
    }
    model, hub = torch.nn.Linear(2, 1), diloco.local(raw)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = diloco.DiLoCo(model, inner, hub, worker="w", tokens=32, join=False)
    drawing.lease(optimizer, per_step=4, sizes=(30,))
    optimizer.join()
    read: list[int] = []
    while optimizer.inner_step < 20:
        read += [at for _, lo, hi in drawing.draw(optimizer, 4) for at in range(lo, hi)]
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    assert read == list(range(80)) and optimizer.replica.rejections == []
    with pytest.raises(ConfigError, match="before join"):
        drawing.lease(optimizer, per_step=4, sizes=(30,))
    optimizer.close()


def test_an_own_loop_without_a_lease_is_told_what_to_do() -> None:
    """It would send contributions that cannot count."""
    raw: dict[str, Any] = {"data": {"mode": "leased"}, "run": {"inner_steps_total": 4}, "stream": {"H": 2}}
    model = torch.nn.Linear(2, 1)
    optimizer = diloco.DiLoCo(
        model, torch.optim.SGD(model.parameters(), lr=0.1), diloco.local(raw), worker="w"
    )
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ConfigError, match=r"drawing\.lease"):
        optimizer.step()
    optimizer.close("interrupted")
