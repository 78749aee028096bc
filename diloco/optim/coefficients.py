"""Named coefficient sets of the orthogonalising iteration, and the generator behind the Polar Express list.

A set is a divisor for the normalisation and one (a, b, c) triple per iteration. The iteration itself is in
`orthogonalize`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diloco.errors import ConfigError, nearest

Triple = tuple[float, float, float]
Coefficients = str | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class CoefficientSet:
    """`div` divides the normalised input; `triples` are applied in order as ``a X + (b A + c A A) X``."""

    name: str
    div: float
    triples: tuple[Triple, ...]


_QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
_NEWTON: Triple = (2.0, -1.5, 0.5)
_YOU: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_POLAR5B: tuple[Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_TURBO4: tuple[Triple, ...] = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)
_TURBO4B: tuple[Triple, ...] = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)
_FIXED = {
    s.name: s
    for s in (
        CoefficientSet("quintic5", 1.0, (_QUINTIC,) * 5),
        CoefficientSet("you5", 1.0, _YOU),
        CoefficientSet("polar5b", 1.02, _POLAR5B),
        CoefficientSet("newton12", 1.0, (_NEWTON,) * 12),
        CoefficientSet("deepseek10", 1.0, (_QUINTIC,) * 8 + (_NEWTON,) * 2),
        CoefficientSet("turbo4", 1.0, _TURBO4),
        CoefficientSet("turbo4b", 1.0, _TURBO4B),
    )
}
NAMES = (*_FIXED, "polar5", "polar8")
_SAFETY = 1.01


def coefficient_set(coefficients: Coefficients) -> CoefficientSet:
    """Look up a set by name (``polarN`` for any N >= 1), or wrap a list of triples, whose `div` is 1.

    Raises:
        ConfigError: unknown name, empty list, or an entry that is not three finite numbers.
    """
    if isinstance(coefficients, str):
        if coefficients in _FIXED:
            return _FIXED[coefficients]
        polar = re.fullmatch(r"polar([1-9]\d?)", coefficients)
        if polar is None:
            raise ConfigError(
                f"coefficients is {coefficients!r}: known are {', '.join(NAMES)} (polarN for N iterations)"
                f"{nearest(coefficients, NAMES)}"
            )
        return CoefficientSet(coefficients, _SAFETY, _safe_polar(int(polar[1])))
    triples: list[Triple] = []
    for entry in coefficients:
        values = tuple(float(v) for v in entry)
        if len(values) != 3 or not all(math.isfinite(v) for v in values):
            raise ConfigError(
                f"coefficients has the entry {entry!r}: each must be three finite numbers (a, b, c)"
            )
        triples.append((values[0], values[1], values[2]))
    if not triples:
        raise ConfigError("coefficients is an empty list: give at least one (a, b, c)")
    return CoefficientSet("list", 1.0, tuple(triples))


def _safe_polar(iterations: int) -> tuple[Triple, ...]:
    s = _SAFETY
    raw = [*POLAR_EXPRESS[:7], *[POLAR_EXPRESS[7]] * max(iterations - 7, 0)][:iterations]
    return tuple((a / s, b / s**3, c / s**5) if i < 7 else (a, b, c) for i, (a, b, c) in enumerate(raw))


def polar_express(
    iterations: int, *, lower: float = 1e-3, cushion: float = 0.02407327424182761
) -> tuple[Triple, ...]:
    """Generate raw Polar Express triples for singular values in [`lower`, 1] (arXiv 2505.16932).

    Each triple is the odd quintic minimising max |1 - p| on the interval the previous ones left, its lower end
    cushioned to `cushion` * upper, then rescaled so that p is centred on 1 over the uncushioned interval.
    """
    if not 0 < lower < 1:
        raise ConfigError(f"lower is {lower}: give the smallest singular value to reach, in (0, 1)")
    low, high = lower, 1.0
    out: list[Triple] = []
    for _ in range(iterations):
        a, b, c = _best_quintic(max(low, cushion * high), high)
        at_low = a * low + b * low**3 + c * low**5
        at_high = a * high + b * high**3 + c * high**5
        k = 2 / (at_low + at_high)
        a, b, c = a * k, b * k, c * k
        out.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    return tuple(out)


def _best_quintic(low: float, high: float) -> Triple:
    """The odd quintic with the least max |1 - p| on [low, high], by equioscillation at low, q, r, high."""
    if low / high >= 1 - 5e-6:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    error = math.inf
    a = b = c = 0.0
    # The exchange converges quadratically; the bound only stops a last-bit oscillation.
    for _ in range(100):
        points = (low, q, r, high)
        system = np.array([[x, x**3, x**5, (-1.0) ** i] for i, x in enumerate(points)])
        a, b, c, new_error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c
