"""Overlap modes on the real machines: what each reduces to, and that timing changes none of them (I3-I7, I11)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.aggregate import staleness_weight
from diloco.comms import downlink, frame
from diloco.comms.machine import COORDINATOR, Received
from diloco.comms.messages import Commit, Progress
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from diloco.outer import Nesterov, OuterShard, Sgd
from diloco.overlap import (
    DelayedNesterov,
    EagerAverage,
    advance,
    compensate,
    eager_update,
    local_steps,
    next_step,
)
from tests.sim.faults import require_equal_ends, require_sound
from tests.toy import Cluster, ToyModel, ToyWorker, config, plan_of

torch.set_num_threads(1)

STEPS, H = 20, 5
PLAIN = {"kind": "sgd", "lr": 1.0}
EAGER: dict[str, Any] = {"stream": {"overlap": "eager"}, "codec": {"down": "relay"}}
DELAYED: dict[str, Any] = {"stream": {"overlap": "delayed"}}
ASYNC: dict[str, Any] = {"stream": {"overlap": "async"}, "fault": {"s_max": 20}}
LOSSY = {"up": "e3m0", "block": 16, "ef": "on"}
# Every mode in which timing must not change a bit.
MODES: dict[str, dict[str, Any]] = {
    "none": {"stream": {"overlap": "none"}, "codec": {"down": "mean_q", **LOSSY}},
    "inner": {"stream": {"tau": 2}, "codec": {"down": "q4_ef", **LOSSY}},
    "delay_corrected": {"stream": {"overlap": "delay_corrected", "tau": 3}, "codec": {"down": "relay"}},
    "delayed": {"stream": {"overlap": "delayed", "compensate": 0.5}, "codec": {"down": "relay", **LOSSY}},
    "delayed, bf16 down": {"stream": {"overlap": "delayed"}, "codec": {"down": "g_bf16", "up": "int8"}},
    "eager": {"stream": {"overlap": "eager"}, "codec": {"down": "relay", **LOSSY}},
    "eager, mean requantised": {"stream": {"overlap": "eager"}, "codec": {"down": "mean_q", "up": "int8"}},
}
SLOW = Weather(delay_s=(0.3, 4.0), duplicate=0.2, drop=0.05)


def merged(mode: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    names = {*mode, *sections}
    return config(**{name: {**mode.get(name, {}), **sections.get(name, {})} for name in names})


def result(cluster: Cluster) -> list[Tensor]:
    return [values for _, values in sorted(cluster.values().items())]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def digests(cluster: Cluster, up_to: int) -> dict[tuple[int, int], str]:
    """Of every commit up to a version, by fragment and version."""
    commits = cluster.disk.commits()
    return {(r["fragment"], r["version"]): r["digest"] for r in commits if r["version"] <= up_to}


def alone(c: RunConfig, flavour: int = 0) -> list[Tensor]:
    model = ToyModel(plan_of(c), flavour)
    for step in range(1, STEPS + 1):
        model.train_step(step)
    return [model.read(f.index) for f in plan_of(c).fragments]


def watch(cluster: Cluster, look: Callable[[ToyWorker, int], None]) -> Cluster:
    """Call `look` with each worker and the number of every inner step that it has just made."""
    for worker in cluster.workers:

        def after_training(step: int, model: ToyModel, worker: ToyWorker = worker) -> None:
            look(worker, step)

        worker.poison = after_training
    return cluster


# ---- timing ----


@pytest.mark.parametrize("mode", MODES)
def test_the_network_changes_no_bit(mode: str) -> None:
    """Promise 6: delays up to a round, losses, duplicates and a slow worker leave every commit as it was."""
    c = merged(MODES[mode], topology={"workers": 3})
    quiet = Cluster(c, flavours=(0, 1, 2)).run()
    for seed in range(2):
        cluster = Cluster(c, seed=seed, weather=SLOW, flavours=(0, 1, 2))
        cluster.workers[seed].step_s = 2.5
        cluster.run()
        require_sound(cluster)
        require_equal_ends(cluster)
        assert digests(cluster, 99) == digests(quiet, 99)


@pytest.mark.parametrize("mode", MODES)
def test_everybody_ends_with_the_same_parameters(mode: str) -> None:
    """I6, eager included: what each worker's model holds after the flush is the committed value."""
    c = merged(MODES[mode], topology={"workers": 3}, run={"inner_steps_total": 18})
    cluster = Cluster(c, flavours=(0, 1, 2)).run()
    require_equal_ends(cluster)
    for worker in cluster.workers:
        held = [worker.model.read(f.index) for f in worker.plan.fragments]
        assert same(held, result(cluster))


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_asynchronous_runs_are_determined_by_the_order_of_arrival(strength: float) -> None:
    """The journal's contributions, one after another through the formula, give the value bit for bit.

    With compensation D becomes D + lambda D D (G_now - G_base) before it is weighed, to rounding.
    """
    momentum = {
        "outer": {"lr": 0.1, "momentum": 0.9},
        "weights": {"dn_N": 3, "dn_c": 0.1, "staleness_pow": 0.7},
    }
    late = {"stream": {"compensate": strength}}
    c = merged(ASYNC, topology={"workers": 3}, codec={"up": "int8"}, **momentum, **late)
    orders = set()
    for seed in range(4):
        cluster = Cluster(c, seed=seed, weather=SLOW, flavours=(0, 1, 2)).run()
        require_sound(cluster)
        orders.add(tuple(r["indices"][0] for r in cluster.disk.commits()))
        initial = {r["fragment"]: blobs[0] for r, blobs in cluster.disk.records if r["type"] == "initial"}
        shards = {
            p: OuterShard.start(DelayedNesterov(0.1, 0.9, 3, 0.1), frame.decode_frame(blob)[1])
            for p, blob in initial.items()
        }
        versions = {(p, 0): shard.params.clone() for p, shard in shards.items()}
        for record, blobs in cluster.disk.records:
            if record["type"] == "commit":
                shard = shards[record["fragment"]]
                header, values = frame.decode_frame(blobs[0])
                weight = (1.0 + shard.version - header.base_version) ** -0.7
                assert record["weights"] == [weight]
                base = versions[record["fragment"], header.base_version]
                exact = values * weight
                if strength:
                    exact = weight * (values + strength * values * values * (shard.params - base))
                shard.apply(torch.zeros_like(values) + exact)
                versions[record["fragment"], shard.version] = shard.params.clone()
        found = [s.params for _, s in sorted(shards.items())]
        for a, b in zip(found, result(cluster), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert strength or same(found, result(cluster))
    assert len(orders) > 1, "the weather never changed the order"


def test_an_asynchronous_run_of_one_worker_does_not_depend_on_timing() -> None:
    """There is one order of arrival only."""
    c = merged(ASYNC, topology={"workers": 1})
    quiet = Cluster(c, flavours=(0,)).run()
    assert same(result(Cluster(c, seed=5, weather=SLOW, flavours=(0,)).run()), result(quiet))


# ---- what modes reduce to ----


@pytest.mark.parametrize("layout", ["single", "strided"])
def test_i3_asynchronous_alone_with_plain_averaging_is_plain_training(layout: str) -> None:
    """M=1, lr 1, no momentum: G is what training alone gives."""
    c = merged(ASYNC, stream={"layout": layout}, outer=PLAIN, topology={"workers": 1})
    for a, b in zip(result(Cluster(c, flavours=(0,)).run()), alone(c), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [0, 1, 4])
def test_i3_delay_corrected_overlap_is_the_merge_of_that_name(tau: int) -> None:
    """The mode and the merge rule give the same bits, whatever alpha says; alone it is plain training (2605.20866)."""
    mode = config(stream={"overlap": "delay_corrected", "tau": tau}, outer=PLAIN, topology={"workers": 1})
    rule = config(
        stream={"merge": "delay_corrected", "tau": tau, "alpha": 0.0}, outer=PLAIN, topology={"workers": 1}
    )
    found = result(Cluster(mode, flavours=(0,)).run())
    assert same(found, result(Cluster(rule, flavours=(0,)).run()))
    for a, b in zip(found, alone(mode), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(
    "stream",
    [
        {"overlap": "none"},
        {"overlap": "inner", "tau": 3},
        {"overlap": "delay_corrected", "tau": 2},
        {"overlap": "delayed"},
    ],
    ids=lambda stream: stream["overlap"],
)
def test_i5_identical_workers_equal_a_single_one(stream: dict[str, Any], workers: int) -> None:
    """For every mode with rounds in common except eager: the same bits as one worker alone."""
    one = Cluster(config(stream=stream, topology={"workers": 1}), flavours=(1,)).run()
    c = config(stream=stream, topology={"workers": workers})
    assert same(result(Cluster(c, flavours=(1,) * workers).run()), result(one))


def textbook(c: RunConfig, whole: Callable[[list[ToyModel], int], None]) -> list[ToyModel]:
    models = [ToyModel(plan_of(c), flavour) for flavour in (0, 1)]
    models[1].write(0, models[0].read(0))
    for start in range(1, STEPS + 1, H):
        for model in models:
            for step in range(start, start + H):
                model.train_step(step)
        whole(models, start // H + 1)
    return models


def test_delayed_is_the_loop_with_every_update_one_round_late() -> None:
    """Written out, bit for bit: D(n) is measured from where round n began and applied at boundary n + 1."""
    c = merged(DELAYED, stream={"layout": "single"})
    G = ToyModel(plan_of(c), 0).read(0)
    shard = OuterShard.start(Nesterov(0.7, 0.5), G)
    waiting: list[Tensor] = []

    def boundary(models: list[ToyModel], n: int) -> None:
        D = sum((0.5 * (shard.params - m.read(0)) for m in models), torch.zeros_like(G))
        if waiting:
            shard.apply(waiting.pop())
        waiting.append(D)
        for model in models:
            model.write(0, shard.params)

    textbook(c, boundary)
    shard.apply(waiting.pop())
    assert same(result(Cluster(c).run()), [shard.params])


def test_the_flush_of_a_delayed_run_takes_the_steps_since_the_last_boundary() -> None:
    """18 steps with H=5: the round in flight is applied, then the three steps that were never sent, bit for bit."""
    c = merged(DELAYED, stream={"layout": "single"}, run={"inner_steps_total": 18})
    G = ToyModel(plan_of(c), 0).read(0)
    shard = OuterShard.start(Nesterov(0.7, 0.5), G)
    waiting: list[Tensor] = []

    def boundary(models: list[ToyModel], n: int) -> None:
        if n == 4:  # where the loop goes on and the run has ended
            return
        D = sum((0.5 * (shard.params - m.read(0)) for m in models), torch.zeros_like(G))
        if waiting:
            shard.apply(waiting.pop())
        waiting.append(D)
        for model in models:
            model.write(0, shard.params)

    textbook(c, boundary)
    ends = [ToyModel(plan_of(c), m) for m in (0, 1)]
    for model in ends:
        model.write(0, shard.params)
        for step in (16, 17, 18):
            model.train_step(step)
    rest = sum((0.5 * (shard.params - m.read(0)) for m in ends), torch.zeros_like(G))
    shard.apply(waiting.pop())
    shard.apply(rest)
    assert same(result(Cluster(c).run()), [shard.params])


@pytest.mark.parametrize("strength", [0.0, 0.8])
def test_delay_compensation_adds_the_taylor_term(strength: float) -> None:
    """D + lambda D D (G_now - G_base) from each worker, in the same loop written out (2504.17672)."""
    c = merged(DELAYED, stream={"layout": "single", "compensate": strength})
    G = ToyModel(plan_of(c), 0).read(0)
    shard = OuterShard.start(Nesterov(0.7, 0.5), G)
    waiting: list[Tensor] = []

    def boundary(models: list[ToyModel], n: int) -> None:
        base, D = shard.params.clone(), [shard.params - m.read(0) for m in models]
        if waiting:
            shard.apply(waiting.pop())
        D = [d + strength * d * d * (shard.params - base) for d in D]
        waiting.append(0.5 * D[0] + 0.5 * D[1])
        for model in models:
            model.write(0, shard.params)

    textbook(c, boundary)
    shard.apply(waiting.pop())
    torch.testing.assert_close(result(Cluster(c).run())[0], shard.params, rtol=1e-5, atol=1e-5)
    assert compensate(G, 0.0, G + 1, G) is G


# ---- eager ----


@pytest.mark.parametrize("down", ["relay", "mean_q"])
@pytest.mark.parametrize("layout", ["single", "strided"])
def test_i7_eager_alone_is_diloco(layout: str, down: str) -> None:
    """M=1: every commit before the final flush has the bits of the blocking run, momentum and all."""
    common: dict[str, Any] = {"topology": {"workers": 1}, "outer": {"momentum": 0.9}}
    eager = merged(EAGER, stream={"layout": layout}, codec={"down": down}, **common)
    plain = config(stream={"overlap": "none", "layout": layout}, codec={"down": down}, **common)
    found, expected = (digests(Cluster(c, flavours=(0,)).run(), 4) for c in (eager, plain))
    assert len(found) == 4 * len(plan_of(plain).fragments)
    assert found == expected


def boundaries(c: RunConfig, flavours: tuple[int, ...]) -> tuple[Cluster, dict[tuple[int, int], Any]]:
    """Run; for each boundary n and worker: G_m, D_m, and the coordinator's value after commit n."""
    cluster = Cluster(c, flavours=flavours)
    seen: dict[tuple[int, int], Any] = {}
    shared: dict[int, Tensor] = {}
    seen[-1, -1] = shared

    def look(worker: ToyWorker, step: int) -> None:
        slot = worker.replica.slots[0]
        if step % H == 1 and step > 1:
            assert slot.own is not None and slot.flight is not None and slot.flight.own is not None
            seen[step // H, cluster.workers.index(worker)] = (
                slot.own.params.clone(),
                slot.flight.own.clone(),
            )

    def remember() -> None:
        for ledger in cluster.coordinator.ledgers.values():
            shared.setdefault(ledger.shard.version, ledger.shard.params.clone())

    watch(cluster, look)
    cluster.sim.after["coordinator"] = remember
    return cluster.run(), seen


def test_i7_eager_workers_differ_by_one_rounds_share() -> None:
    """Without momentum G_m - G_k == -(lr / M)(D_m(n) - D_k(n)) at every boundary: the gap does not grow."""
    c = merged(EAGER, stream={"layout": "single"}, outer={"kind": "sgd", "lr": 0.7}, topology={"workers": 3})
    _, seen = boundaries(c, (0, 1, 2))
    for n in (1, 2, 3):
        for k in (1, 2):
            (g0, d0), (gk, dk) = seen[n, 0], seen[n, k]
            assert float((g0 - gk).norm()) > 1e-3
            torch.testing.assert_close(g0 - gk, -(0.7 / 3) * (d0 - dk), rtol=1e-4, atol=1e-5)


def test_eager_is_the_formula_of_its_paper() -> None:
    """E_m = Dbar(n-1) + (D_m(n) - D_m(n-1)) / M through each worker's own Nesterov (2502.12996), written out."""
    c = merged(EAGER, stream={"layout": "single"})
    plan = plan_of(c)
    G = [OuterShard.start(Nesterov(0.7, 0.5), ToyModel(plan, 0).read(0)) for _ in range(2)]
    before = [torch.zeros_like(G[0].params)] * 2
    expected: dict[tuple[int, int], Tensor] = {}

    def boundary(models: list[ToyModel], n: int) -> None:
        D = [g.params - m.read(0) for g, m in zip(G, models, strict=True)]
        mean = 0.5 * before[0] + 0.5 * before[1]
        for m, (g, model) in enumerate(zip(G, models, strict=True)):
            g.apply(mean + (D[m] - before[m]) / 2)
            model.write(0, g.params)
            expected[n, m] = g.params.clone()
        before[:] = D

    textbook(c, boundary)
    _, seen = boundaries(c, (0, 1))
    for n in (1, 2, 3):
        for m in (0, 1):
            torch.testing.assert_close(seen[n, m][0], expected[n, m], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "sgdm", "nesterov"])
def test_the_coordinator_knows_the_average_of_eager_workers(kind: str) -> None:
    """Its value after commit n is the mean of the values that the workers took at boundary n."""
    c = merged(EAGER, stream={"layout": "single"}, outer={"kind": kind}, topology={"workers": 3})
    _, seen = boundaries(c, (0, 1, 2))
    for n in (1, 2, 3):
        mean = sum(seen[n, m][0] for m in range(3)) / 3
        torch.testing.assert_close(seen[-1, -1][n], mean, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_average_takes_each_rounds_share_by_its_own_contributors(counts: list[int], seed: int) -> None:
    """(1 - 1/M) Dbar(n-1) + Dbar(n) / M with M of round n-1; before the first round M is that round's own."""
    generator = torch.Generator().manual_seed(seed)
    shard = OuterShard.start(EagerAverage(Sgd(1.0)), torch.zeros(6))
    expected, previous, before = (
        torch.zeros(6, dtype=torch.float64),
        torch.zeros(6, dtype=torch.float64),
        counts[0],
    )
    for count in counts:
        mean = torch.randn(6, generator=generator)
        advance(shard, mean, count)
        expected = expected - (1 - 1 / before) * previous - mean.double() / before
        previous, before = mean.double(), count
    torch.testing.assert_close(shard.params.double(), expected, rtol=1e-4, atol=1e-5)
    assert shard.version == len(counts)


def test_the_flush_of_an_eager_run_is_the_average_of_its_workers() -> None:
    """Every worker ends with the mean of what the workers held when their last round had been taken in."""
    c = merged(
        EAGER,
        stream={"layout": "single"},
        run={"inner_steps_total": 18},
        topology={"workers": 2},
        outer={"kind": "sgd"},
    )
    cluster, seen = boundaries(c, (0, 1))
    # Without momentum, what is taken in at the end makes all G_m equal: G - lr (D(1) + D(2) + D(3)), D in the mean.
    G = ToyModel(plan_of(c), 0).read(0)
    taken = G - 0.7 * sum(0.5 * (seen[n, 0][1] + seen[n, 1][1]) for n in (1, 2, 3))
    ends = []
    for m in range(2):
        model = ToyModel(plan_of(c), m)
        model.write(0, seen[3, m][0])
        for step in (16, 17, 18):
            model.train_step(step)
        ends.append(taken + model.read(0) - seen[3, m][0])
    torch.testing.assert_close(result(cluster)[0], (ends[0] + ends[1]) / 2, rtol=1e-4, atol=1e-4)


def test_an_eager_worker_left_out_of_a_round_adds_its_next_share_to_one_more() -> None:
    """E = Dbar(n-1) + D(n) / (M + 1): it subtracts nothing for the round that went without it."""
    c = merged(
        EAGER,
        stream={"layout": "single"},
        outer={"kind": "sgd", "lr": 0.7},
        fault={"fixed_grace_s": 0.0, "quorum": 1},
    )
    cluster = Cluster(c)
    late, seen = cluster.workers[1], []
    late.step_s = 1.3

    def look(worker: ToyWorker, step: int) -> None:
        slot = worker.replica.slots[0]
        if worker is late and step == 5:
            worker.step_s = 0.5
        if worker is late and step in (10, 11):
            assert slot.own is not None and slot.shard is not None and slot.flight is not None
            state = {k: v.clone() for k, v in slot.shard.state.items()}
            seen.append((slot.own.params.clone(), slot.flight.own, slot.flight.outcome, state))

    watch(cluster, look).run()
    (before, _, outcome, state), (after, fresh, _, _) = seen
    assert outcome == "left-out" and state["count"].item() == 1.0
    assert fresh is not None
    torch.testing.assert_close(after, before - 0.7 * (state["previous"] + fresh / 2), rtol=1e-5, atol=1e-5)


def test_an_eager_worker_that_missed_several_rounds_becomes_an_average_one() -> None:
    """Its own value is given up for the shared one, in which the average worker's part of the last round is the mean."""
    c = merged(
        EAGER,
        stream={"layout": "single"},
        outer={"kind": "sgd", "lr": 0.7},
        fault={"fixed_grace_s": 0.0, "quorum": 1},
        run={"inner_steps_total": 30},
    )
    cluster = Cluster(c)
    late, seen = cluster.workers[1], []
    late.step_s = 3.0

    def look(worker: ToyWorker, step: int) -> None:
        slot = worker.replica.slots[0]
        if worker is late and step == 5:
            worker.step_s = 0.5
        if worker is late and step in (10, 11):
            assert slot.own is not None and slot.shard is not None and slot.flight is not None
            state = {k: v.clone() for k, v in slot.shard.state.items()}
            behind = slot.version - slot.flight.base
            seen.append((slot.own.params.clone(), slot.shard.params.clone(), slot.flight.own, behind, state))

    watch(cluster, look).run()
    (_, shared, _, behind, state), (after, _, fresh, _, _) = seen
    assert behind > 1 and fresh is not None
    mean, count = state["previous"], state["count"]
    torch.testing.assert_close(after, shared - 0.7 * (mean + (fresh - mean) / count), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_eager_shares_cancel_over_two_rounds(count: int, seed: int) -> None:
    """What a worker adds of its round at once, it takes back when the mean that holds it has come."""
    generator = torch.Generator().manual_seed(seed)
    fresh, mean, before = (torch.randn(9, generator=generator) for _ in range(3))
    first = eager_update(mean, count, fresh, before, absent=False)
    torch.testing.assert_close(first, mean + (fresh - before) / count)
    second = eager_update(fresh, count, None, fresh, absent=False)
    torch.testing.assert_close(first + second, mean - before / count + fresh, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        eager_update(mean, count, fresh, before, absent=True), mean + fresh / (count + 1)
    )
    assert torch.equal(eager_update(before, 1, fresh, before, absent=False), fresh)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_published_order_of_the_modes_by_loss(momentum: float) -> None:
    """How far from the common optimum a short run ends: none < eager < naive delayed (2502.12996, table 1)."""
    loss: dict[str, float] = {}
    for mode in ("none", "eager", "delayed"):
        c = config(
            stream={"overlap": mode, "layout": "single"},
            codec={"down": "relay"},
            outer={"lr": 0.7, "momentum": momentum},
            run={"inner_steps_total": 60},
            topology={"workers": 4},
        )
        found = result(Cluster(c, flavours=(0, 1, 2, 3)).run())
        loss[mode] = float(torch.cat([values - 1.5 for values in found]).square().mean())
    assert loss["none"] < loss["eager"] < loss["delayed"]


# ---- asynchronous momentum, staleness ----


def moved(optimizer: Any, arrivals: int) -> float:
    shard = OuterShard.start(optimizer, torch.zeros(1))
    for _ in range(arrivals):
        shard.apply(torch.ones(1))
    return -float(shard.params)


def test_delayed_nesterov_cures_what_momentum_at_every_arrival_does() -> None:
    """Four identical arrivals move G by 12.1 g through sequential momentum; by one synchronous step with N=4."""
    b = 0.9
    assert moved(DelayedNesterov(1.0, b, 1), 4) == pytest.approx(
        4 + 4 * b + 3 * b**2 + 2 * b**3 + b**4, rel=1e-5
    )
    assert moved(DelayedNesterov(1.0, b, 1), 4) == pytest.approx(12.144, abs=1e-3)
    assert moved(DelayedNesterov(1.0, b, 4), 4) == pytest.approx(moved(Nesterov(1.0, b), 1), rel=1e-6)


@given(st.integers(1, 6), st.floats(0, 1), st.floats(0, 0.95), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_delayed_nesterov_is_its_formula(n: int, part: float, mu: float, seed: int) -> None:
    """Against the two lines of 2401.09135 in fp64, for any c in [0, 1/N]."""
    generator = torch.Generator().manual_seed(seed)
    c, lr = part / n, 0.3
    shard = OuterShard.start(DelayedNesterov(lr, mu, n, c), torch.zeros(5))
    G, b, acc = (torch.zeros(5, dtype=torch.float64) for _ in range(3))
    for i in range(13):
        g = torch.randn(5, generator=generator)
        shard.apply(g)
        acc = acc + g.double()
        if (i + 1) % n == 0:
            b = mu * b + acc / n
            G = G - lr * ((1 - c * n + c) * mu * b + g.double() / n)
            acc = torch.zeros_like(acc)
        else:
            G = G - lr * (c * mu * b + g.double() / n)
    torch.testing.assert_close(shard.params.double(), G, rtol=1e-4, atol=1e-5)


@given(st.floats(0, 0.99), st.floats(0, 2), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_i11_delayed_nesterov_of_one_is_nesterov(mu: float, lr: float, seed: int) -> None:
    """N=1, c=0: the same bits."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(7, generator=generator)
    found, expected = (
        OuterShard.start(o, start) for o in (DelayedNesterov(lr, mu, 1, 0.0), Nesterov(lr, mu))
    )
    for _ in range(6):
        g = torch.randn(7, generator=generator)
        found.apply(g)
        expected.apply(g)
    assert torch.equal(found.params, expected.params)


def test_staleness_is_weighed_and_bounded() -> None:
    """(1 + s)^-power counts, beyond s_max nothing does; the sender takes the value in either case and goes on."""
    assert staleness_weight(0, 0.5) == 1.0 and staleness_weight(3, 0.5) == 0.5
    slow = merged(ASYNC, topology={"workers": 2}, fault={"s_max": 2}, run={"inner_steps_total": 40})
    for step_s, late in (
        (4.0, True),
        (2.2, False),
    ):  # 4 and about 2 commits of the other in each of its rounds
        cluster = Cluster(slow)
        cluster.workers[1].step_s = step_s
        cluster.run()
        require_sound(cluster)
        assert (cluster.coordinator.rejections["late"] > 3) == late
        found = {round(r["weights"][0], 6) for r in cluster.disk.commits()}
        assert found <= {round((1.0 + s) ** -0.5, 6) for s in (0, 1, 2)}
        assert late or round(3**-0.5, 6) in found
        assert all(w.finished for w in cluster.workers)


def test_an_asynchronous_worker_waits_for_the_answer_to_its_own_round() -> None:
    """A newer value that answers another round, as a repeated message may, is not taken for the answer."""
    c = merged(ASYNC, topology={"workers": 1})
    quiet = Cluster(c, flavours=(0,)).run()
    cluster = Cluster(c, flavours=(0,), weather=Weather(delay_s=(1.0, 2.0)))
    worker, given = cluster.workers[0], 0

    def foreign() -> None:
        nonlocal given
        for slot in worker.replica.slots:
            if (
                slot.flight is not None
                and not slot.flight.outcome
                and not slot.jobs
                and slot.shard is not None
            ):
                value, version = torch.zeros_like(slot.shard.params), slot.version + 5
                framed = downlink.value_frame(value, slot.index, version, worker.replica.run_hash)
                message = Commit(slot.index, version, ((0, 1.0),), (), frame.digest(value), ((0, framed),))
                cluster.sim.deliver(worker.name, Received(COORDINATOR, message))
                given += 1

    for at in range(10, 60):
        cluster.sim.at(at / 2, foreign)
    cluster.run()
    assert given > 3
    assert same(result(cluster), result(quiet))


def test_asynchronous_workers_never_wait_for_each_other() -> None:
    """A worker ten times slower does not hold the fast one."""
    c = merged(ASYNC, topology={"workers": 2})
    cluster = Cluster(c)
    cluster.workers[1].step_s = 10.0
    fast = cluster.workers[0]
    cluster.sim.run(100.0, lambda: fast.finished)
    assert cluster.sim.now < STEPS + 5.0


# ---- uneven speeds ----


def test_dylu_gives_the_published_steps() -> None:
    """Speeds 1, .6, .25 with H=50 make 50, 30 and 12; nobody makes none, and an unknown speed is no slowness."""
    assert local_steps(50, [1.0, 0.6, 0.25]) == [50, 30, 12]
    assert local_steps(50, [1.0, 0.001, 0.0, math.nan]) == [50, 1, 50, 50]


@given(st.integers(1, 300), st.floats(1e-3, 1e3), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_i11_equal_speeds_make_equal_steps(H: int, speed: float, workers: int) -> None:
    """H_m = H."""
    assert local_steps(H, [speed] * workers) == [H] * workers


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_slower_worker_reaches_every_deadline_in_its_own_number_of_steps(
    H: int, pace: int, cycle: int
) -> None:
    """From a multiple of H, `pace` steps lead exactly to the next one, each of them forward."""
    pace = min(pace, H)
    step = cycle * H
    for _ in range(pace):
        following = next_step(step, H, pace)
        assert following > step
        step = following
    assert step == (cycle + 1) * H


def steps_of_commits(cluster: Cluster) -> list[list[int]]:
    return [
        [frame.unpack(blob)[0].steps for blob in blobs]
        for record, blobs in cluster.disk.records
        if record["type"] == "commit" and record["fragment"] == 0
    ]


def with_speeds(c: RunConfig, speeds: tuple[float, ...], **kwargs: Any) -> Cluster:
    cluster = Cluster(c, flavours=tuple(range(len(speeds))), **kwargs)
    for worker, speed in zip(cluster.workers, speeds, strict=True):
        worker.step_s = 1.0 / speed
        worker.replica.progress = Progress(steps_per_s=speed)
    return cluster


@pytest.mark.parametrize("mode", ["inner", "none", "delayed", "eager", "async"])
def test_slower_workers_do_fewer_steps_and_meet_the_same_deadline(mode: str) -> None:
    """After the first commit each makes its share of H steps a round, and the run no longer waits for the slowest."""
    down = {"codec": {"down": "relay"}} if mode == "eager" else {}
    base: dict[str, dict[str, Any]] = {
        "stream": {"overlap": mode, "H": 10, "tau": 1},
        "run": {"inner_steps_total": 60},
        **down,
    }
    base["fault"] = {"s_max": 9} if mode == "async" else {}
    plain = with_speeds(config(**base, topology={"workers": 3}), (1.0, 0.5, 0.25)).run()
    c = config(**base, topology={"workers": 3}, weights={"dylu": True})
    cluster = with_speeds(c, (1.0, 0.5, 0.25)).run()
    require_sound(cluster)
    assert all(w.finished for w in cluster.workers)
    if mode != "async":
        assert [10, 5, 2] in steps_of_commits(cluster)
        require_equal_ends(cluster)
    assert cluster.sim.now < 0.7 * plain.sim.now
    assert cluster.workers[2].trained < 60 * 0.55


@pytest.mark.parametrize("speed", [1.0, 0.4])
def test_i11_equal_speeds_change_no_bit(speed: float) -> None:
    """DyLU among equals is the run without it."""
    plain = with_speeds(config(), (speed, speed)).run()
    assert same(result(with_speeds(config(weights={"dylu": True}), (speed, speed)).run()), result(plain))


# ---- fragments in flight ----


def test_several_fragments_are_in_flight_at_once() -> None:
    """tau above floor(H / P): rounds overlap, timing still changes no bit."""
    c = config(stream={"tau": 4})
    most = 0

    def look(worker: ToyWorker, step: int) -> None:
        nonlocal most
        most = max(most, sum(s.flight is not None for s in worker.replica.slots))

    quiet = watch(Cluster(c), look).run()
    assert most >= 3
    assert same(result(Cluster(c, seed=4, weather=SLOW).run()), result(quiet))


def test_each_worker_may_have_its_own_tau() -> None:
    """One merges after 1 step, the other after 4: both are let in, and end with the same bits in any weather."""
    near, far = config(stream={"tau": 1}), config(stream={"tau": 4})
    found = []
    for seed, weather in ((0, None), (3, SLOW)):
        cluster = Cluster(near, seed=seed, weather=weather, flavours=(0,))
        cluster.workers.append(ToyWorker(cluster.sim, "w1", far, flavour=1, nonce=101))
        cluster.run()
        require_sound(cluster)
        require_equal_ends(cluster)
        assert all(len(r["indices"]) == 2 for r in cluster.disk.commits())
        found.append(result(cluster))
    assert same(found[0], found[1])
    assert not same(found[0], result(Cluster(near).run()))


@pytest.mark.parametrize("overlap", ["inner", "delayed", "async"])
def test_a_full_first_round_has_all_its_steps(overlap: str) -> None:
    """first_round=full skips the short rounds at the start: each fragment's first round has H steps and its offset."""
    c = config(
        stream={"overlap": overlap, "first_round": "full"},
        fault={"s_max": 9} if overlap == "async" else {},
    )
    cluster = Cluster(c).run()
    steps: dict[int, list[int]] = {}
    for record, blobs in cluster.disk.records:
        if record["type"] == "commit":
            steps.setdefault(record["fragment"], []).append(frame.unpack(blobs[0])[0].steps)
    assert {p: told[0] for p, told in steps.items()} == {p: H + p for p in range(4)}


# ---- checkpoints ----


SAVED = {**MODES, "async": ASYNC}


@pytest.mark.parametrize("cut", [5, 6, 9, 11, 14])
@pytest.mark.parametrize("mode", SAVED)
def test_a_worker_continues_from_its_checkpoint_bit_for_bit(mode: str, cut: int) -> None:
    """Saved before step `cut`, killed there, continued in a fresh object: one of two workers, the same run.

    The same life goes on: with a new one the coordinator would let the other worker commit alone meanwhile.
    """
    c = merged(SAVED[mode], topology={"workers": 1 if mode == "async" else 2})
    flavours = (0,) if mode == "async" else (0, 1)
    expected = Cluster(c, flavours=flavours).run()
    cluster = Cluster(c, flavours=flavours)
    old = cluster.workers[-1]

    def step(number: int) -> None:
        if number == cut and old.alive:
            saved, model = old.replica.state_dict(), {n: t.clone() for n, t in old.model.tensors.items()}
            old.kill()

            def restart() -> None:
                new = ToyWorker(cluster.sim, old.name, c, flavour=flavours[-1], nonce=100 + len(flavours) - 1)
                new.replica.load_state_dict(saved)
                new.model.tensors.update(model)
                cluster.workers[-1] = new

            cluster.sim.at(0.0, restart)
        ToyModel.train_step(old.model, number)

    old.model.train_step = step  # type: ignore[method-assign, assignment]
    cluster.run()
    assert cluster.workers[-1] is not old
    require_sound(cluster)
    assert same(result(cluster), result(expected))


@pytest.mark.parametrize("mode", ["delayed", "eager", "eager, mean requantised"])
def test_a_worker_that_is_interrupted_at_a_boundary_continues_bit_for_bit(mode: str) -> None:
    """The round that has ended waits for the one before; saved just then, it leaves in the next life of the process."""
    c = merged(MODES[mode])
    expected = Cluster(c).run()
    cluster = Cluster(c, weather=Weather(delay_s=(2.0, 7.0)))
    old = cluster.workers[-1]
    advance_old = cluster.sim.after[old.name]
    held: list[int] = []

    def advance_or_stop() -> None:
        waiting = [s.index for s in old.replica.slots if s.turn is not None]
        if not (waiting and old.replica.blocked and old.alive):
            advance_old()
            return
        held.extend(waiting)
        saved, model = old.replica.state_dict(), {n: t.clone() for n, t in old.model.tensors.items()}
        old.kill()
        new = ToyWorker(cluster.sim, old.name, c, flavour=1, nonce=101)
        new.replica.load_state_dict(saved)
        new.model.tensors.update(model)
        cluster.workers[-1] = new

    cluster.sim.after[old.name] = advance_or_stop
    cluster.run()
    assert held and cluster.workers[-1] is not old
    require_sound(cluster)
    assert same(result(cluster), result(expected))
