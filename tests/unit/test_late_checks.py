"""Which settings go with `fault.late`, and what every node of a run must share of it."""

from __future__ import annotations

import pytest

from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.settings import difference, settings_json


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["fault.late=isolate", "stream.overlap=eager"], "fault.late = 'isolate' cannot be combined"),
        (["fault.late=rollback", "stream.overlap=delayed"], "fault.late = 'rollback' cannot be combined"),
        (["fault.late=carry", "robust.kind=clip_median"], "robust.kind = 'clip_median' cannot be combined"),
        (["fault.late=discount", "weights.normalize=steps"], "weights.normalize = 'steps' cannot be"),
        (["fault.late=discount", "weights.merge=rda"], "weights.merge = 'rda' cannot be combined"),
        (["fault.late=carry", "fault.s_max=0"], "fault.s_max = 0 accepts nothing late"),
        (["fault.late=carry", "topology.kind=replicated"], "would be lost with it"),
        (["fault.late=isolate", "fault.s_max=3"], "fault.s_max = 3 has an effect with"),
        (["fault.late=carry", "weights.staleness_pow=1.0"], "weights.staleness_pow = 1.0 has an effect with"),
        (["codec.ef=on", "codec.ef_recover=true", "fault.late=isolate"], "codec.ef_recover = True cannot be"),
        (["codec.ef=on", "codec.ef_recover=true", "fault.late=rollback"], "which gives the work up"),
        (
            ["codec.ef=on", "codec.ef_recover=true", "stream.overlap=eager"],
            "stream.overlap = 'eager', in which",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_reason(overrides: list[str], said: str) -> None:
    """Key, value, and what to use instead."""
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_toml("", overrides)


@pytest.mark.parametrize("policy", ["skip", "isolate", "carry", "discount", "rollback"])
@pytest.mark.parametrize("down", ["relay", "mean_q", "q4_ef", "g_fp32", "g_bf16"])
def test_every_policy_goes_with_every_downlink(policy: str, down: str) -> None:
    """Also the default one, in which workers repeat the outer step."""
    assert RunConfig.from_toml("", [f"fault.late={policy}", f"codec.down={down}"]).fault.late == policy


@pytest.mark.parametrize(
    ("run", "worker", "said"),
    [
        ([], ["fault.late=isolate"], "fault.late = 'isolate' on the worker and 'skip' in the run"),
        (["fault.late=carry"], ["fault.late=carry", "fault.rebase=false"], "fault.rebase = False"),
        (["fault.late=discount"], ["fault.late=discount", "fault.s_max=4"], "fault.s_max = 4"),
    ],
)
def test_a_worker_with_another_policy_is_told_so(run: list[str], worker: list[str], said: str) -> None:
    """Whatever decides what the nodes compute must be the same on all of them."""
    ours, theirs = (settings_json(RunConfig.from_toml("", given)) for given in (run, worker))
    found = difference(ours, theirs)
    assert found is not None and said in found


def test_patience_is_each_nodes_own_affair() -> None:
    """Time-outs and grace change nothing that another node computes."""
    other = settings_json(
        RunConfig.from_toml("", ["fault.gamma=0.5", "fault.dead_s=90.0", "fault.rebase=false"])
    )
    assert difference(settings_json(RunConfig()), other) is None
