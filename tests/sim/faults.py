"""Faults for simulated runs of the toy cluster, and what must hold after each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diloco.comms import frame
from diloco.comms.machine import COORDINATOR, Action, Event, Machine
from diloco.comms.sim import Weather
from diloco.late import COUNTING
from tests.toy import Cluster, ToyWorker

CALM = Weather()
ROUGH = Weather(delay_s=(0.001, 0.9), duplicate=0.2, drop=0.03)
STORM = Weather(delay_s=(0.01, 1.5), duplicate=0.3, drop=0.12)


def bits(cluster: Cluster) -> list[bytes]:
    return [frame.digest(values).encode() for _, values in sorted(cluster.values().items())]


def require_sound(cluster: Cluster) -> None:
    """What holds in every run: one commit per version, and every replica has exactly what the journal says."""
    digests: dict[tuple[int, int], str] = {}
    newest: dict[int, int] = {}
    rounds: set[tuple[int, int, int]] = set()  # by fragment, worker index and number
    for record in cluster.disk.commits():
        p, version = record["fragment"], record["version"]
        assert version == newest.get(p, 0) + 1, "a committed version was lost or doubled"
        newest[p] = version
        digests[p, version] = record["digest"]
        late = cluster.config.fault.late in COUNTING  # then a worker may be there with two rounds
        counted = list(zip(record["indices"], record["rounds"] if late else record["indices"], strict=True))
        assert len(set(counted)) == len(counted), "one worker counted twice"
        assert not rounds.intersection((p, *pair) for pair in counted) or not late, "a round counted twice"
        rounds.update((p, *pair) for pair in counted)
        if cluster.config.stream.overlap == "async":
            assert len(record["weights"]) == 1 and 0.0 < record["weights"][0] <= 1.0
        else:
            assert sum(record["weights"]) == pytest.approx(1.0, abs=1e-9)
    assert cluster.coordinator.versions() == tuple(
        newest.get(p, 0) for p in range(len(cluster.coordinator.versions()))
    )
    for worker in cluster.workers:
        for slot in worker.replica.slots:
            if slot.shard is not None and slot.version > 0 and not slot.broken:
                assert frame.digest(slot.shard.params) == digests[slot.index, slot.version], (
                    f"{worker.name} holds another version {slot.version} of fragment {slot.index}"
                )


def require_equal_ends(cluster: Cluster) -> None:
    """Everyone who finished holds the run's parameters, bit for bit."""
    for worker in cluster.workers:
        if worker.finished:
            assert worker.replica.digest() == cluster.coordinator.global_digest()


class Fused:
    """A machine that dies after `fuse` more actions, if that is set, whatever it was about to do next."""

    def __init__(
        self, inner: Machine, fuse: int | None = None, died: Callable[[], None] = lambda: None
    ) -> None:
        self.inner, self.fuse, self.died = inner, fuse, died
        self.dead = False

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.dead:
            return []
        actions = self.inner.handle(event, now)
        if self.fuse is None:
            return actions
        if len(actions) <= self.fuse:
            self.fuse -= len(actions)
            return actions
        self.dead = True
        self.died()
        return actions[: self.fuse]

    @property
    def deadline(self) -> float | None:
        return None if self.dead else self.inner.deadline

    def check(self) -> None:
        if not self.dead:
            self.inner.check()


def arm(cluster: Cluster, fuse: int, down_s: float = 3.0) -> None:
    """Let the coordinator die after `fuse` more actions and come back `down_s` later from the disk alone."""
    if isinstance(cluster.sim.machines[COORDINATOR], Fused):
        return  # one death at a time
    cluster.sim.add(
        COORDINATOR,
        Fused(cluster.coordinator, fuse, lambda: cluster.sim.at(down_s, cluster.restart_coordinator)),
    )


def replace_worker(cluster: Cluster, position: int, nonce: int, flavour: int = 5) -> None:
    """The worker's process starts again from nothing, under its old name."""
    old = cluster.workers[position]
    old.kill()
    cluster.workers[position] = ToyWorker(cluster.sim, old.name, cluster.config, flavour=flavour, nonce=nonce)
