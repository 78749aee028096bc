"""One run's configuration: strict, frozen, read from TOML, every key overridable on the command line.

Names and defaults follow the field's papers; combinations that cannot work are refused here, before anything
starts, all problems in one message. What reads the file system or the command line's argv is elsewhere.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diloco.codec_section import Codec, codec_problems
from diloco.errors import ConfigError, nearest
from diloco.ignored_settings import ignored_warnings
from diloco.late import late_problems
from diloco.optim_section import AVERAGING, Optim, composition_problem
from diloco.outer_defaults import momentum_warnings, with_outer_defaults
from diloco.schedules_section import Schedule, schedule_problems, schedule_warnings
from diloco.stream_checks import stream_problems, stream_warnings
from diloco.topology_checks import topology_problems


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    run_id: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(0, ge=0, lt=2**63)
    inner_steps_total: int = Field(1000, ge=1)


class Model(Section):
    preset: str = "tiny"
    factory: str | None = None  # "package.module:function", instead of a preset
    sequence_length: int = Field(128, ge=2)


class Data(Section):
    source: str = "stdlib"
    format: str = "auto"
    tokenizer: str = "bytes"
    field: str = "text"
    mode: Literal["static", "leased", "deficit"] = "static"  # by shard, or by lease
    shards: int | None = Field(None, ge=1)  # None: one per worker of the start cohort
    noniid: Literal["none", "kmeans"] = "none"


class Train(Section):
    batch_size: int = Field(8, ge=1)
    grad_accum: int = Field(1, ge=1)
    clip: float = Field(1.0, ge=0)  # global gradient norm; 0 turns clipping off
    eval_every: int = Field(0, ge=0)  # inner steps; 0: only at the start and the end
    eval_batches: int = Field(32, ge=1)
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    threads: int = Field(0, ge=0)  # 0: torch's own choice
    checkpoint_every: int = Field(0, ge=0)  # inner steps between a worker's own checkpoints; 0: only at exit
    outer: Literal["none", "snoo", "gpa", "anytime"] = (
        "none"  # around the inner optimizer, in `diloco train` alone
    )


class Snoo(Section):
    k: int = Field(10, ge=1)  # inner steps per outer step
    lr: float = Field(0.7, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    offload: bool = False  # slow copy and momentum in CPU memory


class Gpa(Section):
    mu_x: float = Field(0.9967, ge=0, le=1)
    mu_y: float = Field(0.7, gt=0, le=1)


class Anytime(Section):
    half_life: float = Field(0.1, gt=0, le=1)  # of the average, as a fraction of the steps so far


class Outer(Section):
    kind: Literal["nesterov", "sgd", "sgdm", "adam", "gpa"] = "nesterov"
    lr: float = Field(0.4, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    gpa_mu_x: float = Field(0.9, ge=0, le=1)
    gpa_mu_y: float = Field(0.9, gt=0, le=1)
    gpa_lr: float = Field(4.0, ge=0)
    gradient_clip: float | None = Field(None, gt=0)  # largest L2 norm of a fragment's mean update


class Stream(Section):
    H: int = Field(30, ge=1)
    frag_layers: int = Field(3, ge=1)
    layout: Literal["strided", "sequential", "balanced", "single"] = "strided"
    offsets: Literal["auto"] | Annotated[tuple[int, ...], Field(strict=False)] = "auto"
    tau: int = Field(1, ge=0)
    alpha: float = Field(0.5, ge=0, le=1)
    first_round: Literal["short", "full"] = "short"
    overlap: Literal["inner", "none", "delayed", "eager", "delay_corrected", "async"] = "inner"
    merge: Literal["lerp", "delay_corrected"] = "lerp"
    compensate: float = Field(0.0, ge=0)  # delayed, async: how much of the Taylor correction
    final_flush: bool = True
    pace: float = Field(
        0.0, ge=0, le=0.9
    )  # share of the time until the merge over which a transfer is spread


class Fault(Section):
    heartbeat_s: float = Field(2.0, gt=0)
    suspect_s: float = Field(10.0, gt=0)
    dead_s: float = Field(40.0, gt=0)
    quorum: int | None = Field(None, ge=1)  # None: ceil(M/2)
    gamma: float = Field(0.9, ge=0)  # share of the time that overlap leaves in which late ones are waited for
    fixed_grace_s: float | None = Field(None, ge=0)
    round_timeout_s: float = Field(600.0, gt=0)
    late: Literal["skip", "isolate", "carry", "discount", "rollback"] = "skip"
    s_max: int = Field(1, ge=0)
    rebase: bool = True
    quarantine_after: int = Field(
        5, ge=0
    )  # bad contributions before a worker is shut out for a while; 0: never
    standby_s: float = Field(5.0, gt=0)  # how long words to workers may wait for the standby's disk
    takeover_s: float = Field(2.0, gt=0)  # of the coordinator's absence, before its standby asks for votes


class Weights(Section):
    mode: Literal["uniform", "tokens", "tokens_rate", "shard"] = "uniform"
    normalize: Literal["none", "steps"] = "none"
    merge: Literal["mean", "rda"] = "mean"  # rda: directions and lengths averaged apart, per tensor
    staleness_pow: float = Field(0.5, ge=0)
    dylu: bool = False
    dn_N: int = Field(1, ge=1)
    dn_c: float = Field(0.0, ge=0)


class Robust(Section):
    kind: Literal[
        "mean", "clip_median", "norm_outlier", "trimmed", "coord_median", "centered_clip", "cos_gate"
    ] = "mean"
    trim: int = Field(1, ge=0)
    rho: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"  # auto: the median distance
    iters: int = Field(3, ge=1)


class Topology(Section):
    kind: Literal["central", "replicated", "dht"] = "central"
    workers: int = Field(2, ge=1)  # the start cohort: training begins when this many have joined
    journal: str | None = None  # None: runs/<run_id>/journal
    fsync: bool = True
    checkpoint_every_commits: int = Field(50, ge=1)
    standby: Literal["auto", "off"] = "auto"  # off: serve none, and forget one that will never come back


class RunConfig(Section):
    """Everything one run needs. `RunConfig.from_toml(text)`, `.load(path, overrides)`; frozen."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    snoo: Snoo = Snoo()
    gpa: Gpa = Gpa()
    anytime: Anytime = Anytime()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    outer: Outer = Outer()
    stream: Stream = Stream()
    codec: Codec = Codec()
    fault: Fault = Fault()
    weights: Weights = Weights()
    robust: Robust = Robust()
    topology: Topology = Topology()

    @model_validator(mode="before")
    @classmethod
    def _outer_defaults(cls, raw: Any) -> Any:
        return with_outer_defaults(raw, Stream().alpha)

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        problems = list(_impossible(self)) + list(_not_offered(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RunConfig:
        try:
            text = json.dumps(raw)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"no key of the configuration takes such a value: {error}") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None

    @classmethod
    def from_toml(cls, text: str, overrides: Sequence[str] = ()) -> RunConfig:
        """Parse TOML, then apply `overrides` such as ``["stream.H=100"]``."""
        try:
            raw = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError: nested deeper than Python's stack
            raise ConfigError(f"the configuration is not valid TOML: {error}") from None
        for item in overrides:
            _override(raw, item)
        return cls.from_dict(raw)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"the configuration {str(path)!r} is no UTF-8: {error}") from None
        return cls.from_toml(text, overrides)


def _override(raw: dict[str, Any], item: str) -> None:
    key, separator, value = item.partition("=")
    parts = key.split(".")
    if not separator or (len(parts) != 2 and parts[:-1] != ["codec", "roles"]):
        raise ConfigError(f"override {item!r} is not of the form section.key=value, such as stream.H=100")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except (ValueError, RecursionError):
        parsed = value  # a bare word is a string, as people type it on a command line
    table = raw
    for name in parts[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {item!r}: {name} is a value, not a section with keys of its own")
    table[parts[-1]] = parsed


def _known(location: tuple[int | str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location[:-1]:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _explain(item: Any) -> str:
    location = item["loc"]
    name = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"unknown configuration key {name!r}{nearest(str(location[-1]), _known(location))}"
    message = re.sub(r"^Value error, ", "", item["msg"])
    if item["type"] == "value_error" and isinstance(item["input"], dict):
        return message  # a whole section: the message names the keys
    if item["type"] == "literal_error":
        message += nearest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return f"{name} = {item['input']!r}: {message}" if name else message


def _impossible(c: RunConfig) -> list[str]:
    found = []
    if c.stream.tau >= c.stream.H:
        found.append(f"stream.tau = {c.stream.tau} must be smaller than stream.H = {c.stream.H}")
    if c.fault.quorum is not None and c.fault.quorum > c.topology.workers:
        found.append(
            f"fault.quorum = {c.fault.quorum} can never be met by topology.workers = {c.topology.workers}"
        )
    if c.fault.suspect_s <= c.fault.heartbeat_s:
        found.append(
            f"fault.suspect_s = {c.fault.suspect_s} must exceed fault.heartbeat_s = {c.fault.heartbeat_s}"
        )
    if c.fault.dead_s <= c.fault.suspect_s:
        found.append(f"fault.dead_s = {c.fault.dead_s} must exceed fault.suspect_s = {c.fault.suspect_s}")
    found += codec_problems(c.codec)
    found += stream_problems(c)
    found += late_problems(c)
    found += topology_problems(c)
    found += _robust_problems(c)
    found += schedule_problems(c.schedule, c.run.inner_steps_total, c.optim.kind, c.optim.momentum)
    around = composition_problem(c.optim.kind, c.train.outer)
    if around:
        found.append(around)
    if c.optim.kind in AVERAGING and c.schedule.kind != "constant":
        found.append(
            f"optim.kind = {c.optim.kind!r} needs no schedule beyond its own warm-up: set schedule.kind = 'constant'"
        )
    return found


def _robust_problems(c: RunConfig) -> list[str]:
    kind, found = c.robust.kind, []
    sparse = [key for key, name in c.codec.names().items() if name == "topk"]
    if sparse and kind not in ("mean", "clip_median", "norm_outlier"):
        found.append(
            f"robust.kind = {kind!r} needs every value of a contribution and {sparse[0]} = 'topk' sends few: "
            f"use 'clip_median' or 'norm_outlier', or another {sparse[0]}"
        )
    if kind == "trimmed" and c.topology.workers > 2 and 2 * c.robust.trim >= c.topology.workers:
        found.append(
            f"robust.trim = {c.robust.trim} at both ends leaves nothing of topology.workers = {c.topology.workers}: "
            "2 * trim must be smaller"
        )
    if c.weights.merge == "rda" and kind in ("trimmed", "coord_median", "centered_clip"):
        found.append(
            f"weights.merge = 'rda' cannot be combined with robust.kind = {kind!r}, which merges by its own rule: "
            "use 'mean', 'clip_median', 'norm_outlier' or 'cos_gate', or weights.merge = 'mean'"
        )
    return found


def _robust_warnings(c: RunConfig) -> list[str]:
    kind, found = c.robust.kind, []
    if kind not in ("mean", "clip_median") and c.topology.workers < 3:
        found.append(
            f"robust.kind = {kind!r} with topology.workers = {c.topology.workers}: with fewer than 3 contributions "
            "nobody can tell which is bad, and each is only cut to the median norm"
        )
    if kind in ("trimmed", "coord_median") and c.weights.mode != "uniform":
        found.append(
            f"robust.kind = {kind!r} takes no weights: weights.mode = {c.weights.mode!r} has no effect"
        )
    for key, user in (("trim", "trimmed"), ("rho", "centered_clip"), ("iters", "centered_clip")):
        if kind != user and getattr(c.robust, key) != Robust.model_fields[key].default:
            found.append(f"robust.{key} has an effect with robust.kind = {user!r} only, which is {kind!r}")
    return found


# Keys of the specification whose behaviour is not built yet. Refused, never ignored.
_ONLY: dict[str, tuple[Any, ...]] = {
    "data.noniid": ("none",),
    "topology.kind": ("central", "replicated"),
}


def _not_offered(c: RunConfig) -> list[str]:
    found = []
    for name, offered in _ONLY.items():
        section, key = name.split(".")
        value = getattr(getattr(c, section), key)
        if value not in offered:
            found.append(
                f"{name} = {value!r} is not available in this version; "
                f"use one of {', '.join(map(repr, offered))}"
            )
    return found


def check_distributed(c: RunConfig) -> None:
    """Refuse an inner optimizer that the run's outer one cannot go around; `diloco train` has no such outer one.

    Raises:
        ConfigError: with the reason and what to use instead.
    """
    problem = composition_problem(c.optim.kind, "gpa" if c.outer.kind == "gpa" else "diloco")
    if problem:
        raise ConfigError(f"{problem}; a single node can use it with `diloco train`")


def warnings(c: RunConfig) -> list[str]:
    """Settings that work but are probably not meant, each with what to do instead."""
    found = schedule_warnings(c.schedule)
    if c.stream.alpha == 1:
        found.append("stream.alpha = 1 never takes anything in: workers are independent; use 0.5")
    if c.stream.overlap == "none" and (c.stream.tau or c.stream.alpha):
        found.append(
            "stream.overlap = 'none' means tau = 0 and alpha = 0; the given tau and alpha are ignored"
        )
    found += stream_warnings(c)
    found += _robust_warnings(c) + ignored_warnings(c)
    if (
        c.codec.up == "topk"
        and c.codec.ef == "on"
        and c.outer.momentum > 0
        and c.outer.kind in ("nesterov", "sgdm")
    ):
        found.append(
            f"codec.up = 'topk' with codec.ef = 'on' and outer.momentum = {c.outer.momentum}: the error feedback "
            "already acts as momentum; use outer.momentum = 0 or outer.kind = 'sgd'"
        )
    return found + list(momentum_warnings(c))
