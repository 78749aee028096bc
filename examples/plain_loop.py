"""A training loop of your own with diloco: predict the next byte of Python source from the sixteen before it.

Alone:            python examples/plain_loop.py
In a real run:    python examples/plain_loop.py --coordinator 127.0.0.1:7700 --seed 1     (another seed per worker)
"""

from __future__ import annotations

import argparse
import inspect

import torch
from torch import nn

import diloco
from diloco.schedules import multiplier

CONTEXT, BATCH = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="default: one inside this process")
    parser.add_argument("--steps", type=int, default=300, help="without --coordinator, which knows them")
    parser.add_argument("--seed", type=int, default=0, help="of this worker's data")
    arguments = parser.parse_args()

    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8).long()
    windows = text.unfold(0, CONTEXT + 1, 1)
    train, heldout = windows[: -len(windows) // 10], windows[-len(windows) // 10 :]
    order = torch.Generator().manual_seed(arguments.seed)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 128), nn.ReLU(), nn.Linear(128, 256)
    )

    def loss_on(batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])

    if arguments.coordinator:
        connection = diloco.connect(arguments.coordinator)
    else:
        connection = diloco.local(
            {
                "run": {"inner_steps_total": arguments.steps},
                "outer": {"lr": 0.7, "momentum": 0.5},
                "stream": {"H": 10},
            }
        )
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = diloco.DiLoCo(model, inner, connection, tokens=BATCH)
    total = optimizer.config.run.inner_steps_total
    # By the run's own step, so that a worker that joins late continues the schedule where the run is.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: multiplier("cosine", optimizer.inner_step, total, total // 20)
    )

    with torch.no_grad():
        print(f"held-out loss before: {loss_on(heldout).item():.3f} nats/byte")
    while optimizer.inner_step < total:
        batch = train[torch.randint(len(train), (BATCH,), generator=order)]
        loss_on(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    optimizer.flush()
    with torch.no_grad():
        print(f"held-out loss after:  {loss_on(heldout).item():.3f} nats/byte")
    print(f"global parameters:    {optimizer.digest()}")
    optimizer.close()


if __name__ == "__main__":
    main()
