"""Whole runs with a standby in virtual time: nothing announced is lost or doubled, never two lead, no worker ends."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from diloco.comms.machine import Received, Send
from diloco.comms.messages import Join, Refused
from diloco.comms.sim import Weather
from diloco.coordinator.lead import Lead
from diloco.coordinator.standby import Standby
from diloco.errors import RefusedError
from tests.sim.succession import World, require_sound
from tests.toy import Cluster, config

torch.set_num_threads(1)

FAULT = {
    "heartbeat_s": 0.5,
    "suspect_s": 6.0,
    "dead_s": 12.0,
    "fixed_grace_s": 6.0,
    "round_timeout_s": 30.0,
    "standby_s": 1.5,
    "takeover_s": 1.0,
}
ROUGH = Weather(delay_s=(0.001, 0.2), duplicate=0.1, drop=0.02)
OTHER = {"a": "b", "b": "a"}


def lead(world: World, name: str) -> Lead | None:
    return world.nodes[name].lead


def in_step(world: World) -> bool:
    found = lead(world, "a")
    return found is not None and found.facts()["state"] == "in step"


def bound(seed: int = 0, **sections: dict[str, object]) -> World:
    """A world in which the standby is in step."""
    world = World(config(fault=FAULT, **sections), seed=seed, weather=ROUGH)
    world.run(60.0, lambda: in_step(world))
    return world


def final(world: World) -> str:
    node = world.completed()
    assert node is not None
    return str(next(r["digest"] for r, _ in node.disk.records if r["type"] == "complete"))


@pytest.fixture(scope="module")
def undisturbed() -> str:
    """The digest of the run without any standby or fault."""
    return Cluster(config(fault=FAULT)).run().coordinator.global_digest()


def test_a_standby_holds_the_coordinators_journal_and_changes_no_result(undisturbed: str) -> None:
    """Record by record, bulk data included, and it ends with the run."""
    world = bound().finish()
    world.run(world.now + 10.0, lambda: all(node.stopped is not None for node in world.nodes.values()))
    require_sound(world)
    copy = world.nodes["b"].disk.records
    assert copy[-1][0]["type"] == "complete" and copy == world.nodes["a"].disk.records[: len(copy)]
    assert final(world) == undisturbed


@pytest.mark.parametrize("back", ["never", "before the takeover", "after it", "as standby"])
def test_a_coordinator_killed_between_any_two_actions_changes_no_result(back: str, undisturbed: str) -> None:
    """The standby, or the coordinator if it is back in time, goes on; an old one that comes back later is harmless."""
    for fuse in range(0, 260, 20):
        world = bound(fuse)
        if back == "never":
            world.arm("a", fuse)
        elif back == "as standby":
            world.arm("a", fuse, partial(world.at, 3.0, partial(world.start_standby, "a", "b")))
        else:
            delay_s = 0.4 if back == "before the takeover" else 3.0
            world.arm("a", fuse, partial(world.at, delay_s, partial(world.start_primary, "a")))
        world.finish()
        require_sound(world)
        assert final(world) == undisturbed, f"died after {fuse} actions"


def test_a_takeover_raises_the_epoch_and_comes_within_bounded_time() -> None:
    """`takeover_s` of absence and the time in which workers come and vote."""
    world = bound()
    world.kill("a")
    killed = world.now
    world.run(killed + 60.0, lambda: lead(world, "b") is not None)
    assert world.now - killed < FAULT["takeover_s"] + 2.0
    found = lead(world, "b")
    assert found is not None and found.coordinator.epoch == 2
    require_sound(world.finish())


def test_a_standby_that_dies_costs_the_run_a_bounded_time(undisturbed: str) -> None:
    """The workers release the coordinator from it; back again it catches up and is in step."""
    for fuse in range(0, 60, 7):
        world = bound(fuse)
        world.arm("b", fuse)
        world.run(60.0, lambda w=world: "b" not in w.machines or w.completed() is not None)  # type: ignore[misc]
        gone = world.now
        found = lead(world, "a")
        assert found is not None
        world.run(gone + 30.0, lambda f=found: f.drops > 0 or f.coordinator.complete)  # type: ignore[misc]
        assert world.now - gone < FAULT["standby_s"] + 2.0
        if not found.coordinator.complete:
            world.start_standby("b", "a")
            world.run(world.now + 30.0, lambda w=world: in_step(w) or w.completed() is not None)  # type: ignore[misc]
        require_sound(world.finish())
        assert final(world) == undisturbed


def test_a_standby_that_cannot_keep_up_is_dropped_and_holds_up_no_later_commit(undisturbed: str) -> None:
    """Its records take 2 s and it may be behind for 1.5 s: the run waits once, and the result is the same."""
    world = bound()
    found = lead(world, "a")
    assert found is not None
    start, world.slow_links_s = world.now, 2.0
    require_sound(world.finish())
    assert found.drops == 1 and world.now - start < 40.0
    assert final(world) == undisturbed


def test_a_standby_that_was_dropped_does_not_take_over() -> None:
    """The coordinator went on without it and then dies: only its own journal continues the run."""
    world = bound()
    world.part("a", "b")
    found = lead(world, "a")
    assert found is not None
    world.run(60.0, lambda: found.drops == 1)
    commits = found.coordinator.commits
    world.run(60.0, lambda: found.coordinator.commits > commits)
    world.kill("a")
    world.heal("a", "b")
    world.at(30.0, partial(world.start_primary, "a"))
    world.run(world.now + 29.0, lambda: world.now > 29.0)
    assert lead(world, "b") is None
    require_sound(world.finish())
    completed = world.completed()
    assert completed is not None
    assert sum(1 for r, _ in completed.disk.records if r["type"] == "epoch") == 1


def test_a_coordinator_cut_off_from_everybody_announces_nothing_and_gives_up_when_it_hears() -> None:
    """The standby takes over; the old one waits, and ends with a refusal once the new one reaches it."""
    world = bound()
    for name in ("b", "w0", "w1"):
        world.part("a", name)
    old = lead(world, "a")
    assert old is not None
    world.run(60.0, lambda: lead(world, "b") is not None)
    told = world.now
    world.run(told + 1.0, lambda: world.now > told + 0.5)
    assert old.bonds and not old.stopped
    for name in ("b", "w0", "w1"):
        world.heal("a", name)
    world.run(world.now + 30.0, lambda: world.nodes["a"].stopped is not None)
    stop = world.nodes["a"].stopped
    assert stop is not None and isinstance(stop.error, RefusedError) and stop.error.exit_code == 3
    require_sound(world.finish())


def test_workers_on_both_sides_of_a_partition_never_have_two_leaders() -> None:
    """w0 sees only the coordinator, w1 only the standby: one side waits; healed, the run goes on and loses nothing."""
    for seed in range(6):
        world = bound(seed)
        for one, other in (("a", "b"), ("a", "w1"), ("b", "w0")):
            world.part(one, other)
        start = world.now
        world.run(start + 30.0, lambda w=world, s=start: w.now > s + 20.0)  # type: ignore[misc]
        world.cut.clear()
        require_sound(world.finish())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_whatever_dies_and_whoever_cannot_reach_whom_nothing_announced_is_lost(workers: int) -> None:
    """Random kills, restarts and partitions, again and again, by an operator who restarts what has died."""
    for seed in range(8):
        world = World(
            config(fault=FAULT, topology={"workers": workers}), seed=seed, weather=ROUGH, workers=workers
        )
        world.at(1.0, partial(_trouble, world, random.Random(seed)))
        require_sound(world.finish())


def _trouble(world: World, chance: random.Random) -> None:
    calm = world.now > 60.0
    world.at(chance.uniform(0.5, 2.0), partial(_trouble, world, chance))
    for name, node in world.nodes.items():
        if node.machine is None and (calm or chance.random() < 0.5):
            if node.stopped is not None and node.stopped.reason == "superseded":
                world.start_standby(name, OTHER[name])
            else:
                world.restart(name, OTHER[name])
    if calm:
        world.cut.clear()
        return
    names = ["a", "b", *(worker.name for worker in world.workers)]
    kind = chance.random()
    if kind < 0.3:
        world.arm(chance.choice("ab"), chance.randrange(12))
    elif kind < 0.6:
        one, other = chance.sample(names, 2)
        world.part(one, other)
        world.at(chance.uniform(0.3, 6.0), partial(world.heal, one, other))
    elif kind < 0.7:
        alone = chance.choice("ab")
        for other in names:
            if other != alone:
                world.part(alone, other)
                world.at(chance.uniform(1.0, 6.0), partial(world.heal, alone, other))


def test_a_worker_that_claims_a_later_epoch_stops_no_coordinator_that_has_no_lost_standby() -> None:
    """It is sent elsewhere: nobody can have taken over."""
    world = bound()
    found = lead(world, "a")
    assert found is not None
    run_id = world.config.run.run_id
    for epoch in (2, 2**62):
        liar = Join("liar", 1, run_id, "{}", "{}", epoch=epoch)
        answers = [
            a
            for a in found.handle(Received("liar", liar), world.now)
            if isinstance(a, Send) and a.to == "liar"
        ]
        assert [type(a.message) for a in answers] == [Refused]
    assert not found.stopped


def test_a_standby_lets_nobody_in_while_its_coordinator_is_there() -> None:
    """A worker that finds it first is sent on."""
    world = bound()
    standby = world.nodes["b"].machine
    assert isinstance(standby, Standby)
    worker = world.workers[0].replica
    join = Join(worker.worker, worker.nonce, world.config.run.run_id, "{}", "{}")
    (answer,) = standby.handle(Received(worker.worker, join), world.now)
    assert isinstance(answer, Send) and answer.message == Refused(
        "standby", "a standby: it does not lead this run"
    )
