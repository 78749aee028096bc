"""What convex theory promises of a schedule, and the peak learning rate it calls for.

Non-smooth convex theory is about other functions than a network's loss, yet its bound ranks schedules, and scales
their best peak learning rates, much as training large models does (arXiv 2501.18965). The shapes are in `schedules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diloco.errors import ConfigError

Floats: TypeAlias = Sequence[float] | NDArray[np.float64]

_GOLDEN = (math.sqrt(5) - 1) / 2


def bound(multipliers: Floats, D: float = 1.0, G: float | Floats = 1.0) -> tuple[float, float]:
    """The smallest bound that a schedule of this shape has over all peak learning rates, and the peak that gives it.

    With steps eta_t = gamma f_t, t = 1..T, a start at distance D from a minimiser and gradient norms G_t, the point
    x_T at which the last gradient is taken has

        f(x_T) - f* <= D^2/(2 S_1) + Q_1/(2 S_1) + 1/2 sum_{k<T} eta_k/S_{k+1} * Q_k/S_k
        S_k = sum_{t>=k} eta_t,    Q_k = sum_{t>=k} eta_t^2 G_t^2

    for subgradient steps on a convex function, in expectation for stochastic ones (arXiv 2310.07831, theorem 10;
    2501.18965, theorem 1). As a function of gamma that is a/gamma + b gamma, smallest at gamma = sqrt(a/b), where it
    is 2 sqrt(ab). O(T) time, float64. A constant schedule has D G sqrt((1 + H)/T), H = 1 + 1/2 + .. + 1/(T-1); linear
    decay has 2 D G sqrt((T + H - 1/2)/(T (T+1))), without the logarithm.

    Args:
        multipliers: f_t, T numbers, 0 or more, not all 0. Steps of length 0 at the end are left out.
        D: distance of the start from a minimiser; more than 0.
        G: the gradients' norm: one number, or one a step.

    Raises:
        ConfigError: an empty, negative or infinite schedule, or D or G not positive or of another length.
    """
    a, b = _terms(multipliers, D, G)
    return 2 * math.sqrt(a * b), math.sqrt(a / b)


def bound_at(multipliers: Floats, lr: float, D: float = 1.0, G: float | Floats = 1.0) -> float:
    """`bound`'s right-hand side at the peak learning rate `lr`; at least `bound(...)[0]`."""
    if not lr > 0:
        raise ConfigError(f"lr is {lr}: give a positive number")
    a, b = _terms(multipliers, D, G)
    return a / lr + b * lr


def best_factor(
    done: Floats, rest: Floats, lr: float, D: float = 1.0, G: float | Floats = 1.0
) -> tuple[float, float]:
    """The factor rho on the learning rate of the `rest` of a run whose first steps are `done`, and its bound.

    Minimises the bound of the steps ``lr*done, rho*lr*rest`` over rho in [0.001, 10], to about 1e-6 of rho.
    `G` is one number, or one a step of both parts. Continued training: arXiv 2501.18965, section 5.1.
    """
    first, second = np.asarray(done, np.float64), np.asarray(rest, np.float64)

    def at(log_rho: float) -> float:
        return bound_at(np.concatenate([first, second * math.exp(log_rho)]), lr, D, G)

    log_rho = minimum(at, math.log(1e-3), math.log(10.0))
    return math.exp(log_rho), at(log_rho)


def minimum(f: Callable[[float], float], low: float, high: float, *, points: int = 24) -> float:
    """Where `f` is smallest in [`low`, `high`]: the best of a grid, refined by golden section between its neighbours."""
    grid = [low + (high - low) * i / points for i in range(points + 1)]
    values = [f(x) for x in grid]
    best = values.index(min(values))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, points)]
    x, y = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    fx, fy = f(x), f(y)
    while right - left > 1e-6 * (high - low) / points:
        if fx <= fy:
            right, y, fy = y, x, fx
            x = right - _GOLDEN * (right - left)
            fx = f(x)
        else:
            left, x, fx = x, y, fy
            y = left + _GOLDEN * (right - left)
            fy = f(y)
    middle = (left + right) / 2
    return middle if f(middle) <= values[best] else grid[best]  # the best may be an end of the interval


def _terms(multipliers: Floats, D: float, G: float | Floats) -> tuple[float, float]:
    """a and b of the bound a/gamma + b gamma."""
    f, g = np.asarray(multipliers, np.float64), np.asarray(G, np.float64)
    if f.ndim != 1 or not f.size or not np.isfinite(f).all() or (f < 0).any() or not f.any():
        raise ConfigError("multipliers: give one finite number of 0 or more per step, and not all of them 0")
    if g.ndim and g.shape != f.shape:
        raise ConfigError(f"G has shape {g.shape}: give one number, or one for each of the {f.size} steps")
    if not (np.isfinite(g).all() and (g > 0).all() and 0 < D < math.inf):
        raise ConfigError("D and G: give positive, finite numbers")
    end = int(np.flatnonzero(f)[-1]) + 1
    q = (f * f * g * g)[:end]
    f = f[:end]
    # Summed from the end: differences of prefix sums would lose the small last steps that matter most here.
    S, Q = np.cumsum(f[::-1])[::-1], np.cumsum(q[::-1])[::-1]
    last = float(np.sum(f[:-1] / S[1:] * (Q[:-1] / S[:-1])))
    return D * D / (2 * float(S[0])), (float(Q[0] / S[0]) + last) / 2
