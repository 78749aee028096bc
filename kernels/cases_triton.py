"""One small job for every operator and configuration of the Triton kernels: what `report` compiles and a GPU times.

A case knows how to run the kernels through their real host functions, how to do the same in plain torch, how to compare
the two, and the floor of bytes and flops below which nothing can go. It measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.kernels import gpu_triton, md_triton, normuon_triton, orthogonal
from diloco.kernels import reference_fused as reference
from diloco.kernels.reference_blocks import DIVISOR
from diloco.kernels.settings import Settings, settings

WORKERS = 8
CASTS = ("fp32", "fp16", "bf16")
YOU5 = (
    *(4.0848, -6.8946, 2.9270, 3.9505, -6.3029, 2.6377, 3.7418, -5.5913, 2.3037),
    *(2.8769, -3.1427, 1.2046, 2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True, slots=True)
class Case:
    """`run` and `torch` write to their own outputs; `difference` compares these once both ran, `limit` is the most allowed.

    `bytes` and `flops` are what the job cannot do without, for `values` values. `mma` says whether matrix instructions are
    expected.
    """

    op: str
    config: str
    run: Callable[[], object]
    torch: Callable[[], object]
    difference: Callable[[], float]
    limit: float
    values: int
    bytes: float
    flops: float = 0.0
    mma: bool = False


def cases(device: str, n: int, side: int) -> Iterator[Case]:
    """All cases, elementwise ones on `n` values, matrices with a short side of `side` (and 64, for small tiles)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    yield from _encode(normal, n)
    yield from _decode(normal, n)
    yield from _outer(normal, n)
    yield from _orthogonalize(normal, side)
    yield from _optimizers(normal, side)


Normal = Callable[..., Tensor]


def _codecs() -> Iterator[tuple[str, Settings]]:
    for codec in DIVISOR:
        yield codec, settings(codec)
    yield "e2m1/32", settings("e2m1", 32)
    yield "int4/4096", settings("int4", 4096)


def _several() -> Iterator[tuple[str, Settings]]:
    for bits in (2, 4, 8):
        yield f"stat{bits}", settings("stat", bits=bits)
    yield "topk", settings("topk")


def _payload_bytes(s: Settings) -> float:
    return s.size(1 << 20) / (1 << 20)


def _encode(normal: Normal, n: int) -> Iterator[Case]:
    def case(label: str, s: Settings, fused: bool, seed: int | None) -> Case:
        x, local, before = normal(n), normal(n), normal(n)
        outputs = [
            (
                before.clone(),
                torch.empty(s.size(n), dtype=torch.uint8, device=x.device),
                x.new_empty(1).double(),
            )
            for _ in range(2)
        ]

        def job(encode: Callable[..., object], k: int) -> Callable[[], object]:
            residual, payload, squared = outputs[k]
            if fused:
                return lambda: encode(s, x, local, before, residual, payload, squared, 0.95, seed)
            return lambda: encode(s, x, None, None, None, payload, squared, 1.0, seed)

        def difference() -> float:
            (r0, p0, s0), (r1, p1, s1) = outputs
            return float((p0 != p1).sum() + (r0 != r1).sum()) / n + float((s0 / s1 - 1).abs())

        # Statistics are summed in another order: a table may differ in its last bit.
        limit = 1e-6 if s.family in ("block", "cast") else 1e-2
        config = label + (" ef" if fused else "") + ("" if seed is None else " stochastic")
        moved = (16.0 if fused else 4.0) + _payload_bytes(s)
        run = job(gpu_triton.encode, 0)
        return Case("encode", config, run, job(reference.encode, 1), difference, limit, n, moved * n)

    for label, s in (*_codecs(), *((c, settings(c)) for c in CASTS)):
        yield case(label, s, False, None)
        yield case(label, s, True, None)
        if s.family == "block":
            yield case(label, s, True, 1 << 40)
    for label, s in _several():
        yield case(label, s, True, None)


def _decode(normal: Normal, n: int) -> Iterator[Case]:
    for label, s in (*_codecs(), *((c, settings(c)) for c in CASTS), *_several()):
        payloads = [reference.encode_values(s, normal(n)) for _ in range(2)] * (WORKERS // 2)
        yield _accumulate(label, s, payloads, normal(n))
        if s.family not in ("stat", "topk"):
            yield _squared_norms(label, s, payloads, normal(n))


def _accumulate(label: str, s: Settings, payloads: list[Tensor], out: Tensor) -> Case:
    weights, other = [(w + 1) / 36 for w in range(WORKERS)], out.clone()

    def run() -> None:
        gpu_triton.decode_accumulate(s, payloads, weights, out)

    def torch_() -> None:
        reference.decode_accumulate(s, payloads, weights, other)

    moved = (8.0 + WORKERS * _payload_bytes(s)) * out.numel()
    return Case("decode_accumulate", label, run, torch_, differing(out, other), 0.0, out.numel(), moved)


def _squared_norms(label: str, s: Settings, payloads: list[Tensor], center: Tensor) -> Case:
    n, norms = center.numel(), torch.empty(2, WORKERS, dtype=torch.float64, device=center.device)

    def run() -> None:
        gpu_triton.squared_norms(s, payloads, n, center, norms[0])

    def torch_() -> None:
        reference.squared_norms(s, payloads, n, center, norms[1])

    def difference() -> float:
        return float((norms[0] / norms[1] - 1).abs().max())

    moved = (4.0 + _payload_bytes(s)) * WORKERS * n
    return Case("squared_norms", label, run, torch_, difference, 1e-12, n, moved)


def _outer(normal: Normal, n: int) -> Iterator[Case]:
    state_count = {"sgd": 0, "sgdm": 1, "nesterov": 1, "gpa": 2}

    def step(rule: str, label: str, s: Settings | None) -> Case:
        mean, states = normal(n), [[normal(n) for _ in range(4)]]
        states.append([t.clone() for t in states[0]])
        chosen = s or Settings("")
        payloads = [
            None if s is None else torch.empty(s.size(n), dtype=torch.uint8, device=mean.device) for _ in "ab"
        ]

        def job(f: Callable[..., object], k: int) -> Callable[[], object]:
            params, first, second, residual = states[k]
            kept = [first, second][: state_count[rule]] + [None, None][state_count[rule] :]
            squared = None if s is None else params.new_empty(1).double()
            sent = (None, None, None) if s is None else (residual, payloads[k], squared)
            return lambda: f(chosen, rule, params, mean, *kept, *sent, 0.7, 0.9, 0.8, None)

        def difference() -> float:
            tensors = list(zip(*states, strict=True)) + ([] if s is None else [(payloads[0], payloads[1])])
            return float(sum((a != b).sum() for a, b in tensors))

        moved = (12.0 + 8.0 * state_count[rule] + (0.0 if s is None else 8.0 + _payload_bytes(s))) * n
        run = job(gpu_triton.outer_step, 0)
        config = f"{rule} {label}".strip()
        return Case("outer_step", config, run, job(reference.outer_step, 1), difference, 0.0, n, moved)

    for rule in state_count:
        yield step(rule, "", None)
        yield step(rule, "int4", settings("int4"))
    for codec in DIVISOR:
        if codec != "int4":
            yield step("nesterov", codec, settings(codec))
    for codec in ("fp32", "bf16", "int8", "int4"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield _merge(settings(codec), normal(n).to(dtype), normal(n))


def _merge(s: Settings, params: Tensor, new: Tensor) -> Case:
    payload, other, n = reference.encode_values(s, new), params.clone(), new.numel()

    def run() -> None:
        gpu_triton.merge(s, params, payload, 0.5)

    def torch_() -> None:
        reference.merge(s, other, payload, 0.5)

    moved = (2.0 * params.itemsize + _payload_bytes(s)) * n
    config = f"{s.codec} into {str(params.dtype).removeprefix('torch.')}"
    return Case("merge", config, run, torch_, differing(params, other), 0.0, n, moved)


def differing(a: Tensor, b: Tensor) -> Callable[[], float]:
    """How many elements differ, once asked."""
    return lambda: float((a != b).sum())


def _orthogonalize(normal: Normal, side: int) -> Iterator[Case]:
    def case(dtype: torch.dtype, rows: int, columns: int, gram: bool) -> Case:
        g = normal(1, rows, columns)
        made: dict[str, Tensor] = {}

        def run() -> None:
            made["triton"] = gpu_triton.orthogonalize(g, YOU5, 1.0, dtype, 1e-7, gram, False)

        def torch_() -> None:
            made["torch"] = orthogonal.orthogonalize(g, YOU5, 1.0, dtype, 1e-7, gram, False)

        def difference() -> float:
            exact = orthogonal.orthogonalize(g.double(), YOU5, 1.0, torch.float64, 1e-7, gram, False)
            errors = {name: float((value.double() - exact).norm()) for name, value in made.items()}
            return errors["triton"] / errors["torch"]

        r, iterations = columns / rows, len(YOU5) // 3
        cubes = 6 * r + 14 if gram else iterations * (3 * r + 1)
        config = f"{str(dtype).removeprefix('torch.')} {rows}x{columns}{' gram' if gram else ''}"
        moved = float(rows * columns * (4 + dtype.itemsize))
        # Tensor instructions have no fp32 of full precision on these targets but gfx942.
        half = dtype != torch.float32
        flops = cubes * rows**3
        return Case("orthogonalize", config, run, torch_, difference, 1.2, g.numel(), moved, flops, half)

    for rows in (64, side):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield case(dtype, rows, 2 * rows, False)
        yield case(torch.float16, rows, 2 * rows, True)


def _optimizers(normal: Normal, side: int) -> Iterator[Case]:
    rows, columns = side, 2 * side

    def close(a: Tensor, b: Tensor) -> Callable[[], float]:
        return lambda: float((a.float() - b.float()).abs().max() / b.float().abs().max())

    for dtype, floor in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        p = normal(1, rows, columns).to(dtype)
        q, o = p.clone(), normal(1, rows, columns).to(torch.bfloat16)
        v, w = (torch.ones((1, 1, columns) if floor else (1, rows, 1), device=p.device) for _ in range(2))
        run, torch_ = _normuon(p, q, o, v, w, floor)
        config = f"{str(dtype).removeprefix('torch.')}{' by column, cautious' if floor else ''}"
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        moved = float(rows * columns * (2 * dtype.itemsize + 4))
        yield Case("normuon_step", config, run, torch_, close(p, q), limit, p.numel(), moved)
    for momentum in (False, True):
        matrix, g = normal(1, rows, columns), normal(1, rows, columns)
        gains = normal(1, rows, 1).exp(), normal(1, 1, columns).exp()
        run, torch_, difference = _md(matrix, g, *gains, torch.zeros_like(g) if momentum else None)
        moved = float(rows * columns * (24 if momentum else 16))
        yield Case(
            "md_split", "momentum" if momentum else "", run, torch_, difference, 1e-4, g.numel(), moved
        )


def _normuon(
    p: Tensor, q: Tensor, o: Tensor, v: Tensor, w: Tensor, floor: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    def run() -> None:
        normuon_triton.normuon_step(
            p, o, v, lr=0.02, decay=0.01, beta2=0.95, eps=1e-10, target=0.2, floor=floor, cautious=floor
        )

    def torch_() -> None:
        wide = o.float()
        w.lerp_(wide.square().mean(dim=-2 if floor else -1, keepdim=True), 0.05)
        scaled = wide * w.clamp_min(1e-10).rsqrt() if floor else wide / (w.sqrt() + 1e-10)
        scaled = scaled * (0.2 * wide.norm() / (scaled.norm() + 1e-10))
        old = q.float()
        old = torch.where(scaled * old >= 0, old * 0.99, old) if floor else old * 0.99
        q.copy_(old - 0.02 * scaled)

    return run, torch_


def _md(
    matrix: Tensor, g: Tensor, row: Tensor, col: Tensor, momentum: Tensor | None
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], float]]:
    made: dict[str, tuple[Tensor, ...]] = {}
    other = None if momentum is None else momentum.clone()

    def run() -> None:
        made["triton"] = md_triton.md_split(matrix, g, row, col, momentum=momentum, mu=0.95)

    def torch_() -> None:
        d, u = matrix / row / col, row * g * col
        by_row = (d * g * col).sum(dim=-1, keepdim=True)
        by_col = (d * g * row).sum(dim=-2, keepdim=True)
        if other is not None:
            u = u.lerp(other.lerp_(u, 0.05), 0.95)
        made["torch"] = d, u, by_row, by_col

    def difference() -> float:
        pairs = zip(made["triton"], made["torch"], strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    return run, torch_, difference
