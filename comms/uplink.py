"""Which codec a fragment's updates travel in: the [codec] section and the fragment's spans decide. No arithmetic.

Every node derives it alike: the section is among the settings that a worker must share with the run, and the plan,
which is compared too, names each tensor's role.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from diloco.codec_section import Codec as CodecConfig
from diloco.comms.codec import Codec, get
from diloco.comms.mixed import Mixed, Tiled
from diloco.config import RunConfig
from diloco.fragments import Fragment, FragmentPlan, Span

TILE = 64
MAX_ROWS = 1 << 20  # a tensor of more rows is one group: a plan from outside must not cost memory


def codecs_for(config: RunConfig, plan: FragmentPlan) -> list[Codec]:
    """The codec of each fragment, in plan order."""
    return [codec_for(config, fragment) for fragment in plan.fragments]


def codec_for(config: RunConfig, fragment: Fragment) -> Codec:
    """The codec of one fragment: plain where all its spans are coded alike, else one part per run of like spans."""
    section, seed = config.codec, config.run.seed
    parts: list[tuple[int, Codec]] = []
    for name, run in itertools.groupby(fragment.spans, lambda span: _name(section, span)):
        spans = list(run)
        if name == "topk" and section.groups != "fragment":
            parts += [(_count(span), _of_tensor(section, span)) for span in spans]
        elif name == "stat" and section.groups != "fragment":
            sizes = [size for span in spans for size in _groups(section, span)]
            parts.append((sum(sizes), get("stat", spans=sizes, **_given(bits=section.bits))))
        else:
            parts.append((sum(map(_count, spans)), uplink_codec(section, name, seed)))
    if len(parts) == 1 and not isinstance(parts[0][1], Tiled):
        return parts[0][1]
    return Mixed(tuple(parts))


def uplink_codec(section: CodecConfig, name: str = "", seed: int = 0) -> Codec:
    """The codec `name` (default: `codec.up`) with the section's options; `seed` is the run's."""
    match name or section.up:
        case "fp32" | "fp16" | "bf16" as cast:
            return get(cast)
        case "stat":
            return get("stat", **_given(bits=section.bits))
        case "topk":
            return get("topk", k=section.topk, chunk=section.chunk, **_given(bits=section.bits))
        case block:
            return get(block, stochastic=section.stochastic, seed=seed, **_given(block=section.block))


def _given(**options: int | None) -> dict[str, int]:
    """The options that are set; the others are the codec's own affair."""
    return {name: value for name, value in options.items() if value is not None}


def _name(section: CodecConfig, span: Span) -> str:
    return (getattr(section.roles, span.role) if span.role else None) or section.up


def _of_tensor(section: CodecConfig, span: Span) -> Codec:
    """topk of one tensor: in tiles if it is a whole matrix of tiles, else in flat chunks."""
    flat = uplink_codec(section, "topk")
    matrix = len(span.shape) == 2 and not any(side % TILE for side in span.shape)
    if matrix and flat.block == TILE * TILE and _count(span) == span.shape[0] * span.shape[1]:
        return Tiled(flat, *span.shape)
    return flat


def _groups(section: CodecConfig, span: Span) -> Iterator[int]:
    """Sizes of stat's groups in a span: all of it, or what it holds of each row of a matrix."""
    edges = [span.start, span.stop]
    width = span.shape[-1] if span.shape else 1
    if section.groups == "row" and len(span.shape) > 1 and _count(span) <= MAX_ROWS * width:
        edges[1:1] = range((span.start // width + 1) * width, span.stop, width)
    return (stop - start for start, stop in itertools.pairwise(edges))


def _count(span: Span) -> int:
    return span.stop - span.start
