"""Settings that the chosen combination does not read: each is named when it was set, and only then."""

from __future__ import annotations

import pytest

from diloco.config import RunConfig, warnings

LONG = "run.inner_steps_total=100000"
EAGER, DELAYED = "stream.overlap=eager", "stream.overlap=delayed"
ASYNC = ["stream.overlap=async", "codec.down=g_fp32", "fault.s_max=9", "weights.dn_N=2"]
SPARSE = ["codec.up=topk", "outer.kind=sgd"]


def said(*overrides: str) -> list[str]:
    return [line for line in warnings(RunConfig.from_toml("", [LONG, *overrides])) if "no effect" in line]


@pytest.mark.parametrize(
    ("chosen", "item", "why"),
    [
        ([EAGER], "stream.tau=2", "stream.overlap = 'eager'"),
        ([EAGER], "stream.alpha=0.25", "stream.overlap = 'eager'"),
        ([DELAYED], "stream.tau=2", "stream.overlap = 'delayed'"),
        ([DELAYED], "stream.alpha=0.25", "stream.overlap = 'delayed'"),
        (ASYNC, "stream.tau=2", "stream.overlap = 'async'"),
        (ASYNC, "stream.alpha=0.25", "stream.overlap = 'async'"),
        (["stream.layout=single"], "stream.frag_layers=2", "stream.layout = 'single'"),
        (["outer.kind=sgd"], "outer.momentum=0.5", "outer.kind = 'sgd'"),
        (["outer.kind=adam"], "outer.momentum=0.5", "outer.kind = 'adam'"),
        (["outer.kind=gpa"], "outer.momentum=0.5", "outer.gpa_mu_x and outer.gpa_mu_y instead"),
        (["outer.kind=gpa"], "outer.lr=0.5", "outer.gpa_lr instead"),
        ([], "outer.gpa_lr=2.0", "outer.kind = 'nesterov'"),
        ([], "outer.gpa_mu_x=0.5", "outer.kind = 'nesterov'"),
        ([], "outer.gpa_mu_y=0.5", "outer.kind = 'nesterov'"),
        (["codec.up=fp32"], "codec.block=64", "the codec 'fp32', without blocks"),
        (["codec.up=fp16"], "codec.block=64", "the codec 'fp16', without blocks"),
        (["codec.up=bf16", "codec.roles.embed=stat"], "codec.block=64", "the codec 'bf16', 'stat', without"),
        ([], "codec.bits=2", "the codec 'e3m0'; it is for 'stat' and 'topk'"),
        ([], "codec.topk=32", "the codec 'e3m0'; it is for 'topk'"),
        (["codec.up=stat"], "codec.chunk=1024", "the codec 'stat'; it is for 'topk'"),
        ([], "codec.ef_beta=0.9", "codec.ef = 'off'"),
    ],
)
def test_a_key_that_is_not_read_is_named_with_what_makes_it_so(
    chosen: list[str], item: str, why: str
) -> None:
    """Key, value and reason; the same combination with the key left alone gives no such line."""
    assert said(*chosen) == []
    (line,) = said(*chosen, item)
    assert line.startswith(item.replace("=", " = ") + " has no effect with ") and why in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["stream.tau=2", "stream.alpha=0.25", "stream.frag_layers=2"],
        ["outer.kind=sgdm", "outer.momentum=0.5", "outer.lr=0.1"],
        [*ASYNC, "outer.momentum=0.5", "outer.lr=0.1"],
        ["outer.kind=sgd", "outer.lr=0.1", "outer.gradient_clip=1.0"],
        ["outer.kind=gpa", "outer.gpa_lr=2.0", "outer.gpa_mu_x=0.5", "outer.gpa_mu_y=0.5"],
        ["codec.block=64"],
        ["codec.up=fp32", "codec.roles.matrix=nf4", "codec.block=32"],
        ["codec.up=stat", "codec.bits=2", "codec.ef=on", "codec.ef_beta=0.9"],
        ["codec.roles.embed=topk", "codec.bits=4", "codec.topk=32", "codec.chunk=1024"],
    ],
)
def test_a_key_that_is_read_is_not_named(overrides: list[str]) -> None:
    """By the codec of a single role too."""
    assert said(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (SPARSE, ["codec.up = 'topk' with codec.ef = 'off' sends 64 of every 4096 values"]),
        ([*SPARSE, "codec.ef=on"], []),
        ([*SPARSE, "codec.ef=on", "codec.down=q4_ef"], []),
        ([*SPARSE, "codec.ef=on", "codec.down=mean_q"], ["codec.down = 'mean_q' keeps 64 of every 4096"]),
        (
            ["codec.roles.matrix=topk", "codec.down=mean_q"],
            ["codec.roles.matrix = 'topk' with codec.ef", "codec.roles.matrix = 'topk' with codec.down"],
        ),
    ],
)
def test_top_k_that_loses_most_of_the_update_is_warned_about(
    overrides: list[str], expected: list[str]
) -> None:
    """Without error feedback on the way up, or on the way down."""
    found = warnings(RunConfig.from_toml("", [LONG, *overrides]))
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))
