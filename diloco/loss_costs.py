"""What a setting is known to cost in loss: measured by this project or published, with the source. Data and look-up.

Nothing is extrapolated: where nobody measured, no number stands.
"""

from __future__ import annotations

from dataclasses import dataclass

# Held-out loss against data parallel with equal tokens: means of three seeds of docs/quality.md (a), fp32, whole rounds,
# two workers, preset tiny (0.84M parameters), 3000 steps with the outer settings that were best at H 10.
MEASURED_H = (
    (5, 1.6547 / 1.6276 - 1),
    (10, 1.6583 / 1.6276 - 1),
    (30, 1.6769 / 1.6276 - 1),
    (100, 1.7359 / 1.6276 - 1),
)
# Against fp32 both ways at H 10, 100 rounds: docs/quality.md (c). int8, which rounds next to nothing, moves single seeds by
# 0.7 %: no smaller difference means anything.
MEASURED_CODECS = {
    "e3m0": 1.9932 / 2.0062 - 1,
    "int4": 2.0032 / 2.0062 - 1,
    "int8": 2.0060 / 2.0062 - 1,
    "nf4": 2.0081 / 2.0062 - 1,
    "e2m1": 2.0096 / 2.0062 - 1,
    "stat": 2.0026 / 2.0062 - 1,
    "topk": 2.0065 / 2.0062 - 1,
}
_HOW = {
    "stat": "2 bits without error feedback",
    "topk": "1.6 % of the values, with error feedback, outer SGD",
}
NOISE = "0.7 %"
_MEASURED = "measured here, docs/quality.md"


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
    exact = [share for at, share in MEASURED_H if at == H]
    told = ", ".join(f"H {at} {share:+.1%}" for at, share in MEASURED_H)
    words = f"against data parallel with 0.84M parameters, two workers and 3000 steps: {told}; shorter runs lose more"
    if not exact:
        words = f"not measured at {H}; {words}"
    return Cost("stream.H", str(H), 100 * exact[0] if exact else None, words, _MEASURED)


def _of_tau(tau: int) -> Cost:
    words = {0: "nothing overlaps"}.get(
        tau, "harmless up to 5 of H 100, under 0.2 % with 10; at H 10 each step of tau cost about 0.6 % here"
    )
    percent = 0.0 if tau == 0 else 0.2 if 5 < tau <= 10 else None
    return Cost("stream.tau", str(tau), percent, words, "published, arXiv 2501.18512" if tau else "")


def _of_codec(codec: str) -> Cost:
    if codec not in MEASURED_CODECS:
        return Cost("codec.up", codec, None, "16 or more bits: not measured here", "")
    share, how = MEASURED_CODECS[codec], _HOW.get(codec, "without error feedback")
    words = f"{how}, against fp32 at H 10, 100 rounds, three seeds; less than the noise of {NOISE}: no loss is visible"
    return Cost("codec.up", codec, 100 * share, words, _MEASURED)
