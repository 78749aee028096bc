"""What a replicated run cannot be combined with is refused with key, value and what to use."""

from __future__ import annotations

import pytest

from diloco.config import RunConfig
from diloco.errors import ConfigError

REPLICATED = "topology.kind=replicated"


@pytest.mark.parametrize("down", ["mean_q", "q4_ef", "g_fp32", "g_bf16"])
def test_other_ways_back_contradict_it(down: str) -> None:
    """Workers that step by themselves need the payloads; in a central run each of these ways is fine."""
    assert RunConfig.from_toml("", [f"codec.down={down}"]).topology.kind == "central"
    with pytest.raises(ConfigError, match=rf"codec\.down = '{down}' cannot be .* 'replicated'.* use 'relay'"):
        RunConfig.from_toml("", [REPLICATED, f"codec.down={down}"])


def test_asynchronous_commits_contradict_it() -> None:
    """Both reasons come in one message: nobody but the sender hears of its commit, and it brings the value."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_toml("", [REPLICATED, "stream.overlap=async", "codec.down=g_fp32"])
    assert "stream.overlap = 'async' cannot be combined with topology.kind" in str(caught.value)
    assert "codec.down = 'g_fp32'" in str(caught.value)


@pytest.mark.parametrize("overlap", ["none", "inner", "delay_corrected", "delayed", "eager"])
@pytest.mark.parametrize("robust", ["mean", "clip_median"])
def test_everything_else_goes_with_it(overlap: str, robust: str) -> None:
    """With the default way back, each overlap mode by rounds; robust rules wherever the mode bears them."""
    if (overlap, robust) == ("eager", "clip_median"):
        with pytest.raises(ConfigError, match=r"robust\.kind"):
            RunConfig.from_toml("", [REPLICATED, f"stream.overlap={overlap}", f"robust.kind={robust}"])
        return
    c = RunConfig.from_toml("", [REPLICATED, f"stream.overlap={overlap}", f"robust.kind={robust}"])
    assert (c.topology.kind, c.codec.down) == ("replicated", "relay")
