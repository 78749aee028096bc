"""The kernels as torch operators: what callers use. How they are registered is in `operators`.

Every operator works on flat contiguous tensors and writes into tensors that the caller gives; the functions here make
those tensors and check shapes. What an operator computes is defined in `reference_fused`; `cpu` does the same with one
C++ file, `gpu_triton` on CUDA and ROCm devices. A codec's results are equal bit for bit on every path, except that
`stat` (and the values of `topk`) may differ in the last bit of a table on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import diloco.kernels.operators  # noqa: F401  (registers them)
from diloco.kernels.settings import Settings, settings

__all__ = [
    "Encoded",
    "decode_accumulate",
    "encode",
    "merge",
    "orthogonalize",
    "outer_step",
    "squared_norms",
    "swap_lerp",
    "trimmed_mean",
]

RULES = ("sgd", "sgdm", "nesterov", "gpa")


class Encoded(NamedTuple):
    """`payload`: uint8 [size]. `squared_norm`: fp64 [1], sum of dec(payload)^2, NaN if the input was not finite."""

    payload: Tensor
    squared_norm: Tensor


def encode(
    codec: str,
    x: Tensor,
    local: Tensor | None = None,
    *,
    error: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    block: int | None = None,
    bits: int | None = None,
    k: int | None = None,
    groups: Sequence[int] = (),
    seed: int | None = None,
) -> Encoded:
    """Pseudo-gradient, error feedback, scale, quantise, pack, residual and squared norm in one pass.

    ``D = x - local`` (or x alone);  ``e = beta*error + D``;  ``payload = enc(e)``;  ``residual <- e - dec(payload)``.

    Args:
        codec: a name of `diloco.kernels.settings.CODECS`; `block`, `bits`, `k`, `groups` as `settings` has them.
        x: fp32 [n]; the anchor where `local` is given.
        local: fp32 [n].
        error: fp32 [n], the residual before. Without it and with `residual`, `residual` is read, then overwritten.
        residual: fp32 [n], written. Without it nothing is fed back and `error` must be absent too. Its content is
            undefined if the input was not finite.
        seed: rounds stochastically (block codecs only): up with the probability that makes the result unbiased. The
            draw of value i is word i%4 of Philox4x32-10 with key `seed` (64 bits) and counter i//4, its top 24 bits.

    A NaN or infinity in e makes `squared_norm` NaN and the payload meaningless: look before you send.
    Raises ValueError for shapes, dtypes or settings that do not fit.
    """
    chosen = settings(codec, block, bits, k, tuple(groups))
    n = _flat("x", x)
    _like("local", local, n, x.device)
    _like("error", error, n, x.device)
    _like("residual", residual, n, x.device)
    if error is not None and residual is None:
        raise ValueError("error is given without residual: error feedback needs a place for what is left")
    if seed is not None and chosen.family != "block":
        raise ValueError(f"codec {codec} has no stochastic rounding; the block codecs have")
    payload = torch.empty(_size(chosen, n), dtype=torch.uint8, device=x.device)
    squared_norm = torch.empty(1, dtype=torch.float64, device=x.device)
    torch.ops.diloco.encode(*_flags(chosen), x, local, error, residual, payload, squared_norm, beta, seed)
    return Encoded(payload, squared_norm)


def decode_accumulate(
    codec: str,
    payloads: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    *,
    block: int | None = None,
    bits: int | None = None,
    k: int | None = None,
    groups: Sequence[int] = (),
) -> None:
    """``out += w_0*dec(p_0); out += w_1*dec(p_1); ...`` in this order, each product and sum rounded to fp32.

    `payloads` are uint8 [size] at any alignment, already checked (`diloco.comms.codec` does); `out` is fp32 [n].
    """
    chosen = settings(codec, block, bits, k, tuple(groups))
    n = _flat("out", out)
    _payloads(chosen, payloads, n, out.device)
    if len(weights) != len(payloads):
        raise ValueError(f"{len(payloads)} payloads have {len(weights)} weights")
    torch.ops.diloco.decode_accumulate(*_flags(chosen), list(payloads), [float(w) for w in weights], out)


def squared_norms(
    codec: str,
    payloads: Sequence[Tensor],
    n: int,
    center: Tensor | None = None,
    *,
    block: int | None = None,
    bits: int | None = None,
    k: int | None = None,
    groups: Sequence[int] = (),
) -> Tensor:
    """fp64 [W]: sum over the `n` values of ``dec(p_i)^2``, or of ``(dec(p_i) - center)^2``.

    The order of the sum is part of the definition (`reference.squared_norm`), so that the CPU paths agree bit for bit.
    """
    chosen = settings(codec, block, bits, k, tuple(groups))
    device = center.device if center is not None else (payloads[0].device if payloads else None)
    _like("center", center, n, device)
    _payloads(chosen, payloads, n, device)
    out = torch.empty(len(payloads), dtype=torch.float64, device=device)
    torch.ops.diloco.squared_norms(*_flags(chosen), list(payloads), n, center, out)
    return out


def trimmed_mean(
    codec: str,
    payloads: Sequence[Tensor],
    trim: int,
    out: Tensor,
    *,
    block: int | None = None,
    bits: int | None = None,
    k: int | None = None,
    groups: Sequence[int] = (),
) -> None:
    """Write to `out` (fp32 [n]), for each coordinate, the mean of the W values less the `trim` largest and smallest.

    ``trim = (W - 1)//2`` is the coordinate median. Values are summed in ascending order and divided once, in fp32.
    """
    chosen = settings(codec, block, bits, k, tuple(groups))
    n = _flat("out", out)
    _payloads(chosen, payloads, n, out.device)
    if not 0 <= 2 * trim < len(payloads):
        raise ValueError(f"trim={trim} leaves nothing of {len(payloads)} payloads")
    torch.ops.diloco.trimmed_mean(*_flags(chosen), list(payloads), trim, out)


def outer_step(
    rule: str,
    params: Tensor,
    mean: Tensor,
    state: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    mu_y: float = 0.0,
    codec: str | None = None,
    residual: Tensor | None = None,
    block: int | None = None,
    bits: int | None = None,
    k: int | None = None,
    groups: Sequence[int] = (),
    seed: int | None = None,
) -> Encoded | None:
    """One outer step of a fragment, in place; with `codec` also its requantised downlink, all in the same pass.

    With D = `mean` and mu = `momentum`, each operation rounded to fp32 by itself:
      sgd       ``u = lr D``;                                              state ()
      sgdm      ``b <- mu b + D;  u = lr b``;                              state (b,)
      nesterov  ``b <- mu b + D;  u = lr (mu b + D)``;                     state (b,)
      gpa       ``z -= lr D;  x <- mu x + (1-mu) z;  u = params - (mu_y x + (1-mu_y) z)``;  state (x, z)
    Without `codec` then ``params -= u``. With it ``e = residual + u;  payload = enc(e);  residual <- e - dec(payload);
    params -= dec(payload)``, and the payload is returned; a `squared_norm` of NaN then says that params are spoilt.
    """
    n = _flat("params", params)
    _like("mean", mean, n, params.device)
    wanted = {"sgd": 0, "sgdm": 1, "nesterov": 1, "gpa": 2}
    if rule not in wanted:
        raise ValueError(f"unknown outer rule {rule!r}; known: {', '.join(RULES)}")
    if len(state) != wanted[rule]:
        raise ValueError(f"outer rule {rule} has {wanted[rule]} state tensors, got {len(state)}")
    for tensor in state:
        _like("state", tensor, n, params.device)
    first, second = (*state, None, None)[:2]
    rates = (lr, momentum, mu_y)
    if codec is None:
        torch.ops.diloco.outer_step(
            "", 0, 0, 0, [], rule, params, mean, first, second, None, None, None, *rates, None
        )
        return None
    chosen = settings(codec, block, bits, k, tuple(groups))
    if residual is None:
        raise ValueError("a requantised step needs a residual: what the codec drops must be sent later")
    _like("residual", residual, n, params.device)
    if seed is not None and chosen.family != "block":
        raise ValueError(f"codec {codec} has no stochastic rounding; the block codecs have")
    payload = torch.empty(_size(chosen, n), dtype=torch.uint8, device=params.device)
    squared_norm = torch.empty(1, dtype=torch.float64, device=params.device)
    torch.ops.diloco.outer_step(
        *_flags(chosen), rule, params, mean, first, second, residual, payload, squared_norm, *rates, seed
    )
    return Encoded(payload, squared_norm)


def merge(
    params: Tensor,
    new: Tensor,
    alpha: float,
    *,
    codec: str = "fp32",
    block: int | None = None,
    bits: int | None = None,
    k: int | None = None,
    groups: Sequence[int] = (),
) -> None:
    """``params <- alpha*params + (1-alpha)*dec(new)`` in place (2501.18512 eq. 3).

    `params` is fp32, bf16 or fp16 [n]; products and sum are fp32, the result is rounded once to the dtype. `new` is a
    payload (uint8), or fp32 [n] for codec fp32. The ends are exact: alpha 0 gives dec(new), alpha 1 changes nothing.
    """
    chosen = settings(codec, block, bits, k, tuple(groups))
    if params.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"params are {params.dtype}: merge takes float32, bfloat16 and float16")
    if params.dim() != 1 or not params.is_contiguous():
        raise ValueError(f"params must be 1-D and contiguous, got {tuple(params.shape)}")
    payload = new.view(torch.uint8) if new.dtype == torch.float32 else new
    _payloads(chosen, [payload], params.numel(), params.device)
    torch.ops.diloco.merge(*_flags(chosen), params, payload, alpha)


def swap_lerp(a: Tensor, b: Tensor, weight: float) -> None:
    """``(a, b) <- (b, a + weight*(b - a))`` in place and one pass, both fp32 [n]; weights 0 and 1 are exact."""
    n = _flat("a", a)
    _like("b", b, n, a.device)
    torch.ops.diloco.swap_lerp(a, b, weight)


def orthogonalize(
    G: Tensor,
    coefficients: Sequence[float],
    *,
    div: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    gram: bool = False,
    aol: bool = False,
) -> Tensor:
    """orth(G) for G [..., r, c]; `coefficients` are a, b, c of each iteration in turn. See `orthogonal`."""
    made: Tensor = torch.ops.diloco.orthogonalize(
        G, [float(c) for c in coefficients], div, dtype, eps, gram, aol
    )
    return made


def _flags(chosen: Settings) -> tuple[str, int, int, int, list[int]]:
    return chosen.codec, chosen.block, chosen.bits, chosen.k, list(chosen.groups)


def _size(chosen: Settings, n: int) -> int:
    if chosen.groups and sum(chosen.groups) != n:
        raise ValueError(f"groups cover {sum(chosen.groups)} values, the tensor has {n}")
    return chosen.size(n)


def _flat(name: str, tensor: Tensor) -> int:
    if tensor.dtype != torch.float32 or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a 1-D contiguous float32 tensor, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.numel()


def _like(name: str, tensor: Tensor | None, n: int, device: torch.device | None) -> None:
    if tensor is not None and (_flat(name, tensor) != n or tensor.device != device):
        raise ValueError(f"{name} has {tensor.numel()} values on {tensor.device}, want {n} on {device}")


def _payloads(chosen: Settings, payloads: Sequence[Tensor], n: int, device: torch.device | None) -> None:
    want = _size(chosen, n)
    for i, payload in enumerate(payloads):
        if payload.dtype != torch.uint8 or payload.dim() != 1 or not payload.is_contiguous():
            raise ValueError(f"payload {i} must be 1-D contiguous uint8, got {payload.dtype}")
        if payload.numel() != want or payload.device != device:
            raise ValueError(
                f"payload {i} has {payload.numel()} bytes on {payload.device}, want {want} on {device}"
            )
