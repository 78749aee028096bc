"""One run's configuration: strict keys, overrides, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from diloco.config import RunConfig, warnings
from diloco.errors import ConfigError
from diloco.settings import difference, settings_json


def test_an_empty_file_gives_the_published_defaults() -> None:
    """H=30, tau=1, alpha=.5, Nesterov .4/.9, E3M0 in blocks of its own, relay, no outer clipping."""
    c = RunConfig.from_toml("")
    assert (c.stream.H, c.stream.tau, c.stream.alpha) == (30, 1, 0.5)
    assert (c.outer.kind, c.outer.lr, c.outer.momentum) == ("nesterov", 0.4, 0.9)
    assert (c.codec.up, c.codec.block, c.codec.bits, c.codec.down) == ("e3m0", None, None, "relay")
    assert c.outer.gradient_clip is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[outer]\nlrr = 1.0", r"'outer\.lrr'; did you mean 'lr'\?"),
        ("[stream]\nfrag_layer = 3", r"did you mean 'frag_layers'\?"),
        ("[streem]\nH = 3", r"unknown configuration key 'streem'; did you mean 'stream'\?"),
        ("[outer]\nqqqqqqqq = 1", r"unknown configuration key 'outer\.qqqqqqqq'$"),
        ("[stream]\noverlap = 'iner'", r"stream\.overlap = 'iner'.*; did you mean 'inner'\?"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_known_one(text: str, said: str) -> None:
    """A typing error is an error, with a hint where one is near."""
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_toml(text)


def test_overrides_win_and_are_read_as_toml_or_words() -> None:
    """Numbers, booleans, lists and bare words, as people type them on a command line."""
    c = RunConfig.from_toml(
        "[stream]\nH = 50",
        [
            "stream.H=100",
            "outer.kind=sgd",
            "topology.fsync=false",
            "optim.betas=[0.9, 0.99]",
            "run.run_id=a-b",
        ],
    )
    assert (c.stream.H, c.outer.kind, c.topology.fsync, c.optim.betas) == (100, "sgd", False, (0.9, 0.99))
    assert c.run.run_id == "a-b"


@pytest.mark.parametrize("item", ["stream.H", "H=3", "a.b.c=3", "=3"])
def test_an_override_of_another_form_is_refused(item: str) -> None:
    """The form and an example are said."""
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        RunConfig.from_toml("", [item])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stream.H=5", "stream.tau=5"], r"stream\.tau = 5 must be smaller than stream\.H = 5"),
        (["fault.quorum=3"], r"fault\.quorum = 3 can never be met by topology\.workers = 2"),
        (["fault.suspect_s=1.0"], r"fault\.suspect_s = 1\.0 must exceed fault\.heartbeat_s"),
        (["fault.dead_s=5.0"], r"fault\.dead_s = 5\.0 must exceed fault\.suspect_s"),
        (["codec.block=100"], r"codec\.block = 100 must be a power of two"),
        (["codec.bits=3"], r"codec\.bits = 3: .* 2, 4 or 8"),
        (["outer.gradient_clip=0.0"], r"outer\.gradient_clip = 0\.0"),
        (["codec.topk=63"], r"codec\.topk = 63 must be even"),
        (["stream.alpha=1.5"], r"stream\.alpha = 1\.5"),
        (["stream.alpha=-0.1"], r"stream\.alpha = -0\.1"),
        (["outer.momentum=1.0"], r"outer\.momentum = 1\.0"),
        (["outer.lr=nan"], r"outer\.lr = nan"),
        (["run.run_id='a/b'"], r"run\.run_id = 'a/b'"),
        (["stream.H='30'"], r"stream\.H = '30'"),
        (["robust.kind=coord_median", "codec.up=topk"], r"robust\.kind = 'coord_median' needs every value"),
        (["robust.kind=trimmed", "robust.trim=2", "topology.workers=4"], r"robust\.trim = 2 at both ends"),
        (
            ["robust.kind=centered_clip", "weights.merge=rda"],
            r"weights\.merge = 'rda' cannot be combined with robust\.kind = 'centered_clip'",
        ),
        (["robust.rho=-1.0"], r"robust\.rho.* = -1\.0"),
        (["codec.up=int9"], r"codec\.up = 'int9' is no codec; did you mean 'int8'"),
        (["codec.roles.embed=int9"], r"codec\.roles\.embed = 'int9' is no codec"),
        (["codec.block=131072"], r"codec\.block = 131072 must be a power of two from 2 to 65536"),
        (["codec.up=topk", "codec.chunk=32"], r"codec\.topk = 64 keeps more than the codec\.chunk = 32"),
        (["codec.up=topk", "codec.chunk=48"], r"codec\.chunk = 48 must be a power of two"),
        (["codec.stochastic=true", "codec.up=bf16"], r"codec\.up = 'bf16', which has no stochastic rounding"),
        (["codec.stochastic=true", "codec.up=fp32"], r"codec\.up = 'fp32', which has no stochastic rounding"),
        (
            ["codec.stochastic=true", "codec.roles.head=stat"],
            r"codec\.roles\.head = 'stat', which has no stochastic rounding: use one of int8",
        ),
        (
            ["codec.groups=tensor"],
            r"codec\.groups = 'tensor' has an effect with the codecs 'stat' and 'topk' only",
        ),
        (["codec.groups=row", "codec.up=topk"], r"codec\.groups = 'row' is for the codec 'stat'"),
        (
            ["codec.roles.matrix=topk", "robust.kind=trimmed"],
            r"robust\.kind = 'trimmed' needs every value of a contribution and codec\.roles\.matrix = 'topk'",
        ),
        (["codec.roles.embd=int8"], r"unknown configuration key 'codec\.roles\.embd'; did you mean 'embed'"),
        (["codec.roles.embed.x=1"], "section.key=value"),
        (["stream.H=0"], r"stream\.H = 0"),
    ],
)
def test_what_cannot_work_is_refused_with_key_and_value(overrides: list[str], said: str) -> None:
    """Combinations and ranges, before anything starts."""
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_toml("", overrides)


def test_all_problems_come_in_one_message() -> None:
    """Nobody should have to fix them one by one."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_toml("", ["stream.tau=40", "codec.topk=3", "topology.kind=dht"])
    for name in ("stream.tau", "codec.topk", "topology.kind"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "item",
    [
        "data.noniid=kmeans",
        "topology.kind=dht",
    ],
)  # fmt: skip
def test_an_option_that_is_not_built_is_refused_and_never_ignored(item: str) -> None:
    """The key, the value and what is offered are named."""
    with pytest.raises(ConfigError, match=item.split("=")[0].replace(".", r"\.") + r" = .* is not available"):
        RunConfig.from_toml("", [item])


def test_bad_files_are_configuration_errors(tmp_path: Path) -> None:
    """Not TOML, or not there: said with the path or the position."""
    with pytest.raises(ConfigError, match="not valid TOML"):
        RunConfig.from_toml("[[[")
    with pytest.raises(ConfigError, match="absent.toml"):
        RunConfig.load(tmp_path / "absent.toml")
    (tmp_path / "run.toml").write_text("[stream]\nH = 7\n")
    assert RunConfig.load(tmp_path / "run.toml", ["stream.tau=2"]).stream.H == 7


def test_a_configuration_is_frozen() -> None:
    """A run cannot change under its feet."""
    with pytest.raises(ValidationError):
        RunConfig().stream.H = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stream.alpha=1.0"], "stream.alpha = 1 never takes anything in"),
        (["stream.overlap=none"], "stream.overlap = 'none' means tau = 0"),
        (["stream.alpha=0", "outer.momentum=0.9"], "outer.momentum = 0.9 where a merge keeps no share"),
        (["robust.kind=trimmed"], "with fewer than 3 contributions"),
        (
            ["robust.kind=coord_median", "weights.mode=tokens"],
            "weights.mode = 'tokens' has no effect",
        ),
        (["robust.rho=2.0"], "robust.rho has an effect with robust.kind = 'centered_clip' only"),
        (["codec.up=topk", "codec.ef=on"], "the error feedback already acts as momentum"),
    ],
)
def test_settings_that_are_probably_not_meant_are_warned_about(overrides: list[str], said: str) -> None:
    """They work, so they are not refused."""
    assert any(said in line for line in warnings(RunConfig.from_toml("", overrides)))


def test_sensible_settings_give_no_warning() -> None:
    """Silence means something."""
    quiet = ["run.inner_steps_total=100000", "outer.momentum=0.9"]
    assert warnings(RunConfig.from_toml("", quiet)) == []


def test_shared_settings_are_compared_and_private_ones_are_not() -> None:
    """A worker's device is its own affair; its outer learning rate is not."""
    ours = settings_json(RunConfig())
    assert difference(ours, settings_json(RunConfig.from_toml("", ["train.batch_size=99"]))) is None
    found = difference(ours, settings_json(RunConfig.from_toml("", ["outer.lr=0.1"])))
    assert found is not None and found.startswith("outer.lr = 0.1 on the worker and 0.4 in the run")
    robust = difference(ours, settings_json(RunConfig.from_toml("", ["robust.kind=clip_median"])))
    assert robust is not None and robust.startswith("robust.kind = 'clip_median' on the worker")
    for item in ("codec.bits=2", "codec.block=64", "outer.gradient_clip=1.0"):
        found = difference(ours, settings_json(RunConfig.from_toml("", [item])))
        assert found is not None and found.startswith(item.replace("=", " = ") + " on the worker and None in")
    for garbage in ("[]", "3", '{"outer": 3}', '{"outer": null}'):
        assert " = None on the worker" in str(difference(ours, garbage))
    assert difference(ours, "[" * 100_000) == "the worker's settings are not valid JSON"
    assert difference(ours, "{") == "the worker's settings are not valid JSON"
