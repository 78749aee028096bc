"""Toy workers that train on leased blocks in virtual time, and what must hold of blocks in every run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diloco.comms.machine import COORDINATOR, Action, Computed, Connected, Event
from diloco.comms.sim import Simulation, Weather
from diloco.config import RunConfig
from diloco.coordinator.journal import Record
from diloco.coordinator.replay import replay
from diloco.coordinator.state import Coordinator
from diloco.ranges import Ranges, count, normal, parsed
from diloco.worker import leasing
from diloco.worker.leasing import Leasing
from tests.toy import Cluster, Disk, ToyWorker, config

PER_STEP = 2  # blocks of an inner step
TOKENS = 5  # of a block: a step has 10
SIZES = {"leased": (1000,), "deficit": (500, 300, 200)}

Block = tuple[int, int]


def leased_config(mode: str = "leased", **sections: dict[str, Any]) -> RunConfig:
    data = {"mode": mode} if mode == "leased" else {"mode": mode, "shards": 3}
    return config(data=data, model={"sequence_length": TOKENS}, **sections)


def blocks(ranges: Ranges) -> list[Block]:
    return [(shard, at) for shard, lo, hi in ranges for at in range(lo, hi)]


class LeasedWorker(ToyWorker):
    """Draws its blocks when a step begins; `waits` counts the steps that had to wait for a lease."""

    def __init__(
        self,
        sim: Simulation,
        name: str,
        c: RunConfig,
        *,
        flavour: int,
        nonce: int = 1,
        sizes: tuple[int, ...] = (),
    ):
        super().__init__(sim, name, c, flavour=flavour, nonce=nonce)
        self.lease = self.replica.lease = Leasing(PER_STEP, sizes or SIZES[c.data.mode])
        self.read: list[Block] = []  # in order, also in steps that were not finished
        self.waits = 0
        self.frozen = self._held_step = False
        self._waited_at = -1

    def _advance(self) -> None:
        replica = self.replica
        if self.frozen:
            return
        at_work = self.alive and not self.finished and self.state in ("start", "stepping")
        if at_work and not replica.blocked and replica.stopped is None:
            self.sim.perform(self.name, replica.merge())
            ends = replica.step >= self.config.run.inner_steps_total
            if not ends and not replica.blocked and not self.lease.ready(PER_STEP):
                if self._waited_at != replica.step:
                    self.waits, self._waited_at = self.waits + 1, replica.step
                self.sim.perform(self.name, leasing.ask(replica))
                return
        super()._advance()
        if at_work and self.state == "computing":
            self.read += blocks(self.lease.draw(PER_STEP))

    def freeze(self, seconds: float) -> None:
        """Stop the process for a while, as SIGSTOP and SIGCONT do: messages are lost, what its threads did is not."""
        if not self.alive or self.frozen:
            return
        handle, done = self.replica.handle, list[Computed]()
        self.frozen = True

        def hold(event: Event, now: float) -> list[Action]:
            if isinstance(event, Computed):
                done.append(event)
            return []

        def wake() -> None:
            self.frozen = False
            self.replica.handle = handle  # type: ignore[method-assign]
            for event in done:
                self.sim.deliver(self.name, event)
            self.sim.deliver(self.name, Connected(COORDINATOR))
            if self._held_step:
                self._held_step = False
                self.sim.at(self.step_s, self._step)

        self.replica.handle = hold  # type: ignore[method-assign]
        self.replica.next_heartbeat = self.sim.now + seconds
        self.sim.at(seconds, wake)

    def _step(self) -> None:
        self._held_step = self.frozen
        if not self.frozen:
            super()._step()

    def reborn(self, saved: dict[str, Any] | None, nonce: int) -> LeasedWorker:
        """A new process under the same name, from a checkpoint if there is one."""
        self.kill()
        new = LeasedWorker(self.sim, self.name, self.config, flavour=self.model.flavour, nonce=nonce)
        if saved is not None:
            new.replica.load_state_dict(saved)
        return new


class LeasedCluster(Cluster):
    """A cluster of leased workers; `lives` has all of them, dead ones too."""

    def __init__(
        self, c: RunConfig, *, seed: int = 0, weather: Weather | None = None, flavours: Sequence[int] = (0, 1)
    ):
        super().__init__(c, seed=seed, weather=weather, flavours=())
        self.lives: list[LeasedWorker] = []
        for i, flavour in enumerate(flavours):
            self.lives.append(LeasedWorker(self.sim, f"w{i}", c, flavour=flavour, nonce=100 + i))
        self.workers = list(self.lives)

    def run(self, until_s: float = 5000.0) -> LeasedCluster:
        super().run(until_s)
        return self

    def replace(self, position: int, nonce: int, saved: dict[str, Any] | None = None) -> None:
        """A worker's process dies and starts again at once."""
        old = self.workers[position]
        assert isinstance(old, LeasedWorker)
        if self.coordinator.complete or old.finished:
            return
        new = old.reborn(saved, nonce)
        self.workers[position] = new
        self.lives.append(new)


def committed(disk: Disk) -> list[Block]:
    """Blocks in the journal's commits, in the journal's order."""
    found: list[Block] = []
    for record in disk.commits():
        for ranges in record.get("ranges", ()):
            found += blocks(parsed(ranges))
    return found


def rebuilt(c: RunConfig, records: Sequence[Record]) -> Coordinator:
    coordinator = Coordinator(c)
    replay(coordinator, list(records), 0.0)
    return coordinator


def require_sound_leases(c: RunConfig, coordinator: Coordinator, disk: Disk) -> None:
    """No block is in two commits, none is lost, tokens add up, and the journal has the same table."""
    table, done = coordinator.leases, committed(disk)
    assert table is not None
    table.check()
    assert len(done) == len(set(done)), "a block was committed twice"
    assert sorted(done) == blocks(table.committed)
    assert coordinator.tokens == sum(sum(r["tokens"]) for r in disk.commits())
    of_ledger = [r for r in disk.commits() if r["fragment"] == leasing.LEDGER]
    for record in of_ledger:
        named = record.get("ranges", [()] * len(record["tokens"]))
        for ranges, tokens in zip(named, record["tokens"], strict=True):
            assert tokens <= count(normal(parsed(ranges))) * TOKENS, "tokens that no block has"
    again = rebuilt(c, [*disk.records]).leases
    assert again is not None
    for name in vars(table):
        if name != "holders":
            assert getattr(again, name) == getattr(table, name), name
    assert {n: (h.incarnation, h.number, h.ranges) for n, h in again.holders.items()} == {
        n: (h.incarnation, h.number, h.ranges) for n, h in table.holders.items()
    }
