"""The processes of one job on one node, as `torchrun` starts them; a single process is a job of one.

Here: who we are, and the few sums and copies that all ranks agree on. Gradients are averaged by torch's
DistributedDataParallel. Nothing that is exchanged is unpickled.
"""

from __future__ import annotations

import os
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diloco.errors import EnvironmentProblem


class Ranks:
    """`rank` of `world` processes; `gpu` is this one's GPU on its machine. A context manager."""

    def __init__(self) -> None:
        """Read torchrun's environment variables. Raises EnvironmentProblem if they are not whole numbers."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            self.rank, self.world, self.gpu = (
                int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True)
            )
        except ValueError:
            raise EnvironmentProblem(
                f"{', '.join(names)} must be whole numbers, as torchrun sets them"
            ) from None
        self._device = torch.device("cpu")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Meet the other processes: over NCCL between GPUs, else over gloo."""
        self._device = device
        if self.world == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")

    def averaging(self, module: nn.Module) -> DistributedDataParallel:
        """`module` with gradients averaged over the ranks during backward; parameters start as rank 0's."""
        ids = [self._device.index] if self._device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64; the same bits on every rank."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def gather(self, value: Tensor) -> Tensor:
        """[world, ...]: the CPU tensors `value`, of the same shape everywhere, by rank."""
        if self.world == 1:
            return value[None].clone()
        parts = [torch.empty_like(value, device=self._device) for _ in range(self.world)]
        dist.all_gather(parts, value.to(self._device))
        return torch.stack(parts).cpu()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
