"""The fused requantised step of a coordinator says and leaves the same bits as one operation after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco import outer
from diloco.comms import codec as codecs
from diloco.comms import downlink, frame
from diloco.comms.feedback import ErrorFeedback
from diloco.comms.frame import COORDINATOR
from diloco.comms.requantise import requantised
from diloco.comms.scratch import scratch
from diloco.errors import NonFiniteError

RULES: tuple[Callable[[], outer.OuterOptimizer], ...] = (
    lambda: outer.Sgd(0.7),
    lambda: outer.SgdM(0.5, 0.9),
    lambda: outer.Nesterov(0.4, 0.9),
    lambda: outer.Gpa(1.25, 0.4, 0.9),
)
CODECS: tuple[dict[str, int | bool | str], ...] = (
    {"name": "e3m0"},
    {"name": "int4"},
    {"name": "int8"},
    {"name": "nf4"},
    {"name": "e2m1", "stochastic": True},
    {"name": "stat", "bits": 2},
    {"name": "topk"},
    {"name": "bf16"},
)


def step_by_step(
    shard: outer.OuterShard, mean: Tensor, feedback: ErrorFeedback, key: tuple[int, ...]
) -> bytes:
    """The definition."""
    update = shard.optimizer.update(shard.params, mean, shard.state)
    payload = feedback.encode(update, key)
    feedback.commit()
    shard.subtract(feedback.codec.decode(payload, mean.numel()))
    return payload


@pytest.mark.parametrize("options", CODECS, ids=lambda o: str(o["name"]))
@pytest.mark.parametrize("rule", range(len(RULES)))
@settings(max_examples=8, deadline=None)
@given(n=st.sampled_from((1, 63, 256, 257, 4096, 5000)), seed=st.integers(0, 99))
def test_one_pass_gives_the_bits_of_the_definition(
    options: dict[str, int | bool | str], rule: int, n: int, seed: int
) -> None:
    """Payload, parameters, state and residual, round after round."""
    rest = {k: v for k, v in options.items() if k != "name"}
    codec = codecs.get(str(options["name"]), **rest)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, generator=generator)
    one, two = (outer.OuterShard.start(RULES[rule](), start) for _ in range(2))
    fused, plain = ErrorFeedback(codec, 1.0), ErrorFeedback(codec, 1.0)
    for number in range(3):
        mean = torch.randn(n, generator=generator) * 0.01
        key = (7, COORDINATOR, 0, number)
        payload = requantised(one, mean.clone(), fused, key)
        assert payload is not None
        assert payload == step_by_step(two, mean.clone(), plain, key)
        assert one.version == two.version
        assert fused.residual is not None and plain.residual is not None
        pairs = [(one.params, two.params), (fused.residual, plain.residual)]
        pairs += [(one.state[name], two.state[name]) for name in two.state]
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def test_an_optimizer_without_such_a_kernel_is_left_to_the_definition() -> None:
    """And nothing has happened to it."""
    shard = outer.OuterShard.start(outer.Adam(), torch.ones(8))
    feedback = ErrorFeedback(codecs.get("e3m0"), 1.0)
    assert requantised(shard, torch.ones(8), feedback, (1, 2, 3, 4)) is None
    assert shard.version == 0 and feedback.residual is None and torch.equal(shard.params, torch.ones(8))


def test_a_step_that_overflows_is_an_error_and_no_frame() -> None:
    """Nobody may apply infinity."""
    shard = outer.OuterShard.start(outer.Sgd(1e30), torch.zeros(300))
    with pytest.raises(NonFiniteError, match="overflows fp32"):
        requantised(shard, torch.full((300,), 1e30), ErrorFeedback(codecs.get("e3m0"), 1.0), (1, 2, 3, 4))


def test_rounds_of_fragments_of_different_sizes_share_memory_and_no_values() -> None:
    """What one round leaves in the shared memory is in no other round's result."""
    codec, label = (
        codecs.get("e3m0"),
        {"base_version": 0, "run_id": 1, "incarnation": 1, "steps": 1, "tokens": 1},
    )

    def rounds(sizes: tuple[int, ...]) -> list[Tensor]:
        found = []
        for fragment, n in enumerate(sizes):
            generator = torch.Generator().manual_seed(n)
            framed = frame.encode_frame(
                codec, torch.randn(n, generator=generator), fragment=fragment, round=0, worker=0, **label
            )
            shard = outer.OuterShard.start(outer.Nesterov(), torch.zeros(n))
            ledger = downlink.Ledger.start(shard, "relay", codec)
            downlink.close(
                "relay", ledger, [downlink.Part(0, 1.0, framed)], codec, fragment=fragment, run_id=1
            )
            found.append(shard.params)
        return found

    together = rounds((5000, 300, 7000))
    for n, values in zip((5000, 300, 7000), together, strict=True):
        assert torch.equal(rounds((n,))[0], values)
    assert scratch(10).data_ptr() == scratch(7000).data_ptr()
