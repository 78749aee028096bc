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
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from diloco.comms.audit import Audit
from diloco.comms.driver import MachineThread
from diloco.comms.grpc_server import GrpcServer
from diloco.comms.machine import Action, Event, Persist, Received, Send, Stop
from diloco.comms.messages import PROTOCOL, Heartbeat, Leave, Rejected
from diloco.config import RunConfig
from diloco.coordinator.journal import open_journal
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
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self.machine = Coordinator(config)
        self._done = threading.Event()
        self._told: set[tuple[str, str]] = set()  # (worker, cause) of rejections that are in the log
        folder = Path(config.topology.journal) if config.topology.journal else run_dir / "journal"
        self.journal = open_journal(folder, resume=resume, fsync=config.topology.fsync)
        try:
            records = self.journal.read()
            self.resumed = bool(records)
            if self.resumed:
                for action in self.machine.restore(records, time.monotonic()):
                    self._perform(action)
        except BaseException:
            self.journal.close()
            raise
        self._begun = time.monotonic()
        self._thread = MachineThread(self.machine, self._perform, name="coordinator")
        try:
            self._server = GrpcServer(
                self._inbox,
                self.status,
                listen=listen,
                insecure=insecure,
                keys=keys,
                audit=Audit(run_dir / "audit.jsonl"),
                object_limit=self._object_limit,
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
        return self.port

    def wait(self, timeout_s: float | None = None) -> bool:
        """True when the run is complete, False on time-out. Raises what ended the machine otherwise."""
        limit = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while time.monotonic() < limit:
            if self._thread.ended.is_set() and self._thread.error is not None:
                raise self._thread.error
            if self._done.wait(min(0.2, max(0.0, limit - time.monotonic()))):
                return True
        return False

    def close(self, *, linger: bool = False) -> None:
        if linger:
            self._thread.ended.wait(LINGER_S)
        self._server.close(1.0)
        self._thread.stop()
        self._series.close()
        self.journal.close()

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        facts = status(self.machine, now, now - self._begun)
        facts["journal_bytes"] = self.journal.bytes_written
        facts["protocol"] = PROTOCOL
        facts["plan"] = self.machine.plan.digest() if self.machine.plan is not None else ""
        return facts

    def _object_limit(self) -> int | None:
        """More bytes than any honest frame of this run has; None before the plan is known."""
        plan = self.machine.plan
        return None if plan is None else (1 << 20) + 16 * max(f.numel for f in plan.fragments)

    def export(self) -> Path:
        """Write the global parameters by name as one safetensors file; returns its path."""
        folder = self.run_dir / "checkpoint"
        target, partial = folder / "model.safetensors", folder / ".model.safetensors"
        plan = self.machine.plan
        assert plan is not None, "there is nothing to export before the run has started"
        tensors = {}
        for fragment in plan.fragments:
            shard = self.machine.ledgers[fragment.index].shard
            values = shard.state.get("x", shard.params)  # GPA evaluates and ships its average
            for span in fragment.spans:
                part = values[span.offset : span.offset + span.stop - span.start]
                tensors[span.name] = part.view(span.shape).clone()
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

    def _inbox(self, event: Event) -> None:
        if isinstance(event, Received) and isinstance(event.message, Heartbeat | Leave):
            self._log(event.message)
        self._thread.post(event)

    def _log(self, message: Heartbeat | Leave) -> None:
        facts = {k: finite(v) for k, v in dataclasses.asdict(message.progress).items()}
        line = {"t": round(time.monotonic() - self._begun, 3), "worker": message.worker, **facts}
        line["commits"] = self.machine.commits
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
                self.journal.append(action)
            case Send(to=to, message=message):
                if isinstance(message, Rejected):
                    self._log_once(to, message)
                self._server.send(to, message)  # type: ignore[arg-type]
            case Stop():
                self._done.set()
