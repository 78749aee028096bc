"""How much of data parallel's quality does the demo's setting keep? One command, one table.

Equal tokens, equal global batch, same model, data and inner schedule; three ways to train:

    data parallel      every step sees both workers' batches
    no communication   one worker alone on its share
    diloco             the demo's configuration: two workers, 4-bit contributions

"gap closed" = (no communication - x) / (no communication - data parallel), on held-out nats/byte.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from diloco.config import RunConfig
from diloco.coordinator.inprocess import local_hub
from diloco.demo import config_text
from diloco.schedules import multiplier
from diloco.worker.data import load_corpus
from diloco.worker.evaluate import evaluate
from diloco.worker.loop import Trainer, make_model, make_optimizer
from diloco.worker.model import next_token_loss
from diloco.worker.sampler import Sampler, take


def alone(config: RunConfig, shards: Sequence[int]) -> float:
    """Plain training on the given workers' shares, one batch of each per step; final held-out loss."""
    device = torch.device("cpu")
    corpus = load_corpus(config.data.source, config.data.format, config.data.tokenizer)
    model = make_model(config, corpus.vocab_size, device)
    optimizer = make_optimizer(config, model)
    t, s, length = config.train, config.schedule, config.model.sequence_length
    samplers = [
        Sampler.for_worker(len(corpus.train), length, config.run.seed, i, config.topology.workers)
        for i in shards
    ]
    for step in range(config.run.inner_steps_total):
        factor = multiplier(s.kind, step, config.run.inner_steps_total, s.warmup, final=s.final)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * factor
        for sampler in samplers:
            tokens = torch.from_numpy(take(corpus.train, sampler.batch(step * t.batch_size, t.batch_size)))
            (next_token_loss(model, tokens) / len(samplers)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        optimizer.step()
        optimizer.zero_grad()
    return evaluate(
        model,
        corpus,
        sequence_length=length,
        batch_size=t.batch_size,
        max_batches=t.eval_batches,
        device=device,
    )


def together(config: RunConfig) -> float:
    """The real workers and coordinator, in one process; final held-out loss of the global parameters."""
    hub = local_hub(config)
    finals: dict[int, float | None] = {}

    with tempfile.TemporaryDirectory() as folder:

        def work(i: int) -> None:
            trainer = Trainer(
                config,
                hub.connect(),
                name=f"w{i}",
                run_dir=Path(folder),
                stop=threading.Event(),
                say=lambda text: None,
            )
            finals[i] = trainer.run()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(config.topology.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    hub.close()
    final = finals[0]
    assert final is not None and len(set(finals.values())) == 1, "replicas differ"
    return final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=2.0, help="as in `diloco demo`")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="section.key=value", help="overrides for diloco"
    )
    parser.add_argument("--only", nargs="*", default=["data parallel", "no communication", "diloco"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo_parity.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[str, list[float]] = {name: [] for name in arguments.only}
    for seed in arguments.seeds:
        base = [f"run.seed={seed}", "train.checkpoint_every=0"]
        config = RunConfig.from_toml(config_text(2, arguments.minutes), base)
        for name in arguments.only:
            if name == "data parallel":
                loss = alone(config, range(config.topology.workers))
            elif name == "no communication":
                loss = alone(config, [0])
            else:
                tuned = RunConfig.from_toml(config_text(2, arguments.minutes), [*base, *arguments.set])
                loss = together(tuned)
            losses[name].append(loss)
            print(f"seed {seed}  {name:18s} {loss:.4f}", flush=True)
    report(losses, config, arguments.out)


def report(losses: dict[str, list[float]], config: RunConfig, out: Path) -> None:
    medians = {name: statistics.median(values) for name, values in losses.items()}
    none, parallel = medians.get("no communication", math.nan), medians.get("data parallel", math.nan)
    print(f"\n{'setting':18s} {'median':>8s} {'spread':>8s} {'gap closed':>11s}   held-out nats/byte")
    for name, values in losses.items():
        closed = (none - medians[name]) / (none - parallel)
        print(f"{name:18s} {medians[name]:8.4f} {max(values) - min(values):8.4f} {closed:11.1%}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps(
            {
                "losses": losses,
                "medians": medians,
                "steps": config.run.inner_steps_total,
                "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread each",
                "config": config.model_dump(mode="json"),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
