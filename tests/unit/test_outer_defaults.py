"""Outer settings that nobody gave: those that the run's merges bear, and never half of what somebody did give."""

from __future__ import annotations

import pytest

from diloco.config import RunConfig, Stream, warnings


def outer_of(*overrides: str) -> tuple[float, float]:
    c = RunConfig.from_toml("", list(overrides))
    return c.outer.lr, c.outer.momentum


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (0.4, 0.9)),
        (("stream.tau=5",), (0.4, 0.9)),
        (("stream.overlap=async", "codec.down=g_fp32"), (0.4, 0.9)),
        (("stream.alpha=0",), (0.8, 0.4)),
        (("stream.overlap=none",), (0.8, 0.4)),
        (("stream.overlap=eager",), (0.8, 0.4)),
        (("stream.overlap=delay_corrected",), (0.8, 0.4)),
        (("stream.merge=delay_corrected",), (0.8, 0.4)),
        (("outer.kind=sgdm", "stream.overlap=none"), (0.8, 0.4)),
        (("stream.overlap=delayed",), (0.8, 0.0)),
    ],
)
def test_settings_that_nobody_gave_are_those_that_the_merges_bear(
    overrides: tuple[str, ...], expected: tuple[float, float]
) -> None:
    """Gain 4 where a share of the local work is kept, about 1.3 where none is."""
    assert outer_of(*overrides) == expected


def test_who_gives_one_of_the_two_gets_the_documented_other() -> None:
    """A momentum of 0.9 with an lr of 0.8 would be a gain of 8."""
    assert outer_of("stream.overlap=none", "outer.momentum=0.9") == (0.4, 0.9)
    assert outer_of("stream.overlap=none", "outer.lr=0.3") == (0.3, 0.9)


def test_other_outer_optimizers_keep_their_lr() -> None:
    """An lr of SGD without momentum is chosen by whoever chooses SGD."""
    assert outer_of("stream.overlap=none", "outer.kind=sgd") == (0.4, 0.9)


def test_a_configuration_made_of_sections_is_taken_as_it_is() -> None:
    """Python callers who build sections themselves decide themselves."""
    c = RunConfig(stream=Stream(overlap="none", tau=0, alpha=0.0))
    assert (c.outer.lr, c.outer.momentum) == (0.4, 0.9)


def test_the_chosen_settings_survive_being_written_and_read() -> None:
    """A worker that gets the run's configuration from the coordinator has the same one."""
    c = RunConfig.from_toml("", ["stream.overlap=none"])
    assert RunConfig.from_dict(c.model_dump(mode="json")) == c


@pytest.mark.parametrize("mode", ["none", "delayed", "eager", "delay_corrected"])
def test_the_chosen_settings_are_not_warned_about(mode: str) -> None:
    """Silence about what the program itself chose."""
    found = warnings(RunConfig.from_toml("", [f"stream.overlap={mode}"]))
    assert not [line for line in found if line.startswith("outer.")]
