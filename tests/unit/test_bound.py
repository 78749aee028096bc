"""The bound of convex theory: against its definition, closed forms, published code's values and real descent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diloco.errors import ConfigError
from diloco.schedules import KINDS, multipliers
from diloco.schedules_bound import best_factor, bound, bound_at, minimum


def as_defined(etas: Sequence[float], D: float, norms: Sequence[float]) -> float:
    """The theorem's right-hand side, sum by sum, in T^2 steps."""
    T = len(etas)
    total = sum(etas)
    value = D**2 / (2 * total) + sum(e**2 * g**2 for e, g in zip(etas, norms, strict=True)) / (2 * total)
    for k in range(T - 1):
        after, since = sum(etas[k + 1 :]), sum(etas[k:])
        value += etas[k] / (2 * after) / since * sum(etas[t] ** 2 * norms[t] ** 2 for t in range(k, T))
    return value


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 10), st.floats(0.1, 5)), min_size=1, max_size=25),
    st.floats(0.1, 10),
    st.floats(1e-3, 10),
)
def test_it_is_the_theorems_formula(steps: list[tuple[float, float]], D: float, lr: float) -> None:
    """O(T) suffix sums give the O(T^2) sums, with gradient norms of their own at every step."""
    f, norms = [a for a, _ in steps], [b for _, b in steps]
    assert bound_at(f, lr, D, norms) == pytest.approx(as_defined([lr * x for x in f], D, norms), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_returned_peak_is_the_best_one(kind: str) -> None:
    """At it the bound has the returned value, and is larger on both sides."""
    f = multipliers(kind, 200, 20)
    value, lr = bound(f, 2.0, 3.0)
    assert bound_at(f, lr, 2.0, 3.0) == pytest.approx(value, rel=1e-12)
    assert min(bound_at(f, lr * 1.01, 2.0, 3.0), bound_at(f, lr / 1.01, 2.0, 3.0)) > value


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_constant_and_linear_have_their_closed_forms(T: int) -> None:
    """D G sqrt((1 + H)/T) with the logarithm, and 2 D G sqrt((T + H - 1/2)/(T (T+1))) without, H = H_{T-1}."""
    D, G, H = 3.0, 0.5, harmonic(T - 1)
    value, lr = bound([1.0] * T, D, G)
    assert value == pytest.approx(D * G * math.sqrt((1 + H) / T), rel=1e-12)
    assert lr == pytest.approx(D / G / math.sqrt(T * (1 + H)), rel=1e-12)
    value, lr = bound(multipliers("linear", T), D, G)
    assert value == pytest.approx(2 * D * G * math.sqrt((T + H - 0.5) / (T * (T + 1))), rel=1e-12)
    assert lr == pytest.approx(D / G * math.sqrt(T / ((T + 1) * (T + H - 0.5))), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "cooldown", "value", "lr"),
    [
        ("wsd", 80, 0.1093230124887, 0.0253736614174),
        ("wsd-sqrt", 80, 0.1072881471663, 0.0268461376226),
        ("cosine", None, 0.1040525839789, 0.0435950346466),
        ("linear", None, 0.1006298654356, 0.0495631306917),
        ("constant", None, 0.1375448080734, 0.0181758950775),
    ],
)
def test_it_gives_the_values_of_the_authors_code(
    kind: str, cooldown: int | None, value: float, lr: float
) -> None:
    """400 steps, D = G = 1: what the code published with arXiv 2501.18965 computes."""
    got = bound(multipliers(kind, 400, cooldown=cooldown))
    assert got == pytest.approx((value, lr), rel=1e-10)


def test_the_peak_scales_with_distance_and_against_the_gradients() -> None:
    """Bound ~ D G and peak ~ D/G: gradients ten times larger want a tenth of the step."""
    f = multipliers("wsd", 100, 5)
    value, lr = bound(f)
    assert bound(f, 2.0, 10.0) == pytest.approx((20 * value, lr / 5))


def test_a_cooldown_is_worth_more_than_none_and_linear_is_best() -> None:
    """The order that the theory is known for, at 10 000 steps."""
    values = {c: bound(multipliers("wsd", 10_000, cooldown=c))[0] for c in (0, 1000, 2000, 4000, 10_000)}
    assert sorted(values, key=values.__getitem__) == [10_000, 4000, 2000, 1000, 0]
    assert values[10_000] == bound(multipliers("linear", 10_000))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("problem", ["absolute value", "largest entry", "sum of absolutes"])
def test_subgradient_descent_stays_below_it(kind: str, scale: float, problem: str) -> None:
    """Real runs on non-smooth convex functions, at the best peak and far from it, with the norms they had."""
    T, rng = 300, np.random.default_rng(7)
    A = rng.standard_normal((8, 5))

    def value(x: NDArray[np.float64]) -> float:
        if problem == "absolute value":
            return float(abs(x[0]))
        return float(np.max(np.abs(A @ x)) if problem == "largest entry" else np.sum(np.abs(A @ x)))

    def subgradient(x: NDArray[np.float64]) -> NDArray[np.float64]:
        if problem == "absolute value":
            return np.asarray(np.sign(x + 1e-300) * np.eye(5)[0])
        y = A @ x
        if problem == "sum of absolutes":
            return np.asarray(A.T @ np.sign(y))
        row = int(np.argmax(np.abs(y)))
        return np.asarray(A[row] * np.sign(y[row]))

    start = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    D = 1.0 if problem == "absolute value" else float(np.linalg.norm(start))
    f = multipliers(kind, T, 10)
    lr = scale * bound(f, D, 1.0 if problem == "absolute value" else 4.0)[1]
    x, norms = start.copy(), []
    for factor in f[:-1]:
        g = subgradient(x)
        norms.append(float(np.linalg.norm(g)))
        x = x - lr * factor * g
    norms.append(float(np.linalg.norm(subgradient(x))))
    assert value(x) <= bound_at(f, lr, D, norms)


def test_steps_of_length_zero_at_the_end_change_nothing() -> None:
    """The point no longer moves, so that the bound is that of the steps before."""
    assert bound([1.0, 0.5, 0.0, 0.0]) == bound([1.0, 0.5])
    assert math.isfinite(bound([0.0, 1.0, 0.0, 0.5])[0])


def test_a_million_steps_keep_their_accuracy() -> None:
    """Sums from the end: the linear schedule's closed form to eleven digits at T = 10^6."""
    T = 1_000_000
    value, _ = bound(np.arange(T, 0, -1) / T)
    H = math.log(T - 1) + 0.57721566490153286 + 1 / (2 * (T - 1))
    assert value == pytest.approx(2 * math.sqrt((T + H - 0.5) / (T * (T + 1))), rel=1e-11)


def test_the_best_factor_beats_its_neighbours_and_is_the_published_codes() -> None:
    """4000 steps of wsd extended to 8000: the published code's bound is smallest at 0.48 of the learning rate."""
    lr = bound(multipliers("wsd", 4000, cooldown=800))[1]
    f = np.asarray(multipliers("wsd", 8000, cooldown=1600))
    done, rest = f[:3200], f[3200:]
    factor, value = best_factor(done, rest, lr)
    assert factor == pytest.approx(0.48, abs=0.006)
    assert value == pytest.approx(0.023061, abs=2e-6)
    for other in (0.99 * factor, 1.01 * factor):
        assert bound_at(np.concatenate([done, other * rest]), lr) > value


def test_a_minimum_may_lie_inside_or_at_either_end() -> None:
    """The search gives the place, also where the function falls towards an end of the interval."""
    assert minimum(lambda x: (x - 0.3) ** 2, 0.0, 2.0) == pytest.approx(0.3, abs=1e-6)
    assert minimum(lambda x: x, -1.0, 2.0) == -1.0
    assert minimum(lambda x: -x, -1.0, 2.0) == 2.0


@pytest.mark.parametrize(
    ("multipliers_", "D", "G", "named"),
    [
        ([], 1.0, 1.0, "multipliers"),
        ([1.0, -1.0], 1.0, 1.0, "multipliers"),
        ([0.0, 0.0], 1.0, 1.0, "multipliers"),
        ([1.0, math.nan], 1.0, 1.0, "multipliers"),
        ([1.0], 0.0, 1.0, "D and G"),
        ([1.0], 1.0, -1.0, "D and G"),
        ([1.0, 1.0], 1.0, [1.0], "G has shape"),
    ],
)
def test_what_cannot_be_is_refused(
    multipliers_: list[float], D: float, G: float | list[float], named: str
) -> None:
    """The error names the argument."""
    with pytest.raises(ConfigError, match=named):
        bound(multipliers_, D, G)
    with pytest.raises(ConfigError, match="lr is 0"):
        bound_at([1.0], 0.0)
