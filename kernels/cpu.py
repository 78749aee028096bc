"""The operators on CPU tensors through the compiled kernels; each returns False where those cannot do it.

Same arguments and same bits as `reference_fused`. This module lays out pointers; arithmetic is in `csrc`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diloco.kernels import reference_blocks as blocks
from diloco.kernels import reference_fused as reference
from diloco.kernels import reference_stat as stat
from diloco.kernels import reference_topk as topk
from diloco.kernels.native import Job, Op, library, run
from diloco.kernels.reference import SLICE
from diloco.kernels.settings import CODECS, Settings

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_RULES = {"sgd": 0, "sgdm": 1, "nesterov": 2, "gpa": 3}
_FP32 = Settings("fp32")


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
    if library() is None:
        return False
    n = x.numel()
    before = residual if error is None else error
    job = _job(s, n, x=x, local=local, error=before, residual=residual, payload=payload, beta=beta)
    if s.family in ("cast", "block"):
        _draw(job, seed)
        squared.copy_(_sum_of_chunks(job, Op.ENCODE, n))
        return True
    e = x
    if residual is not None or local is not None:
        e = torch.empty_like(x) if residual is None else residual
        job.residual = _address(e)
        run(Op.CORRECT, job)
    if run(Op.CHECK, _job(_FP32, n, payload=e)):
        squared.fill_(math.nan)
        return True
    if s.family == "stat":
        _encode_stat(e, s.spans(n), s.bits, payload, 0)
    else:
        _encode_topk(s, e, payload)
    squared_norms(s, [payload], n, None, squared)
    if residual is not None:
        decode_accumulate(s, [payload], [-1.0], residual)
    return True


def decode_accumulate(s: Settings, payloads: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> bool:
    if library() is None:
        return False
    s, payloads = _single_group(s, payloads, out.numel())
    job = _job(s, out.numel(), payloads=payloads, out=out)
    factors = (ctypes.c_float * len(weights))(*weights)
    job.weights = ctypes.addressof(factors)
    run(Op.ACCUMULATE, job)
    return True


def squared_norms(
    s: Settings, payloads: Sequence[Tensor], n: int, center: Tensor | None, out: Tensor
) -> bool:
    if library() is None:
        return False
    s, payloads = _single_group(s, payloads, n)
    chunks = -(-n // reference.NORM_CHUNK)
    sums = torch.empty(len(payloads), chunks, dtype=torch.float64)
    job = _job(s, n, payloads=payloads, sums=sums, center=center)
    run(Op.NORMS, job)
    for i, row in enumerate(sums):
        out[i] = reference.fold(row) if chunks else 0.0
    return True


def trimmed_mean(s: Settings, payloads: Sequence[Tensor], trim: int, out: Tensor) -> bool:
    if library() is None:
        return False
    s, payloads = _single_group(s, payloads, out.numel())
    run(Op.TRIMMED, _job(s, out.numel(), payloads=payloads, out=out, trim=trim))
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
    if library() is None:
        return False
    if payload is not None and s.family in ("stat", "topk"):
        assert residual is not None and squared is not None
        u = reference.update(rule, params, mean, first, second, lr, momentum, mu_y)
        encode(s, u, None, None, residual, payload, squared, 1.0, None)
        if not math.isnan(float(squared)):
            decode_accumulate(s, [payload], [-1.0], params)
        return True
    n = params.numel()
    job = _job(
        s if payload is not None else _FP32,
        n,
        params=params,
        mean=mean,
        first=first,
        second=second,
        residual=residual,
        payload=payload,
        rule=_RULES[rule],
        lr=lr,
        mu=momentum,
        mu_rest=1 - momentum,
        mu_y=mu_y,
        mu_y_rest=1 - mu_y,
    )
    _draw(job, seed)
    if squared is None:
        run(Op.STEP, job)
    else:
        squared.copy_(_sum_of_chunks(job, Op.STEP, n))
    return True


def merge(s: Settings, params: Tensor, payload: Tensor, alpha: float) -> bool:
    if library() is None:
        return False
    if alpha != 1.0:
        s, payloads = _single_group(s, [payload], params.numel())
        job = _job(
            s,
            params.numel(),
            payloads=payloads,
            params=params,
            dtype=_DTYPES[params.dtype],
            alpha=alpha,
            alpha_rest=1.0 - alpha,
            flag=alpha == 0.0,
        )
        run(Op.MERGE, job)
    return True


def swap_lerp(a: Tensor, b: Tensor, weight: float) -> bool:
    if library() is None:
        return False
    run(Op.SWAP_LERP, _job(_FP32, a.numel(), params=a, first=b, alpha=weight, alpha_rest=1.0 - weight))
    return True


def holds_numbers_only(s: Settings, payload: Tensor, n: int) -> bool | None:
    """Whether no code of a cast or fp8 payload is a NaN or an infinity; None where only torch can tell."""
    if library() is None:
        return None
    return not run(Op.CHECK, _job(s, n, payload=payload))


def _job(
    s: Settings, n: int, *, payloads: Sequence[Tensor] | None = None, **fields: Tensor | float | None
) -> Job:
    """A job with the codec's layout; tensors become pointers, which hold only as long as the caller's tensors."""
    job = Job(codec=CODECS.index(s.codec), n=n, block=s.block, bits=s.bits, k=s.k, rule=-1)
    for name, value in fields.items():
        setattr(job, name, _address(value) if value is None or isinstance(value, Tensor) else value)
    if s.codec == "nf4":
        job.edges = ctypes.addressof(_EDGES)
    if s.family in ("stat", "topk"):
        at = topk.index_bytes(n, s.k, s.block) if s.family == "topk" else 0
        job.shift_at, job.table_at, job.codes_at = at, at + 4, at + 4 + 4 * (1 << s.bits)
    if payloads is not None:
        addresses = (ctypes.c_void_p * len(payloads))(*(p.data_ptr() for p in payloads))
        job.payloads, job.workers = ctypes.addressof(addresses), len(payloads)
        job.keep = addresses
    return job


_EDGES = (ctypes.c_float * 15)(*blocks.nf4_edges())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _draw(job: Job, seed: int | None) -> None:
    if seed is not None:
        job.random, job.seed = 1, seed & 0xFFFFFFFFFFFFFFFF


def _sum_of_chunks(job: Job, op: Op, n: int) -> Tensor:
    """Run `op`, which leaves a squared norm in partial sums; NaN if it met NaN or infinity."""
    sums = torch.zeros(max(1, -(-n // reference.NORM_CHUNK)), dtype=torch.float64)
    job.sums = sums.data_ptr()
    return torch.tensor(math.nan) if run(op, job) else reference.fold(sums)


def _single_group(s: Settings, payloads: Sequence[Tensor], n: int) -> tuple[Settings, Sequence[Tensor]]:
    """The same values in a form that the compiled kernels read: stat with several groups is decoded first."""
    groups = s.spans(n)
    if s.family != "stat" or len(groups) <= 1:
        return s, payloads
    size, plain = 1 << s.bits, []
    for payload in payloads:
        values = torch.empty(n, dtype=torch.float32)
        start, at = 0, 4 * len(groups) * (1 + size)
        for g, count in enumerate(groups):
            job = _job(
                Settings("stat", bits=s.bits), count, payloads=[payload], params=values[start:], flag=1
            )
            job.shift_at, job.table_at, job.codes_at = 4 * g, 4 * len(groups) + 4 * g * size, at
            run(Op.MERGE, job)
            start, at = start + count, at + (count * s.bits + 7) // 8
        plain.append(values.view(torch.uint8))
    return _FP32, plain


def _encode_stat(x: Tensor, groups: Sequence[int], bits: int, payload: Tensor, at: int) -> None:
    """Write the stat payload of `x` to `payload` from byte `at` on."""
    size = 1 << bits
    constants = torch.zeros(len(groups) * (1 + size), dtype=torch.float32)
    start, codes_at = 0, at + 4 * constants.numel()
    for g, n in enumerate(groups):
        part = x[start : start + n]
        mean, width = stat.statistics(part, size, _ordered_sum)
        slices = -(-n // SLICE)
        sums = torch.empty(slices, size, dtype=torch.float64)
        counts = torch.empty(slices, size, dtype=torch.int64)
        job = _job(Settings("stat", bits=bits), n, x=part, payload=payload, sums=sums, counts=counts)
        job.codes_at, job.mean64, job.width = codes_at, mean, width
        run(Op.STAT_CODES, job)
        total = torch.zeros(size, dtype=torch.float64)
        for row in sums:
            total += row
        constants[g] = mean
        table = constants[len(groups) + g * size :][:size]
        table.copy_(total / counts.sum(dim=0).clamp_(min=1))
        start, codes_at = start + n, codes_at + (n * bits + 7) // 8
    payload[at : at + 4 * constants.numel()] = constants.view(torch.uint8)


def _ordered_sum(x: Tensor, shift: float, square: bool) -> float:
    sums = torch.empty(-(-x.numel() // SLICE), dtype=torch.float64)
    run(Op.STAT_SUM, _job(_FP32, x.numel(), x=x, sums=sums, mean64=shift, flag=square))
    total = 0.0
    for part in sums.tolist():
        total += part
    return total


def _encode_topk(s: Settings, x: Tensor, payload: Tensor) -> None:
    n = x.numel()
    kept = torch.empty(topk.chunk_count(n, s.block) * s.k, dtype=torch.float32)
    run(Op.TOPK_SELECT, _job(s, n, x=x, out=kept, payload=payload))
    groups = topk.inner_groups(n, s.k, s.block)
    _encode_stat(kept, groups, s.bits, payload, topk.index_bytes(n, s.k, s.block))
