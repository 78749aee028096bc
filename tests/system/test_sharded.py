"""Parameters spread over processes (DTensor, as FSDP2 makes them): every optimizer moves them as it moves whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, warnings
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from diloco.errors import ConfigError
from diloco.optim import *

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
EXACT = {"iteration_dtype": torch.float32}
MAKE = {
    "adamw": lambda ps: AdamW(ps, lr=0.02),
    "adamp": lambda ps: AdamP(ps, lr=0.02),
    "muon": lambda ps: Muon(ps, lr=0.02),
    "muon-exact": lambda ps: Muon(ps, lr=0.02, scale="rms_exact", **EXACT),
    "normuon": lambda ps: NorMuon(ps, lr=0.02, **EXACT),
    "speedrun": lambda ps: NorMuon(ps, variant="speedrun", **EXACT),
    "hyperball": lambda ps: Hyperball(ps, base="normuon", **EXACT),
    "hyperball-adam": lambda ps: Hyperball(ps, base="adam"),
    "md": lambda ps: MD(ps, gain_lr=0.02, **EXACT),
    "md-row": lambda ps: MD(ps, base="adam", sphere="row"),
    "muown": lambda ps: Muown(ps, lr=0.02, total_steps=9, **EXACT),
    "scion": lambda ps: Scion(ps, lr=0.01, **EXACT),
    "scion-col": lambda ps: Scion(ps, lr=0.01, rho=3.0, norm="col"),
    "mars-m": lambda ps: MARS(ps, base="muon", **EXACT),
    "freon": lambda ps: Freon(ps),
    "kaon": lambda ps: Kaon(ps),
    "schedule-free": lambda ps: ScheduleFreeAdamW(ps),
    "schedule-free-plus": lambda ps: ScheduleFreePlus(ps),
    "snoo": lambda ps: SNOO(Muon(ps, lr=0.02, **EXACT), k=2),
    "snoo-md": lambda ps: SNOO(MD(ps, **EXACT), k=2),
    "gpa": lambda ps: GPA(NorMuon(ps, lr=0.02, **EXACT), mu_x=0.9),
    "anytime": lambda ps: AnytimeAverage(Muon(ps, lr=0.02, **EXACT)),
}
SHAPES = ((8, 6), (3, 10), (4, 6, 5))  # one that does not divide evenly, one stack


def trained(make, spread):
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator)
    ps = [torch.nn.Parameter(spread(draw(s))) for s in SHAPES]
    optimizer = make(ps)
    for _ in range(4):
        for p in ps:
            p.grad = spread(draw(p.shape))
        optimizer.step(**({"loss": 1.0} if getattr(optimizer, "needs_loss", False) else {}))
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return [p.detach() for p in ps]


for name, make in MAKE.items():
    expected = trained(make, lambda t: t)
    for placement in (Shard(0), Shard(1), Replicate()):
        found = trained(make, lambda t: distribute_tensor(t, mesh, [placement]))
        for a, b in zip(found, expected):
            off = float((a.full_tensor() - b).norm() / b.norm())
            assert off < (1e-3 if name == "kaon" else 1e-5), (name, placement, tuple(b.shape), off)
fused = torch.nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)]))
try:
    Muon([{"params": [fused], "blocks": 3}])
except ConfigError as error:
    assert "sharded" in str(error), error
else:
    raise AssertionError("blocks that lie across processes were accepted")
dist.barrier()
print("same", flush=True)
os._exit(0)  # gloo's threads now and then abort a process that takes itself apart
"""


def test_sharded_parameters_move_as_whole_ones(tmp_path: Path) -> None:
    """Two processes, each with half of every parameter by rows, by columns, or all of it; fused blocks are refused."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    results = [r.communicate(timeout=120) for r in ranks]
    for rank, (out, err) in zip(ranks, results, strict=True):
        assert rank.returncode == 0, err[-2000:]
        assert out.strip() == "same"
