# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton's kernels against the definition, in Triton's interpreter. Run by `test_triton_interpreter` in its own process.

Outputs lie between guard bands and programs run in shuffled order, so that a stray write or one program reading what
another writes shows.
"""

from __future__ import annotations

import math
import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1 before Python starts: Triton reads it when it is imported")

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.kernels import gpu_triton, md_triton, normuon_triton, orthogonal, products_triton
from diloco.kernels import reference_fused as reference
from diloco.kernels.cases_triton import YOU5, Case, cases
from diloco.kernels.launch_triton import SPAN
from diloco.kernels.reference_blocks import DIVISOR, levels, magnitudes
from diloco.kernels.settings import Settings
from diloco.kernels.settings import settings as codec_settings
from tests.triton_interpreter import Guarded, installed, shuffled, unrepaired

torch.set_num_threads(1)

BLOCK_CODECS = list(DIVISOR)
CASTS = ["fp32", "fp16", "bf16"]
# Without shrinking: in the interpreter it takes minutes.
EXAMPLES = settings(
    max_examples=6, deadline=None, database=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
# Around the ends of blocks and spans, where masks matter.
SIZES = st.integers(1, 2 * SPAN + 300) | st.sampled_from(
    [1, 2, 255, 256, 257, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN]
)
SEEDS = st.integers(0, 2**63 - 1)


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with installed(), shuffled(7):
        yield


def numbers(n: int, seed: int) -> Tensor:
    """Values of very different size, blocks of zeros, of 1e30, of 1e-30, of subnormals, and signed zeros."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(3).exp()
    for i, factor in enumerate((0.0, 1e30, 1e-30, 1e-42, -0.0)):
        x[256 * (i + 1) : 256 * (i + 1) + 200] *= factor
    return x


def encoded(
    s: Settings, x: Tensor, local: Tensor | None, error: Tensor | None, beta: float, seed: int | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Payload, residual and squared norm of the kernel and of the definition."""
    n, guarded = x.numel(), Guarded()
    made = []
    for function in (gpu_triton.encode, reference.encode):
        payload, squared = guarded.empty(s.size(n), torch.uint8), guarded.empty(1, torch.float64)
        residual = None if error is None else guarded.copy(error)
        function(s, x, local, None, residual, payload, squared, beta, seed)
        made.append((payload, squared) if residual is None else (payload, squared, residual))
    assert guarded.intact()
    return made[0], made[1]


@pytest.mark.parametrize("codec", [*BLOCK_CODECS, *CASTS])
@EXAMPLES
@given(n=SIZES, seed=SEEDS, plain=st.booleans())
def test_encode_makes_the_bytes_of_the_definition(codec: str, n: int, seed: int, plain: bool) -> None:
    """Payload and residual are equal to the bit, the squared norm to rounding, with and without error feedback."""
    s = codec_settings(codec)
    local, error = (None, None) if plain else (numbers(n, seed + 1), numbers(n, seed + 2))
    ours, wanted = encoded(s, numbers(n, seed), local, error, 0.95, None)
    assert torch.equal(ours[0], wanted[0])
    assert plain or torch.equal(ours[2], wanted[2])
    torch.testing.assert_close(ours[1], wanted[1], rtol=1e-6, atol=1e-300)


@pytest.mark.parametrize("codec", BLOCK_CODECS)
@EXAMPLES
@given(n=SIZES, seed=SEEDS)
def test_stochastic_rounding_draws_what_the_definition_draws(codec: str, n: int, seed: int) -> None:
    """The same Philox number for the same place, the same choice, hence the same bytes; seeds use all 63 bits."""
    ours, wanted = encoded(codec_settings(codec), numbers(n, seed), None, numbers(n, seed + 1), 1.0, seed)
    assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[2], wanted[2])


@pytest.mark.parametrize(
    ("codec", "block"), [("e2m1", 32), ("int8", 2), ("int4", 4096), ("nf4", 1024), ("e4m3", 8)]
)
def test_blocks_of_other_sizes_are_encoded_alike(codec: str, block: int) -> None:
    """From two values to the most one program holds; a span is never shorter than a block."""
    ours, wanted = encoded(codec_settings(codec, block), numbers(5001, 3), None, numbers(5001, 4), 0.9, None)
    assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[2], wanted[2])


def test_a_block_too_large_for_a_program_is_left_to_the_definition() -> None:
    """False, and nothing written."""
    s = codec_settings("int8", 8192)
    payload, squared = torch.zeros(s.size(9000), dtype=torch.uint8), torch.zeros(1, dtype=torch.float64)
    assert gpu_triton.encode(s, numbers(9000, 0), None, None, None, payload, squared, 1.0, None) is False
    assert not payload.any() and not gpu_triton.decode_accumulate(s, [payload], [1.0], torch.zeros(9000))


@pytest.mark.parametrize("codec", BLOCK_CODECS)
def test_every_tie_is_rounded_as_in_the_definition(codec: str) -> None:
    """All middles between levels and the fp32 numbers next to them, of both signs, at scale 1."""
    level = torch.tensor(levels(codec) if codec in ("nf4", "int4") else signed_levels(codec)).sort().values
    middle = (level[1:].double() + level[:-1].double()).div(2).float()
    near = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (-math.inf, math.inf)]
    x = torch.cat((level, middle, *near))
    x = torch.nn.functional.pad(x, (0, -x.numel() % 255)).view(-1, 255)
    # The largest level first in each block makes its scale 1.
    x = torch.cat((torch.full((x.shape[0], 1), DIVISOR[codec]), x), dim=1).reshape(-1)
    ours, wanted = encoded(codec_settings(codec, 256), x, None, None, 1.0, None)
    assert torch.equal(ours[0], wanted[0])


def signed_levels(codec: str) -> list[float]:
    positive = [float(v) for v in range(128)] if codec == "int8" else magnitudes(codec)
    return [-v for v in positive[1:]] + positive


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("codec", [*BLOCK_CODECS, *CASTS, "stat", "topk"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_makes_the_norm_nan(codec: str, bad: float) -> None:
    """One such value among thousands: the caller sees it in the norm and sends nothing."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    x[4321] = bad
    s = codec_settings(codec)
    payload, squared = torch.empty(s.size(5000), dtype=torch.uint8), torch.zeros(1, dtype=torch.float64)
    gpu_triton.encode(s, x, None, None, None, payload, squared, 1.0, None)
    assert math.isnan(float(squared))


@pytest.mark.parametrize("codec", [*BLOCK_CODECS, *CASTS])
@EXAMPLES
@given(n=SIZES, seed=SEEDS, workers=st.integers(1, 5), offset=st.integers(0, 3))
def test_payloads_are_summed_in_their_order(codec: str, n: int, seed: int, workers: int, offset: int) -> None:
    """Equal to the bit to W separate additions, for payloads at any alignment; the norms to rounding."""
    s, guarded = codec_settings(codec), Guarded()
    payloads = []
    for w in range(workers):
        payload = reference.encode_values(s, numbers(n, seed + w))
        moved = torch.zeros(payload.numel() + offset, dtype=torch.uint8)
        moved[offset:] = payload
        # A view into fp16 memory must be even.
        payloads.append(moved[offset:])
    weights = [(w + 1) / 7 for w in range(workers)]
    ours, wanted = guarded.copy(numbers(n, seed + 9)), numbers(n, seed + 9)
    gpu_triton.decode_accumulate(s, payloads, weights, ours)
    reference.decode_accumulate(s, payloads, weights, wanted)
    assert torch.equal(ours, wanted) and guarded.intact()
    norms = [torch.empty(workers, dtype=torch.float64) for _ in range(2)]
    gpu_triton.squared_norms(s, payloads, n, wanted, norms[0])
    reference.squared_norms(s, payloads, n, wanted, norms[1])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", ["sgd", "sgdm", "nesterov", "gpa"])
@pytest.mark.parametrize("codec", [None, *BLOCK_CODECS])
@settings(EXAMPLES, max_examples=2)
@given(n=SIZES, seed=SEEDS, stochastic=st.booleans())
def test_an_outer_step_moves_state_parameters_and_downlink_alike(
    rule: str, codec: str | None, n: int, seed: int, stochastic: bool
) -> None:
    """Parameters, state, residual and payload are equal to the bit; with a codec params move by what is sent."""
    s, guarded = codec_settings(codec or "fp32"), Guarded()
    start = [numbers(n, seed + k).clamp(-1e20, 1e20) for k in range(5)]
    made = []
    for function in (gpu_triton.outer_step, reference.outer_step):
        params, mean, first, second, residual = (guarded.copy(t) for t in start)
        kept = (first if rule != "sgd" else None, second if rule == "gpa" else None)
        payload, squared = guarded.empty(s.size(n), torch.uint8), guarded.empty(1, torch.float64)
        sent = (residual, payload, squared) if codec else (None, None, None)
        draw = seed if stochastic and codec else None
        function(s, rule, params, mean, *kept, *sent, 0.7, 0.9, 0.8, draw)  # type: ignore[call-arg]
        made.append((params, first, second, residual, *(() if codec is None else (payload,))))
    assert guarded.intact()
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8", "e2m1", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_merge_rounds_once(codec: str, dtype: torch.dtype, alpha: float) -> None:
    """Equal to the bit for each parameter type, and exact at both ends."""
    s, guarded = codec_settings(codec), Guarded()
    payload = reference.encode_values(s, numbers(5001, 1).clamp(-3e4, 3e4))
    ours, wanted = guarded.copy(torch.randn(5001).to(dtype)), torch.empty(5001, dtype=dtype)
    wanted.copy_(ours)
    gpu_triton.merge(s, ours, payload, alpha)
    reference.merge(s, wanted, payload, alpha)
    assert torch.equal(ours, wanted) and guarded.intact()


@EXAMPLES
@given(
    seed=SEEDS, bits=st.sampled_from([2, 4, 8]), groups=st.lists(st.integers(1, 5000), min_size=1, max_size=4)
)
def test_stat_has_the_codes_of_the_definition(seed: int, bits: int, groups: list[int]) -> None:
    """Constants to one rounding; codes equal but where a value lies on the edge of a bin; residual sums to the input."""
    n, count = sum(groups), 4 * len(groups) * (1 + (1 << bits))
    s = codec_settings("stat", bits=bits, groups=tuple(groups))
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed % 2**31))
    x[: groups[0]] = 0.1 if seed % 2 else x[: groups[0]]
    ours, wanted = encoded(s, x, None, torch.zeros(n), 1.0, None)
    constants = [p[0][:count].clone().view(torch.float32) for p in (ours, wanted)]
    torch.testing.assert_close(constants[0], constants[1], rtol=2e-7, atol=1e-7)
    assert int((ours[0][count:] != wanted[0][count:]).sum()) <= 1
    torch.testing.assert_close(ours[2] + reference.dense(s, ours[0], n), x, rtol=1e-6, atol=1e-6)


@EXAMPLES
@given(seed=SEEDS, n=st.integers(1, 9000), shape=st.sampled_from([(4096, 64), (256, 6), (16, 16), (64, 2)]))
def test_topk_keeps_what_the_definition_keeps(seed: int, n: int, shape: tuple[int, int]) -> None:
    """The same indices, ties to the lower one; the sum of payloads is equal to the bit."""
    s = codec_settings("topk", block=shape[0], k=shape[1], bits=4)
    n = min(n, 12 * shape[0])
    # Few distinct values, so that ties are everywhere.
    x = torch.randint(-6, 7, (n,), generator=torch.Generator().manual_seed(seed % 2**31)).float()
    ours, wanted = encoded(s, x, None, torch.zeros(n), 1.0, None)
    assert torch.equal(ours[0][: -4 * 17], wanted[0][: -4 * 17]) or torch.equal(ours[0], wanted[0])
    torch.testing.assert_close(ours[2], wanted[2], rtol=0, atol=1e-6)
    guarded = Guarded()
    sums = [guarded.copy(numbers(n, seed)) for _ in range(2)]
    for function, out in zip((gpu_triton.decode_accumulate, reference.decode_accumulate), sums, strict=True):
        function(s, [wanted[0], ours[0]], [0.25, 0.75], out)
    assert torch.equal(*sums) and guarded.intact()


def test_nothing_is_encoded_to_nothing() -> None:
    """n = 0 is a payload of no bytes with norm 0, for every codec."""
    for codec in (*BLOCK_CODECS, *CASTS):
        ours, _ = encoded(codec_settings(codec), torch.empty(0), None, torch.empty(0), 1.0, None)
        assert ours[0].numel() == 0 and float(ours[1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "count"), [(77, 83, 3), (64, 16, 1), (129, 40, 1)])
def test_a_symmetric_product_is_symmetric_and_as_exact_as_torch(
    dtype: torch.dtype, n: int, k: int, count: int
) -> None:
    """``a x x^T + b d`` for odd sizes: mirrored to the bit, error against float64 no larger than torch's own."""
    guarded = Guarded()
    x = torch.randn(count, n, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    d = torch.bmm(x, x.mT)
    c = guarded.empty(count * n * n, dtype).view(count, n, n)
    products_triton.symmetric_product(x, x, d, c, -0.7, 0.3)
    exact = -0.7 * (x.double() @ x.double().mT) + 0.3 * d.double()
    own = torch.baddbmm(d, x, x.mT, beta=0.3, alpha=-0.7)
    assert torch.equal(c, c.mT) and guarded.intact()
    assert float((c.double() - exact).norm()) <= 1.1 * float((own.double() - exact).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_product_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    """``B X + a X`` for odd sizes and a batch."""
    guarded, generator = Guarded(), torch.Generator().manual_seed(2)
    b, x = (torch.randn(2, 70, m, generator=generator).to(dtype) for m in (70, 101))
    c = guarded.empty(2 * 70 * 101, dtype).view(2, 70, 101)
    products_triton.plain_product(b, x, x, c, 1.0, 3.5)
    exact = b.double() @ x.double() + 3.5 * x.double()
    own = torch.baddbmm(x, b, x, beta=3.5)
    assert guarded.intact()
    assert float((c.double() - exact).norm()) <= 1.1 * float((own.double() - exact).norm())


def test_places_of_the_triangle_are_each_visited_once() -> None:
    """Rows and columns from a place alone, exact up to a million tiles in spite of the approximate root."""
    places = torch.tensor(
        [0, 1, 2, 3, 5, 6, 499_999, 500_499, 500_500, 1_000_404, 1_000_405], dtype=torch.int32
    )
    rows, columns = torch.empty_like(places), torch.empty_like(places)
    _triangle_kernel[(1,)](places, rows, columns, places.numel(), SIZE=16)
    for p, i, j in zip(places.tolist(), rows.tolist(), columns.tolist(), strict=True):
        assert i * (i + 1) // 2 + j == p and 0 <= j <= i


@triton.jit
def _triangle_kernel(places, rows, columns, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    i, j = products_triton.triangle(tl.load(places + at, mask=at < n, other=0))
    tl.store(rows + at, i, mask=at < n)
    tl.store(columns + at, j, mask=at < n)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("aol", [False, True])
@pytest.mark.parametrize("shape", [(40, 70), (2, 90, 33), (17, 17)])
def test_the_iteration_is_that_of_the_definition(gram: bool, aol: bool, shape: tuple[int, ...]) -> None:
    """Wide, tall, square and stacked matrices in fp32: within 1e-5 of float64, contiguous, the input untouched."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    before = G.clone()
    made = gpu_triton.orthogonalize(G, YOU5, 1.01, torch.float32, 1e-7, gram, aol)
    exact = orthogonal.orthogonalize(G.double(), YOU5, 1.01, torch.float64, 1e-7, gram, aol)
    assert made.shape == G.shape and made.is_contiguous() and torch.equal(G, before)
    assert float((made.double() - exact).norm() / exact.norm()) < 1e-5


def test_a_zero_matrix_stays_zero() -> None:
    """Without a NaN, also for eps 0."""
    for eps in (0.0, 1e-7):
        made = gpu_triton.orthogonalize(torch.zeros(20, 30), YOU5[:3], 1.0, torch.float16, eps, False, False)
        assert not made.any()


CASES = list(cases("cpu", 5003, 64))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.config}")
def test_every_shipped_case_agrees_with_plain_torch(case: Case) -> None:
    """The jobs that a GPU is timed with give, interpreted, what torch gives, within the limit they state."""
    case.run()
    case.torch()
    assert case.difference() <= case.limit


def test_wrong_shapes_are_refused() -> None:
    """The fused optimizer steps name what does not fit."""
    p = torch.zeros(1, 4, 6)
    with pytest.raises(ValueError, match="want"):
        normuon_triton.normuon_step(p, p, torch.zeros(1, 5, 1), lr=1, decay=0, beta2=0, eps=0, target=1)
    with pytest.raises(ValueError, match="differ"):
        md_triton.md_split(p, p, torch.ones(1, 4, 1), torch.ones(1, 1, 5))


@triton.jit
def _bf16_kernel(x, y, z, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    v = tl.load(x + at)
    tl.store(y + at, tl.dot(v.to(tl.bfloat16), v.to(tl.bfloat16)))
    tl.store(z + at, v.to(tl.bfloat16))


def test_the_interpreter_still_needs_its_repairs() -> None:
    """Unrepaired it multiplies bf16 bit patterns and truncates; once this fails, `tests/triton_interpreter.py` can go."""
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(4))
    y, z = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    _bf16_kernel[(1,)](x, y, z, SIDE=16)
    half = x.bfloat16()
    torch.testing.assert_close(y, half.float() @ half.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(z, half)
    with unrepaired():
        _bf16_kernel[(1,)](x, y, z, SIDE=16)
    assert float((y - half.float() @ half.float()).abs().max()) > 1e3
    assert not torch.equal(z, half)
