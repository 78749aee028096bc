"""Workers that are wrong about leased data, and what a coordinator makes of it: the others and the books are unharmed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diloco.comms import downlink, frame
from diloco.comms.machine import Persist, Received, Send, Tick
from diloco.comms.messages import (
    COUNTS_LATER,
    Contribution,
    Initial,
    Join,
    Lease,
    LeaseRequest,
    Refused,
    Rejected,
)
from diloco.comms.uplink import codecs_for
from diloco.coordinator.state import Coordinator
from diloco.errors import RefusedError
from diloco.ranges import MAX_RANGES, Ranges, both, count
from diloco.settings import settings_json
from tests.sim import faults
from tests.sim.leased import LeasedCluster, committed, leased_config, require_sound_leases
from tests.toy import Disk, plan_of

torch.set_num_threads(1)

SIZES = (1000,)
FAULT = {"heartbeat_s": 0.5, "suspect_s": 3.0, "dead_s": 6.0, "fixed_grace_s": 2.0, "round_timeout_s": 30.0}


class Desk:
    """A coordinator whose two workers "a" and "b" say what the test wants; `disk` has its records."""

    def __init__(self, **fault: Any) -> None:
        self.config = leased_config(fault={"fixed_grace_s": 1.0, "quorum": 1, **fault})
        self.plan, self.hash = plan_of(self.config), frame.run_id_hash(self.config.run.run_id)
        self.codecs = codecs_for(self.config, self.plan)
        self.coordinator, self.disk, self.now = Coordinator(self.config), Disk(), 0.0
        for nonce, name in enumerate("ab"):
            self.join(name, nonce + 1)
        for f in self.plan.fragments:
            value = downlink.value_frame(torch.zeros(f.numel), f.index, 0, self.hash)
            self.say("a", Initial("a", 1, f.index, value))

    def join(self, name: str, nonce: int) -> list[Any]:
        return self.say(
            name,
            Join(
                worker=name,
                nonce=nonce,
                run_id=self.config.run.run_id,
                plan=self.plan.describe(),
                settings=settings_json(self.config),
                versions=(),
                step=0,
                epoch=0,
            ),
        )

    def say(self, sender: str, message: Any) -> list[Any]:
        """What the sender is told."""
        return [a.message for a in self._handle(Received(sender, message)) if a.to == sender]

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self._handle(Tick())

    def _handle(self, event: Any) -> list[Send]:
        actions = self.coordinator.handle(event, self.now)
        for action in actions:
            if isinstance(action, Persist):
                self.disk.write(action)
        self.coordinator.check()
        return [a for a in actions if isinstance(a, Send)]

    def ask(self, worker: str, number: int, want: int, kept: Ranges = (), life: int = 1) -> Ranges:
        (answer,) = self.say(worker, LeaseRequest(worker, life, number, want, kept, SIZES))
        assert isinstance(answer, Lease) and (answer.incarnation, answer.number) == (life, number)
        return answer.ranges

    def contribute(self, worker: str, number: int, base: int, ranges: Ranges, life: int = 1) -> list[Any]:
        index = "ab".index(worker)
        about: dict[str, Any] = {
            "run_id": self.hash,
            "worker": index,
            "incarnation": life,
            "steps": 1,
            "tokens": 5,
        }
        delta = torch.ones(self.plan.fragments[0].numel)
        sent = frame.encode_frame(self.codecs[0], delta, fragment=0, round=number, base_version=base, **about)
        return self.say(worker, Contribution(worker, life, 0, number, sent, 0, ranges))


def reasons(said: list[Any]) -> list[str]:
    return [m.reason.split(":")[0] for m in said if isinstance(m, Rejected)]


@pytest.mark.parametrize("late", ["carry", "discount"])
def test_a_block_that_is_held_for_the_next_commit_is_not_named_again(late: str) -> None:
    """Nor told to the worker as its own. The coordinator goes on, also from its journal; the block counts once."""
    desk = Desk(late=late)
    assert desk.ask("a", 1, 100) == ((0, 0, 100),) and desk.ask("b", 1, 100) == ((0, 100, 200),)
    desk.contribute("a", 0, 0, ((0, 0, 1),))
    desk.wait(2.0)
    assert desk.contribute("b", 0, 0, ((0, 100, 101),))[0] == Rejected(0, 0, COUNTS_LATER)
    assert desk.ask("b", 2, 0) == ((0, 101, 200),)
    assert reasons(desk.contribute("b", 1, 1, ((0, 100, 102),))) == ["lease"]
    again = Coordinator(desk.config)
    again.restore(list(desk.disk.records), desk.now)
    desk.contribute("b", 2, 1, ((0, 101, 102),))
    desk.contribute("a", 1, 1, ((0, 1, 2),))
    desk.wait(2.0)
    assert sorted(committed(desk.disk)) == [(0, 0), (0, 1), (0, 100), (0, 101)]
    require_sound_leases(desk.config, desk.coordinator, desk.disk)


def test_what_comes_late_does_not_name_what_is_in_the_open_round() -> None:
    """The other order; but the same contribution may come twice."""
    desk = Desk(late="carry")
    desk.ask("a", 1, 100)
    desk.ask("b", 1, 100)
    desk.contribute("a", 0, 0, ((0, 0, 1),))
    desk.wait(2.0)
    for _ in range(2):
        assert reasons(desk.contribute("b", 1, 1, ((0, 100, 101),))) == []
    assert reasons(desk.contribute("b", 0, 0, ((0, 100, 101),))) == ["lease"]
    desk.wait(2.0)
    assert sorted(committed(desk.disk)) == [(0, 0), (0, 100)]
    require_sound_leases(desk.config, desk.coordinator, desk.disk)


def test_a_new_life_cannot_give_back_what_its_contribution_names() -> None:
    """It contributes first, with a block of its earlier life, and then keeps nothing: the block stays its own."""
    desk = Desk()
    assert desk.ask("b", 1, 100) == ((0, 0, 100),)
    desk.join("b", 77)
    assert reasons(desk.contribute("b", 0, 0, ((0, 5, 6),), life=2)) == []
    assert desk.ask("b", 1, 0, life=2) == ((0, 5, 6),)
    assert (0, 5, 6) not in desk.ask("a", 1, 100)
    desk.wait(2.0)
    assert committed(desk.disk) == [(0, 5)]
    require_sound_leases(desk.config, desk.coordinator, desk.disk)


def test_a_commit_does_not_fail_for_blocks_that_are_gone() -> None:
    """Were they to slip through: the commit counts without them, and so does its record."""
    desk = Desk()
    desk.ask("b", 1, 100)
    desk.contribute("b", 0, 0, ((0, 5, 7),))
    table = desk.coordinator.leases
    assert table is not None
    record = table.returning("b", ((0, 6, 100),))
    assert record is not None
    table.apply(record)
    desk.disk.records.append((record, []))
    desk.wait(2.0)
    assert committed(desk.disk) == [(0, 6)]
    again = Coordinator(desk.config)
    again.restore(list(desk.disk.records), desk.now)


def test_a_contribution_that_scatters_the_lease_does_not_count() -> None:
    desk = Desk()
    desk.ask("b", 1, 10000)
    crumbs = tuple((0, at, at + 1) for at in range(1, 2 * MAX_RANGES, 2))
    assert reasons(desk.contribute("b", 0, 0, crumbs)) == ["lease"]
    assert reasons(desk.contribute("b", 1, 0, crumbs[1:])) == []
    desk.wait(2.0)
    assert count(desk.ask("b", 2, 0)) == 10000 - len(crumbs) + 1


def test_requests_that_change_nothing_write_nothing_and_are_answered() -> None:
    """Also by a coordinator that has restarted and does not know of them."""
    desk = Desk()
    desk.ask("b", 1, 10)
    written = len(desk.disk.records)
    for number in range(2, 50):
        assert desk.ask("b", number, 0) == ((0, 0, 10),)
    assert len(desk.disk.records) == written
    desk.coordinator = Coordinator(desk.config)
    desk.coordinator.restore(list(desk.disk.records), desk.now)
    assert desk.ask("b", 50, 0) == ((0, 0, 10),) and desk.ask("b", 51, 10) == ((0, 0, 20),)


def test_who_is_wrong_about_the_data_is_told_and_the_others_go_on() -> None:
    """It asks first. Once the others have committed, it is refused; its own contributions are not in the run."""
    desk = Desk()
    desk.say("b", LeaseRequest("b", 1, 1, 10, (), (7,)))
    assert desk.ask("a", 1, 10) == ((0, 10, 20),)
    desk.contribute("a", 0, 0, ((0, 10, 11),))
    desk.wait(2.0)
    said = desk.contribute("b", 1, 1, ((0, 0, 1),))
    (refused,) = (m for m in said if isinstance(m, Refused))
    assert refused.kind == "settings" and "[7] blocks" in refused.reason and "data.source" in refused.reason
    assert reasons(said) == ["lease"]
    assert [m.kind for m in desk.say("b", LeaseRequest("b", 1, 2, 10, (), (7,)))] == ["settings"]
    desk.contribute("a", 1, 1, ((0, 11, 12),))
    desk.wait(2.0)
    assert committed(desk.disk) == [(0, 10), (0, 11)]


def test_two_workers_finish_a_run_that_a_third_with_other_data_began() -> None:
    """Its request is the first of all; most say something else, so its contributions are refused, and it stops."""
    c = leased_config(topology={"workers": 3}, fault={**FAULT, "quorum": 1})
    cluster = LeasedCluster(c, flavours=(0, 1, 2))
    wrong = cluster.lives[0]
    wrong.lease.sizes = (7,)
    cluster.workers.remove(wrong)  # who does not finish
    cluster.run()
    assert wrong.replica.stopped is not None and isinstance(wrong.replica.stopped.error, RefusedError)
    assert all(worker.finished and worker.read for worker in cluster.lives[1:])
    assert not any("w0" in r["contributors"] for r in cluster.disk.commits() if r["fragment"] == 0)
    require_sound_leases(c, cluster.coordinator, cluster.disk)
    faults.require_sound(cluster)


def test_a_worker_hears_what_it_lost_also_from_a_new_coordinator() -> None:
    """The old one took the lease away and died before it could say so: with a new connection a worker asks."""
    c = leased_config(run={"inner_steps_total": 60}, fault=FAULT)
    cluster = LeasedCluster(c)
    unaware, found = cluster.lives[1], list[Ranges]()

    def lose() -> None:
        table = cluster.coordinator.leases
        assert table is not None and unaware.lease.asked is None and unaware.lease.ahead
        record = table.returning("w1", (*unaware.lease.flying, *unaware.lease.fresh, *unaware.lease.drawn))
        assert record is not None
        other = table.holders["w0"]
        life: dict[str, Any] = {"incarnation": other.incarnation, "number": other.number}
        cluster.disk.records.append((record, []))
        cluster.disk.records.append(({**record, **life, "type": "lease", "worker": "w0"}, []))
        cluster.restart_coordinator()
        found.append(unaware.lease.ahead)

    cluster.sim.at(7.3, lose)
    cluster.sim.at(7.8, lambda: found.append(unaware.lease.ahead))
    cluster.run()
    before, after = found
    assert before and not both(before, after), "it has let go of what is another's by now"
    assert cluster.coordinator.rejections["lease"] == 0, "it named nothing that is not its own"
    require_sound_leases(c, cluster.coordinator, cluster.disk)
