"""The [optim] section: every inner optimizer's settings, their defaults, and which kind uses which.

Also which inner optimizers an outer one may wrap (`composition_problem`). Nothing here needs torch: the command line
reads configurations without it. Turning a section into an optimizer is `diloco.optim.build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from diloco.errors import nearest

_ORTH = ("coefficients", "iteration_dtype", "form", "start")
_ADAM = ("betas", "eps")
_DECAY = ("weight_decay", "head_weight_decay")
_MATRIX = ("matrix_lr", "blocks", "momentum", *_ORTH)
_RESEARCH = (
    *("matrix_lr", "blocks", "momentum", *_ADAM, *_DECAY),
    *("nesterov", "scale", "cautious", "iteration_dtype"),
)

# What each kind reads, beside `kind`, `lr`, `head` and `router`, which all do.
_USES: dict[str, tuple[str, ...]] = {
    "adamw": (*_ADAM, *_DECAY, "decay", "normalized"),
    "muon": (*_MATRIX, *_ADAM, *_DECAY, "nesterov", "scale", "cautious"),
    "normuon": (*_MATRIX, *_ADAM, *_DECAY, "nesterov", "scale", "cautious", "variant", "beta2"),
    "hyperball": (*_MATRIX, *_ADAM, "head_weight_decay", "nesterov", "base", "beta2"),
    "md": (*_MATRIX, *_ADAM, "base", "gain_lr", "radius"),
    "md-adam": ("matrix_lr", "blocks", *_ADAM, "gain_lr", "radius"),
    "muown": (*_MATRIX, *_ADAM, "head_weight_decay", "n_target", "total_steps"),
    "adamp": (*_ADAM, *_DECAY, "delta", "wd_ratio", "normalized"),
    "scion": (
        *("blocks", "momentum", *_ORTH),
        *("rho", "embed_norm", "embed_rho", "constrained", "spectral_max"),
    ),
    "mars": (*_ADAM, *_DECAY, "gamma", "normalized"),
    "mars-m": (*_MATRIX, *_ADAM, *_DECAY, "gamma"),
    "schedule-free": (*_ADAM, *_DECAY, "warmup", "normalized"),
    "schedule-free-plus": (
        *(*_ADAM, *_DECAY, "normalized"),
        *("beta", "beta_max", "anneal_steps", "c_warmup"),
    ),
    "freon": (*_RESEARCH, "q", "method"),
    "kaon": (*_RESEARCH, "iterations"),
    "sgd": (*_DECAY, "momentum", "nesterov"),
}
KINDS = tuple(_USES)
_ALWAYS = ("kind", "lr", "d_base", "head", "router")
SPHERES = ("hyperball", "md", "md-adam", "muown")
AVERAGING = ("schedule-free", "schedule-free-plus")

# Peak learning rate of everything but matrices, and how many times it the matrices get.
_RATES: dict[str, tuple[float, float]] = {
    "adamw": (1e-3, 1.0),
    "muon": (1e-3, 1.0),
    "normuon": (1e-3, 1.0),
    "hyperball": (1e-3, 18.0),  # the relative step: 0.018
    "md": (2e-3, 10.0),  # the relative step: 0.02
    "md-adam": (2e-3, 2.5),
    "muown": (3.5e-3, 1.0),
    "adamp": (1e-3, 1.0),
    "scion": (2.0**-12, 1.0),
    "mars": (3e-3, 1.0),
    "mars-m": (3e-3, 1.0),
    "schedule-free": (2.5e-3, 1.0),
    "schedule-free-plus": (1.0, 1.0),  # a factor on the step size that it finds itself
    "freon": (1e-3, 1.0),
    "kaon": (1e-3, 1.0),
    "sgd": (0.1, 1.0),
}
_SPEEDRUN: dict[str, Any] = {"matrix_lr": 0.023, "weight_decay": 1.2}  # of NorMuon's variant
_BETAS = {"mars": (0.95, 0.99), "schedule-free": (0.9, 0.999)}
_WEIGHT_DECAY = {"sgd": 0.0, "schedule-free-plus": 20.0}

_SCALES = ("match_rms", "original", "spectral", "shape_up", "none", "rms_exact")
_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "scale": _SCALES,
    "decay": ("decoupled", "adamc", "cautious"),
    "iteration_dtype": ("bfloat16", "float16", "float32", "float64"),
    "form": ("plain", "gram", "auto"),
    "start": ("frobenius", "aol"),
    "variant": ("rows", "speedrun"),
    "base": ("muon", "normuon", "adam"),
    "embed_norm": ("sign", "col", "row"),
    "method": ("gram", "svd"),
}


class Optim(BaseModel):
    """Settings of the inner optimizer. `lr`, `matrix_lr`, `weight_decay`, `betas` and `eps` are filled in per kind
    when left out; any other setting left out (None) has its class's default. A setting that the kind does not use is
    an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: str = "adamw"
    lr: float = Field(1e-3, gt=0)  # peak; of what is not a matrix, where matrices have their own optimizer
    matrix_lr: float | None = Field(
        None, gt=0
    )  # None: lr, times 18 for hyperball, 10 for md, 2.5 for md-adam
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    head_weight_decay: float | None = Field(None, ge=0)  # of an untied output projection; None: 0
    d_base: int | None = Field(None, ge=1)  # embeddings' lr is times d_model/d_base
    decay: str | None = None  # decoupled, adamc, cautious
    normalized: tuple[str, ...] | None = (
        None  # weights that a normalisation follows: no decay, or AdamC's; None: "auto", which finds them
    )
    cautious: bool | None = None
    momentum: float | None = Field(None, ge=0, le=1)
    nesterov: bool | None = None
    scale: str | None = None
    coefficients: str | tuple[tuple[float, float, float], ...] | None = None
    iteration_dtype: str | None = None
    form: str | None = None
    start: str | None = None
    variant: str | None = None  # NorMuon's
    beta2: float | None = Field(None, ge=0, lt=1)
    base: str | None = None  # hyperball: muon, normuon, adam; md: muon, adam
    gain_lr: float | None = Field(None, ge=0)  # None: a tenth of matrix_lr
    radius: str | float | None = None  # init, shape or a number; None: init where d_model is known
    n_target: float | None = Field(None, gt=0)
    total_steps: int | None = Field(None, ge=1)  # Muown's; None: the run's
    delta: float | None = Field(None, ge=0)
    wd_ratio: float | None = Field(None, ge=0)
    rho: float | None = Field(None, gt=0)
    embed_norm: str | None = None
    embed_rho: float | None = Field(None, gt=0)
    constrained: bool | None = None
    spectral_max: bool | None = None
    gamma: float | None = Field(None, ge=0)
    warmup: int | None = Field(None, ge=0)  # Schedule-Free's own, in steps
    beta: float | None = Field(None, gt=0, lt=1)
    beta_max: float | None = Field(None, gt=0, lt=1)
    anneal_steps: int | None = Field(None, ge=0)
    c_warmup: int | None = Field(None, ge=0)
    q: float | None = Field(None, gt=0, le=2)  # Freon's Schatten exponent
    method: str | None = None  # Freon's: gram, svd
    iterations: int | None = Field(None, ge=1)  # Kaon's
    blocks: dict[str, int | tuple[int, ...]] | None = None  # fused weights by part of their name
    head: str | None = None  # part of the output projection's name, when it is an unusual one
    router: str | None = None  # likewise of routers

    @model_validator(mode="before")
    @classmethod
    def _per_kind(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        given = {k: _tuples(v) for k, v in raw.items() if v is not None}
        problems = list(_problems(given, cls.model_fields))
        if problems:
            raise ValueError("; ".join(problems))
        return given | _defaults(given)

    @model_serializer(mode="wrap")
    def _used(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """What the kind uses and is not left out, so that a section can be read again from what it was written as."""
        return {k: v for k, v in dump(self).items() if v is not None and uses(self.kind, k)}


def uses(kind: str, key: str) -> bool:
    """Whether optimizers of this kind read this setting."""
    return key in _ALWAYS or key in _USES[kind]


def _problems(given: Mapping[str, Any], known: Iterable[str]) -> Iterable[str]:
    for key, choices in _CHOICES.items():
        value = given.get(key)
        if isinstance(value, str) and value not in choices:
            yield f"optim.{key} is {value!r}: known are {', '.join(choices)}{nearest(value, choices)}"
    kind = given.get("kind", "adamw")
    if kind not in KINDS:
        return
    for key in given:
        if key in known and not uses(kind, key):
            users = ", ".join(k for k in KINDS if key in _USES[k])
            yield f"optim.{key} is not used by optim.kind = {kind!r}: remove it, or use one of {users}"
    betas = given.get("betas")
    if isinstance(betas, tuple) and not all(isinstance(b, float | int) and 0 <= b < 1 for b in betas):
        yield f"optim.betas is {list(betas)}: give two numbers in [0, 1)"
    radius = given.get("radius")
    if radius is not None and not (radius in ("init", "shape") or _positive(radius)):
        yield f"optim.radius is {radius!r}: give 'init', 'shape' or a positive number"
    if kind == "md" and given.get("base") == "normuon":
        yield "optim.base is 'normuon': kind 'md' has muon and adam; 'hyperball' has normuon"
    if kind not in ("muon", "normuon") and given.get("scale") == "rms_exact":
        yield "optim.scale is 'rms_exact', which is of the kinds 'muon' and 'normuon': use 'match_rms'"
    momentum = given.get("momentum")
    if kind != "scion" and momentum == 1:
        yield f"optim.momentum is {momentum}: give a number in [0, 1)"


def _tuples(value: Any) -> Any:
    """Lists, which is how JSON and TOML write them, as the tuples that the strict fields want."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def _positive(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0


def _defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given.get("kind", "adamw")
    if kind not in KINDS:
        return {}
    adam = kind == "md" and given.get("base") == "adam"
    rate, ratio = _RATES["md-adam" if adam else kind]
    filled: dict[str, Any] = {
        "lr": rate,
        "betas": _BETAS.get(kind, (0.9, 0.95)),
        "weight_decay": _WEIGHT_DECAY.get(kind, 0.1),
    }
    if kind == "normuon" and given.get("variant") == "speedrun":
        filled.update(_SPEEDRUN)
    lr = given.get("lr", rate)
    if "matrix_lr" in _USES[kind] and _positive(lr):
        filled.setdefault("matrix_lr", lr * ratio)
    return {k: v for k, v in filled.items() if k not in given}


def composition_problem(inner: str, outer: str) -> str | None:
    """Why the outer optimizer `outer` (none, snoo, gpa, anytime, diloco) cannot go around the kind `inner`; None if it can."""
    if inner in AVERAGING and outer != "none":
        return (
            f"optim.kind = {inner!r} averages its weights itself, so that {outer!r} cannot go around it: "
            "use it without an outer optimizer, or another kind such as 'adamw' or 'muon'"
        )
    if inner in SPHERES and outer == "gpa":
        return (
            f"optim.kind = {inner!r} holds weights to norms or gains of its own, which the average of 'gpa' leaves: "
            "use 'snoo' or 'diloco', or another kind such as 'muon'"
        )
    return None
