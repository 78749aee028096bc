"""What a setting is known to cost in loss: measured by this project or published, with the source. Data and look-up.

Nothing is extrapolated: where nobody measured, no number stands.
"""

from __future__ import annotations

from dataclasses import dataclass

# Held-out loss against data parallel with equal tokens; preset tiny (0.84M parameters), two workers: docs/log.md.
MEASURED_H = (
    (10, 1.3363 / 1.2956 - 1, "960 steps, tau 2, 3 seeds"),
    (10, 1.5828 / 1.5274 - 1, "480 steps, tau 1, one seed"),
    (15, 1.6319 / 1.5274 - 1, "480 steps, tau 1, one seed"),
)
_LOG = "measured here, docs/log.md"


@dataclass(frozen=True, slots=True)
class Cost:
    """`percent` more loss than without the setting, None where no number is known; for tau a bound. `source` is who measured."""

    setting: str
    value: str
    percent: float | None
    note: str
    source: str


def loss_costs(H: int, tau: int, codec: str) -> tuple[Cost, ...]:
    """What is known about each of the three settings that a plan trades loss for."""
    return _of_H(H), _of_tau(tau), _of_codec(codec)


def _of_H(H: int) -> Cost:
    exact = [share for at, share, _ in MEASURED_H if at == H]
    told = "; ".join(f"H {at}: +{share:.1%} ({how})" for at, share, how in MEASURED_H)
    words = f"with 0.84M parameters, 4 bits, against data parallel: {told}"
    if not exact:
        words = f"not measured at {H}; {words}"
    return Cost("stream.H", str(H), 100 * exact[0] if exact else None, words, _LOG)


def _of_tau(tau: int) -> Cost:
    words = {0: "nothing overlaps"}.get(tau, "harmless up to 5, under 0.2 % with 10")
    percent = 0.0 if tau == 0 else 0.2 if 5 < tau <= 10 else None
    return Cost("stream.tau", str(tau), percent, words, "published, arXiv 2501.18512" if tau else "")


def _of_codec(codec: str) -> Cost:
    match codec:
        case "e3m0":
            words = "4 bits work without error feedback; another 4-bit code, int4, +0.09 %"
            source = "published, arXiv 2501.18512 and 2604.21428"
        case "topk":
            words = "sparse with 2-bit values: near lossless with error feedback, 2 bits without it +32 %"
            source = "published, arXiv 2505.23725 and 2604.21428"
        case _:
            words, source = "16 or 8 bits: not measured here", ""
    return Cost("codec.up", codec, None, words, source)
