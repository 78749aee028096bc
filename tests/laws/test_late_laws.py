"""The arithmetic of contributions that come late: weights, the way to a newer value, and what error feedback keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diloco.aggregate import MODES, weights
from diloco.comms import downlink, frame
from diloco.comms.codec import ErrorFeedback, get
from diloco.delta import rebase
from diloco.late import rebase_mean, shares, tracks_bases
from diloco.outer import Nesterov, OuterShard

torch.set_num_threads(1)

parts = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 9), st.integers(0, 3)),
    min_size=1,
    max_size=6,
)


def shared(
    policy: str, mode: str, found: list[tuple[int, int, int, int]], staleness: list[int], power: float = 0.5
) -> list[float]:
    return shares(
        policy,
        mode,
        [t for t, _, _, _ in found],
        steps=[s for _, s, _, _ in found],
        shards=[n for _, _, n, _ in found],
        staleness=staleness,
        staleness_pow=power,
    )


@given(found=parts, mode=st.sampled_from(MODES), policy=st.sampled_from(["skip", "carry", "discount"]))
def test_in_time_all_policies_weigh_as_the_mode_does(
    found: list[tuple[int, int, int, int]], mode: str, policy: str
) -> None:
    """Without a late one the shares are those of `weights`, bit for bit."""
    plain = weights(mode, [t for t, *_ in found], steps=[f[1] for f in found], shards=[f[2] for f in found])
    assert shared(policy, mode, found, [0] * len(found)) == plain


@given(found=parts, mode=st.sampled_from(MODES), policy=st.sampled_from(["carry", "discount"]))
def test_shares_sum_to_one(found: list[tuple[int, int, int, int]], mode: str, policy: str) -> None:
    """Renormalised over what is accepted, also where nothing is in time or nobody has tokens."""
    got = shared(policy, mode, found, [f[3] for f in found])
    assert sum(got) == pytest.approx(1.0, abs=1e-12) and min(got) >= 0.0


@given(found=parts, mode=st.sampled_from(MODES), power=st.floats(0, 2))
def test_a_discounted_share_is_its_own_times_the_staleness_weight(
    found: list[tuple[int, int, int, int]], mode: str, power: float
) -> None:
    """Of any two, the ratio is w_i (1 + s_i)^-power to w_j (1 + s_j)^-power."""
    staleness = [f[3] for f in found]
    plain = shared("discount", mode, found, [0] * len(found))
    sizes = [w * (1 + s) ** -power for w, s in zip(plain, staleness, strict=True)]
    assert shared("discount", mode, found, staleness, power) == pytest.approx(
        [size / sum(sizes) for size in sizes], rel=1e-9
    )


def test_a_carried_share_is_its_tokens() -> None:
    """Half the tokens of those in time: half their weight, in every mode that weighs those alike; staleness is free."""
    found = [(100, 10, 7, 0), (100, 10, 7, 0), (50, 10, 7, 1)]
    for mode in MODES:
        assert shared("carry", mode, found, [0, 0, 2]) == pytest.approx([0.4, 0.4, 0.2], rel=1e-12)
    assert shared("carry", "shard", [(100, 1, 3, 0), (100, 1, 1, 0), (200, 1, 9, 1)], [0, 0, 1]) == (
        pytest.approx([0.375, 0.125, 0.5], rel=1e-12)
    )
    assert shared("carry", "uniform", [(0, 1, 1, 0), (0, 1, 1, 0), (5, 1, 1, 1)], [0, 0, 1]) == (
        pytest.approx([1 / 3] * 3, rel=1e-12)
    )


def test_the_mean_is_rebased_as_each_late_update_would_be() -> None:
    """sum w D' with D' = D + (G_now - G_base), from values one and two commits old; then every base is a commit older."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(50, generator=generator) for _ in range(3)]  # two commits ago, one, now
    deltas = [torch.randn(50, generator=generator) for _ in range(3)]
    state = {"base.1": values[1].clone(), "base.2": values[0].clone(), "momentum": torch.zeros(50)}
    assert tracks_bases(state) and not tracks_bases({"momentum": torch.zeros(1)})
    w = [0.5, 0.3, 0.2]
    mean = torch.stack([x * d for x, d in zip(w, deltas, strict=True)]).sum(0)
    rebase_mean(mean, [(w[1], 1), (w[2], 2)], values[2], state)
    expected = (
        w[0] * deltas[0]
        + w[1] * rebase(deltas[1], values[1], values[2])
        + w[2] * rebase(deltas[2], values[0], values[2])
    )
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(state["base.1"], values[2]) and torch.equal(state["base.2"], values[1])


@pytest.mark.parametrize("mode", ["relay", "g_fp32", "mean_q"])
def test_a_worker_that_is_there_twice_is_taken_in_the_order_of_its_rounds(mode: str) -> None:
    """Whatever the order of the frames, the coordinator and a worker get the same bits, bases included."""
    codec, n = get("e3m0"), 40
    generator = torch.Generator().manual_seed(9)

    def framed(worker: int, number: int, base: int) -> bytes:
        values = torch.randn(n, generator=generator)
        return frame.encode_frame(
            codec,
            values,
            fragment=0,
            round=number,
            base_version=base,
            run_id=1,
            worker=worker,
            incarnation=1,
            steps=5,
            tokens=50,
        )

    def fresh() -> OuterShard:
        shard = OuterShard.start(Nesterov(0.7, 0.5), start)
        shard.state["base.1"] = torch.zeros(n)
        return shard

    start = torch.randn(n, generator=generator)
    ledger = downlink.Ledger.start(fresh(), mode, codec)
    worker = fresh() if mode == "relay" else OuterShard.start(Nesterov(0.7, 0.5), start)
    first = [downlink.Part(0, 1.0, framed(0, 1, 0))]
    second = [
        downlink.Part(0, 0.3, framed(0, 2, 1)),
        downlink.Part(1, 0.3, framed(1, 1, 0)),
        downlink.Part(1, 0.4, framed(1, 2, 1)),
    ]
    for parts in (first, second):
        frames = downlink.close(mode, ledger, parts, codec, fragment=0, run_id=1)
        weights_ = [(p.index, p.weight) for p in parts]
        downlink.open_commit(mode, worker, tuple(reversed(frames)), weights_, codec)
        worker.version = ledger.shard.version
        assert frame.digest(worker.params) == frame.digest(ledger.shard.params)
    if mode == "relay":
        assert all(torch.equal(worker.state[k], v) for k, v in ledger.shard.state.items())
        with pytest.raises(KeyError):
            downlink.open_commit(mode, worker, frames[:2], weights_, codec)


def test_recovered_work_is_kept_by_the_error_feedback_and_nothing_else_changes() -> None:
    """e_before + (1 - alpha) D after a rejection; never while a message is out."""
    feedback, generator = ErrorFeedback(get("e3m0"), 1.0), torch.Generator().manual_seed(2)
    first, late = torch.randn(300, generator=generator), torch.randn(300, generator=generator)
    feedback.encode(first)
    feedback.commit()
    assert feedback.residual is not None
    before = feedback.residual.clone()
    feedback.encode(late)
    with pytest.raises(RuntimeError, match="recover"):
        feedback.recover(late, 0.5)
    feedback.rollback()
    feedback.recover(late, 0.75)
    assert torch.equal(feedback.residual, before + late * 0.75)
    anew = ErrorFeedback(get("e3m0"), 1.0)
    anew.recover(late, 0.5)
    assert anew.residual is not None and torch.equal(anew.residual, late * 0.5)
