"""`outer.gradient_clip` in whole runs: whoever takes the outer step clips the same mean to the same norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.comms.machine import Action, Event
from diloco.config import RunConfig
from diloco.outer import Nesterov, OuterShard
from diloco.outer_clip import Clipped, clipped
from diloco.sums import norm
from tests.sim.faults import ROUGH, arm, require_equal_ends, require_sound
from tests.toy import Cluster, config

torch.set_num_threads(1)

LIMIT = 0.5
DOWN = ("relay", "mean_q", "q4_ef", "g_fp32", "g_bf16")


def settings(down: str, limit: float | None = LIMIT, **sections: dict[str, Any]) -> RunConfig:
    outer = {"kind": "sgd", "lr": 1.0, "gradient_clip": limit, **sections.pop("outer", {})}
    codec = {"up": "fp32", "block": 16, "down": down, **sections.pop("codec", {})}
    return config(outer=outer, codec=codec, **{"topology": {"workers": 3}, **sections})


def ran(c: RunConfig) -> tuple[Cluster, list[float]]:
    """The run, sound on all nodes, and how far each commit moved a fragment's unrounded value."""
    cluster = Cluster(c, flavours=(0, 1, 2))
    last: dict[int, tuple[int, Tensor]] = {}
    moved: list[float] = []
    inner = cluster.coordinator.handle

    def record(event: Event, now: float) -> list[Action]:
        actions = inner(event, now)
        for p, ledger in cluster.coordinator.ledgers.items():
            value = ledger.shard.params if ledger.master is None else ledger.master
            if p in last and last[p][0] != ledger.shard.version:
                moved.append(float((value - last[p][1]).norm()))
            last[p] = (ledger.shard.version, value.clone())
        return actions

    cluster.coordinator.handle = record  # type: ignore[method-assign]
    cluster.run()
    require_agreement(cluster)
    return cluster, moved


def require_agreement(cluster: Cluster) -> None:
    require_sound(cluster)
    if cluster.config.stream.overlap != "async":  # in which nobody hears of the commits of others
        require_equal_ends(cluster)
    assert all(worker.finished for worker in cluster.workers)
    assert cluster.coordinator.rejections["digest_differs"] == 0


def digests(c: RunConfig) -> list[str]:
    return [record["digest"] for record in ran(c)[0].disk.commits()]


@pytest.mark.parametrize("down", DOWN)
def test_no_commit_moves_a_fragment_further_than_the_limit(down: str) -> None:
    """With plain averaging the step is the clipped mean itself; without the limit it is longer."""
    _, free = ran(settings(down, None))
    _, held = ran(settings(down))
    assert len(held) > 10 and max(free) > 2 * LIMIT
    assert max(held) <= LIMIT * (1 + 1e-5)
    assert sum(abs(length - LIMIT) < 1e-5 for length in held) > len(held) / 2


def test_every_way_back_clips_to_the_same_bits() -> None:
    """Without loss on the way, workers that step and a coordinator that steps make the same commits."""
    found = [
        digests(settings(down, outer={"kind": "nesterov", "lr": 0.7, "momentum": 0.5}))
        for down in ("relay", "mean_q", "q4_ef", "g_fp32")
    ]
    assert len(found[0]) > 10 and found[1:] == found[:1] * 3
    assert found[0] != digests(
        settings("relay", None, outer={"kind": "nesterov", "lr": 0.7, "momentum": 0.5})
    )


@pytest.mark.parametrize("kind", ["central", "replicated"])
@pytest.mark.parametrize("robust", ["mean", "centered_clip"])
def test_workers_that_step_by_themselves_clip_like_the_coordinator(kind: str, robust: str) -> None:
    """A lossy codec, a robust rule that carries its centre along, faults, and a coordinator that dies."""
    c = settings(
        "relay",
        codec={"up": "e3m0", "ef": "on"},
        robust={"kind": robust},
        outer={"kind": "nesterov", "lr": 0.7, "momentum": 0.5},
        topology={"workers": 3, "kind": kind},
    )
    for seed in range(2):
        cluster = Cluster(c, seed=seed, weather=ROUGH, flavours=(0, 1, 2))
        cluster.sim.at(8.0 + seed, lambda cluster=cluster: arm(cluster, 3))  # type: ignore[misc]
        cluster.run(until_s=2000.0)
        require_agreement(cluster)
        assert cluster.coordinator.epoch > 1


@pytest.mark.parametrize("overlap", ["delayed", "async", "delay_corrected", "none"])
@pytest.mark.parametrize("outer", ["nesterov", "adam", "gpa"])
def test_it_goes_with_the_overlap_modes_and_outer_optimizers(overlap: str, outer: str) -> None:
    """Whatever steps, steps by another amount with it, and all who hear of a commit agree on it."""
    down, fault = ("g_fp32", {"s_max": 9}) if overlap == "async" else ("relay", {})
    held, free = (
        settings(down, limit, stream={"overlap": overlap}, outer={"kind": outer}, fault=fault)
        for limit in (LIMIT, None)
    )
    assert digests(held) != digests(free)


def test_a_mean_within_the_limit_is_left_as_it_is() -> None:
    """Bit for bit, so that a limit nobody reaches changes nothing; a longer one keeps its direction."""
    mean = torch.tensor([3.0, -4.0])
    assert clipped(mean, 5.0) is mean
    assert torch.equal(clipped(mean, 2.5), torch.tensor([1.5, -2.0]))
    assert torch.equal(mean, torch.tensor([3.0, -4.0]))
    zero = torch.zeros(4)
    assert clipped(zero, 1e-6) is zero


def test_step_and_update_of_a_clipped_optimizer_give_the_same_bits() -> None:
    """One moves the coordinator's copy, the other is sent: both clip, and the momentum sees the clipped mean."""
    generator = torch.Generator().manual_seed(4)
    rule = Clipped(Nesterov(0.7, 0.9), 1.0)
    one, two = (OuterShard.start(rule, torch.zeros(100)) for _ in range(2))
    plain = OuterShard.start(rule.inner, torch.zeros(100))
    for _ in range(3):
        mean = torch.randn(100, generator=generator)
        one.apply(mean)
        two.subtract(rule.update(two.params, mean, two.state))
        plain.apply(mean * (1.0 / norm(mean)))
        assert torch.equal(one.params, two.params) and torch.equal(one.params, plain.params)
    assert torch.equal(one.state["momentum"], plain.state["momentum"])
