"""The coordinator as a process: the machine on its thread, the journal on disk, gRPC in front.

No rules of the protocol are decided here; see `state` for those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from diloco.comms.audit import Audit
from diloco.comms.driver import MachineThread
from diloco.comms.following import Ack, Beat, Entry, Follow, Turned
from diloco.comms.frame import frame_size
from diloco.comms.grpc_follow import FollowService
from diloco.comms.grpc_follower import FollowClient
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.machine import Action, Compute, Computed, Event, Persist, Received, Send, Stop
from diloco.comms.messages import PROTOCOL, Fetch, Heartbeat, Leave, Rejected
from diloco.config import RunConfig
from diloco.coordinator.journal import Journal
from diloco.coordinator.journal_copy import JournalLines, mark_copy
from diloco.coordinator.lead import Lead
from diloco.coordinator.opening import open_lead, open_standby, start_afresh
from diloco.coordinator.rebuild import journal_folder, parameters
from diloco.coordinator.standby import DIVERGED
from diloco.coordinator.state import Coordinator
from diloco.coordinator.status import finite, status
from diloco.errors import StorageError

LINGER_S = 3.0  # after the end: late farewells are still answered

log = logging.getLogger(__name__)


class CoordinatorService:
    """`start()`, then `wait()` until the run is complete; `close()` in any case.

    The journal is read before the port is opened: a coordinator that cannot restore its run never greets anybody.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        listen: str,
        resume: bool = False,
        insecure: bool = False,
        keys: Path | None = None,
        standby: str | None = None,
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="diloco-copy")  # repeats what a standby copies
        self._failed: BaseException | None = None  # there
        self._said: set[tuple[str, int]] = set()  # (worker, incarnation) whose timeline is in the record
        self._told: set[tuple[str, str]] = set()  # (worker, cause) of rejections that are in the log
        folder = journal_folder(config, run_dir)
        self._opened = (
            open_lead(config, folder, resume=resume) if standby is None else open_standby(config, folder)
        )
        self.resumed = self._opened.records > 0
        try:
            for action in self._opened.actions:
                self._perform(action)
            self._follower = FollowClient(standby, self._post, keys=keys) if standby is not None else None
        except BaseException:
            self.journal.close()
            raise
        self._begun = time.monotonic()
        self._thread = MachineThread(self._opened.machine, self._perform, name="coordinator")
        lines = JournalLines(folder)
        self._followers = FollowService(self._post, lines.entry, lines.blob)
        try:
            self._server = GrpcServer(
                self._inbox,
                self.status,
                listen=listen,
                insecure=insecure,
                keys=keys,
                audit=Audit(run_dir / "audit.jsonl"),
                object_limit=self._object_limit,
                more=[self._followers.handler],
            )
        except BaseException:
            self.journal.close()
            raise
        self._series = (run_dir / "progress.jsonl").open("a", encoding="utf-8")
        self.port = 0

    def start(self) -> int:
        """Serve; returns the port."""
        try:
            self.port = self._server.start()
        except BaseException:
            self._series.close()
            self.journal.close()
            raise
        self._thread.start()
        if self._follower is not None:
            self._follower.start()
        return self.port

    @property
    def machine(self) -> Coordinator:
        return self._opened.machine.coordinator

    @property
    def journal(self) -> Journal:
        return self._opened.journal

    @property
    def leads(self) -> bool:
        """Whether this is the run's coordinator, rather than a standby that has not taken over."""
        return isinstance(self._opened.machine, Lead) or self._opened.machine.lead is not None

    def wait(self, timeout_s: float | None = None) -> bool:
        """True when the run is complete, False on time-out. Raises what ended the machine otherwise."""
        limit = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while time.monotonic() < limit:
            if self._thread.ended.is_set() and self._thread.error is not None:
                raise self._thread.error
            if self._failed is not None:
                raise self._failed
            if self._done.wait(min(0.2, max(0.0, limit - time.monotonic()))):
                return True
        return False

    def close(self, *, linger: bool = False) -> None:
        if linger:
            self._thread.ended.wait(LINGER_S)
        if self._follower is not None:
            self._follower.close()
        self._server.close(1.0)
        self._thread.stop()
        self._pool.shutdown(cancel_futures=True)
        # What a full disk keeps it from writing must not hide why the run ended.
        with contextlib.suppress(OSError):
            self._series.close()
        self.journal.close()

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        facts = status(self.machine, now, now - self._begun)
        facts["journal_bytes"] = self.journal.bytes_written
        facts["protocol"] = PROTOCOL
        facts["standby"] = self._opened.machine.facts()
        if not self.leads:
            facts["phase"] = "standby"
        facts["plan"] = self.machine.plan.digest() if self.machine.plan is not None else ""
        return facts

    def _object_limit(self) -> int | None:
        """More bytes than any honest frame of this run has; None before the plan is known."""
        plan, codecs = self.machine.plan, self.machine.codecs
        if plan is None:
            return None
        sizes = [frame_size(codec, f.numel) for f, codec in zip(plan.fragments, codecs, strict=False)]
        return max((1 << 20) + 16 * max(f.numel for f in plan.fragments), *sizes)

    def export(self) -> Path:
        """Write the global parameters by name as one safetensors file; returns its path."""
        folder = self.run_dir / "checkpoint"
        target, partial = folder / "model.safetensors", folder / ".model.safetensors"
        tensors = parameters(self.machine)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            metadata = {"digest": self.machine.global_digest(), "run_id": self.config.run.run_id}
            save_file(tensors, partial, metadata=metadata)
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"cannot write the checkpoint {str(target)!r}: {error}; free space there and restart with --resume"
            ) from None
        return target

    def _post(self, event: Event) -> None:
        self._thread.post(event)

    def _inbox(self, event: Event) -> None:
        if isinstance(event, Received) and isinstance(event.message, Heartbeat | Leave):
            if self.leads:
                self._log(event.message)
        elif isinstance(event, Received) and isinstance(event.message, Fetch) and event.message.differs:
            log.warning(
                "worker %s: the last commit of fragment %d gave it another digest than here; it gets the run's value",
                *(event.message.worker, event.message.fragment),
            )
        self._thread.post(event)

    def _log(self, message: Heartbeat | Leave) -> None:
        facts = {k: finite(v) for k, v in dataclasses.asdict(message.progress).items()}
        line = {"t": round(time.monotonic() - self._begun, 3), "worker": message.worker, **facts}
        line["commits"] = self.machine.commits
        # A goodbye is said until it is heard.
        life = (message.worker, message.incarnation)
        if isinstance(message, Leave) and message.timeline and life not in self._said:
            self._said.add(life)
            line["timeline"] = message.timeline
        # A full disk may cost points of a chart, never a worker its session.
        with contextlib.suppress(OSError):
            self._series.write(json.dumps(line) + "\n")
            self._series.flush()

    def _log_once(self, worker: str, message: Rejected) -> None:
        cause = message.reason.split(":")[0]
        if cause != "late" and (worker, cause) not in self._told:
            self._told.add((worker, cause))
            log.warning(
                "worker %s: contribution to round %d of fragment %d refused: %s (said once per cause; counted in the status)",
                *(worker, message.round, message.fragment, message.reason),
            )

    def _perform(self, action: Action) -> None:
        match action:
            case Persist():
                self._persist(action)
            case Send(to=to, message=message):
                if isinstance(message, Follow | Ack) and self._follower is not None:
                    self._follower.send(message)
                elif isinstance(message, Entry | Beat | Turned):
                    self._followers.send(message)
                else:
                    if isinstance(message, Rejected):
                        self._log_once(to, message)
                    self._server.send(to, message)  # type: ignore[arg-type]
            case Compute(job=job):
                self._pool.submit(self._compute, job)
            case Stop(reason=reason, error=error):
                if reason == DIVERGED:
                    self._opened = start_afresh(self.config, self.journal)
                    self._thread.machine = self._opened.machine
                elif error is not None:
                    raise error
                else:
                    self._done.set()

    def _compute(self, job: Callable[[], Any]) -> None:
        try:
            self._post(Computed(job()))
        except BaseException as error:  # noqa: BLE001 - raised again by `wait`
            self._failed = error

    def _persist(self, action: Persist) -> None:
        if not self.leads:
            mark_copy(self.journal.folder, True)
        self.journal.append(action)
        record = action.record
        if not self.leads:
            return
        if record["type"] == "standby" and not record["attached"]:
            log.warning("%s: this coordinator goes on alone", record["reason"])
        elif record["type"] == "epoch":
            mark_copy(self.journal.folder, False)
