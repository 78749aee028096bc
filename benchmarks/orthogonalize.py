"""`orthogonalize` beside the same iteration in plain torch (`baddbmm`), by shape, in bfloat16 and float32.

Also the distance of both from the float64 iteration, for singular values over three decades.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, interleaved, machine, median_ratio, save
from torch import Tensor

from diloco.optim import orthogonalize
from diloco.optim.coefficients import coefficient_set

SHAPES = (
    (64, 64),
    (128, 352),
    (256, 256),
    (256, 1024),
    (768, 768),
    (768, 2048),
    (2048, 768),
    (768, 3072),
    (1024, 1024),
)


def plain_torch(G: Tensor, dtype: torch.dtype) -> Tensor:
    """The textbook iteration: wide orientation, one fused product for each of its last two lines."""
    X = G.unsqueeze(0)
    if G.shape[0] > G.shape[1]:
        X = X.mT.contiguous()
    X = (X / (X.norm() + 1e-7)).to(dtype)
    for a, b, c in coefficient_set("you5").triples:
        A = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if G.shape[0] > G.shape[1] else X)[0]


def conditioned(shape: tuple[int, int]) -> Tensor:
    k = min(shape)
    U, V = (torch.linalg.qr(torch.randn(side, k, dtype=torch.float64)).Q for side in shape)
    made: Tensor = U @ torch.logspace(0, -3, k, dtype=torch.float64).diag() @ V.mT
    return made.float()


def row(shape: tuple[int, int], dtype: torch.dtype, runs: int) -> dict[str, Any]:
    G = torch.randn(shape)
    repeat = max(1, 20_000_000 // (min(shape) ** 2 * max(shape)))  # small ones many times: clocks are coarse
    taken = interleaved(
        {
            "torch": lambda: [plain_torch(G, dtype) for _ in range(repeat)],
            "plain": lambda: [orthogonalize(G, dtype=dtype) for _ in range(repeat)],
            "auto": lambda: [orthogonalize(G, dtype=dtype, form="auto") for _ in range(repeat)],
        },
        runs,
    )
    hard = conditioned(shape)
    exact = orthogonalize(hard, dtype=torch.float64)
    made = {
        "torch": plain_torch(hard, dtype),
        "plain": orthogonalize(hard, dtype=dtype),
        "auto": orthogonalize(hard, dtype=dtype, form="auto"),
    }
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {k: 1e3 * statistics.median(v) / repeat for k, v in taken.items()},
        "speedup": {k: median_ratio(taken["torch"], taken[k]) for k in ("plain", "auto")},
        "error": {k: float((v.double() - exact).norm() / exact.norm()) for k, v in made.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "orthogonalize.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    print(
        "shape          dtype      torch ms  plain ms   auto ms  torch/plain  torch/auto  error torch/plain/auto"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            r = row(shape, dtype, options.runs)
            results["rows"].append(r)
            ms, error = r["milliseconds"], r["error"]
            print(
                f"{shape[0]:>5} x {shape[1]:<6} {r['dtype']:<9}"
                + "".join(f"{ms[k]:10.2f}" for k in ("torch", "plain", "auto"))
                + f"{r['speedup']['plain']:13.2f}{r['speedup']['auto']:12.2f}  "
                + " / ".join(f"{error[k]:.2g}" for k in ("torch", "plain", "auto")),
                flush=True,
            )
    save(options.out, results)


if __name__ == "__main__":
    main()
