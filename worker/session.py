"""The torch-style face of a worker: `diloco.DiLoCo` wraps any optimizer and keeps a training loop yours.

Here threads meet the replica's state machine: a receiver thread brings events, one background thread encodes and
decodes, the training thread steps and merges. The protocol itself is in `replica`.
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diloco.comms.machine import Action, Compute, Computed, Connection, Event, Send, Tick
from diloco.config import RunConfig
from diloco.errors import ConfigError, TransportError
from diloco.fragments import FragmentPlan, build_plan, gather, scatter
from diloco.optim.groups import place
from diloco.worker import leasing, replica_end, timeline
from diloco.worker.clock import Clock
from diloco.worker.deadlines import Deadlines
from diloco.worker.rates import Peaks
from diloco.worker.replica import Replica

T = TypeVar("T")

FAREWELL_S = 60.0  # how long a complete worker waits for the coordinator's goodbye
INTERRUPT_S = 1.5  # and an interrupted one
POLL_S = 0.5


class Interrupted(Exception):
    """The wait for the coordinator was broken off by the `stop` event; nothing is lost."""


class ModelParameters:
    """The trainable tensors of a model, each once, as the fragments of a plan."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        # named_parameters names a tied tensor once.
        self.tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.written = False  # since somebody last looked
        s = config.stream
        self.plan: FragmentPlan = build_plan(
            {name: tuple(p.shape) for name, p in self.tensors.items()},
            s.H,
            layout=s.layout,
            frag_layers=s.frag_layers,
            offsets=s.offsets,
            first_round=s.first_round,
            roles={p.name: p.group for p in place(model)} if any(vars(config.codec.roles).values()) else None,
        )

    def read(self, fragment: int) -> Tensor:
        return gather(self.plan.fragments[fragment], self.tensors)

    def write(self, fragment: int, values: Tensor) -> None:
        scatter(self.plan.fragments[fragment], values, self.tensors)
        self.written = True


class DiLoCo(torch.optim.Optimizer):
    """DiLoCo around any torch optimizer (2311.08105; streaming and overlap 2501.18512).

        optimizer = diloco.DiLoCo(model, torch.optim.AdamW(model.parameters()), diloco.connect("grpc://host:7700"))
        for batch in data: loss(batch).backward(); optimizer.step(); optimizer.zero_grad()
        optimizer.flush(); optimizer.close()

    `step` makes one inner step, sends the fragments whose turn it is, and merges committed ones exactly
    `stream.tau` steps after they were sent. `param_groups` and `state` are the inner optimizer's own objects, so
    learning-rate schedulers work unchanged. With `join` (the default) the constructor waits for admission and
    writes the run's parameters into `model`: **what the model held before is lost unless this worker is asked
    for the starting values.** `config` defaults to what the coordinator says.

    `tokens` (per step, or given to each `step`) weighs contributions under ``weights.mode = "tokens"``, `shard` (tokens
    of the data that this worker reads) under ``weights.mode = "shard"``, which needs it before the first `step`.
    Setting `stop` breaks off a wait for the coordinator with `Interrupted`.
    Raises RefusedError (other model, settings or run), ConfigError, TransportError.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        connection: Connection,
        *,
        config: RunConfig | Mapping[str, Any] | None = None,
        worker: str | None = None,
        tokens: int = 0,
        shard: int = 0,
        join: bool = True,
        on_wait: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        if hasattr(optimizer, "eval"):
            raise ConfigError(
                f"DiLoCo cannot wrap {type(optimizer).__name__}, which averages its weights itself: wrap its inner optimizer"
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.config = _configuration(config, connection)
        self.parameters = ModelParameters(model, self.config)
        self.tokens_per_step = tokens
        self.tokens_total = 0
        self.clock = Clock()
        self.recorder = timeline.Recorder(time.monotonic(), time.time())
        self._deadlines, self._peaks = Deadlines(), Peaks()
        self._wanted: dict[int, float] = {}  # as the connection was last told
        self._connection, self._on_wait = connection, on_wait
        self._stop = stop or threading.Event()
        self._changed = threading.Condition()
        self._jobs = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="diloco-codec")
        self._closing = False
        self._error: BaseException | None = None
        self._last_step_end: float | None = None
        name = worker or getattr(connection, "name", None) or f"{socket.gethostname()}-{secrets.token_hex(3)}"
        self.replica = Replica(
            self.parameters.plan, self.config, self.parameters, worker=name, nonce=secrets.randbits(63)
        )
        self.replica.shard = shard
        self._receiver = threading.Thread(target=self._receive, name="diloco-receiver", daemon=True)
        if join:
            self.join()

    # ---- the optimizer's face ----

    def step(self, closure: Callable[[], float] | None = None, *, tokens: int | None = None) -> float | None:  # type: ignore[override]
        """One inner step and whatever the schedule asks for after it; returns the closure's loss."""
        if self._receiver.ident is None:
            self.join()
        if self.replica.flushing:
            raise ConfigError(
                "DiLoCo.step after flush(): the run of this worker is over; flush only at its end"
            )
        leasing.require_data(self.replica)
        loss = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        begun = time.monotonic()
        taken = begun - self._last_step_end if self._last_step_end is not None else None
        if taken is not None:
            self.clock.computed(taken)
            self.recorder.computed(begun - taken, begun, self.replica.step + 1)
        count = self.tokens_per_step if tokens is None else tokens
        self.tokens_total += count
        with self._changed:
            self._deadlines.stepped(begun, taken)
            self._perform(self.replica.after_step(count, begun))
            self._merge_when_due()
        self._last_step_end = time.monotonic()
        self.clock.exposed += self._last_step_end - begun
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.__dict__.get("param_groups") is not None and hasattr(self, "replica"):
            raise ConfigError("DiLoCo: the plan of fragments is fixed; add parameter groups before wrapping")
        super().add_param_group(param_group)

    @property
    def inner_step(self) -> int:
        """How many inner steps of the run this worker is at: the index for learning-rate schedules."""
        return self.replica.step

    # ---- the run ----

    def join(self) -> None:
        """Wait until the coordinator has let us in and the run's parameters are in the model."""
        self._receiver.start()
        with self._changed:
            self._merge_when_due()
        self._last_step_end = time.monotonic()

    def flush(self) -> None:
        """End of the run: merge what is in flight, send every fragment once more, hold the run's final value.

        Waits until no other worker that is alive owes its last contribution, so that all end with the same value.
        Afterwards `step` raises ConfigError.
        """
        if self.replica.flushing:
            return
        begun = time.monotonic()
        with self._changed:
            self.replica.drain()
            self._merge_when_due()
            if self.config.stream.final_flush:
                self._perform(self.replica.flush(time.monotonic()))
                self._merge_when_due()
                self._perform(replica_end.ask(self.replica, time.monotonic()))
                self._merge_when_due()
        self.clock.exposed += time.monotonic() - begun

    def facts(self) -> dict[str, Any]:
        """What this worker last reported about itself, by name; `fragments` are totals of their rounds."""
        progress = dataclasses.asdict(self.replica.progress)
        return {"worker": self.replica.worker, **progress, "fragments": self.recorder.totals()}

    def report(self, **facts: Any) -> None:
        """Put facts (fields of `Progress`: loss, lr, ...) into the next heartbeats."""
        up, down = self._connection.traffic()
        rates = self._connection.rates()
        with self._changed:
            self.replica.progress = dataclasses.replace(
                self.replica.progress,
                **{
                    "step": self.replica.step,
                    "tokens": self.tokens_total,
                    **self.clock.figures(time.monotonic(), self.tokens_total),
                    "bytes_up": up,
                    "bytes_down": down,
                    **self._peaks.seen(time.monotonic(), up, down),
                    "link_up_bps": rates.up_bps,
                    "link_down_bps": rates.down_bps,
                    "rtt_s": rates.rtt_s,
                    **facts,
                },
            )

    def close(self, reason: str = "complete") -> None:
        """Say goodbye, wait for the answer, and let go of threads and connection."""
        if self._closing:
            return
        with self._changed:
            if self.replica.joined and self.replica.stopped is None and self._error is None:
                self._perform(self.replica.leave(reason, timeline.dump(self.recorder.read())))
                # A coordinator that never hears of the end would wait for this worker: be patient with a restart.
                limit = time.monotonic() + (FAREWELL_S if reason == "complete" else INTERRUPT_S)
                while self.replica.stopped is None and self._error is None and time.monotonic() < limit:
                    if reason == "complete" and self._stop.is_set():
                        break
                    self._changed.wait(POLL_S)
            self._closing = True
        self._connection.close()
        if self._receiver.ident is not None:
            self._receiver.join(timeout=5.0)
        self._pool.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def global_parameters(self) -> Iterator[None]:
        """The model holds the global value inside this block (for evaluation), and the local one again after it."""
        anchors = self._settled(
            lambda: [s.shard.params.clone() for s in self.replica.slots if s.shard is not None]
        )
        local = [self.parameters.read(f.index) for f in self.parameters.plan.fragments]
        try:
            for index, values in enumerate(anchors):
                self.parameters.write(index, values)
            yield
        finally:
            for index, values in enumerate(local):
                self.parameters.write(index, values)
            self.parameters.written = False  # all is as it was

    def digest(self) -> str:
        """SHA-256 of the global parameters as this worker holds them, hex."""
        return self._settled(self.replica.digest)

    # ---- checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state under "inner", the protocol's under "replica"."""
        replica = self._settled(self.replica.state_dict)
        replica["meta"]["tokens"] = self.tokens_total
        return {"inner": self.optimizer.state_dict(), "replica": replica}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; before `join` (construct with ``join=False``)."""
        if self._receiver.ident is not None:
            raise ConfigError("DiLoCo.load_state_dict: construct with join=False, load, then join()")
        self.optimizer.load_state_dict(state_dict["inner"])  # which makes new objects of both:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.replica.load_state_dict(state_dict["replica"])
        self.tokens_total = int(state_dict["replica"]["meta"]["tokens"])

    # ---- threads ----

    def _settled(self, read: Callable[[], T]) -> T:
        """`read()` while no decode job runs: nobody else touches the anchors then."""
        with self._changed:
            while self._jobs and self._error is None:
                self._changed.wait(POLL_S)
            self._raise_if_stopped()
            return read()

    def _merge_when_due(self) -> None:
        """With the lock held: wait for what is due now, then write it into the parameters."""
        while True:
            self._wait_while_blocked()
            self._perform(self.replica.merge())
            if not self.replica.blocked:  # else a round that had to wait for this merge is due already
                break
        # Optimizers that keep weights on a sphere must take up what was merged; at the end the model is the run's.
        if self.parameters.written and not self.replica.flushing and hasattr(self.optimizer, "reanchor"):
            self.optimizer.reanchor()
        self.parameters.written = False

    def _wait_while_blocked(self) -> None:
        waited = time.monotonic()
        while self.replica.blocked and self._error is None:
            if self._stop.is_set():
                raise Interrupted
            late, since = timeline.missing(self.replica.slots, self.replica.step), time.monotonic()
            self._changed.wait(POLL_S)
            self.recorder.waited(late, since, time.monotonic())
            if self._on_wait is not None and time.monotonic() - waited > 5.0:
                waited = time.monotonic()
                self._on_wait(self._why_waiting())
        self._raise_if_stopped()

    def _why_waiting(self) -> str:
        if not self.replica.joined:
            cohort = self.replica.cohort
            if cohort is not None:
                return f"waiting for workers: {len(cohort.joined)} of {cohort.needed} have joined"
            return "waiting for the coordinator"
        if self.replica.end.waits:
            return "waiting for the last contributions of the others"
        return "waiting for the run's parameters" if not self.replica.ready else "waiting for a commit"

    def _raise_if_stopped(self) -> None:
        if self._error is not None:
            raise TransportError(f"the worker's background thread failed: {self._error!r}") from self._error
        stopped = self.replica.stopped
        if stopped is not None and stopped.error is not None:
            raise stopped.error

    def _perform(self, actions: list[Action]) -> None:
        """With the lock held."""
        flying = [(s.index, s.flight.due) for s in self.replica.slots if s.flight and not s.flight.outcome]
        stride = self.parameters.plan.H / self.replica.pace
        wanted = self._deadlines.of(flying, self.replica.step, stride)
        if wanted != self._wanted:
            self._wanted = wanted
            self._connection.expect(wanted, self.config.stream.pace)
        for action in actions:
            if isinstance(action, Send):
                self._connection.send(action.message)
            elif isinstance(action, Compute):
                self._jobs += 1
                self._pool.submit(self._run_job, action.job)
        now = time.monotonic()
        self.clock.flying(now, bool(flying))
        self.recorder.follow(self.replica.slots, self.replica.step, now)
        self._changed.notify_all()

    def _run_job(self, job: Callable[[], Any]) -> None:
        try:
            result = job()
            with self._changed:
                self._jobs -= 1
                self._perform(self.replica.handle(Computed(result), time.monotonic()))
        except BaseException as error:  # noqa: BLE001 - raised again on the training thread
            self._fail(error)

    def _receive(self) -> None:
        try:
            while not self._closing:
                with self._changed:
                    deadline = self.replica.deadline
                timeout = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - time.monotonic()))
                event: Event = self._connection.receive(timeout) or Tick()
                if isinstance(event, Tick):
                    self.report()
                with self._changed:
                    self._perform(self.replica.handle(event, time.monotonic()))
        except BaseException as error:  # noqa: BLE001 - raised again on the training thread
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _configuration(config: RunConfig | Mapping[str, Any] | None, connection: Connection) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    if config is None:
        config = connection.settings()
        if config is None:
            raise TransportError(
                "the coordinator does not answer, and no config was given: pass config=, or start it"
            )
    return RunConfig.from_dict(config)
