"""One process of the data-parallel baseline of `wire.py`: torch's DistributedDataParallel over gloo through the link.

gloo finds its peers through a store; here the address of each peer that this rank connects to is replaced by that of a
relay (`diloco.comms.link`) in front of it, so every byte between two ranks passes one emulated link. Gradients travel in
bf16, which halves what DDP sends by default, one layer per bucket, each as soon as it is computed.
"""

# No postponed annotations here: DistributedDataParallel checks those of its hooks.
import json
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from diloco.comms.link import Link, Relay
from diloco.config import RunConfig
from diloco.worker.inner import InnerLoop, make_optimizer

WARM = 2  # steps before the clock starts: DDP rebuilds its buckets after the first
ALONE = 15  # steps without an all-reduce, for comparison
PATIENCE = timedelta(seconds=600)


def address(rank: int) -> str:
    """Of two ranks, gloo lets the one with the higher address connect."""
    return f"127.0.0.{10 + rank}"


class RelayedStore(dist.Store):
    """`inner`, but for the addresses of lower ranks: behind each stands a relay. `traffic()` is what they carried."""

    def __init__(self, inner: dist.Store, rank: int, link: Link | None) -> None:
        super().__init__()
        self._inner, self._rank, self._link = inner, rank, link
        self._relays: dict[int, Relay] = {}

    def traffic(self) -> int:
        return sum(sum(relay.traffic()) for relay in self._relays.values())

    def close(self) -> None:
        for relay in self._relays.values():
            relay.close()

    def get(self, key: str) -> bytes:
        value = self._inner.get(key)
        for peer in range(self._rank):
            value = self._behind_relay(value, peer)
        return value

    def _behind_relay(self, value: bytes, peer: int) -> bytes:
        """A sockaddr_in is the family (2, native order), the port and the address (network order)."""
        ip, family = socket.inet_aton(address(peer)), socket.AF_INET.to_bytes(2, sys.byteorder)
        at = value.find(ip) - 4
        if at < 0 or value[at : at + 2] != family or self._link is None:
            return value
        if peer not in self._relays:
            port = int.from_bytes(value[at + 2 : at + 4], "big")
            self._relays[peer] = Relay(address(peer), port, self._link, seed=peer)
        relayed = self._relays[peer].port.to_bytes(2, "big") + socket.inet_aton("127.0.0.1")
        return value[: at + 2] + relayed + value[at + 8 :]

    def set(self, key: str, value: bytes) -> None:
        self._inner.set(key, value)

    def add(self, key: str, amount: int) -> int:
        return self._inner.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return self._inner.check(keys)

    def wait(self, keys: list[str], timeout: timedelta = PATIENCE) -> None:
        self._inner.wait(keys, timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)


def ring(
    store: dist.Store, rank: int, size: int, timeout: timedelta, link: Link | None
) -> tuple[dist.ProcessGroupGloo, RelayedStore]:
    """gloo's process group of this rank, every connection of which goes through `link`, and what counts its bytes."""
    relayed = RelayedStore(store, rank, link)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address(rank))]
    options._timeout, options._threads = timeout, 8  # so that the buckets' round trips overlap
    return dist.ProcessGroupGloo(relayed, rank, size, options), relayed


def connect(job: dict[str, Any]) -> tuple[RelayedStore, dist.TCPStore]:
    """Meet the other ranks behind the job's link; the second store is no part of the link."""
    link = Link.parse(job["link"]) if job["link"] else None
    stores: list[RelayedStore] = []

    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
        group, relayed = ring(store, rank, size, timeout, link)
        stores.append(relayed)
        return group

    dist.Backend.register_backend("relayed", create, devices=["cpu"])
    meeting = dist.TCPStore("127.0.0.1", job["port"], job["world"], is_master=job["rank"] == 0)
    dist.init_process_group(
        "relayed", store=meeting, rank=job["rank"], world_size=job["world"], timeout=PATIENCE
    )
    return stores[0], meeting


def part(meeting: dist.TCPStore, rank: int, world: int) -> None:
    """Nobody closes a connection that another still uses, and rank 0, whose store it is, goes last."""
    meeting.set(f"done{rank}", "")
    meeting.wait([f"done{other}" for other in range(world)], PATIENCE)
    meeting.set(f"gone{rank}", "")
    if rank == 0:
        meeting.wait([f"gone{other}" for other in range(world)], PATIENCE)


def halved(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over the ranks, sent in bf16: torch's own hook for that accepts no gloo."""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(dist.get_world_size())

    def back(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(reduced.value()[0])

    return dist.all_reduce(sent, async_op=True).get_future().then(back)


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    config = RunConfig.load(job["config"])
    inner = InnerLoop(config, lambda text: print(text, flush=True))
    store, meeting = connect(job)
    optimizer = make_optimizer(config, inner.model)
    inner.attach(optimizer)
    inner.read(job["rank"], job["world"])
    layer = max(sum(p.numel() for p in block.parameters()) for block in inner.model.blocks)
    replicas = DistributedDataParallel(
        inner.loss,
        gradient_as_bucket_view=False,
        bucket_cap_mb=4.2 * layer / (1 << 20),
        broadcast_buffers=False,  # tables of sines, the same everywhere: no round trip for them in each step
    )
    replicas.register_comm_hook(None, halved)
    inner.use(replicas)

    def step(number: int) -> None:
        inner.step(number, lambda _: optimizer.step(), lambda: None)

    for number in range(WARM):
        step(number)
    dist.barrier()
    bytes_before, begun = store.traffic(), time.monotonic()
    for number in range(WARM, WARM + job["steps"]):
        step(number)
    seconds = time.monotonic() - begun
    dist.barrier()  # what the others have answered to has passed
    sent = store.traffic() - bytes_before
    loss = inner.evaluate() if job["evaluate"] else None
    digest = float(sum(p.detach().double().sum() for p in inner.parameters))
    begun = time.monotonic()
    with replicas.no_sync():
        for number in range(ALONE):
            step(number)
    alone = (time.monotonic() - begun) / ALONE
    result = {"steps": job["steps"], "seconds": seconds, "alone_s": alone, "bytes": sent, "loss": loss}
    Path(job["out"]).write_text(json.dumps({**result, "sum": digest}), encoding="utf-8")
    part(meeting, job["rank"], job["world"])
    dist.destroy_process_group()
    store.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
