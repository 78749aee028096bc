"""The compiled kernels compute the bits of their definition: any codec, size, value, instruction set, thread count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.kernels import cpu, native
from diloco.kernels import reference_fused as reference
from diloco.kernels.settings import Settings
from diloco.kernels.settings import settings as codec_settings

CODECS = [
    *(codec_settings(name) for name in ("fp32", "fp16", "bf16")),
    *(
        codec_settings(name, block)
        for name in ("int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4")
        for block in (2, 32, 256, 8192)
    ),
    *(codec_settings("stat", bits=bits) for bits in (2, 4, 8)),
    codec_settings("topk", 64, k=4),
    codec_settings("topk", 4096, bits=4, k=10),
]
# Around the sizes of a code pair, a block, a partial sum and a tile.
SIZES = (0, 1, 2, 3, 31, 33, 255, 256, 257, 1023, 1025, 2047, 2048, 2049, 4097, 8191, 10_001)
KINDS = ("wide", "tiny", "huge", "denormal", "zeros", "mixed", "constant")
GUARD = 64

codecs, sizes, kinds = st.sampled_from(CODECS), st.sampled_from(SIZES), st.sampled_from(KINDS)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=20, deadline=None)

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels in this environment")
LEVELS = pytest.mark.parametrize("level", range(native.level() + 1))


def sample(n: int, seed: int, kind: str) -> Tensor:
    """Values over many magnitudes with zeros and ties among them; huge ones leave room for a sum of four."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp(3 * torch.randn(n, generator=generator))
    x = torch.where(torch.rand(n, generator=generator) < 0.3, (x * 4).round() / 4, x)
    x[torch.rand(n, generator=generator) < 0.1] = 0.0
    match kind:
        case "tiny":
            return x * 1e-30
        case "huge":
            return (x * 1e30).clamp_(-5e37, 5e37)
        case "denormal":
            return x * 1e-42
        case "zeros":
            return torch.where(torch.rand(n, generator=generator) < 0.5, -0.0, 0.0)
        case "mixed":
            return x * torch.tensor([1e-38, 1.0, 1e15])[torch.arange(n) // 700 % 3]
        case "constant":
            return torch.full((n,), 0.1)
    return x


@contextmanager
def machine(level: int, threads: int = 1) -> Iterator[None]:
    """The instruction set and the number of threads to use; each thread is content with one tile."""
    before, per_thread, count = native.level, native.PER_THREAD, torch.get_num_threads()
    native.level = lambda: level  # type: ignore[assignment]
    native.PER_THREAD = 1
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        native.level, native.PER_THREAD = before, per_thread
        torch.set_num_threads(count)


def guarded(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy between bands of a pattern, at an odd address if it is bytes, and the check that these still stand."""
    around = torch.full((tensor.numel() + 2 * GUARD + 1,), 77, dtype=tensor.dtype)
    start = GUARD + (1 if tensor.dtype == torch.uint8 else 0)
    inside = around[start : start + tensor.numel()].copy_(tensor)

    def check() -> None:
        assert bool((around[:start] == 77).all()) and bool((around[start + tensor.numel() :] == 77).all())

    return inside, check


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, the sign of zero included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def agree(
    define: Callable[..., Any], fast: Callable[..., Any], *written: Tensor | None
) -> list[Tensor | None]:
    """Run both on copies of `written`, compare every one, and return the result."""
    wanted = [None if t is None else t.clone() for t in written]
    define(*wanted)
    made, checks = [], []
    for tensor in written:
        inside, check = (None, None) if tensor is None else guarded(tensor)
        made.append(inside)
        checks.append(check)
    assert fast(*made) is True
    for want, got, check in zip(wanted, made, checks, strict=True):
        if want is not None and got is not None and check is not None:
            assert same(want, got)
            check()
    return wanted


def payload_of(s: Settings, x: Tensor) -> Tensor:
    payload = torch.empty(s.size(x.numel()), dtype=torch.uint8)
    reference.encode(s, x, None, None, None, payload, torch.empty(1, dtype=torch.float64), 1.0, None)
    return payload


def payloads_of(s: Settings, n: int, seed: int, kind: str, count: int) -> list[Tensor]:
    """Payloads at odd addresses, as they lie in a frame."""
    return [guarded(payload_of(s, sample(n, seed + w, kind)))[0] for w in range(count)]


@LEVELS
@quick
@given(
    s=codecs,
    n=sizes,
    seed=seeds,
    kind=kinds,
    fed=st.sampled_from(("no", "in place", "two")),
    local=st.booleans(),
)
def test_encode_has_the_bytes_the_residual_and_the_norm_of_its_definition(
    level: int, s: Settings, n: int, seed: int, kind: str, fed: str, local: bool
) -> None:
    """Payload, residual and squared norm are equal bit for bit, and nothing is written beside them."""
    x = sample(n, seed, kind)
    other = sample(n, seed + 1, kind) if local else None
    error = sample(n, seed + 2, kind) if fed == "two" else None
    residual = None if fed == "no" else sample(n, seed + 2, kind)
    blank = torch.full((s.size(n),), 255, dtype=torch.uint8)
    squared = torch.zeros(1, dtype=torch.float64)
    with machine(level):
        agree(
            lambda r, p, q: reference.encode(s, x, other, error, r, p, q, 0.95, None),
            lambda r, p, q: cpu.encode(s, x, other, error, r, p, q, 0.95, None),
            residual,
            blank,
            squared,
        )


@pytest.mark.parametrize("s", CODECS, ids=lambda s: f"{s.codec}-{s.block}-{s.bits}")
def test_beyond_one_slice_of_the_definition_nothing_changes(s: Settings) -> None:
    """More values than the definition works on at a time, which is where its sums are cut."""
    x = sample(131_149, 5, "wide")
    blank = torch.full((s.size(x.numel()),), 255, dtype=torch.uint8)
    with machine(native.level(), 2):
        agree(
            lambda r, p, q: reference.encode(s, x, None, None, r, p, q, 1.0, None),
            lambda r, p, q: cpu.encode(s, x, None, None, r, p, q, 1.0, None),
            torch.zeros_like(x),
            blank,
            torch.zeros(1, dtype=torch.float64),
        )


@LEVELS
@quick
@given(s=st.sampled_from(CODECS[3:31]), n=sizes, seed=seeds, kind=kinds)
def test_stochastic_rounding_draws_the_numbers_of_its_definition(
    level: int, s: Settings, n: int, seed: int, kind: str
) -> None:
    """The draw depends on seed and place only, so that the bytes are equal here too."""
    assert s.family == "block"
    x = sample(n, seed, kind)
    blank = torch.full((s.size(n),), 255, dtype=torch.uint8)
    squared = torch.zeros(1, dtype=torch.float64)
    key = seed * 0x9E3779B97F4A7C15 % 2**63
    with machine(level):
        agree(
            lambda p, q: reference.encode(s, x, None, None, None, p, q, 1.0, key),
            lambda p, q: cpu.encode(s, x, None, None, None, p, q, 1.0, key),
            blank,
            squared,
        )


@LEVELS
@quick
@given(s=codecs, n=sizes, seed=seeds, kind=kinds, count=st.integers(1, 5), data=st.data())
def test_every_reader_of_payloads_agrees_with_its_definition(
    level: int, s: Settings, n: int, seed: int, kind: str, count: int, data: st.DataObject
) -> None:
    """Weighted sum, squared norms, trimmed mean: equal bit for bit."""
    parts = payloads_of(s, n, seed, kind, count)
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    trim = data.draw(st.integers(0, (count - 1) // 2))
    center = data.draw(st.sampled_from((None, sample(n, seed + 9, kind))))
    out = sample(n, seed + 8, kind)
    norms = torch.zeros(count, dtype=torch.float64)
    with machine(level):
        agree(
            lambda o: reference.decode_accumulate(s, parts, weights, o),
            lambda o: cpu.decode_accumulate(s, parts, weights, o),
            out,
        )
        agree(
            lambda o: reference.squared_norms(s, parts, n, center, o),
            lambda o: cpu.squared_norms(s, parts, n, center, o),
            norms,
        )
        agree(
            lambda o: reference.trimmed_mean(s, parts, trim, o),
            lambda o: cpu.trimmed_mean(s, parts, trim, o),
            out,
        )


@LEVELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@quick
@given(s=codecs, n=sizes, seed=seeds, kind=kinds, alpha=st.sampled_from((0.0, 1.0, 0.5, 0.3)))
def test_merge_rounds_as_its_definition_does(
    level: int, dtype: torch.dtype, s: Settings, n: int, seed: int, kind: str, alpha: float
) -> None:
    """Parameters of each dtype take the decoded value with the same bits, overflow to infinity included."""
    params = sample(n, seed + 5, "wide").clamp_(-6e4, 6e4).to(dtype)
    payload = payloads_of(s, n, seed, kind, 1)[0]
    with machine(level):
        agree(
            lambda p: reference.merge(s, p, payload, alpha),
            lambda p: cpu.merge(s, p, payload, alpha),
            params,
        )


@LEVELS
@pytest.mark.parametrize("rule", ["sgd", "sgdm", "nesterov", "gpa"])
@quick
@given(s=codecs, n=sizes, seed=seeds, kind=kinds, sends=st.booleans())
def test_the_outer_step_agrees_with_its_definition(
    level: int, rule: str, s: Settings, n: int, seed: int, kind: str, sends: bool
) -> None:
    """Parameters, state and, with a codec, payload, residual and norm: equal bit for bit."""
    params, mean, first, second, left = (sample(n, seed + i, kind) for i in range(5))
    blank = torch.full((s.size(n),), 255, dtype=torch.uint8)
    rates = (0.7, 0.9, 0.8, None)
    with machine(level):
        agree(
            lambda p, b, z, r, y, q: reference.outer_step(s, rule, p, mean, b, z, r, y, q, *rates),
            lambda p, b, z, r, y, q: cpu.outer_step(s, rule, p, mean, b, z, r, y, q, *rates),
            params,
            None if rule == "sgd" else first,
            second if rule == "gpa" else None,
            left if sends else None,
            blank if sends else None,
            torch.zeros(1, dtype=torch.float64) if sends else None,
        )


@LEVELS
@pytest.mark.parametrize("codec", ["e3m0", "int4", "int8"])
@quick
@given(seed=seeds)
def test_quotients_next_to_a_limit_round_as_defined(level: int, codec: str, seed: int) -> None:
    """Blocks full of values within three units in the last place of where a code changes, for scales of any mantissa."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.rand(64, 1, generator=generator) * 1e3 + 1e-3
    if codec == "e3m0":
        at = torch.tensor([*(0.75 * 2.0**-k for k in range(7)), 2.0**-7])
        near = largest * at[torch.randint(0, 8, (64, 256), generator=generator)]
    else:
        top = 127 if codec == "int8" else 7
        near = largest / top * (torch.randint(0, top, (64, 256), generator=generator) + 0.5)
    bits = near.view(torch.int32) + torch.randint(-3, 4, (64, 256), generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32) * (torch.randint(0, 2, (64, 256), generator=generator) * 2 - 1)
    x[:, 0] = largest[:, 0]
    s, flat = codec_settings(codec, 256), x.flatten()
    with machine(level):
        agree(
            lambda y, q: reference.encode(s, flat, None, None, None, y, q, 1.0, None),
            lambda y, q: cpu.encode(s, flat, None, None, None, y, q, 1.0, None),
            torch.full((s.size(flat.numel()),), 255, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.float64),
        )


@LEVELS
@pytest.mark.parametrize("threads", [1, 2])
@quick
@given(n=sizes, seed=seeds, kind=kinds, weight=st.sampled_from((-0.5, 0.0, 0.3, 0.5, 0.9967, 1.0, 1.7)))
def test_swapping_with_a_mean_agrees_with_its_definition(
    level: int, threads: int, n: int, seed: int, kind: str, weight: float
) -> None:
    """Both tensors, also for the weights that only copy and that lie outside of [0, 1]."""
    a, b = sample(n, seed, kind), sample(n, seed + 1, kind)
    with machine(level, threads):
        agree(lambda a, b: reference.swap_lerp(a, b, weight), lambda a, b: cpu.swap_lerp(a, b, weight), a, b)


@pytest.mark.parametrize("s", CODECS, ids=lambda s: f"{s.codec}-{s.block}-{s.bits}")
def test_the_number_of_threads_changes_no_bit(s: Settings) -> None:
    """Two and three threads write what one writes."""
    n = 131_072 * 2 + 77 if s.family == "stat" else 8192 * 3 + 77
    x, local = sample(n, 1, "wide"), sample(n, 2, "wide")
    runs = []
    for threads in (1, 2, 3):
        residual, out, median = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        payload, squared = torch.zeros(s.size(n), dtype=torch.uint8), torch.zeros(1, dtype=torch.float64)
        params, momentum = x.clone(), local.clone()
        with machine(native.level(), threads):
            cpu.encode(s, x, local, None, residual, payload, squared, 1.0, None)
            cpu.decode_accumulate(s, [payload] * 2, [0.5, 0.25], out)
            cpu.trimmed_mean(s, [payload] * 3, 1, median)
            cpu.outer_step(s, "nesterov", params, x, momentum, *(None,) * 4, 0.7, 0.9, 0.0, None)
            cpu.merge(s, params, payload, 0.5)
        runs.append((residual, payload, squared, out, median, params, momentum))
    for other in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("s", CODECS, ids=lambda s: f"{s.codec}-{s.block}-{s.bits}")
def test_what_is_not_finite_has_no_norm(s: Settings) -> None:
    """The squared norm is NaN wherever the value stands: at either end of a tile, in the last block."""
    cases = [(at, bad) for at in (0, 2047, 2048, 4099) for bad in (math.nan, math.inf, -math.inf)]
    for i, (at, bad) in enumerate(cases):
        x = torch.ones(4100)
        x[at] = bad
        squared = torch.zeros(1, dtype=torch.float64)
        with machine(i % (native.level() + 1), 2):
            cpu.encode(
                s, x, None, None, None, torch.zeros(s.size(4100), dtype=torch.uint8), squared, 1.0, None
            )
        assert math.isnan(float(squared))


@LEVELS
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "e4m3", "e5m2"])
def test_codes_that_are_no_numbers_are_found_wherever_they_stand(level: int, name: str) -> None:
    """All 256 bytes (or all 16-bit patterns) are judged as torch judges the values they stand for."""
    s = codec_settings(name)
    codes = torch.arange(256 if name.startswith("e") else 1 << 16, dtype=torch.int32)
    with machine(level):
        for code in [
            *codes[:: max(1, codes.numel() // 256)].tolist(),
            0x7C00,
            0x7BFF,
            0x7F80,
            0x7F7F,
            0xFF80,
        ]:
            payload = payload_of(s, torch.ones(5000))
            if name.startswith("e"):
                code &= 255
                value = torch.tensor([code], dtype=torch.uint8).view(
                    torch.float8_e4m3fn if name == "e4m3" else torch.float8_e5m2
                )
                payload[-1] = code
            else:
                dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
                raw = torch.tensor([code << 16 if name == "fp32" else code], dtype=torch.int64)
                value = raw.view(torch.uint8)[: dtype.itemsize].view(dtype)
                payload[-dtype.itemsize :] = value.view(torch.uint8)
            assert cpu.holds_numbers_only(s, payload, 5000) is bool(torch.isfinite(value.float()).all())
