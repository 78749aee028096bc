"""Settings that the chosen combination does not read, or that cost it most of what is sent: warned about. Pure.

A key left at its default is never named. What cannot work at all is refused elsewhere (`codec_section`,
`stream_checks`, `topology_checks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from diloco.codec_section import BLOCK_CODECS
from diloco.late import COUNTING

if TYPE_CHECKING:
    from diloco.config import RunConfig

_WHOLE_ROUND = ("delayed", "eager", "async")  # the worker's parameters are replaced at its own boundaries


def ignored_warnings(c: RunConfig) -> list[str]:
    """One line for each key that was set to something other than its default and has no effect, then `_sparse`."""
    found = []
    for name, why in (*_data(c), *_outer(c), *_stream(c), *_codec(c), *_fault(c)):
        section, key = name.split(".")
        part = getattr(c, section)
        value = getattr(part, key)
        if value != type(part).model_fields[key].default:
            found.append(f"{name} = {value!r} has no effect with {why}: remove it")
    return found + _sparse(c)


def _data(c: RunConfig) -> Iterator[tuple[str, str]]:
    if c.data.mode == "leased":
        yield "data.shards", "data.mode = 'leased', which leases the corpus as a whole"


def _outer(c: RunConfig) -> Iterator[tuple[str, str]]:
    why = f"outer.kind = {c.outer.kind!r}"
    if c.outer.kind not in ("nesterov", "sgdm"):
        own = "outer.gpa_mu_x and outer.gpa_mu_y instead" if c.outer.kind == "gpa" else "none of this kind"
        yield "outer.momentum", f"{why}, which has {own}"
    if c.outer.kind == "gpa":
        yield "outer.lr", f"{why}, which has outer.gpa_lr instead"
    else:
        for key in ("gpa_mu_x", "gpa_mu_y", "gpa_lr"):
            yield f"outer.{key}", why


def _stream(c: RunConfig) -> Iterator[tuple[str, str]]:
    mode = c.stream.overlap
    if mode in _WHOLE_ROUND:
        why = f"stream.overlap = {mode!r}, in which a fragment is taken whole at its own turn"
        yield "stream.tau", why
        yield "stream.alpha", why
    if c.stream.layout == "single":
        yield "stream.frag_layers", "stream.layout = 'single', which is one fragment"


def _codec(c: RunConfig) -> Iterator[tuple[str, str]]:
    used = sorted(set(c.codec.names().values()))
    coded = f"the codec {', '.join(map(repr, used))}"
    if not set(used) & set(BLOCK_CODECS):
        yield "codec.block", f"{coded}, without blocks"
    if not {"stat", "topk"}.intersection(used):
        yield "codec.bits", f"{coded}; it is for 'stat' and 'topk'"
    if "topk" not in used:
        for key in ("topk", "chunk"):
            yield f"codec.{key}", f"{coded}; it is for 'topk'"
    if c.codec.ef == "off":
        yield "codec.ef_beta", "codec.ef = 'off'"
        yield "codec.ef_recover", "codec.ef = 'off'"


def _fault(c: RunConfig) -> Iterator[tuple[str, str]]:
    if c.fault.late not in COUNTING:
        yield "fault.rebase", f"fault.late = {c.fault.late!r}, under which nothing late is counted"
    if c.fault.fixed_grace_s is not None:
        yield "fault.gamma", f"fault.fixed_grace_s = {c.fault.fixed_grace_s}"
    elif c.stream.overlap not in ("inner", "delay_corrected") or not c.stream.tau:
        why = f"stream.overlap = {c.stream.overlap!r} and stream.tau = {c.stream.tau}, which leave no time to wait in"
        yield "fault.gamma", why


def _sparse(c: RunConfig) -> list[str]:
    """What top-k leaves out must come back by error feedback (2508.15706)."""
    sparse = [key for key, name in c.codec.names().items() if name == "topk"]
    if not sparse:
        return []
    found, kept = [], f"{c.codec.topk} of every {c.codec.chunk} values"
    if c.codec.ef == "off":
        found.append(
            f"{sparse[0]} = 'topk' with codec.ef = 'off' sends {kept} and throws the rest away: "
            "set codec.ef = 'on'"
        )
    if c.codec.down == "mean_q":
        found.append(
            f"{sparse[0]} = 'topk' with codec.down = 'mean_q' keeps {kept} of the mean and throws the rest away: "
            "use codec.down = 'relay' or 'q4_ef'"
        )
    return found
