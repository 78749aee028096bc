"""Settings tuned on a narrow model, carried over to a wider one of the same family.

The rules change a run's configuration and say what they changed; the model's own width, initialisation and forward
pass are not theirs. Longer training, as against wider models, is in `schedules_bound`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diloco.errors import ConfigError, nearest

if TYPE_CHECKING:
    from diloco.config import RunConfig

RULES = ("embed", "mup", "decay", "md")

# How the best learning rate of hidden matrices falls with width m, as a power of m, so that an update changes a
# layer's output by as much as before: Adam's entries all agree in sign at worst, a spectral norm that grows as m; an
# orthogonal update of fixed RMS has one that grows as sqrt(m); one of fixed spectral norm, or of fixed size relative
# to the weights, needs no change.
_ADAM = ("adamw", "adamp", "mars", "schedule-free")
_FIXED_RMS = ("mars-m", "muown")
_RELATIVE = ("hyperball", "md", "md-adam", "scion")
_BY_SCALE = {
    "match_rms": 0.5,
    "rms_exact": 0.5,
    "spectral": 0.0,
    "original": 0.0,
    "shape_up": 0.0,
    "none": 0.0,
}
_SPHERES = ("hyperball", "md", "md-adam")

_BEYOND_CONFIG = (
    "muP also asks for an output projection that starts at 0 or falls as 1/width, and for attention logits divided by "
    "the head's width instead of its square root: these are the model's, and no key here sets them"
)


def transfer(
    config: RunConfig, from_width: int, to_width: int, rule: str = "embed"
) -> tuple[RunConfig, list[str]]:
    """`config`, tuned at model width `from_width`, for width `to_width`; and in sentences what changed and why.

    With m = to_width/from_width, both being d_model:

    embed   lr of embeddings times m (`optim.d_base`), nothing else: most of what muP gains with AdamW (Kalra &
            Barkeshli, arXiv 2605.21486).
    mup     lr of hidden matrices divided by m for Adam's kinds; by sqrt(m) for Muon's with an update of fixed RMS
            ("match_rms", the default); not at all for an update of fixed spectral norm ("spectral", "original") or of
            fixed relative size. Embeddings keep theirs (arXiv 2203.03466). Decay stays, so that lr * decay falls.
    decay   as mup, with the decay of those weights raised so that lr * decay stays: after the start of training it is
            this product that sets how fast weights turn, and muP transfers with it (Kosson et al., arXiv 2510.19093).
    md      nothing: a step relative to the norm of a weight on its sphere transfers (arXiv 2606.25971).

    Equal batch, number of steps and depth are assumed. The model's width is not in the result: set `model.preset` or
    `model.factory`.

    Raises:
        ConfigError: unknown rule, a width that is not positive, or a rule that says nothing about `optim.kind`.
    """
    if rule not in RULES:
        raise ConfigError(f"rule is {rule!r}: known are {', '.join(RULES)}{nearest(rule, RULES)}")
    for name, width in (("from_width", from_width), ("to_width", to_width)):
        if width < 1:
            raise ConfigError(f"{name} is {width}: give the model's d_model, 1 or more")
    rules: dict[str, Callable[[RunConfig, int, int], tuple[dict[str, Any], list[str]]]] = {
        "embed": _embed,
        "mup": _mup,
        "decay": _decay,
        "md": _md,
    }
    changes, said = rules[rule](config, from_width, to_width)
    said.append(f"the model has to become {to_width} wide itself: set model.preset or model.factory")
    if not changes:
        return config, said
    raw = config.model_dump(mode="json", exclude_unset=True)
    raw.setdefault("optim", {}).update(changes)
    return type(config).from_dict(raw), said


def _embed(config: RunConfig, from_width: int, to_width: int) -> tuple[dict[str, Any], list[str]]:
    if config.optim.kind in ("md", "md-adam"):
        raise ConfigError(
            f"rule 'embed' is for embeddings that AdamW trains; those of optim.kind = {config.optim.kind!r} have rows of "
            "fixed norm: use 'md'"
        )
    base = config.optim.d_base
    if base is not None:
        grows = (
            f"optim.d_base = {base} stays: embeddings' learning rate is optim.lr times d_model/d_base, so it grows from "
            f"{from_width / base:g} to {to_width / base:g} times optim.lr with the model"
        )
        return {}, [grows]
    raised = (
        f"optim.d_base = {from_width}: embeddings' learning rate becomes {to_width / from_width:g} times optim.lr, "
        "because in a wide model it is the one that is too low"
    )
    return {"d_base": from_width}, [raised, "matrices, head and gains keep their learning rates and decay"]


def _mup(config: RunConfig, from_width: int, to_width: int) -> tuple[dict[str, Any], list[str]]:
    power, why = _power(config)
    if power == 0:
        return {}, [f"learning rates and decay stay: {why}", _BEYOND_CONFIG]
    o, factor = config.optim, (from_width / to_width) ** power
    if o.matrix_lr is not None:
        return {"matrix_lr": o.matrix_lr * factor}, [
            f"optim.matrix_lr = {o.matrix_lr * factor:.4g} instead of {o.matrix_lr:.4g} (times {factor:.4g}): {why}",
            "optim.lr stays, and with it embeddings, head and gains; muP would lower the head's, for which there is no key",
            _BEYOND_CONFIG,
        ]
    # One lr for all: lower it, and let the embedding multiplier give embeddings theirs back.
    changes: dict[str, Any] = {"lr": o.lr * factor}
    said = [
        f"optim.lr = {o.lr * factor:.4g} instead of {o.lr:.4g} (times {factor:.4g}), for matrices and head: {why}"
    ]
    if o.d_base is None:
        changes["d_base"] = from_width
        said.append(
            f"optim.d_base = {from_width}: embeddings keep {o.lr:.4g}, as lr times d_model/d_base = "
            f"{to_width / from_width:g}"
        )
    else:
        said.append(f"optim.d_base = {o.d_base} stays, so that embeddings keep their learning rate")
    said.append("gains and biases get the lower one too, where muP would leave theirs: no key sets it apart")
    return changes, [*said, _BEYOND_CONFIG]


def _decay(config: RunConfig, from_width: int, to_width: int) -> tuple[dict[str, Any], list[str]]:
    changes, said = _mup(config, from_width, to_width)
    if not changes:
        return changes, said
    o, factor = config.optim, (to_width / from_width) ** _power(config)[0]
    if o.kind == "muown":
        return changes, [*said, "matrices have no decay here, so that there is nothing to keep constant"]
    raised: dict[str, float] = {"weight_decay": o.weight_decay}
    if o.matrix_lr is None and o.head_weight_decay:
        raised["head_weight_decay"] = o.head_weight_decay
    for key, value in raised.items():
        changes[key] = value * factor
        said.insert(
            -1,
            f"optim.{key} = {value * factor:.4g} instead of {value:.4g}: learning rate times decay stays what it was, "
            "and with it the relative size of updates once weights are in equilibrium",
        )
    return changes, said


def _md(config: RunConfig, from_width: int, to_width: int) -> tuple[dict[str, Any], list[str]]:
    kind = config.optim.kind
    if kind not in _SPHERES:
        raise ConfigError(
            f"rule 'md' is for weights on a sphere ({', '.join(_SPHERES)}), and optim.kind is {kind!r}: use 'embed', "
            "'mup' or 'decay'"
        )
    return {}, [
        "nothing changes: matrix_lr is a step relative to the norm of the weight, which is the same at every width"
    ]


def _power(config: RunConfig) -> tuple[float, str]:
    """p of the matrices' learning rate ~ m^-p, and the reason."""
    o = config.optim
    if o.kind in _ADAM:
        return 1.0, "Adam's update of a matrix acts on activations in proportion to its width"
    if o.kind in _FIXED_RMS or (o.kind in ("muon", "normuon") and _BY_SCALE[_scale(config)] == 0.5):
        return (
            0.5,
            "an orthogonal update of fixed RMS has a spectral norm that grows as the root of the width",
        )
    if o.kind in ("muon", "normuon"):
        return (
            0.0,
            f"scale {_scale(config)!r} fixes the update's spectral norm, which is what has to transfer",
        )
    if o.kind in _RELATIVE:
        return 0.0, f"steps of kind {o.kind!r} have a fixed size in a norm that takes the width into account"
    raise ConfigError(
        f"no rule is known for optim.kind = {o.kind!r}: 'embed' applies, or use one of "
        f"{', '.join((*_ADAM, 'muon', 'normuon', *_FIXED_RMS, *_RELATIVE))}"
    )


def _scale(config: RunConfig) -> str:
    o = config.optim
    speedrun = o.kind == "normuon" and o.variant == "speedrun"
    return o.scale or ("original" if speedrun else "match_rms")
