"""Whole runs with stochastic rounding, codecs by role, groups and shard weights: no timing and no crash changes a bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diloco.comms.sim import Weather
from diloco.config import RunConfig
from tests.sim.faults import arm, require_equal_ends, require_sound
from tests.toy import Cluster, ToyWorker, config

torch.set_num_threads(1)

# Nobody is given up for being slow, so that timing does not decide who takes part in a round.
PATIENT = {"suspect_s": 2e3, "dead_s": 4e3, "fixed_grace_s": 1e3, "round_timeout_s": 3e3}
ROLES = {"embed": "int8", "scalar": "fp32", "head": "int4"}
WILD = Weather((0.0, 6.0), duplicate=0.3, drop=0.1)


def settings(down: str, **sections: dict[str, Any]) -> RunConfig:
    codec = {"up": "e3m0", "down": down, "block": 16, "stochastic": True, "ef": "on", "roles": ROLES}
    return config(
        **{
            "codec": {**codec, **sections.pop("codec", {})},
            "fault": PATIENT,
            "stream": {"layout": "single", **sections.pop("stream", {})},
            "topology": {"workers": 3},
            **sections,
        }
    )


def cluster_of(c: RunConfig, seed: int = 0, weather: Weather | None = None) -> Cluster:
    return Cluster(c, seed=seed, weather=weather, flavours=range(c.topology.workers))


def digests(cluster: Cluster) -> list[str]:
    require_sound(cluster)
    require_equal_ends(cluster)
    assert all(worker.finished for worker in cluster.workers)
    return [record["digest"] for record in cluster.disk.commits()]


def resumed(cluster: Cluster, position: int) -> None:
    """The worker's process dies and goes on from what it has saved."""
    old = cluster.workers[position]
    if old.finished or old.state not in ("stepping", "computing"):
        return
    saved = old.replica.state_dict()
    old.kill()
    new = ToyWorker(cluster.sim, old.name, cluster.config, flavour=old.model.flavour, nonce=999 + position)
    new.model.tensors = {name: tensor.clone() for name, tensor in old.model.tensors.items()}
    new.replica.load_state_dict(saved)
    cluster.workers[position] = new


@pytest.mark.parametrize("down", ["relay", "mean_q", "q4_ef", "g_fp32", "g_bf16"])
def test_timing_does_not_change_a_bit_of_random_rounding_by_role(down: str) -> None:
    """Promise 6: delays, losses, duplicates and slow workers; every commit's digest is that of the calm run."""
    c = settings(down)
    expected = digests(cluster_of(c).run())
    assert len(expected) > 3
    for seed in range(4):
        cluster = cluster_of(c, seed, WILD)
        for number, worker in enumerate(cluster.workers):
            worker.step_s = (0.1, 1.0, 4.0)[(number + seed) % 3]
        assert digests(cluster.run(until_s=20_000.0)) == expected


def test_the_roles_and_the_rounding_do_change_the_result() -> None:
    """The law above would hold for a run that ignores them."""
    found = {
        tuple(digests(cluster_of(c).run()))
        for c in (
            settings("relay"),
            settings("relay", codec={"roles": {}}),
            settings("relay", codec={"stochastic": False}),
            settings("relay", run={"seed": 2}),
        )
    }
    assert len(found) == 4


@pytest.mark.parametrize("down", ["relay", "q4_ef"])
@pytest.mark.parametrize("at", [7.6, 11.2, 15.7])
def test_a_resumed_worker_and_a_restarted_coordinator_round_as_before(down: str, at: float) -> None:
    """Nothing about the draws is saved, and nothing has to be: the message itself decides them."""
    c = settings(down)
    expected = digests(cluster_of(c).run())
    cluster = cluster_of(c, 5)
    cluster.sim.at(at, lambda: resumed(cluster, 1))
    cluster.sim.at(at + 2.0, lambda: arm(cluster, 3))
    assert digests(cluster.run(until_s=20_000.0)) == expected


@pytest.mark.parametrize(
    "robust", [{"kind": "clip_median"}, {"kind": "trimmed"}, {"kind": "centered_clip"}, {"kind": "cos_gate"}]
)
def test_robust_rules_read_a_mixture(robust: dict[str, Any]) -> None:
    """Rules that need every value, and those that need norms, in a relay where each node repeats them."""
    cluster = cluster_of(settings("relay", robust=robust), 1, WILD).run(until_s=20_000.0)
    assert digests(cluster) == digests(cluster_of(settings("relay", robust=robust)).run())


@pytest.mark.parametrize(("up", "groups"), [("stat", "tensor"), ("stat", "row"), ("topk", "tensor")])
@pytest.mark.parametrize("down", ["relay", "q4_ef"])
def test_groups_of_tensors_and_rows_run_in_both_directions(up: str, groups: str, down: str) -> None:
    """Frames whose reader must know the plan travel up, down and through the journal."""
    codec = {"up": up, "groups": groups, "roles": {}, "stochastic": False}
    c = settings(down, codec=codec, outer={"kind": "sgd"}, stream={"layout": "strided"})
    cluster = cluster_of(c, 2, WILD)
    cluster.sim.at(8.0, lambda: arm(cluster, 5))
    whole = settings(
        down, codec={**codec, "groups": "fragment"}, outer={"kind": "sgd"}, stream={"layout": "strided"}
    )
    found = sorted(digests(cluster.run(until_s=20_000.0)))
    assert found == sorted(digests(cluster_of(c).run())) != sorted(digests(cluster_of(whole).run()))


# ---- weights by shard ----


def sharded(sizes: tuple[int, ...], weather: Weather | None = None) -> Cluster:
    c = settings("relay", weights={"mode": "shard"})
    cluster = cluster_of(c, 4, weather)
    for worker, size in zip(cluster.workers, sizes, strict=True):
        worker.replica.shard = size
    return cluster


def test_a_worker_with_three_times_the_data_counts_three_times() -> None:
    """2311.08105: weights proportional to the shards' sizes, whatever the network does."""
    calm = sharded((100, 300, 400)).run()
    assert all(record["weights"] == [0.125, 0.375, 0.5] for record in calm.disk.commits())
    assert digests(sharded((100, 300, 400), WILD).run(until_s=20_000.0)) == digests(calm)


def test_a_resumed_worker_still_knows_its_shard() -> None:
    """Its contribution in flight is offered again before it has read its data again."""
    cluster = sharded((100, 300, 400))
    cluster.sim.at(6.05, lambda: resumed(cluster, 1))
    assert digests(cluster.run()) == digests(sharded((100, 300, 400)).run())


@pytest.mark.parametrize("size", [0, -5, 2**60])
def test_a_shard_of_impossible_size_does_not_count(size: int) -> None:
    """It would take the whole mean, or none: the contribution is refused, the others go on."""
    cluster = sharded((100, size, 400)).run()
    assert all(record["indices"] == [0, 2] for record in cluster.disk.commits())
    assert {r.reason.split(":")[0] for r in cluster.workers[1].replica.rejections} <= {
        "tokens",
        "quarantined",
    }
    assert "shard" in cluster.workers[1].replica.rejections[0].reason


def test_a_shard_that_grows_on_the_way_does_not_count() -> None:
    """The first contribution of a life says how large it is; a later claim of more is refused."""
    cluster = sharded((100, 300, 400))
    cluster.sim.at(8.0, lambda: setattr(cluster.workers[1].replica, "shard", 3_000_000))
    records = cluster.run().disk.commits()
    assert records[0]["indices"] == [0, 1, 2] and records[-1]["indices"] == [0, 2]
