"""Leased data in whole runs in virtual time, under deaths, silence, resends, restarts and a standby."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms.sim import Weather
from diloco.errors import RefusedError
from diloco.ranges import Ranges
from tests.sim import faults
from tests.sim.faults import CALM, ROUGH, STORM, arm, require_equal_ends
from tests.sim.leased import (
    PER_STEP,
    TOKENS,
    LeasedCluster,
    LeasedWorker,
    committed,
    leased_config,
    require_sound_leases,
)
from tests.sim.succession import World
from tests.toy import ToyWorker

torch.set_num_threads(1)

FAULT = {"heartbeat_s": 0.5, "suspect_s": 3.0, "dead_s": 6.0, "fixed_grace_s": 2.0, "round_timeout_s": 30.0}


def require(cluster: LeasedCluster) -> None:
    faults.require_sound(cluster)
    require_equal_ends(cluster)
    require_sound_leases(cluster.config, cluster.coordinator, cluster.disk)


def test_every_block_is_read_once_and_committed_once() -> None:
    """Without faults what two workers read is the beginning of the order, all of it committed, nothing left over."""
    cluster = LeasedCluster(leased_config()).run()
    require(cluster)
    read = [block for worker in cluster.lives for block in worker.read]
    assert len(read) == 2 * 20 * PER_STEP
    assert sorted(read) == sorted(committed(cluster.disk)) == [(0, at) for at in range(len(read))]
    table = cluster.coordinator.leases
    assert table is not None and table.facts(TOKENS)["tokens"] == [len(read) * TOKENS]
    ledger = [r for r in cluster.disk.commits() if r["fragment"] == 0]
    assert sum(sum(r["tokens"]) for r in ledger) == len(read) * TOKENS


@pytest.mark.parametrize("H", [1, 5])
def test_no_step_but_the_first_waits_for_a_lease(H: int) -> None:
    """The next lease is here before the last one is used up, with a round trip as long as several steps."""
    c = leased_config(run={"inner_steps_total": 60}, stream={"H": H, "tau": 0, "alpha": 0.0})
    cluster = LeasedCluster(c, weather=Weather(delay_s=(1.0, 2.0))).run()
    require(cluster)
    assert all(worker.waits <= 1 for worker in cluster.lives)


@pytest.mark.parametrize("weather", [CALM, ROUGH, STORM], ids=["calm", "rough", "storm"])
@pytest.mark.parametrize("mode", ["leased", "deficit"])
def test_weather_commits_no_block_twice(mode: str, weather: Weather) -> None:
    """Messages that come late, twice, in another order or not at all."""
    for seed in range(3):
        require(LeasedCluster(leased_config(mode, fault=FAULT), seed=seed, weather=weather).run())


def test_a_coordinator_killed_between_any_two_actions_loses_no_lease() -> None:
    """It comes back from its journal; workers go on with the leases that they have."""
    patient = {**FAULT, "fixed_grace_s": 30.0, "round_timeout_s": 60.0}  # so that nobody is left out
    for fuse in range(0, 160, 16):
        cluster = LeasedCluster(leased_config(fault=patient), seed=fuse, weather=ROUGH)
        cluster.sim.at(2.0 + fuse % 11, partial(arm, cluster, fuse % 40))
        require(cluster.run())
        read = sum(len(worker.read) for worker in cluster.lives)
        table = cluster.coordinator.leases
        assert table is not None and table.returned == 0, "a restart takes no lease away"
        assert read == 2 * 20 * PER_STEP


def test_the_blocks_of_a_dead_worker_are_read_by_another() -> None:
    """What it had not committed is returned when it is dead, and leased again."""
    c = leased_config(run={"inner_steps_total": 60}, fault={**FAULT, "quorum": 1})
    cluster = LeasedCluster(c)
    cluster.sim.at(12.5, cluster.workers[1].kill)
    require(cluster.run())
    table = cluster.coordinator.leases
    assert table is not None and table.returned > 0
    dead, other = cluster.lives[1], cluster.lives[0]
    lost = set(dead.read) - set(committed(cluster.disk))
    assert not lost, "what the dead worker had begun was read again"
    assert set(dead.read) & set(other.read)


@pytest.mark.parametrize("seconds", [4.0, 9.0, 15.0])
def test_a_worker_that_was_silent_commits_nothing_that_was_given_away(seconds: float) -> None:
    """A stopped process goes on with a lease that may be another's by now; it hears of it and takes a new one."""
    c = leased_config(run={"inner_steps_total": 60}, fault={**FAULT, "quorum": 1})
    for seed in range(3):
        cluster = LeasedCluster(c, seed=seed, weather=ROUGH)
        cluster.sim.at(7.3 + seed, partial(cluster.lives[1].freeze, seconds))
        require(cluster.run())
        late = [r["contributors"] for r in cluster.disk.commits()[-6:]]
        assert any("w1" in names for names in late), "it works again"


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_new_life_reads_nothing_that_is_committed(with_checkpoint: bool) -> None:
    """From its checkpoint it goes on with what is still its own; without one it begins with a new lease."""
    for seed in range(4):
        c = leased_config(run={"inner_steps_total": 60}, fault={**FAULT, "quorum": 1})
        cluster = LeasedCluster(c, seed=seed, weather=ROUGH)
        saved: list[dict[str, Any]] = []
        before: list[tuple[int, int]] = []

        def save(cluster: LeasedCluster = cluster, saved: list[dict[str, Any]] = saved) -> None:
            worker = cluster.lives[1]
            if any(slot.jobs for slot in worker.replica.slots):  # a checkpoint waits for the codec's thread
                cluster.sim.at(0.1, partial(save, cluster, saved))
            else:
                saved.append(worker.replica.state_dict())

        def again(
            cluster: LeasedCluster = cluster,
            saved: list[dict[str, Any]] = saved,
            before: list[tuple[int, int]] = before,
        ) -> None:
            before.extend(committed(cluster.disk))
            cluster.replace(1, 777, saved[0] if with_checkpoint else None)

        cluster.sim.at(8.0 + 1.3 * seed, save)
        cluster.sim.at(12.0 + 2.6 * seed, again)
        require(cluster.run())
        new = cluster.lives[2]
        assert before and new.read and not set(new.read) & set(before)


def test_a_worker_back_at_once_keeps_its_lease_and_repeats_its_steps() -> None:
    """Nothing was committed since its checkpoint: the same blocks again, and none returned."""
    cluster = LeasedCluster(leased_config(fault=FAULT))
    saved: list[dict[str, Any]] = []
    old = cluster.lives[1]
    cluster.sim.at(6.5, lambda: saved.append(old.replica.state_dict()))
    cluster.sim.at(8.4, lambda: cluster.replace(1, 777, saved[0]))
    require(cluster.run())
    at = saved[0]["meta"]["step"] * PER_STEP
    again = old.read[at:]
    assert len(again) >= 2 * PER_STEP and cluster.lives[2].read[: len(again)] == again
    table = cluster.coordinator.leases
    assert table is not None and table.returned == 0


@pytest.mark.parametrize(
    "stream",
    [
        {"overlap": "none"},
        {"overlap": "delayed"},
        {"overlap": "eager"},
        {"overlap": "delay_corrected", "tau": 2},
        {"overlap": "async"},
        {"alpha": 0.0},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_every_overlap_mode_keeps_its_books(stream: dict[str, Any]) -> None:
    """Also where the work of a round that did not count is lost, and its blocks are read again."""
    relay = stream.get("overlap") == "eager"
    codec = {"up": "fp32", "down": "relay" if relay else "g_fp32"}
    for seed in range(3):
        c = leased_config(
            run={"inner_steps_total": 40},
            stream=stream,
            codec=codec,
            fault={**FAULT, "fixed_grace_s": 1.0, "quorum": 1},
        )
        cluster = LeasedCluster(c, seed=seed, weather=ROUGH, flavours=(0, 1))
        cluster.lives[1].step_s = 1.7
        cluster.sim.at(9.0 + seed, partial(cluster.replace, 0, 500 + seed))
        cluster.run()
        require_sound_leases(c, cluster.coordinator, cluster.disk)
        faults.require_sound(cluster)


@pytest.mark.parametrize("policy", ["skip", "isolate", "carry", "discount", "rollback"])
def test_every_policy_for_late_ones_keeps_its_books(policy: str) -> None:
    """A worker that is often late, and a coordinator that restarts."""
    for seed in range(3):
        c = leased_config(
            run={"inner_steps_total": 40}, fault={**FAULT, "fixed_grace_s": 0.3, "quorum": 1, "late": policy}
        )
        cluster = LeasedCluster(c, seed=seed, weather=ROUGH)
        cluster.lives[1].step_s = 1.4
        cluster.sim.at(14.0 + seed, partial(arm, cluster, 3 + 5 * seed))
        require(cluster.run())


@pytest.mark.parametrize("mode", ["leased", "deficit"])
def test_anything_at_any_time_keeps_the_books(mode: str) -> None:
    """Deaths with and without checkpoints, silence, restarts of the coordinator, and weather, by seed."""
    for seed in range(5):
        source = random.Random(seed)
        c = leased_config(
            mode, run={"inner_steps_total": 50}, fault={**FAULT, "quorum": 1}, topology={"workers": 3}
        )
        cluster = LeasedCluster(c, seed=seed, weather=source.choice([CALM, ROUGH, STORM]), flavours=(0, 1, 2))
        saved: dict[int, dict[str, Any]] = {}

        def save(
            position: int, cluster: LeasedCluster = cluster, saved: dict[int, dict[str, Any]] = saved
        ) -> None:
            replica = cluster.workers[position].replica
            if replica.joined and not any(slot.jobs for slot in replica.slots):
                saved[position] = replica.state_dict()

        def die(
            position: int,
            nonce: int,
            cluster: LeasedCluster = cluster,
            saved: dict[int, dict[str, Any]] = saved,
        ) -> None:
            cluster.replace(position, nonce, saved.get(position))

        for step in range(3, 40, 4):
            cluster.sim.at(step + source.random(), partial(save, source.randrange(3)))
        for event in range(3):
            at, position = source.uniform(4.0, 40.0), source.randrange(3)
            match source.randrange(3):
                case 0:
                    cluster.sim.at(at, partial(die, position, 1000 + event))
                case 1:
                    worker = cluster.lives[position]
                    cluster.sim.at(at, partial(worker.freeze, source.uniform(1.0, 12.0)))
                case _:
                    cluster.sim.at(at, partial(arm, cluster, source.randrange(30)))
        cluster.run()
        require_sound_leases(c, cluster.coordinator, cluster.disk)
        faults.require_sound(cluster)


@pytest.mark.parametrize(
    "claimed", [((0, 500, 510),), ((0, 0, 1), (0, 0, 1)), ()], ids=["foreign", "twice", "none"]
)
def test_a_contribution_made_with_other_blocks_does_not_count(claimed: Ranges) -> None:
    """Blocks of nobody or another, a block named twice, and tokens without blocks; it is no offence, and it goes on."""
    c = leased_config(run={"inner_steps_total": 40}, fault=FAULT)
    cluster = LeasedCluster(c)
    cluster.sim.at(4.5, lambda: setattr(cluster.lives[1].lease, "fresh", claimed))
    require(cluster.run())
    assert cluster.coordinator.rejections["lease"] == 1
    assert cluster.coordinator.rejections["quarantines"] == 0
    assert sum("w1" in r["contributors"] for r in cluster.disk.commits()) > 10
    assert not {(0, at) for at in range(500, 510)} & set(committed(cluster.disk))


def test_a_worker_with_other_data_is_refused() -> None:
    """A corpus of another size has other blocks behind the same numbers."""
    cluster = LeasedCluster(leased_config(topology={"workers": 1}, fault=FAULT), flavours=(0,))
    found: list[LeasedWorker] = []

    def come() -> None:
        found.append(LeasedWorker(cluster.sim, "w9", cluster.config, flavour=3, nonce=9, sizes=(999,)))

    cluster.sim.at(9.0, come)  # when there is a commit to say what the data is
    require(cluster.run())
    (stranger,) = found
    assert stranger.replica.stopped is not None and isinstance(stranger.replica.stopped.error, RefusedError)
    assert "data.source" in stranger.replica.stopped.reason and not stranger.read


class LeasedWorld(World):
    """A coordinator, its standby and leased workers."""

    def new_worker(self, position: int, nonce: int) -> ToyWorker:
        return LeasedWorker(self, f"w{position}", self.config, flavour=position, nonce=nonce)

    def in_step(self) -> bool:
        lead = self.nodes["a"].lead
        return lead is not None and lead.facts()["state"] == "in step"


def test_a_standby_takes_over_with_the_same_leases() -> None:
    """It repeats the same records; no lease is taken away, and no block is committed twice across the takeover."""
    fault = {
        **FAULT,
        "suspect_s": 6.0,
        "dead_s": 12.0,
        "fixed_grace_s": 6.0,
        "standby_s": 1.5,
        "takeover_s": 1.0,
    }
    for fuse in range(0, 120, 15):
        c = leased_config(fault=fault)
        world = LeasedWorld(c, seed=fuse, weather=Weather((0.001, 0.2), duplicate=0.1, drop=0.02))
        world.run(60.0, world.in_step)
        world.arm("a", fuse)
        world.finish()
        node = world.completed()
        assert node is not None
        coordinator = node.lead.coordinator if node.lead is not None else None
        assert coordinator is not None and coordinator.leases is not None
        require_sound_leases(c, coordinator, node.disk)
        assert coordinator.leases.returned == 0
        read = [
            block for worker in world.workers if isinstance(worker, LeasedWorker) for block in worker.read
        ]
        assert sorted(read) == sorted(committed(node.disk))
