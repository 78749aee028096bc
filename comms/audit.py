"""Who came, who was turned away and why: a log for people who look into an incident. Bounded in size and in rate."""

from __future__ import annotations

import datetime
import json
import logging
import threading
from pathlib import Path

from diloco.comms.limits import Budgets

log = logging.getLogger(__name__)

MAX_BYTES = 4 << 20  # per file; there are two at most, the older one ends in .1.jsonl
LINES_PER_S = 10.0  # per event: a flood of refusals must not wash out what happened before it
BURST = 100.0


class Audit:
    """Appends JSON lines to `path`: "t" (UTC), "event", and facts. Without a path it writes nothing."""

    def __init__(self, path: Path | None, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._lock = threading.Lock()
        self._budgets = Budgets(BURST, LINES_PER_S)
        self._dropped = 0
        self._failed = False

    def write(self, event: str, **facts: str | float) -> None:
        """Never raises and may be called from any thread; a full disk costs lines, not sessions."""
        if self._path is None:
            return
        with self._lock:
            if not self._budgets.take(event):
                self._dropped += 1
                return
            line: dict[str, str | float] = {
                "t": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                "event": event,
                **{k: v[:500] if isinstance(v, str) else v for k, v in facts.items()},
            }
            if self._dropped:
                line["dropped"], self._dropped = self._dropped, 0
            try:
                self._append(self._path, (json.dumps(line) + "\n").encode())
            except OSError as error:
                if not self._failed:
                    log.warning("audit: cannot write %s: %s (said once)", self._path, error)
                self._failed = True

    def _append(self, path: Path, line: bytes) -> None:
        with path.open("ab") as file:
            if file.tell() + len(line) <= self._max_bytes:
                file.write(line)
                return
        path.replace(path.with_suffix(f".1{path.suffix}"))
        with path.open("wb") as file:
            file.write(line)
