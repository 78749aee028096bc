"""What becomes of a contribution that comes after its commit, by policy: `fault.late`, `fault.rebase`."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms import frame
from diloco.comms.machine import COORDINATOR, Received, Send
from diloco.comms.messages import COUNTS_LATER, Contribution, Rejected
from diloco.comms.sim import Weather
from diloco.coordinator.replay import replay
from diloco.coordinator.state import Coordinator
from diloco.late import COUNTING
from tests.sim.faults import Fused, arm, bits, require_equal_ends, require_sound
from tests.sim.latecomers import GRACE_S, Delayed, definition, once, settings
from tests.toy import Cluster, ToyModel, config

torch.set_num_threads(1)

POLICIES = ["skip", "isolate", "carry", "discount", "rollback"]


def sections(policy: str, **fault: Any) -> dict[str, dict[str, Any]]:
    return {"fault": {"late": policy, "quorum": 1, "fixed_grace_s": GRACE_S, **fault}}


def counted_in(record: dict[str, Any]) -> list[tuple[int, int]]:
    """(worker index, round) of a commit's contributions."""
    return list(zip(record["indices"], record["rounds"], strict=True))


def tokens_counted(cluster: Cluster) -> int:
    return sum(sum(r["tokens"]) for r in cluster.disk.commits())


# ---- the definitions ----


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("rebase", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_gives_what_its_definition_says(policy: str, rebase: bool, alpha: float) -> None:
    """Worker 1 is late in round 2 of 4: every value is that of the written-out arithmetic, and of no other policy."""
    c = settings(stream={"tau": 0, "alpha": alpha}, **sections(policy, rebase=rebase))
    cluster = Delayed(c, once("w1", 2)).run()
    expected = definition(c, late_round=2, rounds=4)
    assert len(cluster.after) >= 4
    for n in range(4):
        torch.testing.assert_close(cluster.after[n], expected[n], rtol=1e-5, atol=1e-6)
    for other in POLICIES:
        if other == policy or (alpha == 0 and {other, policy} == {"skip", "rollback"}):
            continue  # without a local share what is left out is overwritten either way
        theirs = definition(
            settings(stream={"tau": 0, "alpha": alpha}, **sections(other, rebase=rebase)), 2, 4
        )
        assert not torch.allclose(cluster.after[3], theirs[3], rtol=1e-3, atol=1e-3), other
    require_sound(cluster)
    require_equal_ends(cluster)


@pytest.mark.parametrize("tau", [0, 2])
@pytest.mark.parametrize("policy", ["isolate", "rollback"])
def test_what_a_late_worker_goes_on_from(policy: str, tau: int) -> None:
    """Isolated it keeps its own values bit for bit, overlapped steps included; rolled back it holds the run's."""
    c = settings(stream={"tau": tau, "alpha": 0.5}, **sections(policy))
    cluster = Delayed(c, once("w1", 2))
    replica, model = cluster.workers[1].replica, cluster.workers[1].model
    merge, seen = replica.merge, []

    def watched() -> list[Any]:
        flight, before = replica.slots[0].flight, model.read(0)
        left_out = flight is not None and flight.outcome == "left-out" and flight.due <= replica.step
        actions = merge()
        if left_out:
            shard = replica.slots[0].shard
            assert shard is not None
            seen.append((before, model.read(0), shard.params.clone(), replica.slots[0].steps))
        return actions

    replica.merge = watched  # type: ignore[method-assign]
    cluster.run()
    ((before, after, value, steps),) = seen
    assert torch.equal(after, before if policy == "isolate" else value) and not torch.equal(before, value)
    assert steps == (5 + tau if policy == "isolate" else 0)


@pytest.mark.parametrize("policy", COUNTING)
def test_rebased_is_as_if_the_parameters_had_been_sent(policy: str) -> None:
    """D' = D + (G_now - G_base) = G_now - theta: with all the weight on it, the next value is the late worker's own."""
    c = settings(outer={"kind": "sgd", "lr": 1.0}, **sections(policy))
    cluster = Delayed(c, once("w1", 2))
    theta: list[torch.Tensor] = []

    def note(step: int, model: ToyModel) -> None:
        if step == 10:
            theta.append(model.read(0))

    cluster.workers[1].poison = note
    cluster.run()
    (record,) = [r for r in cluster.disk.commits() if r["version"] == 3]
    assert record["indices"] == [0, 1, 1] and record["rounds"] == [3, 2, 3]
    # value 3 = sum of weights times parameters, at lr 1
    first, second = cluster.after[1], cluster.after[2]
    shares = record["weights"]
    fresh = definition_of_fresh(cluster, first)
    mean = shares[0] * fresh[0] + shares[1] * theta[0] + shares[2] * fresh[1]
    torch.testing.assert_close(second, mean, rtol=1e-5, atol=1e-6)


def definition_of_fresh(cluster: Delayed, value: torch.Tensor) -> list[torch.Tensor]:
    """The parameters of both workers at step 15, having gone on from `value` at step 10."""
    found = []
    for worker in cluster.workers:
        model = type(worker.model)(worker.plan, worker.model.flavour)
        model.write(0, value)
        for step in range(11, 16):
            model.train_step(step)
        found.append(model.read(0))
    return found


# ---- weights ----


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("mode", ["uniform", "tokens"])
def test_a_discounted_contribution_weighs_its_weight_over_the_root(mode: str, power: float) -> None:
    """w (1 + s)^-power with s = 1, then all weights together are one."""
    weights = {"mode": mode, "staleness_pow": power}
    cluster = Delayed(settings(weights=weights, **sections("discount")), once("w1", 2)).run()
    record = next(r for r in cluster.disk.commits() if len(r["indices"]) == 3)
    w = [1.0, 2.0**-power, 1.0]
    assert record["weights"] == pytest.approx([x / sum(w) for x in w], rel=1e-12)


def test_carried_work_is_counted_once_and_nothing_is_lost() -> None:
    """A worker that is late in every round: all tokens that were trained are in the journal, each once; skipped, not."""

    def always(message: Contribution) -> bool:
        return message.worker == "w1"

    total = 2 * 20 * 10
    carried = Delayed(settings(**sections("carry")), always).run()
    assert tokens_counted(carried) == total and sum(w.trained for w in carried.workers) == 40
    skipped = Delayed(settings(**sections("skip")), always).run()
    assert tokens_counted(skipped) == total - 200
    require_sound(carried)
    require_equal_ends(carried)


def test_carried_beyond_the_limit_is_refused_as_late() -> None:
    """Two commits behind with s_max = 1: not used, the sender is told, and the run goes on; with 2 it counts."""

    def by_two_rounds(s_max: int) -> Delayed:
        c = settings(
            stream={"tau": 0, "alpha": 0.0},
            **sections("discount", s_max=s_max, fixed_grace_s=0.5, heartbeat_s=8.0),
        )
        return Delayed(c, once("w1", 1), by_s=7.0).run()

    refused, counted = by_two_rounds(1), by_two_rounds(2)
    assert refused.coordinator.rejections["late"] == 1 and counted.coordinator.rejections["late"] == 0
    found = [r for r in counted.disk.commits() if 1 in r["indices"] and 1 in r["rounds"]]
    (late,) = [r for r in found if (1, 1) in zip(r["indices"], r["rounds"], strict=True)]
    assert late["version"] == 3
    for cluster in (refused, counted):
        require_sound(cluster)
        require_equal_ends(cluster)


# ---- never twice, never lost ----


@pytest.mark.parametrize("policy", COUNTING)
def test_late_contributions_that_come_again_and_again_count_once(policy: str) -> None:
    """All that the coordinator ever got, again and in random order, also after it was carried: the same bits."""
    c = settings(**sections(policy))
    expected = bits(Delayed(c, once("w1", 2)).run())
    cluster = Delayed(c, once("w1", 2))
    shuffle = random.Random(5)

    def again() -> None:
        for event in shuffle.sample(cluster.seen, len(cluster.seen)):
            cluster.sim.at(shuffle.uniform(0, 0.4), partial(cluster.sim.deliver, COORDINATOR, event))

    for at in (6.0, 13.8, 14.5, 17.0, 21.0):
        cluster.sim.at(at, again)
    assert bits(cluster.run()) == expected
    require_sound(cluster)
    assert tokens_counted(cluster) == 400


@pytest.mark.parametrize("down", ["relay", "g_fp32"])
@pytest.mark.parametrize("policy", COUNTING)
def test_a_coordinator_that_dies_anywhere_forgets_no_late_work_and_counts_none_twice(
    policy: str, down: str
) -> None:
    """With error feedback, the late worker's every token is in the journal once, wherever the coordinator died."""
    c = settings(codec={"up": "e3m0", "down": down, "ef": "on"}, **sections(policy))
    calm, endless = Delayed(c, once("w1", 2)), 10**6
    fused = Fused(calm.coordinator, endless)
    calm.sim.add(COORDINATOR, fused)
    calm.sim.run(100.0, lambda: bool(calm.coordinator.late))
    assert fused.fuse is not None
    promised = endless - fused.fuse  # actions until the sender has been told
    for fuse in [*range(0, promised, 6), *range(promised - 3, promised + 8)]:
        cluster = Delayed(c, once("w1", 2), seed=fuse)
        arm(cluster, fuse, 0.7)
        cluster.run()
        require_sound(cluster)
        require_equal_ends(cluster)
        assert tokens_counted(cluster) == 400, f"died after {fuse} actions"


@pytest.mark.parametrize("policy", COUNTING)
def test_a_restarted_coordinator_knows_what_came_late_and_counted(policy: str) -> None:
    """All that its predecessor ever got comes again, within the limit of staleness: nothing is counted a second time."""
    c = settings(**sections(policy, s_max=9))
    cluster = Delayed(c, once("w1", 2))
    shuffle = random.Random(7)

    def again() -> None:
        cluster.restart_coordinator()
        cluster.which = lambda message: False
        for event in shuffle.sample(cluster.seen, len(cluster.seen)):
            cluster.sim.at(shuffle.uniform(0.3, 0.6), partial(cluster.sim.deliver, COORDINATOR, event))

    cluster.sim.at(19.0, again)  # its third commit has the late round
    cluster.run()
    assert (1, 2) in [pair for r in cluster.disk.commits()[:3] for pair in counted_in(r)]
    require_sound(cluster)
    require_equal_ends(cluster)
    assert tokens_counted(cluster) == 400


def test_who_asks_again_hears_the_same_word() -> None:
    """The word may be lost: the contribution comes again, and its sender must not believe that it did not count."""
    c = settings(**sections("carry"))
    cluster = Delayed(c, once("w1", 2))
    words: list[str] = []

    def ask() -> None:
        assert cluster.coordinator.late
        late = [e for e in cluster.seen if isinstance(e, Received) and isinstance(e.message, Contribution)]
        (event,) = [e for e in late if e.message.worker == "w1" and e.message.round == 2]  # type: ignore[union-attr]
        for action in cluster.coordinator.handle(event, cluster.sim.now):
            if isinstance(action, Send) and isinstance(action.message, Rejected):
                words.append(action.message.reason)

    for at in (14.0, 15.0):
        cluster.sim.at(at, ask)
    cluster.run()
    assert words == [COUNTS_LATER, COUNTS_LATER]


def test_a_journal_cut_anywhere_holds_what_was_promised() -> None:
    """At each record: repeated at once or one by one, as a standby does, the same late work is held."""
    c = settings(codec={"up": "e3m0", "down": "relay"}, **sections("carry"))
    cluster = Delayed(c, once("w1", 2)).run()
    step_by_step, held = Coordinator(c), 0
    for cut in range(len(cluster.disk.records)):
        replay(step_by_step, [cluster.disk.records[cut]], 0.0)
        whole = Coordinator(c)
        replay(whole, cluster.disk.records[: cut + 1], 0.0)
        assert whole.late == step_by_step.late
        held += bool(whole.late)
    assert held == 1 and not whole.late
    assert whole.global_digest() == step_by_step.global_digest() == cluster.coordinator.global_digest()


def test_late_work_at_the_end_of_a_run_becomes_a_commit_of_its_own() -> None:
    """The last round of all comes late: it is in the value with which everybody leaves."""
    cluster = Delayed(settings(**sections("carry")), once("w1", 4)).run()
    last = cluster.disk.commits()[-1]
    assert last["indices"] == [1] and last["rounds"] == [4] and last["weights"] == [1.0]
    assert tokens_counted(cluster) == 400
    require_sound(cluster)
    require_equal_ends(cluster)


# ---- with everything else ----


@pytest.mark.parametrize(
    ("policy", "down"),
    [
        *((policy, down) for policy in COUNTING for down in ("relay", "mean_q", "q4_ef", "g_fp32", "g_bf16")),
        *(("isolate", "relay"), ("isolate", "q4_ef"), ("rollback", "relay"), ("rollback", "g_bf16")),
    ],
)
def test_replicas_are_alike_in_every_weather_with_every_downlink(policy: str, down: str) -> None:
    """Promise 2, with three workers of which one is slow, several fragments, losses, error feedback and snapshots."""
    c = config(
        codec={"up": "e3m0", "down": down, "ef": "on", "ef_beta": 1.0},
        stream={"H": 5, "tau": 1},
        fault={
            "late": policy,
            "quorum": 2,
            "fixed_grace_s": 0.6,
            "s_max": 2 if policy in COUNTING else 1,
        },
        topology={"workers": 3, "checkpoint_every_commits": 2},
    )
    twice = 0
    for seed in range(2):
        cluster = Cluster(
            c, seed=seed, weather=Weather((0.01, 0.9), duplicate=0.2, drop=0.03), flavours=(0, 1, 2)
        )
        cluster.workers[2].step_s = 1.3
        cluster.sim.at(9.0, partial(arm, cluster, 5, 0.5))
        cluster.run(20000.0)
        require_sound(cluster)
        require_equal_ends(cluster)
        assert all(w.finished for w in cluster.workers)
        again = Coordinator(c)
        replay(again, cluster.disk.records, 0.0)
        assert again.global_digest() == cluster.coordinator.global_digest()
        assert [frame.digest(w.model.read(0)) for w in cluster.workers] == [
            frame.digest(again.ledgers[0].shard.params)
        ] * 3
        twice += sum(len(set(r["indices"])) < len(r["indices"]) for r in cluster.disk.commits())
    assert bool(twice) == (policy in COUNTING)


@pytest.mark.parametrize("policy", ["isolate", "rollback"])
def test_workers_that_step_themselves_may_keep_or_give_up_what_was_late(policy: str) -> None:
    """Replicated: the values are the run's on every node, as with a coordinator that steps."""
    raw: dict[str, Any] = {"codec": {"up": "e3m0", "ef": "on"}, **sections(policy)}
    central = Delayed(settings(**raw | {"codec": raw["codec"] | {"down": "relay"}}), once("w1", 2)).run()
    raw |= {"topology": {"kind": "replicated"}, "codec": raw["codec"] | {"down": "relay"}}
    replicated = Delayed(settings(**raw), once("w1", 2)).run()
    assert bits(replicated) == bits(central)
    require_sound(replicated)
    require_equal_ends(replicated)


# ---- the default ----


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_skipped_for_ever_a_worker_leaves_the_run_to_the_others_and_still_follows(alpha: float) -> None:
    """I16: the values are those of the other worker alone, bit for bit, and the late one goes on from them."""
    c = settings(stream={"tau": 0, "alpha": alpha}, **sections("skip"))
    cluster = Delayed(c, lambda message: message.worker == "w1").run()
    alone = Delayed(
        settings(stream={"tau": 0, "alpha": alpha}, topology={"workers": 1}), once("", 0), flavours=(0,)
    )
    assert [frame.digest(v) for v in cluster.after[:4]] == [frame.digest(v) for v in alone.run().after[:4]]
    assert torch.equal(cluster.workers[1].model.read(0), cluster.values()[0])
    assert cluster.coordinator.rejections["late"] >= 3


def test_a_whole_round_that_was_late_can_be_recovered() -> None:
    """Delayed overlap takes everything away, so all of the update goes into the error feedback, once."""
    c = settings(
        stream={"overlap": "delayed", "tau": 0, "alpha": 0.0},
        codec={"up": "e3m0", "ef": "on", "ef_recover": True},
        **sections("skip"),
    )
    cluster = Delayed(c, once("w1", 2))
    recovered: list[tuple[torch.Tensor, float]] = []
    for worker in cluster.workers:
        feedback = worker.replica.slots[0].feedback
        assert feedback is not None
        recover = feedback.recover

        def note(delta: torch.Tensor, share: float, recover: Any = recover) -> None:
            recovered.append((delta.clone(), share))
            recover(delta, share)

        feedback.recover = note  # type: ignore[method-assign]
    cluster.run()
    ((delta, share),) = recovered
    assert share == 1.0 and bool(delta.any())
    require_sound(cluster)
    require_equal_ends(cluster)
