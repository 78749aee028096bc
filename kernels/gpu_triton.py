"""The operators of `ops` on CUDA and ROCm devices: which kernel runs for which settings.

Every function has the arguments of its definition in `reference_fused` and returns False, with nothing written, for a
case that it leaves to the definition. Imported on first use: without Triton the definition runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diloco.kernels import (
    codec_triton,
    decode_triton,
    orthogonal,
    orthogonalize_triton,
    outer_triton,
    topk_triton,
)
from diloco.kernels.settings import Settings
from diloco.kernels.stat_triton import MOST, accumulate_stat, encode_stat


def encode(
    s: Settings,
    x: Tensor,
    local: Tensor | None,
    error: Tensor | None,
    residual: Tensor | None,
    payload: Tensor,
    squared: Tensor,
    beta: float,
    seed: int | None,
) -> bool:
    """Pseudo-gradient, error feedback, encode, residual, squared norm."""
    if residual is not None and error is None:
        error = residual
    if residual is None:
        error = None
    if s.family in ("cast", "block"):
        return codec_triton.encode(s, x, local, error, residual, payload, squared, beta, seed)
    n = x.numel()
    if not n or payload.data_ptr() % 4 or (s.family == "topk" and s.block < 16):
        return False
    if s.family == "stat" and max(s.spans(n)) > MOST:
        return False
    e = x
    if local is not None or error is not None:
        e = torch.empty_like(x) if residual is None else residual
        codec_triton.gather(x, local, error, beta, e)
    elif residual is not None:
        e = residual.copy_(x)
    if s.family == "stat":
        norm = encode_stat(e, s.spans(n), s.bits, payload)
        if residual is not None:
            accumulate_stat(s, [payload], [-1.0], residual)
    else:
        norm = topk_triton.encode_topk(s, e, residual, payload)
    # 0 times infinity is NaN, the sign that the input was not finite.
    torch.add(norm, norm * 0.0, out=squared)
    return True


def decode_accumulate(s: Settings, payloads: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> bool:
    """``out += w*dec(p)`` for each in turn."""
    if s.family == "stat":
        accumulate_stat(s, list(payloads), list(weights), out)
    elif s.family == "topk" and s.block >= 16:
        topk_triton.accumulate_topk(s, list(payloads), list(weights), out)
    elif decode_triton.fits(s):
        decode_triton.decode_accumulate(s, list(payloads), list(weights), out)
    else:
        return False
    return True


def squared_norms(
    s: Settings, payloads: Sequence[Tensor], n: int, center: Tensor | None, out: Tensor
) -> bool:
    """``out[i] = sum (dec(p_i) - center)^2``, in fp64, the order of summation being this device's own."""
    if not decode_triton.fits(s):
        return False
    decode_triton.squared_norms(s, list(payloads), n, center, out)
    return True


def outer_step(
    s: Settings,
    rule: str,
    params: Tensor,
    mean: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    residual: Tensor | None,
    payload: Tensor | None,
    squared: Tensor | None,
    lr: float,
    momentum: float,
    mu_y: float,
    seed: int | None,
) -> bool:
    """Outer optimizer and requantised downlink."""
    return outer_triton.outer_step(
        s, rule, params, mean, first, second, residual, payload, squared, lr, momentum, mu_y, seed
    )


def merge(s: Settings, params: Tensor, payload: Tensor, alpha: float) -> bool:
    """``alpha*params + (1-alpha)*dec(payload)``."""
    if not decode_triton.fits(s):
        return False
    outer_triton.merge(s, params, payload, alpha)
    return True


def orthogonalize(
    G: Tensor,
    coefficients: Sequence[float],
    div: float,
    dtype: torch.dtype,
    eps: float,
    gram: bool,
    aol: bool,
) -> Tensor:
    """The iteration; float64 and wrong arguments go to `orthogonal`."""
    made = orthogonalize_triton.orthogonalize(G, coefficients, div, dtype, eps, gram, aol)
    return orthogonal.orthogonalize(G, coefficients, div, dtype, eps, gram, aol) if made is None else made
