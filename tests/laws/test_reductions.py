"""What the whole machinery reduces to in special cases: invariants I1-I6, I8 and I19 on a toy problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.comms import codec as codecs
from diloco.comms import downlink, frame
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from diloco.fragments import gather
from tests.toy import Cluster, ToyModel, ToyWorker, config, plan_of

torch.set_num_threads(1)

STEPS = 20
PLAIN = {"kind": "sgd", "lr": 1.0}
BLOCKING: dict[str, Any] = {"tau": 0, "alpha": 0.0}


def train(model: ToyModel, first: int, last: int) -> ToyModel:
    for step in range(first, last + 1):
        model.train_step(step)
    return model


def flat(c: RunConfig, tensors: dict[str, Tensor]) -> list[Tensor]:
    return [gather(f, tensors) for f in plan_of(c).fragments]


def result(cluster: Cluster) -> list[Tensor]:
    return [values for _, values in sorted(cluster.values().items())]


def require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def require_close(found: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < rtol


def test_i1_one_step_rounds_are_data_parallel_sgd() -> None:
    """H=1, outer SGD with lr 1, no overlap: the same as SGD on the mean gradient, to fp32 rounding."""
    c = config(stream={"H": 1, "layout": "single", **BLOCKING}, outer=PLAIN)
    models = [ToyModel(plan_of(c), flavour) for flavour in (0, 1)]
    for step in range(1, STEPS + 1):
        for model in models:
            model.train_step(step)
        for name in models[0].tensors:  # the mean of the new values is the step along the mean gradient
            mean = torch.stack([m.tensors[name].double() for m in models]).mean(0)
            for model in models:
                model.tensors[name].copy_(mean)
    require_close(result(Cluster(c).run()), flat(c, models[0].tensors), 1e-6)


def test_i2_one_fragment_without_overlap_is_diloco_bit_for_bit() -> None:
    """The textbook loop of 2311.08105, written out, gives the same bits as the protocol."""
    lr, mu, H = 0.7, 0.5, 5
    c = config(stream={"H": H, "layout": "single", **BLOCKING}, outer={"lr": lr, "momentum": mu})
    plan = plan_of(c)
    models = [ToyModel(plan, flavour) for flavour in (0, 1)]
    G = models[0].read(0)
    b = torch.zeros_like(G)
    for start in range(1, STEPS + 1, H):
        D = torch.zeros_like(G)
        for model in models:
            model.write(0, G)
            D += 0.5 * (G - train(model, start, start + H - 1).read(0))
        b = mu * b + D
        G = G - lr * (D + mu * b)
    require_same(result(Cluster(c).run()), [G])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("layout", ["single", "strided", "balanced"])
def test_i3_one_worker_with_plain_averaging_is_plain_training(layout: str, alpha: float) -> None:
    """M=1, outer SGD with lr 1 and tau 0: whatever the fragments, G is what training alone gives."""
    c = config(stream={"layout": layout, "tau": 0, "alpha": alpha}, outer=PLAIN, topology={"workers": 1})
    alone = train(ToyModel(plan_of(c), 0), 1, STEPS)
    require_close(result(Cluster(c, flavours=(0,)).run()), flat(c, alone.tensors), 1e-6)


@pytest.mark.parametrize("tau", [0, 1, 2, 4])
def test_i3_delay_correction_loses_no_step_for_any_overlap(tau: int) -> None:
    """M=1, lr 1, merge = delay_corrected: plain training again, for every tau."""
    c = config(stream={"tau": tau, "merge": "delay_corrected"}, outer=PLAIN, topology={"workers": 1})
    alone = train(ToyModel(plan_of(c), 0), 1, STEPS)
    require_close(result(Cluster(c, flavours=(0,)).run()), flat(c, alone.tensors), 1e-6)


def test_i4_alpha_one_leaves_workers_independent() -> None:
    """With alpha 1 nothing is taken in: until the final flush each worker has trained alone, bit for bit."""
    c = config(stream={"alpha": 1.0, "tau": 2})
    cluster = Cluster(c)
    last: dict[str, list[Tensor]] = {}
    for worker in cluster.workers:

        def look(step: int, model: ToyModel, name: str = worker.name) -> None:
            if step == STEPS:
                last[name] = flat(c, model.tensors)

        worker.poison = look
    cluster.run()
    for flavour, worker in enumerate(cluster.workers):
        alone = train(ToyModel(plan_of(c), flavour), 1, STEPS)
        require_same(last[worker.name], flat(c, alone.tensors))


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("overlap", [{"tau": 1, "alpha": 0.5}, BLOCKING])
def test_i5_identical_workers_equal_a_single_one(overlap: dict[str, Any], workers: int) -> None:
    """The mean of a power of two of equal updates is each of them: the same bits as one worker alone."""
    alone = Cluster(config(stream=overlap, topology={"workers": 1}), flavours=(1,)).run()
    together = Cluster(config(stream=overlap, topology={"workers": workers}), flavours=(1,) * workers).run()
    require_same(result(together), result(alone))


@pytest.mark.parametrize("down", ["relay", "mean_q", "q4_ef", "g_fp32", "g_bf16"])
@pytest.mark.parametrize("up", codecs.NAMES)
def test_i6_all_replicas_are_bit_identical(up: str, down: str) -> None:
    """Whatever is lost in coding, everyone applies what was sent: all digests agree, versions too."""
    c = config(
        codec={"up": up, "down": down, "topk": 4, "chunk": 16, "ef": "on" if up == "topk" else "off"},
        outer={"lr": 0.5, "momentum": 0.0 if up == "topk" else 0.5},
        topology={"workers": 3},
        run={"inner_steps_total": 12},
    )
    cluster = Cluster(c, flavours=(0, 1, 2)).run()
    assert cluster.coordinator.commits >= 8
    for worker in cluster.workers:
        assert worker.replica.digest() == cluster.coordinator.global_digest()
        assert worker.replica.versions() == cluster.coordinator.versions()
        if down != "g_bf16":  # what is trained on is what is committed
            require_same(flat(c, worker.model.tensors), result(cluster))


def test_i8_the_order_of_arrival_changes_no_bit() -> None:
    """Sums run by worker index: shuffled parts give the same mean, and weights sum to one."""
    coder = codecs.get("e3m0", block=16)
    generator = torch.Generator().manual_seed(3)
    parts = []
    for index, weight in enumerate((0.2, 0.5, 0.3)):
        values = torch.randn(50, generator=generator)
        label = {"fragment": 0, "round": 1, "base_version": 0, "run_id": 1, "incarnation": 1, "steps": 1}
        framed = frame.encode_frame(coder, values, **label, worker=index, tokens=1)
        parts.append(downlink.Part(index, weight, framed))
    expected = downlink.weighted_mean(parts, 50, coder)
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        assert torch.equal(downlink.weighted_mean([parts[i] for i in order], 50, coder), expected)


def test_i8_who_arrives_first_changes_no_bit() -> None:
    """The same on whole runs: any worker may be the slow one."""
    c = config(topology={"workers": 3}, weights={"mode": "tokens"})
    expected = result(Cluster(c, flavours=(0, 1, 2)).run())
    for slow in range(3):
        cluster = Cluster(c, seed=slow, flavours=(0, 1, 2))
        cluster.workers[slow].step_s = 1.9
        require_same(result(cluster.run()), expected)
        for record in cluster.disk.commits():
            assert sum(record["weights"]) == pytest.approx(1.0, abs=1e-12)


MODES: dict[str, dict[str, Any]] = {
    "g_fp32": {"codec": {"down": "g_fp32"}},
    "relay with feedback": {"codec": {"up": "e3m0", "down": "relay", "ef": "on"}},
    "q4_ef": {"codec": {"up": "e3m0", "down": "q4_ef", "ef": "on"}, "stream": {"tau": 2}},
    "delay corrected": {"codec": {"down": "mean_q"}, "stream": {"tau": 3, "merge": "delay_corrected"}},
}


@pytest.mark.parametrize("later", [0, 2])
@pytest.mark.parametrize("delay", [(0.01, 0.05), (0.5, 1.8)])
@pytest.mark.parametrize("mode", MODES)
def test_i19_a_worker_continues_from_its_checkpoint_bit_for_bit(
    mode: str, delay: tuple[float, float], later: int
) -> None:
    """Saved before any step, killed there or two steps later, and started again as a new process: the same run."""
    c = config(**MODES[mode], topology={"workers": 1})
    weather = Weather(delay_s=delay)
    expected = result(Cluster(c, weather=weather, flavours=(0,)).run())
    # A process that has done no step yet is a newcomer: it starts where the run is by then.
    for cut in range(2 if later else 1, STEPS + 1 - later):
        cluster = Cluster(c, weather=weather, flavours=(0,))
        old = cluster.workers[0]
        saved: dict[str, Any] = {}

        def restart(cluster: Cluster = cluster, saved: dict[str, Any] = saved) -> None:
            cluster.workers[0].kill()
            new = ToyWorker(cluster.sim, "w0", c, flavour=0, nonce=77)
            new.replica.load_state_dict(saved["replica"])
            new.model.tensors.update({n: t.clone() for n, t in saved["model"].items()})
            cluster.workers[0] = new

        def step(
            number: int,
            cut: int = cut,
            model: ToyModel = old.model,
            old: ToyWorker = old,
            saved: dict[str, Any] = saved,
            cluster: Cluster = cluster,
            restart: Any = restart,
        ) -> None:
            if number == cut:
                saved["replica"] = old.replica.state_dict()
                saved["model"] = {n: t.clone() for n, t in model.tensors.items()}
            if number == cut + later:
                cluster.sim.at(0.0, restart)
                old.kill()
            ToyModel.train_step(model, number)

        old.model.train_step = step  # type: ignore[method-assign, assignment]
        cluster.run()
        assert cluster.workers[0].replica.incarnation == 2
        require_same(result(cluster), expected)
