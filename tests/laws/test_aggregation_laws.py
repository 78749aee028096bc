"""Every rule of aggregation in whole runs: the same bits everywhere, after restarts and in any order of arrival."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms.machine import COORDINATOR
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from tests.sim.faults import ROUGH, arm, bits, replace_worker, require_equal_ends, require_sound
from tests.sim.hostile import with_liar
from tests.toy import Cluster, ToyWorker, config

torch.set_num_threads(1)

KINDS = ("clip_median", "norm_outlier", "trimmed", "coord_median", "centered_clip", "cos_gate")
RULES: dict[str, dict[str, Any]] = {
    **{kind: {"robust": {"kind": kind}} for kind in KINDS},
    "steps": {"weights": {"normalize": "steps", "mode": "tokens_rate"}},
    "rda": {"weights": {"merge": "rda"}},
    "rda and cos_gate": {"weights": {"merge": "rda"}, "robust": {"kind": "cos_gate"}},
    "steps and centered_clip": {"weights": {"normalize": "steps"}, "robust": {"kind": "centered_clip", "rho": 2.0}},
}  # fmt: skip
DOWN = ("relay", "mean_q", "q4_ef", "g_fp32", "g_bf16")


def settings(rule: str, **sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, dict[str, Any]] = {"run": {"inner_steps_total": 12}, "topology": {"workers": 4}}
    for part in (RULES[rule], sections):
        for name, values in part.items():
            raw[name] = {**raw.get(name, {}), **values}
    return config(**raw)


def codec(up: str, down: str) -> dict[str, Any]:
    return {"up": up, "down": down, "block": 16, "ef": "on" if up == "stat" else "off"}


@pytest.mark.parametrize("down", DOWN)
@pytest.mark.parametrize("rule", RULES)
def test_i6_all_replicas_are_bit_identical_under_every_rule(rule: str, down: str) -> None:
    """With lossy codecs, one liar and a late joiner: every commit has the same digest on every node."""
    up = {"relay": "e3m0", "mean_q": "int8", "q4_ef": "int4", "g_fp32": "stat", "g_bf16": "fp16"}[down]
    c = settings(rule, codec=codec(up, down), run={"inner_steps_total": 14})
    cluster = with_liar(c, "-10x", active=lambda cluster: cluster.sim.now > 5.0)
    cluster.sim.at(6.5, lambda: cluster.workers.append(ToyWorker(cluster.sim, "w9", c, flavour=2, nonce=9)))
    cluster.run()
    assert any("w9" in r["contributors"] for r in cluster.disk.commits())
    require_sound(cluster)
    require_equal_ends(cluster)


@pytest.mark.parametrize("up", ["nf4", "e4m3", "stat"])
def test_i6_relay_repeats_every_rule_with_every_codec(up: str) -> None:
    """Where each worker aggregates for itself."""
    for rule in RULES:
        cluster = Cluster(settings(rule, codec=codec(up, "relay")), flavours=(0, 1, 2, 5)).run()
        require_sound(cluster)
        require_equal_ends(cluster)


@pytest.mark.parametrize("kind", ["clip_median", "norm_outlier"])
def test_i6_rules_that_need_norms_only_take_sparse_contributions(kind: str) -> None:
    """top-k, over every way back."""
    for down in DOWN:
        sparse = {"up": "topk", "topk": 4, "chunk": 16, "ef": "on", "down": down}
        c = settings(kind, codec=sparse, outer={"momentum": 0.0})
        cluster = Cluster(c, flavours=(0, 1, 2, 5)).run()
        require_sound(cluster)
        require_equal_ends(cluster)


@pytest.mark.parametrize("rule", RULES)
def test_i8_delays_duplicates_and_order_change_no_bit(rule: str) -> None:
    """Timing is no input of any rule."""
    c = settings(rule, codec=codec("e3m0", "relay"), fault={"quarantine_after": 0})
    expected = bits(Cluster(c, flavours=(0, 1, 2, 5)).run())
    for seed in range(2):
        cluster = Cluster(c, seed=seed, weather=ROUGH, flavours=(0, 1, 2, 5)).run()
        assert bits(cluster) == expected
        require_equal_ends(cluster)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("down", ["relay", "mean_q", "g_fp32"])
def test_i19_a_restarted_coordinator_goes_on_with_the_same_center(down: str, every: int) -> None:
    """centered_clip starts from the last aggregate: from a snapshot, from repeated commits, or from both."""
    c = settings(
        "centered_clip",
        codec=codec("e3m0", down),
        topology={"workers": 4, "checkpoint_every_commits": every},
        run={"inner_steps_total": 20},
    )
    expected = bits(Cluster(c, flavours=(0, 1, 2, 5)).run())
    for fuse in (30, 70, 110):
        cluster = Cluster(c, seed=fuse, flavours=(0, 1, 2, 5))
        arm(cluster, fuse)
        cluster.run()
        assert cluster.sim.machines[COORDINATOR] is cluster.coordinator and cluster.coordinator.epoch == 2
        assert bits(cluster) == expected, f"died after {fuse} actions"
        require_sound(cluster)
        require_equal_ends(cluster)


@pytest.mark.parametrize("down", ["relay", "mean_q"])
def test_i19_a_worker_back_from_its_checkpoint_has_the_center(down: str) -> None:
    """Its half of the protocol, saved and loaded into a new process, repeats the later aggregations bit for bit."""
    c = settings("centered_clip", codec=codec("int8", down), run={"inner_steps_total": 20})
    cluster = Cluster(c, flavours=(0, 1, 2, 5))
    old = cluster.workers[2]

    def restart() -> None:
        saved = old.replica.state_dict()
        assert any(name.endswith("state.center") for name in saved["tensors"]) == (down == "relay")
        old.kill()
        new = ToyWorker(cluster.sim, old.name, c, flavour=2, nonce=77)
        new.replica.load_state_dict(saved)
        new.model.tensors.update(old.model.tensors)
        cluster.workers[2] = new

    cluster.sim.at(10.5, restart)
    cluster.run()
    assert cluster.workers[2].finished
    require_sound(cluster)
    require_equal_ends(cluster)


@pytest.mark.parametrize("down", DOWN)
def test_a_worker_that_starts_over_gets_the_center_with_its_snapshot(down: str) -> None:
    """A new life without memory, in bad weather: it takes part in later rounds with everybody's bits."""
    c = settings("centered_clip", codec=codec("int8", down), run={"inner_steps_total": 25})
    for seed in range(3):
        cluster = Cluster(c, seed=seed, weather=Weather(drop=0.05, duplicate=0.2), flavours=(0, 1, 2, 5))
        cluster.sim.at(9.0 + seed, partial(replace_worker, cluster, 1, 900 + seed))
        cluster.run()
        require_sound(cluster)
        last = cluster.disk.commits()[-8:]
        assert any(cluster.workers[1].name in r["contributors"] for r in last)


def test_i11_normalising_equal_steps_changes_no_bit_of_a_run() -> None:
    """All workers do H steps a round: FedNova is the weighted mean."""
    plain = config(topology={"workers": 3}, weights={"mode": "tokens"})
    steps = config(topology={"workers": 3}, weights={"mode": "tokens", "normalize": "steps"})
    assert bits(Cluster(plain, flavours=(0, 1, 2)).run()) == bits(Cluster(steps, flavours=(0, 1, 2)).run())


def test_normalising_counts_a_joiners_short_round_by_its_steps() -> None:
    """Somebody with fewer steps in a round changes the result, and the weights stay as they were."""
    found, weights = [], []
    for normalize in ("none", "steps"):
        c = config(run={"inner_steps_total": 30}, weights={"normalize": normalize})
        cluster = Cluster(c)
        cluster.sim.at(
            8.5,
            lambda cluster=cluster, c=c: cluster.workers.append(
                ToyWorker(cluster.sim, "w2", c, flavour=4, nonce=9)
            ),  # type: ignore[misc]
        )
        cluster.run()
        require_sound(cluster)
        found.append(bits(cluster))
        weights.append([r["weights"] for r in cluster.disk.commits()])
    assert found[0] != found[1] and weights[0] == weights[1]


def test_rda_moves_further_where_workers_disagree_and_alike_where_they_agree() -> None:
    """One worker: the same bits as the mean. Several: another result."""
    results = {}
    for workers in (1, 3):
        for merge in ("mean", "rda"):
            c = config(topology={"workers": workers}, weights={"merge": merge})
            results[workers, merge] = bits(Cluster(c, flavours=tuple(range(workers))).run())
    assert results[1, "mean"] == results[1, "rda"]
    assert results[3, "mean"] != results[3, "rda"]


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule != "steps"]
)  # whose equal steps are the mean
def test_every_rule_shows_in_the_result(rule: str) -> None:
    """One worker far from the others: no rule is silently the plain mean."""
    flavours = (0, 0, 0, 40)
    plain = Cluster(config(topology={"workers": 4}), flavours=flavours).run()
    ruled = Cluster(settings(rule, run={"inner_steps_total": 20}), flavours=flavours).run()
    assert bits(plain) != bits(ruled)
