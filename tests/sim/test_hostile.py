"""Workers that lie, in whole runs: what the plain mean suffers, what the gates refuse, what each rule withstands."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from diloco.comms.machine import COORDINATOR, Received, Send
from diloco.comms.messages import Commit, Contribution, Rejected
from diloco.config import RunConfig
from diloco.coordinator.membership import COOL_OFF_ROUNDS
from diloco.coordinator.status import status
from tests.sim.faults import require_equal_ends, require_sound
from tests.sim.hostile import LIES, iid, loss, settings, with_liar
from tests.toy import Cluster, ToyWorker

torch.set_num_threads(1)

RULES = ("clip_median", "norm_outlier", "trimmed", "coord_median", "centered_clip", "cos_gate")


def short(workers: int, **sections: Any) -> RunConfig:
    """Long enough to go most of the way from 3 to the least possible loss of a half."""
    return settings(workers, run={"inner_steps_total": 60}, stream={"layout": "single"}, **sections)


@cache
def clean_loss() -> float:
    return loss(iid(Cluster(short(3), flavours=(0,) * 3)).run())


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", RULES)
def test_every_robust_rule_withstands_one_liar_of_four(kind: str, lie: str) -> None:
    """The run ends within 3 % of the loss that the three honest workers reach without it."""
    cluster = with_liar(short(4, robust={"kind": kind}), lie).run()
    assert loss(cluster) == pytest.approx(clean_loss(), rel=0.03)
    require_sound(cluster)
    require_equal_ends(cluster)


@pytest.mark.parametrize("lie", ["-10x", "1e6x", "noise"])
def test_the_plain_mean_is_pulled_away(lie: str) -> None:
    """What the rules are for: the same liars ruin the mean."""
    cluster = with_liar(short(4), lie).run()
    assert loss(cluster) > 1.1 * clean_loss()


def test_the_gates_alone_hold_back_what_is_not_a_number() -> None:
    """NaN never reaches even the plain mean; the sender is told so, counted, and after five of them shut out."""
    cluster = with_liar(short(4), "nan")
    heard: list[Rejected] = []
    inner = cluster.workers[1].replica.receive

    def receive(message: Any, now: float) -> Any:
        if isinstance(message, Rejected):
            heard.append(message)
        return inner(message, now)

    cluster.workers[1].replica.receive = receive  # type: ignore[method-assign]
    cluster.run()
    assert loss(cluster) == pytest.approx(clean_loss(), rel=0.03)
    c = cluster.coordinator
    assert c.rejections["values"] >= 5 and c.rejections["quarantines"] >= 1
    assert c.members["w1"].rejected["values"] == c.rejections["values"]
    assert sum(not m.rejected for m in c.members.values()) == 3
    assert "NaN" in heard[0].reason and heard[0].reason.startswith("values: ")
    assert len(heard) == sum(c.members["w1"].rejected.values())
    assert not any("w1" in r["contributors"] for r in cluster.disk.commits())


@pytest.mark.parametrize(
    ("kind", "lie"),
    [("norm_outlier", "-10x"), ("cos_gate", "-10x"), *((kind, "zeros") for kind in RULES)],
)
def test_who_is_dropped_from_a_commit_is_told_and_is_no_contributor(kind: str, lie: str) -> None:
    """It gets a reason, its error feedback goes back, and it still ends with everybody's parameters."""
    cluster = with_liar(settings(4, robust={"kind": kind}, codec={"down": "relay"}), lie)
    cluster.run()
    dropped = sum("w1" not in r["contributors"] for r in cluster.disk.commits())
    assert dropped > 0.5 * len(cluster.disk.commits())
    assert cluster.coordinator.members["w1"].rejected["outlier"] == dropped
    assert any(r.reason.startswith("outlier: ") for r in cluster.workers[1].replica.rejections)
    require_sound(cluster)
    require_equal_ends(cluster)


# ---- quarantine ----


def test_a_quarantined_worker_is_not_waited_for_and_may_come_back() -> None:
    """It lies for a while: the rounds do not wait for it then; honest again, it contributes to later ones."""
    c = settings(3, run={"inner_steps_total": 300})
    cluster = with_liar(c, "nan", active=lambda cluster: cluster.sim.now < 40.0)
    seen: list[tuple[float, bool, float]] = []

    def look() -> None:
        facts = status(cluster.coordinator, cluster.sim.now, 0.0)
        liar = next(m for m in facts["members"] if m["id"] == "w1")
        seen.append((cluster.sim.now, liar["quarantined"], liar["rejected"].get("values", 0)))
        if cluster.sim.now < 290:
            cluster.sim.at(1.0, look)

    cluster.sim.at(1.0, look)
    cluster.run()
    barred = [at for at, quarantined, _ in seen if quarantined]
    assert barred and barred[0] < 20.0, "the status shows it"
    assert not seen[-1][1], "it is over"
    late = [r for r in cluster.disk.commits() if r["step"] > 250]
    assert late and all("w1" in r["contributors"] for r in late)
    assert cluster.coordinator.members["w1"].rejected["quarantined"] >= 1
    require_sound(cluster)
    require_equal_ends(cluster)


def test_rounds_do_not_wait_for_a_quarantined_worker() -> None:
    """Slow as well as lying: once it is shut out the others commit at their own pace."""
    c = settings(3, fault={"fixed_grace_s": 500.0})
    cluster = with_liar(c, "nan")
    cluster.workers[1].step_s = 2.0
    others = [cluster.workers[0], cluster.workers[2]]
    cluster.sim.run(5000.0, lambda: all(w.finished for w in others))
    assert cluster.sim.now < 130.0, "as fast as alone, but for the first rounds"


def test_a_lone_quarantined_worker_gets_out_again() -> None:
    """Time is counted in ended rounds, aborted ones too, so nobody is shut out for ever."""
    c = settings(1, run={"inner_steps_total": 400})
    cluster = with_liar(c, "nan", position=0, active=lambda cluster: cluster.sim.now < 30.0)
    cluster.run()
    rejected = cluster.coordinator.members["w0"].rejected
    assert rejected["values"] >= 5 and rejected["quarantined"] >= COOL_OFF_ROUNDS
    assert cluster.coordinator.commits > 100
    require_equal_ends(cluster)


def test_zero_turns_the_quarantine_off() -> None:
    """Each bad contribution is refused for what it is, for ever."""
    cluster = with_liar(settings(3, fault={"quarantine_after": 0}), "nan").run()
    assert set(cluster.coordinator.members["w1"].rejected) == {"values"}


def test_a_new_life_is_no_way_out_of_a_quarantine() -> None:
    """Joining again under the same name keeps the record."""
    cluster = with_liar(settings(3), "nan")
    at: list[tuple[bool, bool]] = []

    def rejoin() -> None:
        old = cluster.coordinator.members["w1"]
        was = old.conduct.barred(cluster.coordinator.ended)
        cluster.workers[1].kill()
        cluster.workers[1] = ToyWorker(cluster.sim, "w1", cluster.config, flavour=0, nonce=999)
        cluster.sim.at(0.3, lambda: at.append((was, now_barred())))

    def now_barred() -> bool:
        new = cluster.coordinator.members["w1"]
        assert new.incarnation == 2
        return new.conduct.barred(cluster.coordinator.ended)

    cluster.sim.at(20.0, rejoin)
    cluster.run()
    assert at == [(True, True)]


def test_the_same_bad_frame_again_and_again_is_one_offence() -> None:
    """A network that duplicates must not have an honest worker shut out."""
    cluster = with_liar(settings(3), "nan", active=lambda cluster: cluster.sim.now < 6.0)
    copies: list[Received] = []
    inner = cluster.coordinator.handle

    def handle(event: Any, now: float) -> Any:
        if isinstance(event, Received) and isinstance(event.message, Contribution) and event.sender == "w1":
            for _ in range(0 if event in copies else 5):
                copies.append(event)
                cluster.sim.at(0.01, lambda event=event: cluster.sim.deliver(COORDINATOR, event))  # type: ignore[misc]
        return inner(event, now)

    cluster.coordinator.handle = handle  # type: ignore[method-assign]
    cluster.run()
    c = cluster.coordinator
    assert c.members["w1"].rejected["values"] > 5 and c.rejections["quarantines"] == 0


def test_a_rejection_reaches_the_sender_before_the_commit_it_is_left_out_of() -> None:
    """And after the record is safe."""
    cluster = with_liar(settings(4, robust={"kind": "norm_outlier"}), "-10x")
    inner = cluster.coordinator.handle
    orders: list[list[str]] = []

    def handle(event: Any, now: float) -> Any:
        actions = inner(event, now)
        names = [
            type(a.message).__name__ if isinstance(a, Send) else type(a).__name__
            for a in actions
            if not isinstance(a, Send) or (a.to == "w1" and isinstance(a.message, Commit | Rejected))
        ]
        if "Rejected" in names and "Persist" in names:
            orders.append(names)
        return actions

    cluster.coordinator.handle = handle  # type: ignore[method-assign]
    cluster.run()
    assert orders and all(o == ["Persist", "Rejected", "Commit"] for o in orders)
