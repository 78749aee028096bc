"""Definition of the operators in `ops`, in plain torch: what every faster implementation must reproduce.

Each function has the arguments of its operator, with the codec's settings as one value, and writes into the tensors it
is given. The codecs themselves are defined in `reference`, `reference_blocks`, `reference_stat` and `reference_topk`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diloco.kernels import reference as ref
from diloco.kernels import reference_blocks as blocks
from diloco.kernels import reference_stat as stat
from diloco.kernels import reference_topk as topk
from diloco.kernels.settings import Settings

NORM_CHUNK = 1024


def encode_values(s: Settings, x: Tensor, seed: int | None = None) -> Tensor:
    """Payload (uint8) of finite fp32 `x` [n]."""
    match s.family:
        case "cast":
            return ref.encode_cast(s.codec, x)
        case "block":
            return blocks.encode_blocks(s.codec, x, s.block, seed)
        case "stat":
            return stat.encode_stat(x, s.spans(x.numel()), s.bits)
    return topk.encode_topk(x, s.k, s.block, s.bits)


def values(s: Settings, payload: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """The `n` decoded values of a payload as fresh fp32 slices ``(start, values)``."""
    if payload.storage_offset() % 4 or (payload.device.type == "cpu" and payload.data_ptr() % 4):
        payload = payload.clone()
    match s.family:
        case "cast":
            return ref.cast_values(s.codec, payload, n)
        case "block":
            return blocks.block_values(s.codec, payload, n, s.block)
        case "stat":
            return stat.stat_values(payload, s.spans(n), s.bits)
    return topk.topk_values(payload, n, s.k, s.block, s.bits)


def dense(s: Settings, payload: Tensor, n: int) -> Tensor:
    """All decoded values, fp32 [n]."""
    out = torch.empty(n, dtype=torch.float32, device=payload.device)
    for lo, part in values(s, payload, n):
        out[lo : lo + part.numel()] = part
    return out


def squared_norm(x: Tensor) -> Tensor:
    """Sum of squares of fp32 `x` [n] in fp64, a 0-d tensor, by halving.

    Squares are exact in fp64. Chunks of 1024 (zero-padded) are folded, first half plus second half, down to one value
    each; the row of these is folded the same way, its first half one longer if the length is odd.
    """
    sums = [torch.zeros(1, dtype=torch.float64, device=x.device)] if x.numel() == 0 else []
    for part in ref.parts(x):
        squares = part.double().square_()
        if squares.numel() % NORM_CHUNK:
            squares = torch.nn.functional.pad(squares, (0, -squares.numel() % NORM_CHUNK))
        rows = squares.view(-1, NORM_CHUNK)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
        sums.append(rows.view(-1))
    return fold(torch.cat(sums))


def fold(row: Tensor) -> Tensor:
    """Sum of a row by halving, a 0-d tensor; the first half is one longer if the length is odd."""
    while row.numel() > 1:
        half = (row.numel() + 1) // 2
        folded = row[:half].clone()
        folded[: row.numel() - half] += row[half:]
        row = folded
    return row[0]


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
) -> None:
    """``e = beta*error + (x - local);  payload = enc(e);  residual = e - dec(payload)``; see `ops.encode`."""
    e = x if local is None else x - local
    if residual is not None:
        e = ((residual if error is None else error) * beta).add_(e)
    _send(s, e, residual, payload, squared, seed)


def decode_accumulate(s: Settings, payloads: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """``out += w*dec(p)`` for each in turn, two fp32 roundings per value and payload."""
    for payload, weight in zip(payloads, weights, strict=True):
        for lo, part in values(s, payload, out.numel()):
            out[lo : lo + part.numel()].add_(part.mul_(weight))


def squared_norms(
    s: Settings, payloads: Sequence[Tensor], n: int, center: Tensor | None, out: Tensor
) -> None:
    """``out[i] = sum (dec(p_i) - center)^2``."""
    for i, payload in enumerate(payloads):
        x = dense(s, payload, n)
        out[i] = squared_norm(x if center is None else x.sub_(center))


def trimmed_mean(s: Settings, payloads: Sequence[Tensor], trim: int, out: Tensor) -> None:
    """Mean of each coordinate's values but the `trim` largest and smallest; minus zero counts as zero."""
    rows = torch.stack([dense(s, payload, out.numel()) for payload in payloads]).add_(0.0)
    kept = rows.sort(dim=0).values[trim : len(payloads) - trim]
    total = kept[0].clone()
    for row in kept[1:]:
        total.add_(row)
    torch.div(total, torch.tensor(float(kept.shape[0]), dtype=torch.float32, device=out.device), out=out)


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
) -> None:
    """State and parameters one outer step on; see `ops.outer_step`. Without a payload `s` is not looked at."""
    u = update(rule, params, mean, first, second, lr, momentum, mu_y)
    if payload is None:
        params.sub_(u)
        return
    assert residual is not None and squared is not None
    _send(s, residual + u, residual, payload, squared, seed)
    if math.isnan(float(squared)):
        return
    for lo, part in values(s, payload, params.numel()):
        params[lo : lo + part.numel()].sub_(part)


def update(
    rule: str,
    params: Tensor,
    mean: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    lr: float,
    momentum: float,
    mu_y: float,
) -> Tensor:
    if rule == "sgd":
        return mean * lr
    assert first is not None
    if rule == "sgdm":
        return first.mul_(momentum).add_(mean) * lr
    if rule == "nesterov":
        return first.mul_(momentum).add_(mean).mul(momentum).add_(mean).mul_(lr)
    assert second is not None
    z = second.sub_(mean * lr)
    x = first.mul_(momentum).add_(z * (1 - momentum))
    return params - (x * mu_y).add_(z * (1 - mu_y))


def merge(s: Settings, params: Tensor, payload: Tensor, alpha: float) -> None:
    """``alpha*params + (1-alpha)*dec(payload)``, rounded once to the dtype of `params`."""
    if alpha == 1.0:
        return
    for lo, new in values(s, payload, params.numel()):
        part = params[lo : lo + new.numel()]
        part.copy_(new if alpha == 0.0 else part.float().mul(alpha).add_(new.mul_(1.0 - alpha)))


def swap_lerp(a: Tensor, b: Tensor, weight: float) -> None:
    """``(a, b) <- (b, a + weight*(b - a))``; a weight from one half on counts from b, so that both ends are exact."""
    apart = b - a
    mixed = a + apart * weight if weight < 0.5 else b - apart * (1.0 - weight)
    a.copy_(b)
    b.copy_(mixed)


def _send(
    s: Settings, e: Tensor, residual: Tensor | None, payload: Tensor, squared: Tensor, seed: int | None
) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in ref.parts(e)):
        squared.fill_(math.nan)
        return
    payload.copy_(encode_values(s, e, seed))
    sent = dense(s, payload, e.numel())
    squared.copy_(squared_norm(sent))
    if residual is not None:
        torch.sub(e, sent, out=residual)
