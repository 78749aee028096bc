"""The orthogonalising iteration: the published scalar maps, their bands, symmetry, batching and both forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.errors import ConfigError
from diloco.optim.coefficients import POLAR_EXPRESS, coefficient_set, polar_express
from diloco.optim.orthogonalize import Form, Start, orthogonalize

TABLE = {
    "quintic5": (0.470544, 0.698917, 0.712120, 0.765439, 0.696436),
    "you5": (0.474982, 1.018025, 1.019050, 0.985869, 0.978346),
    "polar5b": (0.846647, 0.996775, 1.016459, 1.086403, 0.903537),
    "polar5": (0.840145, 1.054024, 0.891444, 1.104657, 0.877107),
}
BANDS = {
    "quintic5": (0.682, 1.134),
    "you5": (0.978, 1.032),
    "polar5b": (0.859, 1.141),
    "polar5": (0.870, 1.124),
    "polar8": (0.9995, 1.0005),
    "newton12": (0.9995, 1.0005),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int) -> Tensor:
    Q: Tensor = torch.linalg.qr(random(n, n, seed=seed)).Q
    return Q


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("name", "column"), [(n, c) for n in TABLE for c in range(5)])
def test_a_set_maps_each_singular_value_as_published(name: str, column: int) -> None:
    """Diagonal input of norm 1 comes out as P(s) on the diagonal, to 1e-6 in float64."""
    s = (1e-3, 1e-2, 0.1, 0.5, 1.0)[column]
    G = torch.diag(torch.tensor([s, (1 - s * s) ** 0.5], dtype=torch.float64))
    out = orthogonalize(G, name, dtype=torch.float64, eps=0.0)
    assert float(out[0, 0]) == pytest.approx(TABLE[name][column], abs=1e-6)


@pytest.mark.parametrize("name", ["polar8", "newton12"])
def test_the_accurate_sets_reach_the_polar_factor(name: str) -> None:
    """polar8 and newton12 give U V^T itself for singular values down to 1e-3."""
    U, V = rotation(4, 1), rotation(4, 2)
    s = torch.tensor([1.0, 0.3, 0.02, 1.5e-3], dtype=torch.float64)
    assert relative(orthogonalize(U @ s.diag() @ V, name, dtype=torch.float64), U @ V) < 1e-5


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_singular_values_end_inside_the_band(name: str, dtype: torch.dtype, slack: float) -> None:
    """Every s >= 1e-2 of ||G|| lands in the set's band, widened by 0.03 in bfloat16."""
    G = random(32, 96, seed=3)
    assert float(torch.linalg.svdvals(G / G.norm()).min()) > 1e-2
    values = torch.linalg.svdvals(orthogonalize(G, name, dtype=dtype).double())
    low, high = BANDS[name]
    assert low - slack <= float(values.min()) and float(values.max()) <= high + slack


@pytest.mark.parametrize("form", ["plain", "gram"])
def test_rotations_transposition_and_scale_pass_through(form: Form) -> None:
    """orth(Q G R) = Q orth(G) R, orth(G^T) = orth(G)^T, orth(k G) = orth(G), to 1e-5 in float32."""
    G, Q, R = random(6, 14), rotation(6, 1), rotation(14, 2)
    orth = partial(orthogonalize, dtype=torch.float32, form=form)
    assert relative(orth(Q @ G @ R), Q @ orth(G).double() @ R) < 1e-5
    assert torch.equal(orth(G.mT), orth(G).mT)
    assert relative(orth(1000 * G), orth(G)) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    form=st.sampled_from(["plain", "gram"]),
    seed=st.integers(0, 1000),
)
def test_a_batch_equals_its_matrices_one_by_one(
    batch: int, rows: int, columns: int, dtype: torch.dtype, form: Form, seed: int
) -> None:
    """Leading dimensions are independent, bit for bit, and the input is not written."""
    G = random(2, batch, rows, columns, seed=seed)
    before = G.clone()
    orth = partial(orthogonalize, dtype=dtype, form=form)
    together = orth(G)
    alone = torch.stack([torch.stack([orth(g) for g in half]) for half in G])
    assert torch.equal(together, alone) and together.dtype == dtype
    assert torch.equal(G, before)


@pytest.mark.parametrize("start", ["frobenius", "aol"])
@pytest.mark.parametrize("eps", [1e-7, 0.0])
def test_zero_stays_zero(start: Start, eps: float) -> None:
    """A zero matrix gives exactly zero even without eps, also beside others in a batch."""
    G = torch.stack([torch.zeros(3, 5), torch.ones(3, 5)])
    out = partial(orthogonalize, start=start, eps=eps)(G)
    assert out[0].count_nonzero() == 0 and bool(out.isfinite().all())
    assert orthogonalize(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("name", ["quintic5", "you5", "polar5b", "polar8", "deepseek10"])
@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (9, 9)])
def test_the_gram_form_is_the_same_map(name: str, shape: tuple[int, int]) -> None:
    """Iterating on the Gram matrix gives the plain result to 1e-5 in float32."""
    G = random(*shape, seed=4)
    plain = orthogonalize(G, name, dtype=torch.float32)
    assert relative(orthogonalize(G, name, dtype=torch.float32, form="gram"), plain) < 3e-5


@pytest.mark.parametrize(
    ("dtype", "form", "bound"),
    [
        (torch.bfloat16, "plain", 0.06),
        (torch.float16, "plain", 0.007),
        (torch.float16, "gram", 0.006),
        (torch.float32, "plain", 1e-5),
    ],
)
def test_low_precision_stays_near_the_float64_iteration(dtype: torch.dtype, form: Form, bound: float) -> None:
    """Gaussian input: a few per cent in bfloat16, below one per cent in float16."""
    G = random(24, 72, seed=5)
    exact = orthogonalize(G, "quintic5", dtype=torch.float64)
    assert relative(partial(orthogonalize, form=form)(G, "quintic5", dtype=dtype), exact) < bound


def test_gram_with_polar_coefficients_in_bfloat16_is_refused() -> None:
    """That combination would lose the result to rounding; float16 is offered."""
    for name in ("polar8", "polar5b"):
        with pytest.raises(ConfigError, match="bfloat16.*float16"):
            orthogonalize(random(4, 9), name, form="gram")
    orthogonalize(random(4, 9), "polar8", form="gram", dtype=torch.float16)
    orthogonalize(random(4, 9), "you5", form="gram")


def test_the_aol_start_is_near_the_polar_factor_and_bounded() -> None:
    """Four iterations from the row-scaled start are close to U V^T on Gaussian input, in both forms."""
    G = random(64, 256, seed=6)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    out = orthogonalize(G, start="aol", dtype=torch.float32)
    assert relative(out, U @ Vh) < 0.1
    assert relative(orthogonalize(G, start="aol", form="gram", dtype=torch.float32), out) < 1e-5
    tiny = orthogonalize(G, [(1.0, 0.0, 0.0)], start="aol", dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(tiny, 2)) <= 1.0


def test_the_generator_reproduces_the_published_list() -> None:
    """The first six triples to 1e-13; later intervals are too narrow for more than the solver's precision."""
    made = polar_express(8)
    for ours, theirs in zip(made[:6], POLAR_EXPRESS, strict=False):
        assert ours == pytest.approx(theirs, abs=1e-13)
    for ours, theirs in zip(made[6:], POLAR_EXPRESS[6:], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-8)


def test_polar_sets_carry_their_safety_factor() -> None:
    """polarN divides by 1.01 and scales entries 1..7 by 1/s, 1/s^3, 1/s^5; the eighth and later are unchanged."""
    ten = coefficient_set("polar10")
    assert ten.div == 1.01 and len(ten.triples) == 10
    a, b, c = POLAR_EXPRESS[0]
    assert ten.triples[0] == pytest.approx((a / 1.01, b / 1.01**3, c / 1.01**5))
    assert ten.triples[7:] == ((1.875, -1.25, 0.375),) * 3


def test_a_list_of_triples_has_divisor_one() -> None:
    """Passing the quintic triple five times is the set quintic5."""
    G = random(5, 8)
    listed = orthogonalize(G, [(3.4445, -4.7750, 2.0315)] * 5, dtype=torch.float64)
    assert torch.equal(listed, orthogonalize(G, "quintic5", dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": "yuo5"}, "did you mean 'you5'"),
        ({"coefficients": [(1.0, 2.0)]}, "three finite numbers"),
        ({"coefficients": []}, "empty"),
        ({"form": "gramm"}, "did you mean 'gram'"),
        ({"start": "frob"}, "start is 'frob'"),
        ({"dtype": torch.int32}, "iteration dtype"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"G": torch.zeros(3)}, "shape \\(3,\\)"),
        ({"G": torch.zeros(3, 3, dtype=torch.int64)}, "int64"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    """The error says which argument, its value and the fix."""
    with pytest.raises(ConfigError, match=message):
        orthogonalize(**{"G": torch.eye(3), **change})  # type: ignore[arg-type]
