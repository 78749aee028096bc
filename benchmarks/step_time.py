"""Time and memory of one optimizer step on the matrices of the 160m preset, beside torch's optimizers.

Ratios are medians over interleaved runs. GPA is compared with copying as many bytes as it has to move, SNOO with the
mean over its k steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, interleaved, machine, median_ratio, save
from torch import Tensor, nn
from torch.nn import Parameter

from diloco.optim import GPA, SNOO, Muon, NorMuon, build_optimizer
from diloco.optim.coefficients import coefficient_set
from diloco.optim.orthogonalize import orthogonalize_each

# One transformer block: shape, and how many matrices are fused in it.
BLOCK = (((2304, 768), 3), ((768, 768), 1), ((4096, 768), 2), ((768, 2048), 1))
K = 28


def matrices(blocks: int, *, separate: bool = False) -> list[Parameter]:
    made = []
    for (rows, columns), fused in BLOCK * blocks:
        parts = fused if separate else 1
        for _ in range(parts):
            p = Parameter(torch.randn(rows // parts, columns) * 0.02)
            p.grad = torch.randn_like(p)
            made.append(p)
    return made


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    """Ours are told what is fused; a parameter's place in its block says it."""
    return [
        {"params": [p for i, p in enumerate(params) if BLOCK[i % len(BLOCK)][1] == n], "blocks": n}
        for n in (1, 2, 3)
    ]


class Holder(nn.Module):
    """A model that is nothing but its matrices, for `build_optimizer`."""

    def __init__(self, params: Iterable[Parameter]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(params)


class Still(torch.optim.Optimizer):
    """Takes no step: what is around it is left."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


def optimizers(blocks: int) -> dict[str, torch.optim.Optimizer]:
    """All over the same weights, whose values no time depends on: twelve blocks nine times over are 12 GB."""
    torch_muon = {"lr": 1e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    fused, separate = matrices(blocks), matrices(blocks, separate=True)
    return {
        "torch Muon, fused": torch.optim.Muon(fused, **torch_muon),  # type: ignore[arg-type]
        "torch Muon, separate": torch.optim.Muon(separate, **torch_muon),  # type: ignore[arg-type]
        "Muon": Muon(groups(fused), lr=1e-3),
        "Muon, separate": Muon(separate, lr=1e-3),
        "NorMuon": NorMuon(groups(fused), lr=1e-3),
        "SNOO over Muon": SNOO(Muon(groups(fused), lr=1e-3), k=K),
        "GPA over Muon": GPA(Muon(groups(fused), lr=1e-3)),
        "torch AdamW, fused": torch.optim.AdamW(fused, lr=1e-3, fused=True),
        "AdamW": build_optimizer(Holder(fused), {"kind": "adamw"}),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Everything it holds beside weights and gradients."""
    own = [getattr(optimizer, name, {}) for name in ("slow", "buffer", "z")]
    tensors = [v for kept in own for v in kept.values()]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def averaging(made: dict[str, torch.optim.Optimizer], runs: int) -> dict[str, float]:
    """What SNOO and GPA add to a step, and a copy of the bytes that GPA moves."""
    snoo, gpa = made["SNOO over Muon"], made["GPA over Muon"]
    assert isinstance(snoo, SNOO) and isinstance(gpa, GPA)
    params = [p for group in gpa.param_groups for p in group["params"]]
    numel = sum(p.numel() for p in params)
    alone = GPA(Still(params, {}))
    source, target = torch.ones(numel), torch.empty(numel)
    taken = interleaved(
        {
            "outer": snoo.outer_step,
            "muon": made["Muon"].step,
            "gpa": gpa.step,
            "gpa alone": alone.step,
            "copy": lambda: target.copy_(source),  # 8 bytes of traffic a number
        },
        runs,
    )
    extra = statistics.median(g - m for g, m in zip(taken["gpa"], taken["muon"], strict=True))
    return {
        "snoo_share_of_step": median_ratio(taken["outer"], taken["muon"]) / K,
        "gpa_extra_seconds": extra,
        "gpa_share_of_step": extra / statistics.median(taken["muon"]),
        # The base steps in place on z where y was: before it and after it both tensors are read and written, 32 bytes
        # a number, which is four copies.
        "gpa_over_copy_of_its_bytes": median_ratio(taken["gpa alone"], taken["copy"]) / 4,
    }


def profile(made: dict[str, torch.optim.Optimizer], runs: int) -> dict[str, float]:
    """Shares of a Muon step: the iteration alone, everything else in the compiled call, Python around it."""
    muon = made["Muon"]
    chosen = coefficient_set("you5")
    parts = [m for g in muon.param_groups for p in g["params"] for m in p.detach().chunk(g["blocks"])]
    empty = Muon([Parameter(torch.zeros(1, 1)) for _ in parts], lr=1e-3)
    for p in empty.param_groups[0]["params"]:
        p.grad = torch.zeros(1, 1)
    actions: dict[str, Callable[[], object]] = {
        "step": muon.step,
        "iteration": lambda: orthogonalize_each(parts, chosen, torch.bfloat16, 1e-7, "auto"),
        "python": empty.step,
    }
    taken = interleaved(actions, runs)
    shares = {name: median_ratio(taken[name], taken["step"]) for name in ("iteration", "python")}
    return {**shares, "momentum_and_weights": 1 - sum(shares.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_time.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = machine()
    print(", ".join(f"{k}: {v}" for k, v in about.items()), flush=True)
    start = time.monotonic()
    made = optimizers(options.blocks)
    taken = interleaved({name: o.step for name, o in made.items()}, options.runs)
    numel = sum(p.numel() for group in made["Muon"].param_groups for p in group["params"])
    rows = []
    print(
        f"{numel / 1e6:.1f} M parameters        ms a step   / torch fused   / torch separate   state bytes/param"
    )
    for name, seconds in taken.items():
        rows.append(
            {
                "optimizer": name,
                "milliseconds": 1e3 * statistics.median(seconds),
                "over_torch_fused": median_ratio(seconds, taken["torch Muon, fused"]),
                "over_torch_separate": median_ratio(seconds, taken["torch Muon, separate"]),
                "over_muon": median_ratio(seconds, taken["Muon"]),
                "over_torch_adamw": median_ratio(seconds, taken["torch AdamW, fused"]),
                "state_bytes_per_parameter": state_bytes(made[name]) / numel,
            }
        )
        r = rows[-1]
        print(
            f"{name:<24}{r['milliseconds']:14.1f}{r['over_torch_fused']:16.3f}{r['over_torch_separate']:19.3f}"
            f"{r['state_bytes_per_parameter']:20.2f}"
        )
    by_name = {r["optimizer"]: r for r in rows}
    print(
        f"NorMuon / Muon {by_name['NorMuon']['over_muon']:.3f}; AdamW / torch {by_name['AdamW']['over_torch_adamw']:.3f}"
    )
    results = {
        "machine": about,
        "blocks": options.blocks,
        "runs": options.runs,
        "parameters": numel,
        "rows": rows,
        "averaging": averaging(made, options.runs),
        "shares_of_a_muon_step": profile(made, options.runs),
        "seconds": time.monotonic() - start,
    }
    for part in ("averaging", "shares_of_a_muon_step"):
        print(", ".join(f"{k} {v:.4f}" for k, v in results[part].items()))
    save(options.out, results)


if __name__ == "__main__":
    main()
