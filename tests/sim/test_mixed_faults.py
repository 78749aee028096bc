"""Many whole runs with several faults each, drawn by seed: a failing seed replays."""

from __future__ import annotations

import random

import pytest
import torch

from diloco.comms.sim import Weather
from tests.sim.faults import CALM, ROUGH, STORM, arm, replace_worker, require_sound
from tests.toy import Cluster, config

torch.set_num_threads(1)


def fault(cluster: Cluster, source: random.Random, calm: Weather, used: dict[str, int]) -> None:
    kind = source.choice(["crash", "kill", "restart", "pause", "black-out"])
    used[kind] = used.get(kind, 0) + 1
    alive = [i for i, w in enumerate(cluster.workers) if w.alive and not w.finished]
    if kind == "crash":
        arm(cluster, source.randrange(8), source.uniform(0.1, 8.0))
    elif kind == "kill" and len(alive) > 1 and cluster.coordinator.started:  # else its cohort never fills
        cluster.workers[source.choice(alive)].kill()
    elif kind == "restart" and alive:
        replace_worker(cluster, source.choice(alive), source.randrange(1000, 10**6))
    elif kind == "pause" and alive:
        cluster.workers[source.choice(alive)].step_s = source.uniform(0.2, 15.0)
    elif kind == "black-out":
        cluster.sim.weather = Weather(drop=1.0)

        def lift() -> None:
            cluster.sim.weather = calm

        cluster.sim.at(source.uniform(1.0, 15.0), lift)


@pytest.mark.parametrize("batch", range(10))
def test_mixed_faults_leave_every_run_sound_and_finished(batch: int) -> None:
    """Crashes, deaths, restarts, slow workers, black-outs, losses and duplicates, mixed by seed: 240 runs."""
    for seed in range(batch * 24, batch * 24 + 24):
        source = random.Random(seed)
        down = source.choice(["g_fp32", "relay", "mean_q", "q4_ef", "g_bf16"])
        workers = source.choice([1, 2, 3])
        c = config(
            codec={"up": source.choice(["fp32", "e3m0"]), "down": down, "ef": source.choice(["on", "off"])},
            topology={"workers": workers, "checkpoint_every_commits": source.choice([1, 3, 50])},
            stream={"tau": source.choice([0, 1, 2]), "alpha": source.choice([0.0, 0.5])},
        )
        weather = source.choice([CALM, ROUGH, STORM])
        cluster = Cluster(c, seed=seed, weather=weather, flavours=tuple(range(workers)))
        used: dict[str, int] = {}
        for _ in range(source.randrange(1, 5)):
            at = source.uniform(0.0, 30.0)
            cluster.sim.at(at, lambda c=cluster, s=source, w=weather, u=used: fault(c, s, w, u))  # type: ignore[misc]
        try:
            cluster.run(until_s=3000.0)
            require_sound(cluster)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}; faults {used}") from error
        stops = [w.replica.stopped for w in cluster.workers if w.alive]
        assert all(stop is None or stop.error is None for stop in stops), f"seed {seed}: {stops}"
        assert any(w.finished for w in cluster.workers), f"seed {seed}"
