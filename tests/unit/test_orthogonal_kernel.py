"""The compiled orthogonalisation beside torch's: products, forms, ragged shapes, threads, memory, whole steps.

Everything runs on both implementations where the CPU has the compiled one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diloco.kernels import native, orthogonal_cpu
from diloco.kernels.orthogonal_cpu import Iteration, Target, Update
from diloco.optim import Muon, NorMuon, orthogonalize
from diloco.optim.orthogonalize import Form

SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (3, 5),
    (17, 33),
    (33, 17),
    (47, 49),
    (48, 48),
    (49, 47),
    (49, 150),
    (150, 97),
]
BANDS = {
    "quintic5": (0.682, 1.134),
    "you5": (0.978, 1.032),
    "polar5b": (0.859, 1.141),
    "polar5": (0.870, 1.124),
}
compiled_only = pytest.mark.skipif(
    not orthogonal_cpu.supports(torch.float32), reason="no compiled orthogonalisation for this CPU"
)


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILOCO_KERNELS", "reference")
    native.library.cache_clear()


@pytest.fixture(params=["compiled", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test with the compiled code, and again with torch's."""
    if request.param == "torch":
        use_reference(monkeypatch)
    elif not orthogonal_cpu.supports(torch.float32):
        pytest.skip("no compiled orthogonalisation for this CPU")
    yield request.param
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """A function that runs its argument without the compiled code."""

    def run(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            use_reference(patch)
            result = what()
        native.library.cache_clear()
        return result

    yield run
    native.library.cache_clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditioned(rows: int, columns: int, decades: float) -> Tensor:
    """Singular values from 1 down to 10^-decades."""
    k = min(rows, columns)
    U = torch.linalg.qr(random(rows, k, seed=1).double()).Q
    V = torch.linalg.qr(random(columns, k, seed=2).double()).Q
    made: Tensor = U @ torch.logspace(0, -decades, k, dtype=torch.float64).diag() @ V.mT
    return made.float()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("shape", [*SHAPES, (95, 200), (200, 96), (144, 145)])
@pytest.mark.parametrize("triple", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, -0.25, 2.0)])
def test_a_product_by_symmetric_tiles_is_the_full_product(
    shape: tuple[int, int], triple: tuple[float, float, float], either: str
) -> None:
    """One iteration of a X + (b X X^T + c (X X^T)^2) X, with each term alone, to 1e-6 in float32."""
    G = random(*shape)
    X = (G / G.norm()).double()
    A = X @ X.mT
    a, b, c = triple
    expected = a * X + (b * A + c * A @ A) @ X
    assert relative(orthogonalize(G, [triple], dtype=torch.float32, eps=0.0), expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["plain", "auto", "gram"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-5), (torch.bfloat16, 0.035)])
def test_every_shape_follows_the_float64_iteration(
    shape: tuple[int, int], form: Form, dtype: torch.dtype, bound: float, either: str
) -> None:
    """Ragged panels, single rows and columns, wide and tall: within the rounding of the dtype."""
    G = random(*shape, seed=5)
    if form == "gram" and max(shape) < 1.4 * min(shape) and dtype == torch.bfloat16:
        bound = (
            0.12  # nearly square matrices have tiny singular values, on which this form is known to be poor
        )
    exact = orthogonalize(G, dtype=torch.float64)
    assert relative(orthogonalize(G, dtype=dtype, form=form), exact) < bound


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("form", ["plain", "auto"])
@pytest.mark.parametrize("shape", [(64, 192), (192, 64)])
def test_singular_values_end_inside_the_band(
    name: str, form: Form, shape: tuple[int, int], either: str
) -> None:
    """Every s >= 1e-2 of ||G|| lands in the set's band, widened by 0.03 in bfloat16."""
    G = random(*shape, seed=3)
    assert float(torch.linalg.svdvals(G / G.norm()).min()) > 1e-2
    values = torch.linalg.svdvals(orthogonalize(G, name, form=form).double())
    low, high = BANDS[name]
    assert low - 0.03 <= float(values.min()) and float(values.max()) <= high + 0.03


@pytest.mark.parametrize(
    "name", ["quintic5", "you5", "polar5", "polar5b", "polar8", "newton12", "deepseek10"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_last_iterations_may_run_on_the_gram_matrix(name: str, dtype: torch.dtype, either: str) -> None:
    """On singular values over three decades `auto` is hardly further from float64 than `plain`; so it is on Gaussians."""
    for G, slack in ((conditioned(48, 128, 3.0), 1.35), (random(48, 128), 2.0)):
        exact = orthogonalize(G, name, dtype=torch.float64)
        plain, auto = (
            relative(orthogonalize(G, name, dtype=dtype, form=f), exact) for f in ("plain", "auto")
        )
        assert auto < slack * plain + 2e-6


def test_auto_is_plain_where_the_gram_matrix_gains_nothing_or_would_lose(either: str) -> None:
    """Nearly square matrices, and coefficients that leave small singular values small, take the plain form."""
    for shape, coefficients in (((40, 50), "you5"), ((20, 80), "turbo4"), ((20, 80), [(1.5, -0.5, 0.0)] * 6)):
        G = random(*shape)
        plain, auto = (orthogonalize(G, coefficients, form=f) for f in ("plain", "auto"))
        assert torch.equal(plain, auto)
    assert not torch.equal(*(orthogonalize(random(20, 80), form=f) for f in ("plain", "auto")))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(
    count: int, dtype: torch.dtype, either: str, threads: Callable[[int], None]
) -> None:
    """One matrix shared by threads, several among them, and a batch beside single calls give the same bits."""
    if either == "torch" and count > 1:
        pytest.skip("torch's products choose their order of summation by the number of threads")
    batch = random(3, 130, 260, seed=8)
    threads(1)
    alone = [orthogonalize(g, dtype=dtype, form="auto") for g in batch]
    threads(count)
    assert torch.equal(orthogonalize(batch, dtype=dtype, form="auto"), torch.stack(alone))
    for g, expected in zip(batch, alone, strict=True):
        assert torch.equal(orthogonalize(g, dtype=dtype, form="auto"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposition_passes_through(dtype: torch.dtype, either: str) -> None:
    """orth(G^T) = orth(G)^T to the rounding of the dtype, also where the tall orientation is written directly."""
    G = random(50, 110)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert relative(orthogonalize(G.mT, dtype=dtype), orthogonalize(G, dtype=dtype).mT) < bound


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(5, 9), (60, 50)])
def test_what_is_not_finite_stays_so(bad: float, shape: tuple[int, int], either: str) -> None:
    """A NaN or an infinity spoils its own matrix, visibly, and no other."""
    G = random(2, *shape)
    clean = orthogonalize(G)
    G[0, 2, 3] = bad
    out = orthogonalize(G)
    assert not bool(out[0].isfinite().all()) and torch.equal(out[1], clean[1])


def test_extreme_scales_and_zero(either: str) -> None:
    """Zero gives zero to the bit; inputs of size 1e-18 to 1e15 are as good as those of size 1."""
    assert orthogonalize(torch.zeros(50, 60)).count_nonzero() == 0
    G = random(50, 60)
    for scale in (1e-18, 1e15):
        assert relative(orthogonalize(scale * G, eps=0.0), orthogonalize(G, eps=0.0)) < 0.02


@compiled_only
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [False, True])
def test_nothing_is_written_outside_the_matrices(shape: tuple[int, int], rows: bool) -> None:
    """Weights, momentum and second moment lie between sentinels, which stay; the gradient is only read."""
    r, c = shape
    pad = 64

    def guarded(n: int) -> tuple[Tensor, Tensor]:
        whole = torch.full((n + 2 * pad,), 777.0)
        whole[pad : pad + n] = random(n, seed=n)
        return whole, whole[pad : pad + n]

    buffers = [guarded(r * c) for _ in range(3)] + [guarded(r)]
    w, g, m = (b[1].view(r, c) for b in buffers[:3])
    v = buffers[3][1].view(r, 1).abs_()
    before = g.clone()
    target = Target(w, g, m, v if rows else None, (1, 2, 2), 0.1)
    how = Update(0.05, 0.99, nesterov=True, cautious=False, advance=0.05, norm_eps=1e-10)
    old = w.clone()
    orthogonal_cpu.update([target], Iteration(((3.4445, -4.7750, 2.0315),) * 5, torch.float32), how)
    for whole, _ in buffers:
        assert bool((whole[:pad] == 777).all()) and bool((whole[-pad:] == 777).all())
    assert torch.equal(g, before) and not torch.equal(w, old) and bool(w.isfinite().all())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False},
    {"cautious": True, "weight_decay": 2.0},
    {"momentum": 0.5, "scale": "original", "coefficients": "polar5b"},
    {"form": "plain"},
    {"form": "gram"},
]


@compiled_only
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [Muon, NorMuon])
@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (50, 50)])
def test_a_compiled_step_is_the_written_out_step(
    kind: Any, options: dict[str, Any], shape: tuple[int, int], by_torch: Callable[[Callable[[], Any]], Any]
) -> None:
    """Five steps with a float32 iteration: weights and every state tensor agree to 1e-4 of the displacement."""
    check_steps(kind, {"lr": 0.02, "weight_decay": 0.5, **options}, shape, by_torch)


@compiled_only
@pytest.mark.parametrize(
    "options", [{"scale": "rms_exact"}, {"variant": "speedrun"}, {"beta2": 0.5, "eps": 1e-3}]
)
def test_normuon_options_reach_the_compiled_step(
    options: dict[str, Any], by_torch: Callable[[Callable[[], Any]], Any]
) -> None:
    """As above for the options that only NorMuon has."""
    check_steps(NorMuon, {"lr": 0.02, **options}, (80, 30), by_torch)


def check_steps(
    kind: Any,
    options: dict[str, Any],
    shape: tuple[int, int],
    by_torch: Callable[[Callable[[], Any]], Any],
) -> None:
    def run() -> list[Tensor]:
        p = Parameter(random(*shape, seed=9) * 0.1)
        optimizer = kind([{"params": [p], "blocks": 2}], iteration_dtype=torch.float32, **options)
        scales = torch.logspace(-1, 1, shape[0])[:, None]
        for t in range(5):
            p.grad = random(*shape, seed=t) * scales
            optimizer.step()
        state = optimizer.state[p]
        return [p.detach() - random(*shape, seed=9) * 0.1, *(state[k] for k in sorted(state))]

    ours, theirs = run(), by_torch(run)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-4


@compiled_only
def test_a_compiled_step_counts_as_a_change_of_the_weights() -> None:
    """Autograd refuses to use weights that a step has overwritten, as after any in-place operation."""
    p = Parameter(random(4, 6))
    loss = (p * p).sum()
    p.grad = random(4, 6, seed=1)
    Muon([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@compiled_only
def test_the_compiled_step_ignores_torchs_default_dtype() -> None:
    """NorMuon's second moments are float32 whatever the default, as its other state."""
    torch.set_default_dtype(torch.float64)
    try:
        p = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float32))
        optimizer = NorMuon([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.dtype for v in optimizer.state[p].values()} == {torch.float32}


def test_state_that_lies_otherwise_in_memory_is_still_advanced() -> None:
    """A loaded momentum need not be contiguous: the step then takes the other path, to the same weights."""
    torch.manual_seed(0)
    weights, moment, g = torch.randn(3, 6, 8).unbind()
    ps = [torch.nn.Parameter(weights.clone()) for _ in range(2)]
    optimizers = [Muon([p], iteration_dtype=torch.float32) for p in ps]
    layouts = [moment.clone(), moment.t().contiguous().t()]
    for optimizer, p, layout in zip(optimizers, ps, layouts, strict=True):
        optimizer.state[p]["momentum"] = layout
        p.grad = g.clone()
        optimizer.step()
    assert torch.allclose(layouts[0], layouts[1]) and not torch.allclose(layouts[1], moment)
    assert torch.allclose(ps[0], ps[1], atol=1e-6)


def test_wrong_tensors_are_refused() -> None:
    """Other dtypes, strides and shapes would be read as something else."""
    iteration, how = Iteration(((1.0, 0.0, 0.0),), torch.float32), Update(0.1, 1.0, True, False)
    w = torch.zeros(4, 6)
    for wrong in (torch.zeros(4, 6, dtype=torch.float64), torch.zeros(6, 4).mT, torch.zeros(5, 6)):
        with pytest.raises(ValueError, match="want contiguous float32|goes with weights"):
            orthogonal_cpu.update([Target(w, wrong, w, None, (1,), 0.1)], iteration, how)


@pytest.mark.parametrize("shape", [(20, 70), (70, 20), (49, 49)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_subtracts_what_orthogonalize_returns(
    shape: tuple[int, int], dtype: torch.dtype, either: str
) -> None:
    """From zero weights, without momentum, the step is -lr orth(g) to the last bit."""
    p = Parameter(torch.zeros(shape))
    p.grad = random(*shape)
    optimizer = Muon([p], lr=0.5, momentum=0.0, scale="none", iteration_dtype=dtype)
    optimizer.step()
    assert torch.equal(p.detach(), -0.5 * orthogonalize(random(*shape), dtype=dtype, form="auto").float())
