"""The operators as a caller meets them: schemas, compilation, refusals, random numbers, life without a compiler."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import torch
from torch.library import opcheck

from diloco.comms import codec as codecs
from diloco.kernels import native, ops
from diloco.kernels.philox import uniform
from diloco.optim.orthogonalize import orthogonalize

N = 700
FLAGS: tuple[Any, ...] = ("int4", 256, 0, 0, [])


def some(seed: int = 0, n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def arguments() -> list[tuple[str, tuple[Any, ...]]]:
    payload, norm = ops.encode("int4", some())
    blank = payload.clone(), norm.clone()
    rates = (0.7, 0.9, 0.9, None)
    return [
        ("encode", (*FLAGS, some(1), some(2), None, some(3), *blank, 0.9, None)),
        ("encode", (*FLAGS, some(1), None, None, None, *blank, 1.0, 7)),
        ("decode_accumulate", (*FLAGS, [payload, payload.clone()], [0.5, 0.5], some(4))),
        ("squared_norms", (*FLAGS, [payload], N, some(5), torch.zeros(1, dtype=torch.float64))),
        ("trimmed_mean", (*FLAGS, [payload], 0, some(6))),
        (
            "outer_step",
            (*FLAGS, "gpa", some(1), some(2), some(3), some(4), some(5), *blank, *rates),
        ),
        ("outer_step", ("", 0, 0, 0, [], "sgd", some(1), some(2), *(None,) * 5, *rates)),
        ("merge", (*FLAGS, some(1).bfloat16(), payload, 0.5)),
        ("swap_lerp", (some(1), some(2), 0.3)),
        (
            "orthogonalize",
            (some(1, 48).view(1, 6, 8), [3.0, -4.0, 2.0], 1.0, torch.float32, 1e-7, False, False),
        ),
    ]


@pytest.mark.parametrize(("name", "given"), arguments(), ids=lambda v: v if isinstance(v, str) else "")
def test_operators_keep_to_their_schema(name: str, given: tuple[Any, ...]) -> None:
    """Torch's own checks: what is mutated is declared, fake tensors work, and AOT dispatch with dynamic shapes."""
    found = opcheck(getattr(torch.ops.diloco, name).default, given)
    assert set(found.values()) == {"SUCCESS"}


def test_a_round_compiles_into_one_graph_with_the_same_bits() -> None:
    """torch.compile(fullgraph) takes the operators, in-place writes included."""

    def a_round(x: torch.Tensor, local: torch.Tensor, left: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        payload, _ = ops.encode("e3m0", x, local, residual=left)
        ops.decode_accumulate("e3m0", [payload], [0.5], out)
        ops.outer_step("nesterov", out, x, [left], lr=0.7, momentum=0.9)
        ops.merge(out, x, 0.5)
        return ops.squared_norms("e3m0", [payload], x.numel())

    plain, compiled = [some(i) for i in range(4)], [some(i) for i in range(4)]
    want = a_round(*plain)
    got = torch.compile(a_round, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(want, got)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_philox_has_the_published_words() -> None:
    """Counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8 (Random123's known answers)."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert uniform(0, 0, 4).tolist() == [(word >> 8) * 2.0**-24 for word in words]
    assert torch.equal(uniform(3, 5, 9), uniform(3, 0, 14)[5:])


@pytest.mark.parametrize("name", ["int8", "e4m3", "e5m2", "e3m0", "e2m1", "nf4", "int4"])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """Over 4000 seeds the mean of the decoded values is the value, within five standard errors."""
    x = torch.tensor([1.0, 0.71, -0.3, 0.013, -0.0004, 0.5])
    total, squares, count = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), 4000
    for seed in range(count):
        out = torch.zeros(6)
        ops.decode_accumulate(name, [ops.encode(name, x, seed=seed).payload], [1.0], out)
        total += out
        squares += out.double().square()
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_(min=0).sqrt()
    assert bool(((mean - x).abs() <= 5 * deviation / count**0.5 + 1e-6).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.encode("int3", some()), "unknown codec 'int3'"),
        (lambda: ops.encode("int4", some().double()), "x must be a 1-D contiguous float32"),
        (lambda: ops.encode("int4", some(), some(1, 3)), "local has 3 values"),
        (lambda: ops.encode("int4", some(), error=some()), "error is given without residual"),
        (lambda: ops.encode("int4", some(), block=48), "block=48 must be a power of two"),
        (lambda: ops.encode("stat", some(), seed=1), "no stochastic rounding"),
        (lambda: ops.encode("stat", some(), groups=(3,)), "groups cover 3 values"),
        (lambda: ops.decode_accumulate("fp32", [some().view(torch.uint8)], [], some()), "0 weights"),
        (lambda: ops.decode_accumulate("int8", [torch.zeros(3).byte()], [1.0], some()), "has 3 bytes"),
        (lambda: ops.trimmed_mean("fp32", [some().view(torch.uint8)], 1, some()), "leaves nothing"),
        (lambda: ops.outer_step("adam", some(), some(), lr=1.0), "unknown outer rule 'adam'"),
        (lambda: ops.outer_step("sgdm", some(), some(), lr=1.0), "has 1 state tensors, got 0"),
        (lambda: ops.outer_step("sgd", some(), some(), lr=1.0, codec="int4"), "needs a residual"),
        (lambda: ops.merge(some().double(), some(), 0.5), "takes float32, bfloat16 and float16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    """The message names the argument and what it must be."""
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("form", ["plain", "gram"])
def test_orthogonalize_computes_the_optimizers_iteration(form: Literal["plain", "gram"]) -> None:
    """The operator takes flat coefficients; with those of a set it gives what `diloco.optim` gives, tall or wide."""
    triples = [(3.4445, -4.7750, 2.0315)] * 5
    flat = [c for triple in triples for c in triple]
    for G in (some(3, 2 * 9 * 16).view(2, 9, 16), some(4, 2 * 9 * 16).view(2, 9, 16).mT):
        want = orthogonalize(G, triples, dtype=torch.float32, form=form)
        got = ops.orthogonalize(G, flat, dtype=torch.float32, gram=form == "gram")
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_without_compiled_kernels_the_bytes_are_the_same_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine without a compiler takes part in a run: codecs, error feedback and all."""
    cases: list[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name in codecs.NAMES),
        ("stat", {"spans": (300, 1, N - 301)}),
    ]

    def everything() -> list[Any]:
        made: list[Any] = []
        for name, options in cases:
            codec = codecs.get(name, **options)
            feedback = codecs.ErrorFeedback(codec, 0.9)
            payloads = [codec.encode(some(1))]
            for seed in (2, 3):
                payloads.append(feedback.encode(some(seed)))
                feedback.commit()
            out = some(4)
            codec.decode_add_all(payloads, [0.3, 0.3, 0.4], out)
            made += [
                payloads,
                out,
                feedback.residual,
                codec.norm(payloads[0], N),
                codec.decode(payloads[1], N),
            ]
        return made

    with_kernels = everything()
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [])
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="diloco.kernels.native"):
            without = everything()
    finally:
        native.library.cache_clear()
    assert len(caplog.records) == 1 and "no compiled kernels" in caplog.text
    for a, b in zip(with_kernels, without, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
