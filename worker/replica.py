"""A worker's half of the protocol as a state machine: no sockets, clock, threads or model.

It knows which fragment to send after which inner step, measures the pseudo-gradient, and merges the committed
value exactly tau inner steps later, never on arrival: so timing cannot change a bit of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diloco.comms import frame
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
    Claim,
    Commit,
    Fetch,
    Lease,
    Leave,
    Progress,
    Refused,
    Rejected,
    Resend,
    Snapshot,
    Waiting,
    Welcome,
)
from diloco.comms.uplink import codecs_for
from diloco.config import RunConfig
from diloco.errors import RefusedError
from diloco.fragments import FragmentPlan
from diloco.overlap import next_step
from diloco.robust import rule_of
from diloco.worker import leasing, replica_end, replica_jobs, replica_late, replica_state, replica_turns
from diloco.worker.replica_slots import Flight, Parameters, Slot, is_of_plan

__all__ = ["Flight", "Parameters", "Replica", "Slot"]


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
        self.codecs = codecs_for(config, plan)
        self.rule = rule_of(config)
        self.mode = config.stream.overlap
        self.whole_round = self.mode in ("delayed", "eager")
        overlapping = self.mode in ("inner", "delay_corrected")
        self.tau = config.stream.tau if overlapping else 0
        # keeps local work by its own rule, alpha is ignored
        self.corrected = self.mode == "delay_corrected" or config.stream.merge == "delay_corrected"
        self.alpha = config.stream.alpha if overlapping and not self.corrected else 0.0
        self.slots = [Slot(f.index) for f in plan.fragments]
        if config.codec.ef == "on":
            for slot in self.slots:
                slot.feedback = ErrorFeedback(self.codecs[slot.index], config.codec.ef_beta)
        self.step = self.last_step = 0
        self.pace = self.next_pace = plan.H  # inner steps of this worker per H of the run
        self.members = 0
        self.shard = 0  # tokens of the data that this worker reads; told under weights.mode = "shard"
        self.epoch, self.votes = 0, dict[str, str]()  # of the coordinator that let us in last; see Claim
        self.incarnation = 0
        self.index = -1
        self.connected = False
        self.joined = False
        self.flushing = False
        self.cohort: Waiting | None = None
        self.leaving: Leave | None = None
        self.end = replica_end.End()
        self.lease: leasing.Leasing | None = None  # of the data, where data.mode has leases
        self.stopped: Stop | None = None
        self.progress = Progress()
        self.rejections: list[Rejected] = []
        self.next_heartbeat: float | None = None
        self.now = 0.0

    # ---- the machine's interface ----

    def handle(self, event: Event, now: float) -> list[Action]:
        self.now = now
        if self.stopped is not None:
            return []
        match event:
            case Connected():
                self.connected = True
                if self.next_heartbeat is None:  # an answer may be lost: ask again then
                    self.next_heartbeat = now + self.config.fault.heartbeat_s
                return [Send(COORDINATOR, replica_jobs.join(self))]
            case Lost():
                self.connected = False
                return []
            case Computed(result):
                actions = self._computed(result)
                replica_end.after_job(self)
                return actions
            case Tick():
                due = self.next_heartbeat is not None and now >= self.next_heartbeat
                return replica_jobs.heartbeat(self) if due else []
            case Received(message=message):
                return self.receive(message, now) if is_of_plan(message, len(self.slots)) else []

    @property
    def deadline(self) -> float | None:
        return None if self.stopped is not None else self.next_heartbeat

    def check(self) -> None:
        over = self.flushing or bool(self.end.final)
        for slot in self.slots:
            flight = slot.flight
            assert flight is None or flight.due > self.last_step or self.blocked or over, "a merge was missed"
            assert not slot.waiting or min(slot.waiting) > slot.version, "a commit was applied and kept"

    @property
    def ready(self) -> bool:
        """The run's parameters are here: training may start."""
        return self.joined and all(
            s.shard is not None and not (s.jobs and s.flight is None) for s in self.slots
        )

    @property
    def blocked(self) -> bool:
        if self.stopped is not None:
            return False
        return not self.ready or self.end.waits or any(not self.settled(slot) for slot in self._due())

    def _due(self) -> list[Slot]:
        return [s for s in self.slots if s.flight is not None and s.flight.due <= self.step]

    @staticmethod
    def settled(slot: Slot) -> bool:
        flight = slot.flight  # while its delta is being encoded nobody may build on the error feedback
        return flight is not None and bool(flight.outcome) and not slot.jobs and flight.delta is None

    def versions(self) -> tuple[int, ...]:
        """Per fragment the newest version that is here; empty before the first values have come."""
        return tuple(s.known for s in self.slots) if all(s.shard is not None for s in self.slots) else ()

    # ---- called by the training thread ----

    def after_step(self, tokens: int, now: float) -> list[Action]:
        """One inner step is done: send the fragments whose turn it is. Then wait while `blocked`, then `merge`."""
        self.now = now
        total = self.config.run.inner_steps_total
        step = next_step(self.step, self.plan.H, self.pace)
        self.last_step, self.step = self.step, min(step, total) if self.step < total else step
        for slot in self.slots:
            slot.steps += 1
            slot.tokens += tokens
        leasing.trained(self)
        actions = leasing.ask(self)
        for at in range(self.last_step + 1, self.step + 1):
            for index in self.plan.due(at):
                actions += replica_turns.take(self, self.slots[index], at)
            if at % self.plan.H == 0:
                self.pace = self.next_pace
        return actions

    def merge(self) -> list[Action]:
        """Write what is due into the parameters; only when not `blocked`. What it returns may block again."""
        return replica_turns.merge(self)

    def drain(self) -> None:
        """The run is over: what is in flight is merged now."""
        replica_turns.drain(self)

    def flush(self, now: float) -> list[Action]:
        """Send every fragment once more and take the result whole, so that the global value covers every step."""
        self.now = now
        return replica_turns.flush(self)

    def leave(self, reason: str, timeline: str = "") -> list[Action]:
        """Say goodbye until it is heard: `stopped` is set once the coordinator has answered."""
        # Asynchronous workers end with different values of the run: theirs is no claim about the result.
        held = "" if self.mode == "async" else self.digest()
        self.leaving = Leave(self.worker, self.incarnation, reason, self.current_progress(), held, timeline)
        return [Send(COORDINATOR, self.leaving)]

    def digest(self) -> str:
        """Digest of the global parameters as this worker holds them."""
        shards = [slot.shard for slot in self.slots]
        return frame.model_digest([frame.digest(s.params) for s in shards if s is not None])

    # ---- heavy work, run by the driver away from the training thread, in order ----

    def _computed(self, result: Any) -> list[Action]:
        kind, slot = result[0], result[1]
        if kind == "encoded":
            return replica_jobs.encoded(self, slot, *result[2:])
        slot.jobs -= 1
        if kind == "opened":
            commit: Commit = result[2]
            if result[3] is None:
                self._settle(slot, commit)
            else:
                slot.broken = True
                if slot.flight is not None and not slot.flight.outcome and self._counts(slot, commit):
                    slot.flight.counted, slot.told = True, dict(commit.local_steps).get(self.index, 0)
                    if slot.feedback is not None:
                        slot.feedback.commit()
                return (
                    []
                    if slot.jobs
                    else [Send(COORDINATOR, self.fetch(slot)), *replica_jobs.open_waiting(self, slot)]
                )
        else:
            slot.restoring = False
            if result[3] is None:  # damaged: the next heartbeat asks again
                slot.broken = slot.shard is not None
                return []
            slot.shard, slot.broken, slot.differs = result[3], False, ""
            self._settle_by_snapshot(slot, result[2])
        slot.waiting = {v: c for v, c in slot.waiting.items() if v > slot.version}
        return replica_jobs.open_waiting(self, slot)

    def fetch(self, slot: Slot) -> Fetch:
        return Fetch(self.worker, self.incarnation, slot.index, slot.differs)

    # ---- what arrives ----

    def receive(self, message: Any, now: float) -> list[Action]:
        """Take a message from the coordinator. Nothing here touches the parameters: `merge` does, when it is time."""
        self.now = now
        match message:
            case Waiting():
                self.cohort = message
                self.next_heartbeat = now + self.config.fault.heartbeat_s
            case Welcome():
                return self._welcome(message)
            case Claim():
                return [Send(COORDINATOR, replica_jobs.vote(self, message))]
            case Refused("final"):
                return replica_end.told(self, message.reason)
            case Refused("incarnation"):
                return [Send(COORDINATOR, replica_jobs.join(self))] if self.connected else []
            case Refused(kind=kind) if self.leaving is not None and kind in ("left", "complete"):
                self.stopped = Stop(self.leaving.reason)
                return [self.stopped]
            case Refused("complete") if replica_end.over(self):  # the others left while we were away
                self.stopped = Stop("complete")
                return [self.stopped]
            case Refused():
                self.stopped = Stop(
                    message.reason, RefusedError(f"refused by the coordinator: {message.reason}")
                )
                return [self.stopped]
            case Commit():
                return self._commit(message)
            case Rejected():
                replica_late.told(self, message)
                return leasing.refused(self, message)
            case Aborted():
                replica_turns.aborted(self, self.slots[message.fragment], message.round)
            case Resend():
                slot = self.slots[message.fragment]
                if slot.flight is not None and slot.flight.round == message.round:
                    return replica_jobs.answer(self, slot, slot.flight)
            case Snapshot():
                return self._snapshot(message)
            case Lease():
                return leasing.told(self, message)
        return []

    def _welcome(self, message: Welcome) -> list[Action]:
        if message.epoch < self.epoch:
            return []  # of a coordinator that has been replaced
        self.epoch = message.epoch
        if self.leaving is not None:
            return [Send(COORDINATOR, self.leaving)]
        fresh = not self.joined
        self.joined, self.index, self.incarnation = True, message.index, message.incarnation
        self.members = message.members
        self.next_heartbeat = self.now + self.config.fault.heartbeat_s
        actions: list[Action] = []
        if message.initial:
            actions += replica_jobs.give_initial(self, message)
        # A newcomer, or one that was away for longer than a cycle, goes on where the run is: all share one schedule.
        if fresh and (self.step == 0 or message.step > self.step + self.plan.H):
            self.step = message.step
        for slot in self.slots:
            flight = slot.flight
            # One version behind is what a resend cures, and a worker back from its checkpoint then repeats its
            # last round exactly. Further behind it is a newcomer: its old weights would pull the run back.
            held = slot.known if flight is None else flight.base
            behind = self.config.fault.s_max if self.mode == "async" else 1
            if fresh and slot.shard is not None and held + behind < message.versions[slot.index]:
                leasing.forgot(self, slot)
                slot.forget()
                flight = None
            if slot.shard is None:
                actions.append(Send(COORDINATOR, self.fetch(slot)))
            if flight is not None and fresh and flight.frame is None and flight.delta is not None:
                actions.append(Compute(replica_jobs.encode_job(self, slot, flight)))
            elif flight is not None and not flight.outcome:
                actions += replica_jobs.answer(self, slot, flight)
        return [*leasing.welcomed(self, fresh=fresh), *actions]

    def _commit(self, message: Commit) -> list[Action]:
        slot = self.slots[message.fragment]
        if slot.shard is None or message.version <= slot.known:
            return []
        if self.mode == "async":
            return self._value(slot, message)
        slot.waiting[message.version] = message
        if not slot.restoring and slot.known < message.version:  # commits in between never reached us
            return [Send(COORDINATOR, self.fetch(slot))]
        return replica_jobs.open_waiting(self, slot)

    def _value(self, slot: Slot, message: Commit) -> list[Action]:
        """A whole value, whatever lies between: the answer if our part is in it, or if we know that it will not be."""
        flight = slot.flight
        waiting = flight is not None and not flight.outcome and not slot.jobs and not slot.broken
        if flight is None or not waiting or not (flight.rejected or self._counts(slot, message)):
            return []
        slot.jobs, slot.target = slot.jobs + 1, message.version
        return [Compute(replica_jobs.open_job(self, slot, message))]

    def _snapshot(self, message: Snapshot) -> list[Action]:
        slot = self.slots[message.fragment]
        if slot.kept is None or slot.kept.version <= message.version:
            slot.kept = message
        return replica_jobs.open_waiting(self, slot)

    def _counts(self, slot: Slot, commit: Commit) -> bool:
        if slot.flight is None:
            return False
        return (self.index, slot.flight.round) in commit.rounds

    def _settle(self, slot: Slot, commit: Commit) -> None:
        """The round in flight has its answer: was our part in it?"""
        flight = slot.flight
        if flight is None or flight.outcome:
            return
        slot.told = dict(commit.local_steps).get(self.index, 0)
        if self._counts(slot, commit):
            flight.outcome = "merged-in"
            if slot.feedback is not None:
                slot.feedback.commit()
        elif replica_late.undecided(self, flight):
            flight.passed = True
        else:
            self._roll_back(slot.index, flight.round)
            flight.outcome = "left-out"

    def _settle_by_snapshot(self, slot: Slot, snapshot: Snapshot) -> None:
        flight = slot.flight
        if flight is None:
            slot.adopt = True
        elif snapshot.version > flight.base and not flight.outcome:
            counts = flight.counted or flight.round == snapshot.counted
            if not counts and replica_late.undecided(self, flight):
                flight.passed = True
                return
            flight.outcome = "merged-in" if counts else "left-out"
            if not counts:
                self._roll_back(slot.index, flight.round)
            elif slot.feedback is not None and not flight.counted:
                slot.feedback.commit()

    def _roll_back(self, fragment: int, number: int) -> None:
        slot = self.slots[fragment]
        if slot.feedback is not None and slot.flight is not None and slot.flight.round == number:
            slot.feedback.rollback()

    def current_progress(self) -> Progress:
        return dataclasses.replace(self.progress, step=self.step)

    # ---- checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues this half of the protocol: numbers under "meta", tensors under "tensors"."""
        return replica_state.state_dict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, before the first connection. Raises KeyError on another plan's state."""
        replica_state.load_state_dict(self, saved)
