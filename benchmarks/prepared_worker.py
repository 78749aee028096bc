"""Workers that do not train, for the benchmarks of the coordinator and the network: one process, a thread for each.

Session, protocol, codec and transport are a worker's own (`diloco.DiLoCo` over gRPC). Only the model is none, a list of
vectors, and its "gradients" are prepared once: an inner step takes them off, which costs next to nothing.

Its argument is the job as JSON:

    config      the run's configuration, a file
    workers     {name: "host:port" of its way to the coordinator}
    blocks      the sizes of the vectors; where the plan cuts by blocks, each is one
    step_s      seconds that an inner step sleeps
    out         file for what they saw, at the end: {name: facts}, see `work`
    beats       optional: folder where each writes down when it sent a heartbeat, <name>.beats, a time.monotonic a line
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from diloco.comms.connect import connect
from diloco.comms.link_meter import LinkRates
from diloco.comms.machine import Connection, Event
from diloco.comms.messages import Heartbeat, Message
from diloco.config import RunConfig
from diloco.worker.session import DiLoCo

UPDATE = 1e-3  # standard deviation of what a step takes off


class Vectors(nn.Module):
    """Parameters and prepared gradients; all workers of a process share the gradients' storage."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in gradients)
        for block, gradient in zip(self.blocks, gradients, strict=True):
            block.w = nn.Parameter(torch.zeros_like(gradient))
            block.w.grad = gradient


@dataclass(slots=True)
class Watched:
    """A connection that writes down when each heartbeat was handed to it."""

    inner: Connection
    log: TextIO

    def send(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.log.write(f"{time.monotonic():.4f}\n")
            self.log.flush()
        self.inner.send(message)

    def receive(self, timeout_s: float | None) -> Event | None:
        return self.inner.receive(timeout_s)

    def settings(self) -> Mapping[str, Any] | None:
        return self.inner.settings()

    def traffic(self) -> tuple[int, int]:
        return self.inner.traffic()

    def rates(self) -> LinkRates:
        return self.inner.rates()

    def expect(self, deadlines: Mapping[int, float], share: float) -> None:
        self.inner.expect(deadlines, share)

    def close(self) -> None:
        self.inner.close()


def prepared(blocks: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [UPDATE * torch.randn(n, generator=generator) for n in blocks]


def work(
    config: RunConfig, name: str, connection: Connection, model: Vectors, step_s: float
) -> dict[str, Any]:
    """A whole run of one worker.

    Facts: `times`, when each inner step and what it waited for was over (time.monotonic); `up`, `down`, bytes of frames;
    `digest` of the final value.
    """
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = DiLoCo(model, inner, connection, config=config, worker=name, tokens=1)
    times = []
    while optimizer.inner_step < config.run.inner_steps_total:
        if step_s:
            time.sleep(step_s)
        optimizer.step()
        times.append(time.monotonic())
    optimizer.flush()
    up, down = connection.traffic()
    facts = {"times": times, "up": up, "down": down, "digest": optimizer.digest()}
    optimizer.close("complete")
    return facts


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    config, workers = RunConfig.load(job["config"]), job["workers"]
    gradients = prepared(job["blocks"], seed=len(workers))
    with contextlib.ExitStack() as logs, ThreadPoolExecutor(len(workers)) as pool:
        futures = {}
        for name, address in workers.items():
            connection: Connection = connect(address)
            if "beats" in job:
                log = (Path(job["beats"]) / f"{name}.beats").open("w", encoding="utf-8")
                connection = Watched(connection, logs.enter_context(log))
            futures[name] = pool.submit(work, config, name, connection, Vectors(gradients), job["step_s"])
        found = {name: future.result() for name, future in futures.items()}
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
