"""A worker's half of the protocol as a state machine: no sockets, clock, threads or model.

It knows which fragment to send after which inner step, measures the pseudo-gradient, and merges the committed
value exactly tau inner steps later, never on arrival: so timing cannot change a bit of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diloco import outer
from diloco.comms import downlink, frame
from diloco.comms.feedback import ErrorFeedback
from diloco.comms.machine import (
    COORDINATOR,
    Action,
    Compute,
    Computed,
    Connected,
    Event,
    Lost,
    Received,
    Send,
    Stop,
    Tick,
)
from diloco.comms.messages import (
    Aborted,
    Commit,
    Contribution,
    Fetch,
    Heartbeat,
    Initial,
    Join,
    Leave,
    Progress,
    Refused,
    Rejected,
    Resend,
    Skip,
    Snapshot,
    Waiting,
    Welcome,
)
from diloco.config import RunConfig
from diloco.delta import merge, merge_delay_corrected, pseudo_gradient
from diloco.errors import CorruptDataError, NonFiniteError, RefusedError
from diloco.fragments import FragmentPlan
from diloco.settings import settings_json


class Parameters(Protocol):
    """The worker's copy of the model, fragment by fragment, as flat fp32 tensors."""

    def read(self, fragment: int) -> Tensor:
        """A copy of the fragment's current values [numel]."""
        ...

    def write(self, fragment: int, values: Tensor) -> None: ...


@dataclass(slots=True)
class Flight:
    """A round of one fragment between its send and its merge."""

    round: int
    base: int
    due: int  # the inner step at which it is merged
    alpha: float
    steps: int
    tokens: int
    sent: Tensor | None = None  # the parameters as they were sent, kept for delay_corrected only
    frame: bytes | None = None
    since: float = 0.0
    outcome: str = ""  # "", "merged-in", "left-out", "aborted"
    overwrite: bool = False  # local values are not fit to keep (non-finite)


@dataclass(slots=True)
class Slot:
    """One fragment at this worker. `shard` is the anchor: what the worker last took, or is about to take."""

    index: int
    shard: outer.OuterShard | None = None
    feedback: ErrorFeedback | None = None
    flight: Flight | None = None
    steps: int = 0  # inner steps since the last send
    tokens: int = 0
    jobs: int = 0  # decode jobs not yet back
    waiting: dict[int, Commit] = field(default_factory=dict)  # commits to be applied, by version
    adopt: bool = False  # take the anchor as it is: after a snapshot

    @property
    def version(self) -> int:
        return self.shard.version if self.shard else 0


class Replica:
    """`handle(event, now) -> actions`; the training thread calls `after_step` and `merge`.

    `blocked` is true while the trainer must wait: for admission, or for the reply that is due now.
    """

    def __init__(
        self, plan: FragmentPlan, config: RunConfig, parameters: Parameters, *, worker: str, nonce: int
    ) -> None:
        self.plan, self.config, self.parameters = plan, config, parameters
        self.worker, self.nonce = worker, nonce
        self.run_hash = frame.run_id_hash(config.run.run_id)
        self.codec = downlink.uplink_codec(config.codec)
        blocking = config.stream.overlap == "none"
        self.tau = 0 if blocking else config.stream.tau
        self.alpha = 0.0 if blocking else config.stream.alpha
        self.slots = [Slot(f.index) for f in plan.fragments]
        if config.codec.ef == "on":
            for slot in self.slots:
                slot.feedback = ErrorFeedback(self.codec, config.codec.ef_beta)
        self.step = 0
        self.incarnation = 0
        self.index = -1
        self.connected = False
        self.joined = False
        self.flushing = False
        self.cohort: Waiting | None = None
        self.leaving: Leave | None = None
        self.stopped: Stop | None = None
        self.progress = Progress()
        self.rejections: list[Rejected] = []
        self._next_heartbeat: float | None = None
        self._now = 0.0

    # ---- the machine's interface ----

    def handle(self, event: Event, now: float) -> list[Action]:
        self._now = now
        if self.stopped is not None:
            return []
        match event:
            case Connected():
                self.connected = True
                return [Send(COORDINATOR, self._join())]
            case Lost():
                self.connected = False
                return []
            case Computed(result):
                return self._computed(result)
            case Tick():
                return (
                    self._heartbeat()
                    if self._next_heartbeat is not None and now >= self._next_heartbeat
                    else []
                )
            case Received(message=message):
                return self.receive(message, now)

    @property
    def deadline(self) -> float | None:
        return None if self.stopped is not None else self._next_heartbeat

    def check(self) -> None:
        for slot in self.slots:
            flight = slot.flight
            assert flight is None or flight.due >= self.step or self.blocked or self.flushing, (
                "a merge was missed"
            )
            assert not slot.waiting or min(slot.waiting) > slot.version, "a commit was applied and kept"

    @property
    def ready(self) -> bool:
        """The run's parameters are here: training may start."""
        return self.joined and all(s.shard is not None and not s.jobs for s in self.slots)

    @property
    def blocked(self) -> bool:
        if self.stopped is not None:
            return False
        return not self.ready or any(not self._settled(slot) for slot in self._due())

    def _due(self) -> list[Slot]:
        return [s for s in self.slots if s.flight is not None and s.flight.due <= self.step]

    @staticmethod
    def _settled(slot: Slot) -> bool:
        return slot.flight is not None and bool(slot.flight.outcome) and not slot.jobs

    def versions(self) -> tuple[int, ...]:
        return tuple(s.version for s in self.slots) if self.ready else ()

    # ---- called by the training thread ----

    def after_step(self, tokens: int, now: float) -> list[Action]:
        """One inner step is done: send the fragments whose turn it is. Then wait while `blocked`, then `merge`."""
        self._now = now
        self.step += 1
        for slot in self.slots:
            slot.steps += 1
            slot.tokens += tokens
        actions: list[Action] = []
        for index in self.plan.due(self.step):
            number = self.plan.round_of(index, self.step)
            actions += self._send(self.slots[index], number, self.step + self.tau, self.alpha)
        return actions

    def merge(self) -> list[int]:
        """Write what is due into the parameters; returns the fragments. Only when not `blocked`."""
        done = []
        for slot in self.slots:
            if slot.adopt and slot.flight is None and slot.shard is not None:
                slot.adopt = False
                self.parameters.write(slot.index, slot.shard.params)
                slot.steps = slot.tokens = 0
                done.append(slot.index)
        for slot in self._due():
            flight, shard = slot.flight, slot.shard
            assert flight is not None and shard is not None and self._settled(slot)
            if flight.outcome != "aborted" or flight.overwrite:
                self.parameters.write(slot.index, self._merged(slot, flight, shard.params))
                done.append(slot.index)
            slot.flight, slot.adopt = None, False
        return done

    def _merged(self, slot: Slot, flight: Flight, new: Tensor) -> Tensor:
        if flight.overwrite:
            return new
        local = self.parameters.read(slot.index)
        if flight.sent is not None:
            return merge_delay_corrected(local, new, flight.sent)
        return merge(local, new, flight.alpha)

    def drain(self) -> None:
        """The run is over: what is in flight is merged now."""
        self.flushing = True
        for slot in self.slots:
            if slot.flight is not None:
                slot.flight.due = self.step

    def flush(self, now: float) -> list[Action]:
        """Send every fragment once more and take the result whole, so that the global value covers every step."""
        self._now = now
        actions: list[Action] = []
        for slot in self.slots:
            if not (slot.steps == 0 and self.tau == 0 and self.alpha == 0.0):
                actions += self._send(slot, self.plan.flush_round(slot.index, self.step), self.step, 0.0)
        return actions

    def leave(self, reason: str) -> list[Action]:
        """Say goodbye until it is heard: `stopped` is set once the coordinator has answered."""
        self.leaving = Leave(self.worker, self.incarnation, reason, self.progress, self.digest())
        return [Send(COORDINATOR, self.leaving)]

    def digest(self) -> str:
        """Digest of the global parameters as this worker holds them."""
        shards = [slot.shard for slot in self.slots]
        return frame.model_digest([frame.digest(s.params) for s in shards if s is not None])

    def _send(self, slot: Slot, number: int, due: int, alpha: float) -> list[Action]:
        shard = slot.shard
        assert shard is not None and slot.flight is None, "a fragment has at most one round in flight"
        local = self.parameters.read(slot.index)
        delta = pseudo_gradient(shard.params, local)
        keep = local if self.config.stream.merge == "delay_corrected" and due > self.step else None
        flight = Flight(
            number, shard.version, due, alpha, max(1, slot.steps), slot.tokens, keep, since=self._now
        )
        slot.flight, slot.steps, slot.tokens = flight, 0, 0
        return [Compute(self._encode_job(slot, flight, delta)), *self._open_waiting(slot)]

    # ---- heavy work, run by the driver away from the training thread, in order ----

    def _encode_job(self, slot: Slot, flight: Flight, delta: Tensor) -> Callable[[], Any]:
        def encode() -> tuple[str, Slot, Flight, bytes | NonFiniteError]:
            try:
                return "encoded", slot, flight, self._frame(slot, delta, flight)
            except NonFiniteError as error:
                return "encoded", slot, flight, error

        return encode

    def _frame(self, slot: Slot, delta: Tensor, flight: Flight) -> bytes:
        return frame.encode_frame(
            slot.feedback or self.codec,
            delta,
            fragment=slot.index,
            round=flight.round,
            base_version=flight.base,
            run_id=self.run_hash,
            worker=self.index,
            incarnation=self.incarnation,
            steps=flight.steps,
            tokens=flight.tokens,
        )

    def _open_waiting(self, slot: Slot) -> list[Action]:
        """Decode queued commits in order. Only while a round is in flight: nobody else then reads the anchor."""
        actions: list[Action] = []
        next_version = slot.version + slot.jobs + 1
        while slot.flight is not None and (commit := slot.waiting.pop(next_version, None)) is not None:
            slot.jobs += 1
            next_version += 1
            actions.append(Compute(self._open_job(slot, commit)))
        return actions

    def _open_job(self, slot: Slot, commit: Commit) -> Callable[[], Any]:
        def open_one() -> tuple[str, Slot, Commit, CorruptDataError | None]:
            shard, frames = slot.shard, commit.frames
            assert shard is not None
            try:
                if (
                    self.config.codec.down == "relay"
                    and slot.flight is not None
                    and slot.flight.frame is not None
                ):
                    if self.index in dict(commit.weights) and self.index not in dict(frames):
                        frames = (*frames, (self.index, slot.flight.frame))
                downlink.open_commit(self.config.codec.down, shard, frames, commit.weights, self.codec)
                if frame.digest(shard.params) != commit.digest:
                    raise CorruptDataError(f"fragment {slot.index} version {commit.version}: digests differ")
            except (CorruptDataError, KeyError) as error:
                return "opened", slot, commit, CorruptDataError(str(error))
            return "opened", slot, commit, None

        return open_one

    def _restore_job(self, slot: Slot, snapshot: Snapshot) -> Callable[[], Any]:
        def restore() -> tuple[str, Slot, Snapshot, CorruptDataError | None]:
            try:
                values = frame.decode_frame(snapshot.frames[0][1])[1]
                if (
                    values.numel() != self.plan.fragments[slot.index].numel
                    or frame.digest(values) != snapshot.digest
                ):
                    raise CorruptDataError(f"snapshot of fragment {slot.index}: size or digest differs")
                shard = slot.shard or self._start(values)
                downlink.load_snapshot(shard, snapshot.frames, snapshot.version)
                slot.shard = shard
            except (CorruptDataError, ValueError) as error:
                return "restored", slot, snapshot, CorruptDataError(str(error))
            return "restored", slot, snapshot, None

        return restore

    def _start(self, values: Tensor) -> outer.OuterShard:
        o = self.config.outer
        optimizer = outer.make(
            o.kind, lr=o.lr, momentum=o.momentum, gpa_lr=o.gpa_lr, gpa_mu_x=o.gpa_mu_x, gpa_mu_y=o.gpa_mu_y
        )
        if self.config.codec.down in downlink.WORKERS_STEP:
            return outer.OuterShard.start(optimizer, values)
        return outer.OuterShard(optimizer, values.clone())  # the coordinator steps; no state is needed here

    def _computed(self, result: Any) -> list[Action]:
        kind, slot = result[0], result[1]
        if kind == "encoded":
            return self._encoded(slot, result[2], result[3])
        slot.jobs -= 1
        error = result[3]
        if kind == "opened":
            commit: Commit = result[2]
            if error is not None:
                return [Send(COORDINATOR, Fetch(self.worker, self.incarnation, slot.index))]
            self._settle(slot, commit)
        elif error is not None:
            return [Send(COORDINATOR, Fetch(self.worker, self.incarnation, slot.index))]
        else:
            self._settle_by_snapshot(slot, result[2])
        slot.waiting = {v: c for v, c in slot.waiting.items() if v > slot.version}
        return self._open_waiting(slot)

    def _encoded(self, slot: Slot, flight: Flight, made: bytes | NonFiniteError) -> list[Action]:
        if isinstance(made, NonFiniteError):
            flight.overwrite = True
            reason = f"non-finite pseudo-gradient: {made}"
            return [Send(COORDINATOR, Skip(self.worker, self.incarnation, slot.index, flight.round, reason))]
        flight.frame = made
        return [Send(COORDINATOR, self._contribution(slot, flight))] if self.joined else []

    def _contribution(self, slot: Slot, flight: Flight) -> Contribution:
        assert flight.frame is not None
        flight.since = self._now
        return Contribution(self.worker, self.incarnation, slot.index, flight.round, flight.frame)

    # ---- what arrives ----

    def receive(self, message: Any, now: float) -> list[Action]:
        """Take a message from the coordinator. Nothing here touches the parameters: `merge` does, when it is time."""
        self._now = now
        match message:
            case Waiting():
                self.cohort = message
                self._next_heartbeat = now + self.config.fault.heartbeat_s
            case Welcome():
                return self._welcome(message)
            case Refused("incarnation"):
                return [Send(COORDINATOR, self._join())] if self.connected else []
            case Refused(kind=kind) if self.leaving is not None and kind in ("left", "complete"):
                self.stopped = Stop(self.leaving.reason)
                return [self.stopped]
            case Refused():
                self.stopped = Stop(
                    message.reason, RefusedError(f"refused by the coordinator: {message.reason}")
                )
                return [self.stopped]
            case Commit():
                return self._commit(message)
            case Rejected():
                self.rejections.append(message)
                self._roll_back(message.fragment, message.round)
            case Aborted():
                flight = self.slots[message.fragment].flight
                if flight is not None and flight.round == message.round and not flight.outcome:
                    self._roll_back(message.fragment, message.round)
                    flight.outcome = "aborted"
            case Resend():
                slot = self.slots[message.fragment]
                if (
                    slot.flight is not None
                    and slot.flight.round == message.round
                    and slot.flight.frame is not None
                ):
                    return [Send(COORDINATOR, self._contribution(slot, slot.flight))]
            case Snapshot():
                return self._snapshot(message)
        return []

    def _join(self) -> Join:
        return Join(
            worker=self.worker,
            nonce=self.nonce,
            run_id=self.config.run.run_id,
            plan=self.plan.describe(),
            settings=settings_json(self.config),
            versions=self.versions(),
            step=self.step,
        )

    def _welcome(self, message: Welcome) -> list[Action]:
        if self.leaving is not None:
            return [Send(COORDINATOR, self.leaving)]
        fresh = not self.joined
        renewed = self.incarnation != message.incarnation or self.index != message.index
        self.joined, self.index, self.incarnation = True, message.index, message.incarnation
        self._next_heartbeat = self._now + self.config.fault.heartbeat_s
        actions: list[Action] = []
        if message.initial:
            actions += self._give_initial(message)
        if fresh and self.step == 0:
            self.step = message.step
        for slot in self.slots:
            flight = slot.flight
            if slot.shard is None or (fresh and slot.version != message.versions[slot.index]):
                actions.append(Send(COORDINATOR, Fetch(self.worker, self.incarnation, slot.index)))
            if flight is not None and flight.frame is not None and not flight.outcome:
                if renewed:  # the header names the life that sends it
                    flight.frame = frame.relabel(
                        flight.frame, worker=self.index, incarnation=self.incarnation
                    )
                actions.append(Send(COORDINATOR, self._contribution(slot, flight)))
            elif flight is not None and flight.overwrite and not flight.outcome:
                skip = Skip(
                    self.worker, self.incarnation, slot.index, flight.round, "non-finite pseudo-gradient"
                )
                actions.append(Send(COORDINATOR, skip))
        return actions

    def _give_initial(self, message: Welcome) -> list[Action]:
        """This worker's starting values become the run's."""
        actions: list[Action] = []
        for slot in self.slots:
            if slot.shard is None and message.versions[slot.index] == 0:
                values = self.parameters.read(slot.index)
                slot.shard = self._start(values)
                slot.shard.params.copy_(values)
                if self.config.codec.down == "g_bf16":
                    slot.shard.params.copy_(values.bfloat16())
                slot.adopt = True
            if slot.version == 0 and slot.shard is not None:
                values = self.parameters.read(slot.index) if slot.adopt else slot.shard.params
                framed = downlink.value_frame(values, slot.index, 0, self.run_hash, worker=self.index)
                actions.append(Send(COORDINATOR, Initial(self.worker, self.incarnation, slot.index, framed)))
        return actions

    def _commit(self, message: Commit) -> list[Action]:
        slot = self.slots[message.fragment]
        if slot.shard is None or message.version <= slot.version + slot.jobs:
            return []
        slot.waiting[message.version] = message
        if slot.version + slot.jobs + 1 not in slot.waiting:  # a gap: commits in between never reached us
            return [Send(COORDINATOR, Fetch(self.worker, self.incarnation, slot.index))]
        return self._open_waiting(slot)

    def _snapshot(self, message: Snapshot) -> list[Action]:
        slot = self.slots[message.fragment]
        if slot.jobs or (slot.shard is not None and message.version < slot.version):
            return []
        slot.jobs += 1
        return [Compute(self._restore_job(slot, message))]

    def _settle(self, slot: Slot, commit: Commit) -> None:
        """The round in flight has its answer: was our part in it?"""
        flight = slot.flight
        if flight is None or flight.outcome:
            return
        if (self.index, flight.round) in commit.rounds:
            flight.outcome = "merged-in"
            if slot.feedback is not None:
                slot.feedback.commit()
        else:
            self._roll_back(slot.index, flight.round)
            flight.outcome = "left-out"

    def _settle_by_snapshot(self, slot: Slot, snapshot: Snapshot) -> None:
        flight = slot.flight
        if flight is None:
            slot.adopt = True
        elif snapshot.version > flight.base and not flight.outcome:
            self._roll_back(slot.index, flight.round)
            flight.outcome = "left-out"

    def _roll_back(self, fragment: int, number: int) -> None:
        slot = self.slots[fragment]
        if slot.feedback is not None and slot.flight is not None and slot.flight.round == number:
            slot.feedback.rollback()

    def _heartbeat(self) -> list[Action]:
        self._next_heartbeat = self._now + self.config.fault.heartbeat_s
        old = self._now - 3 * self.config.fault.heartbeat_s
        in_flight = tuple(
            (s.index, s.flight.round)
            for s in self.slots
            if s.flight is not None
            and not s.flight.outcome
            and s.flight.frame is not None
            and s.flight.since <= old
        )
        actions: list[Action] = []
        if self.leaving is not None:
            return [Send(COORDINATOR, self.leaving)]
        if self.joined:
            beat = Heartbeat(self.worker, self.incarnation, self.progress, self.versions(), in_flight)
            actions.append(Send(COORDINATOR, beat))
            if not self.ready:
                actions += [
                    Send(COORDINATOR, Fetch(self.worker, self.incarnation, s.index))
                    for s in self.slots
                    if s.shard is None and not s.jobs
                ]
        elif self.connected:
            actions.append(Send(COORDINATOR, self._join()))
        return actions

    def _relabelled(self, framed: bytes) -> bytes:
        header, payload = frame.unpack(framed, codec=self.codec)
        return frame.pack(
            dataclasses.replace(header, worker=self.index, incarnation=self.incarnation), payload
        )

    # ---- checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues this half of the protocol: numbers under "meta", tensors under "tensors"."""
        meta: dict[str, Any] = {
            "step": self.step,
            "index": self.index,
            "incarnation": self.incarnation,
            "slots": [],
        }
        tensors: dict[str, Tensor] = {}
        for slot in self.slots:
            p, flight = slot.index, slot.flight
            entry: dict[str, Any] = {"version": slot.version, "steps": slot.steps, "tokens": slot.tokens}
            if slot.shard is not None:
                tensors[f"{p}.params"] = slot.shard.params.clone()
                tensors.update({f"{p}.state.{k}": v.clone() for k, v in slot.shard.state.items()})
            if slot.feedback is not None:
                tensors.update(
                    {f"{p}.feedback.{k}": v.clone() for k, v in slot.feedback.state_dict().items()}
                )
            if flight is not None:
                entry["flight"] = {
                    "round": flight.round,
                    "base": flight.base,
                    "due": flight.due,
                    "alpha": flight.alpha,
                    "steps": flight.steps,
                    "tokens": flight.tokens,
                    "outcome": flight.outcome,
                    "overwrite": flight.overwrite,
                }
                if flight.frame is not None:
                    tensors[f"{p}.frame"] = torch.frombuffer(bytearray(flight.frame), dtype=torch.uint8)
                if flight.sent is not None:
                    tensors[f"{p}.sent"] = flight.sent.clone()
            meta["slots"].append(entry)
        return {"meta": meta, "tensors": tensors}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, before the first connection. Raises KeyError on another plan's state."""
        meta, tensors = saved["meta"], saved["tensors"]
        self.step, self.index, self.incarnation = meta["step"], meta["index"], meta["incarnation"]
        for slot, entry in zip(self.slots, meta["slots"], strict=True):
            p = slot.index
            slot.steps, slot.tokens = entry["steps"], entry["tokens"]
            if f"{p}.params" in tensors:
                slot.shard = self._start(tensors[f"{p}.params"])
                state = {k: tensors[f"{p}.state.{k}"] for k in slot.shard.state}
                slot.shard.load(tensors[f"{p}.params"], state, entry["version"])
            if slot.feedback is not None:
                prefix = f"{p}.feedback."
                slot.feedback.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                )
            if "flight" in entry:
                framed = tensors.get(f"{p}.frame")
                slot.flight = Flight(**entry["flight"], sent=tensors.get(f"{p}.sent"))
                slot.flight.frame = framed.numpy().tobytes() if framed is not None else None
