"""Overlap modes in the configuration: what goes with what, and what each refusal or warning says."""

from __future__ import annotations

import pytest

from diloco.config import RunConfig, warnings
from diloco.errors import ConfigError
from diloco.settings import difference, settings_json
from diloco.stream_checks import plan_warnings

EAGER = ["stream.overlap=eager"]
ASYNC = ["stream.overlap=async", "codec.down=g_fp32"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [*EAGER, "codec.down=g_fp32"],
            r"codec\.down = 'g_fp32' .* 'eager': workers need the averaged update",
        ),
        ([*EAGER, "codec.down=q4_ef"], r"use 'relay' or 'mean_q'"),
        ([*EAGER, "outer.kind=adam"], r"outer\.kind = 'adam' .* use 'nesterov' or 'sgd' or 'sgdm'"),
        (
            [*EAGER, "outer.gradient_clip=1.0"],
            r"outer\.gradient_clip = 1\.0 cannot be combined with .* 'eager': .* leave it unset",
        ),
        ([*EAGER, "weights.mode=tokens"], r"weights\.mode = 'tokens' cannot be combined"),
        ([*EAGER, "robust.kind=clip_median"], r"robust\.kind = 'clip_median' cannot be combined"),
        (
            [*EAGER, "stream.merge=delay_corrected"],
            r"stream\.merge = 'delay_corrected' needs stream\.overlap",
        ),
        (["stream.overlap=async"], r"codec\.down = 'relay' .* 'async': .* use 'g_fp32'"),
        ([*ASYNC, "weights.mode=tokens"], r"weights\.mode = 'tokens' .* 'async'"),
        (
            [*ASYNC, "weights.dn_N=4", "weights.dn_c=0.3"],
            r"weights\.dn_c = 0\.3 must lie between 0 and .* 0\.25",
        ),
        (
            [*ASYNC, "weights.dn_N=4", "outer.kind=sgdm"],
            r"delay the momentum of outer\.kind = 'nesterov', not",
        ),
        (["weights.dn_N=4"], r"weights\.dn_N has an effect with stream\.overlap = 'async' only"),
        (["fault.s_max=4"], r"fault\.s_max = 4 has an effect with stream\.overlap = 'async' or fault\.late"),
        (["weights.staleness_pow=1.0"], r"weights\.staleness_pow = 1\.0 has an effect"),
        (
            ["stream.compensate=0.5"],
            r"stream\.compensate = 0\.5 needs stream\.overlap = 'delayed' or 'async'",
        ),
    ],
)
def test_what_does_not_go_with_an_overlap_mode_is_refused(overrides: list[str], said: str) -> None:
    """Key, value, reason and what to use instead; nothing is ignored."""
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_toml("", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        EAGER,
        [*EAGER, "codec.down=mean_q", "weights.dylu=true"],
        [*ASYNC, "weights.dn_N=4", "weights.dn_c=0.25", "fault.s_max=8", "weights.staleness_pow=1.0"],
        ["stream.overlap=delayed", "stream.compensate=0.5"],
        [*ASYNC, "stream.compensate=0.5"],
        ["stream.overlap=delay_corrected", "stream.alpha=0.0"],
    ],
)
def test_every_overlap_mode_is_offered(overrides: list[str]) -> None:
    """With what it needs, and no more."""
    RunConfig.from_toml("", overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stream.overlap=delay_corrected"], "stream.alpha = 0.5 is ignored"),
        (["stream.merge=delay_corrected"], "stream.alpha = 0.5 is ignored"),
        ([*ASYNC, "topology.workers=4"], "fault.s_max = 1 with topology.workers = 4 rejects workers"),
        ([*ASYNC, "fault.s_max=9"], "moves too far: set weights.dn_N = topology.workers = 2"),
        (
            ["stream.overlap=delayed", "outer.momentum=0.4"],
            "outer.momentum = 0.4 with stream.overlap = 'delayed'",
        ),
        (["stream.pace=0.5", "stream.tau=0"], "stream.pace = 0.5 has no effect"),
        (["stream.pace=0.5", "stream.overlap=none"], "stream.pace = 0.5 has no effect"),
        (["stream.pace=0.5", "fault.fixed_grace_s=1"], "fault.fixed_grace_s = 1.0 must be longer"),
    ],
)
def test_overlap_settings_that_are_probably_not_meant_are_warned_about(
    overrides: list[str], said: str
) -> None:
    """They work, so they are not refused."""
    assert any(said in line for line in warnings(RunConfig.from_toml("", overrides)))


def test_several_fragments_in_flight_are_told_once_the_plan_is_known() -> None:
    """tau above floor(H / P) is allowed and said; up to it nothing is."""
    c = RunConfig.from_toml("", ["stream.tau=4"])
    assert plan_warnings(c, 7) == []
    assert "exceeds floor(H / fragments) = 3" in plan_warnings(c, 8)[0]
    assert plan_warnings(RunConfig.from_toml("", [*EAGER, "stream.tau=4"]), 8) == []


def test_tau_and_pace_are_each_workers_own_affair() -> None:
    """Two workers of one run may merge after different numbers of steps, and send at different rates; alpha they share."""
    ours = settings_json(RunConfig())
    assert difference(ours, settings_json(RunConfig.from_toml("", ["stream.tau=5"]))) is None
    assert difference(ours, settings_json(RunConfig.from_toml("", ["stream.pace=0.5"]))) is None
    assert difference(ours, settings_json(RunConfig.from_toml("", ["stream.alpha=0.2"]))) is not None
