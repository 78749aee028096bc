"""Late work that was promised to count, and a new life of its worker: nothing is lost, nothing counts twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diloco.comms import downlink, frame
from diloco.comms.machine import Persist, Received, Send, Tick
from diloco.comms.messages import COUNTS_LATER, Contribution, Initial, Join, Rejected
from diloco.comms.sim import Weather
from diloco.comms.uplink import codecs_for
from diloco.coordinator.replay import replay
from diloco.coordinator.state import Coordinator
from diloco.errors import StorageError
from diloco.late import COUNTING
from diloco.settings import settings_json
from diloco.worker.leasing import Leasing
from tests.sim.faults import replace_worker, require_equal_ends, require_sound
from tests.sim.latecomers import GRACE_S, Delayed, once, settings
from tests.sim.succession import World
from tests.sim.succession import require_sound as world_sound
from tests.toy import ToyWorker, config, plan_of

torch.set_num_threads(1)

HELD_AT = 13.9  # worker 1's round 2 is held, and the next commit is not there yet


def late(policy: str, **sections: dict[str, Any]) -> Delayed:
    fault = {"late": policy, "quorum": 1, "fixed_grace_s": GRACE_S, **sections.pop("fault", {})}
    return Delayed(settings(fault=fault, **sections), once("w1", 2))


def restart(cluster: Delayed, saved_at: float, back_at: float) -> None:
    """Worker 1 begins a new life at `back_at` with the checkpoint of `saved_at`."""
    old, saved = cluster.workers[1], dict[str, Any]()

    def save() -> None:
        saved["state"] = old.replica.state_dict()
        saved["model"] = {n: t.clone() for n, t in old.model.tensors.items()}

    def begin() -> None:
        old.kill()
        new = ToyWorker(cluster.sim, old.name, cluster.config, flavour=1, nonce=777)
        new.replica.load_state_dict(saved["state"])
        new.model.tensors = saved["model"]
        cluster.workers[1] = new

    cluster.sim.at(saved_at, save)
    cluster.sim.at(back_at, begin)


def counted(cluster: Delayed) -> list[tuple[int, int]]:
    """(worker index, round) over all commits."""
    return [p for r in cluster.disk.commits() for p in zip(r["indices"], r["rounds"], strict=True)]


@pytest.mark.parametrize("saved_at", [HELD_AT, 10.2, 9.5, 7.5])
@pytest.mark.parametrize("policy", COUNTING)
def test_what_was_promised_counts_once_whenever_the_new_lifes_checkpoint_was_taken(
    policy: str, saved_at: float
) -> None:
    """After the word, with the round on its way, or before it was sent; a coordinator that restarts knows it too."""
    cluster = late(policy, codec={"up": "e3m0", "down": "relay", "ef": "on"})
    restart(cluster, saved_at, 14.0)
    held: list[list[int]] = []
    for at in (14.2, 14.6):
        cluster.sim.at(at, lambda: held.append([a.round for a in cluster.coordinator.late[0].values()]))
    cluster.sim.at(14.4, cluster.restart_coordinator)
    cluster.run()
    assert held == [[2], [2]] and counted(cluster).count((1, 2)) == 1
    assert sum(sum(r["tokens"]) for r in cluster.disk.commits()) == 400
    require_sound(cluster)
    require_equal_ends(cluster)


def test_what_is_held_outlives_its_worker() -> None:
    """It was promised: a new life that begins from nothing takes nothing back, and the next commit has it once."""
    cluster = late("carry")
    held: list[int] = []
    cluster.sim.at(13.9, lambda: held.append(len(cluster.coordinator.late)))
    cluster.sim.at(14.0, lambda: replace_worker(cluster, 1, 777))
    cluster.sim.at(14.5, lambda: held.append(len(cluster.coordinator.late)))
    cluster.run()
    assert held == [1, 1]
    assert counted(cluster).count((1, 2)) == 1
    require_sound(cluster)
    require_equal_ends(cluster)


@pytest.mark.parametrize("fuse", [5, 20, 35, 50, 65, 80])
def test_a_standby_that_takes_over_holds_what_was_promised(fuse: int) -> None:
    """The coordinator dies for good somewhere; every token that its workers trained is in the standby's journal once."""
    fault = {"heartbeat_s": 0.5, "suspect_s": 6.0, "dead_s": 12.0, "standby_s": 1.5, "takeover_s": 1.0}
    c = config(
        codec={"up": "e3m0", "down": "relay", "ef": "on"},
        fault={**fault, "late": "carry", "quorum": 1, "fixed_grace_s": 0.3, "s_max": 9},
    )
    world = World(c, seed=fuse, weather=Weather((0.001, 0.2), duplicate=0.1, drop=0.02))
    world.workers[1].step_s = 1.2
    world.run(
        60.0, lambda: (lead := world.nodes["a"].lead) is not None and lead.facts()["state"] == "in step"
    )
    world.arm("a", fuse)
    world.finish()
    world_sound(world)
    node = world.completed()
    assert node is not None
    commits = [r for r, _ in node.disk.records if r["type"] == "commit"]
    pairs = [(r["fragment"], *pair) for r in commits for pair in zip(r["indices"], r["rounds"], strict=True)]
    assert len(set(pairs)) == len(pairs)
    assert any(r["type"] == "late" for r, _ in node.disk.records)
    fragments = len({r["fragment"] for r in commits})
    assert sum(sum(r["tokens"]) for r in commits) == 2 * 20 * 10 * fragments


class Script:
    """A coordinator with workers "a" and "b" and one fragment, by hand: "a" makes the commits, "b" is late."""

    def __init__(self) -> None:
        fault = {"late": "carry", "quorum": 1, "fixed_grace_s": 1.0, "s_max": 9}
        self.c = settings(fault=fault)
        self.plan, self.now = plan_of(self.c), 0.0
        self.coordinator = Coordinator(self.c)
        self.records: list[tuple[Any, Any]] = []
        self.run_id = frame.run_id_hash(self.c.run.run_id)
        self.lives = {"a": 1, "b": 1}
        for nonce, name in enumerate("ab"):
            self.join(name, nonce)
        start = downlink.value_frame(torch.zeros(self.plan.fragments[0].numel), 0, 0, self.run_id)
        self.handle("a", Initial("a", 1, 0, start))

    def handle(self, sender: str, message: Any) -> list[Any]:
        actions = self.coordinator.handle(Received(sender, message), self.now)
        self.records += [(dict(a.record), list(a.blobs)) for a in actions if isinstance(a, Persist)]
        return [a.message for a in actions if isinstance(a, Send) and a.to == sender]

    def join(self, name: str, nonce: int) -> None:
        join = Join(
            name, nonce, self.c.run.run_id, self.plan.describe(), settings_json(self.c), (), step=0, epoch=0
        )
        self.handle(name, join)
        self.lives[name] = self.coordinator.members[name].incarnation

    def offer(self, name: str, number: int, base: int, steps: int = 5) -> list[str]:
        """Words of refusal for a contribution, "" for none."""
        codec, numel = codecs_for(self.c, self.plan)[0], self.plan.fragments[0].numel
        sent = frame.encode_frame(
            codec,
            torch.ones(numel),
            fragment=0,
            round=number,
            base_version=base,
            run_id=self.run_id,
            worker="ab".index(name),
            incarnation=self.lives[name],
            steps=steps,
            tokens=10 * steps,
        )
        found = self.handle(name, Contribution(name, self.lives[name], 0, number, sent, 0, ()))
        return [m.reason for m in found if isinstance(m, Rejected)]

    def commit(self) -> None:
        """The grace period ends."""
        self.now += 2.0
        actions = self.coordinator.handle(Tick(), self.now)
        self.records += [(dict(a.record), list(a.blobs)) for a in actions if isinstance(a, Persist)]

    def held(self) -> dict[int, int]:
        """By worker index the round that is held here, and by whoever repeats the journal, at once or step by step."""
        whole, single = Coordinator(self.c), Coordinator(self.c)
        replay(whole, self.records, self.now)
        for record in self.records:
            replay(single, [record], self.now)
        assert whole.late == single.late == self.coordinator.late
        return {i: a.round for i, a in self.coordinator.late.get(0, {}).items()}


def held_of_b() -> Script:
    """Its rounds 1 and 2 were one piece of work (round 1 was aborted) and came late."""
    script = Script()
    script.offer("a", 1, 0)
    script.commit()
    assert script.offer("b", 2, 0) == [COUNTS_LATER] and script.held() == {1: 2}
    return script


@pytest.mark.parametrize("number", [1, 2])
def test_a_new_life_that_repeats_the_work_late_hears_that_it_counts(number: int) -> None:
    """The same round or an earlier one, again and again: the promise stands, and one commit has it once."""
    script = held_of_b()
    script.join("b", 77)
    assert script.held() == {1: 2}
    for _ in range(2):
        assert script.offer("b", number, 0) == [COUNTS_LATER]
    script.offer("a", 2, 1)
    script.commit()
    (first, second) = [r for r, _ in script.records if r["type"] == "commit"]
    assert (first["indices"], second["indices"], second["rounds"]) == ([0], [0, 1], [2, 2])
    assert script.held() == {}


def test_a_new_life_that_repeats_the_whole_work_in_time_counts_in_its_place() -> None:
    """Measured from the newest value it is the better one of two that are the same work."""
    script = held_of_b()
    script.join("b", 77)
    assert script.offer("b", 2, 1) == [] and script.held() == {}
    script.offer("a", 2, 1)
    (_, second) = [r for r, _ in script.records if r["type"] == "commit"]
    assert second["indices"] == [0, 1] and second["rounds"] == [2, 2]


def test_a_new_life_with_a_part_of_the_round_does_not_push_out_what_was_promised() -> None:
    """It began from the run's value in the middle of the round: the old life's work counts, all of it."""
    script = held_of_b()
    script.join("b", 77)
    assert script.offer("b", 2, 1, steps=2) == ["late"] and script.held() == {1: 2}
    script.offer("a", 2, 1)
    (_, second) = [r for r, _ in script.records if r["type"] == "commit"]
    assert second["indices"] == [0, 1] and second["tokens"] == [50, 50]


def test_what_a_quarantine_drops_is_dropped_in_the_journal_too() -> None:
    """Else a coordinator that restarts, or a standby, would count what this one does not."""
    script = held_of_b()
    coordinator = script.coordinator
    coordinator.config = coordinator.config.model_copy(
        update={"fault": coordinator.config.fault.model_copy(update={"quarantine_after": 1})}
    )
    bad = Contribution("b", script.lives["b"], 0, 3, b"nothing", 0, ())
    script.handle("b", bad)
    assert coordinator.members["b"].conduct.barred(coordinator.ended)
    assert script.held() == {}


def test_a_journal_of_other_outer_defaults_is_told_from_a_damaged_one() -> None:
    """An earlier version took other values where neither outer.lr nor outer.momentum is given: the error names them."""
    before = Delayed(settings(outer={"kind": "nesterov", "lr": 0.4, "momentum": 0.9}), once("", 0)).run()
    now = settings(outer={"kind": "nesterov", "lr": 0.8, "momentum": 0.4})
    with pytest.raises(StorageError, match=r"lr = 0\.4, momentum = 0\.9 where neither is given"):
        replay(Coordinator(now), before.disk.records, 0.0)


def test_a_checkpoint_knows_the_blocks_of_promised_work() -> None:
    """A new life that forgot them would take them for blocks that are to be trained; older checkpoints have none."""
    lease = Leasing(2, (100,))
    lease.flying, lease.ahead = ((0, 0, 10),), ((0, 10, 14),)
    lease.settle(counted=False, kept=False, later=True)
    saved = lease.state()
    back, older = Leasing(2, (100,)), Leasing(2, (100,))
    back.load(saved)
    older.load({name: ranges for name, ranges in saved.items() if name != "handed"})
    assert back.handed == ((0, 0, 10),) and back.ahead == older.ahead == ((0, 10, 14),)
    assert older.handed == ()
