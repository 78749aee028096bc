"""What the coordinator offers for download: the frames of its newest commits and snapshots, by reference."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from diloco.comms.messages import Buffer, Commit, Snapshot
from diloco.comms.transfer import Ref, ref_of

READ_S = 60.0  # somebody who has read a part of a version is given so long to ask for the next


@dataclass(slots=True)
class _Version:
    frames: dict[str, tuple[Ref, Buffer]] = field(default_factory=dict)
    read_at: float | None = None


class Outbox:
    """Thread-safe. Frames have the keys "commit/<fragment>/<version>/<index>" and "snapshot/...".

    All receivers of a message share them. Of each kind and fragment the newest `keep` versions are held, and of the
    older ones those of which a frame was read within `READ_S`, at most the `keep` that were read last: a download,
    which asks for one part after the other, comes to its end though newer versions come while it is on its way.
    So never more than 2 `keep` versions of each are in memory. `clock` is in seconds.
    """

    def __init__(self, keep: int = 2, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep, self._clock = keep, clock
        self._lock = threading.Lock()
        self._versions: dict[tuple[str, int], dict[int, _Version]] = {}

    def put(self, message: Commit | Snapshot) -> tuple[Ref, ...]:
        """Offer the frames of `message`; their Refs, in its order. Computes each CRC32C once."""
        kind = "commit" if isinstance(message, Commit) else "snapshot"
        offered = []
        for index, frame in message.frames:
            key = f"{kind}/{message.fragment}/{message.version}/{index}"
            known = self._held(key, reads=False)
            # The checksum of a large frame takes long: never under the lock that readers need.
            offered.append((known[0] if known and known[1] is frame else ref_of(key, frame), frame))
        with self._lock:
            versions = self._versions.setdefault((kind, message.fragment), {})
            frames = versions.setdefault(message.version, _Version()).frames
            frames.update({ref.key: (ref, frame) for ref, frame in offered})
            for each in self._versions.values():
                self._forget(each)
        return tuple(ref for ref, _ in offered)

    def get(self, key: str) -> Buffer | None:
        """The frame under `key`, None when it is not (or no longer) offered."""
        held = self._held(key, reads=True)
        return held[1] if held else None

    def _forget(self, versions: dict[int, _Version]) -> None:
        """With the lock held."""
        if len(versions) <= self._keep:
            return
        since = self._clock() - READ_S
        read = {n: v.read_at for n, v in versions.items() if v.read_at is not None and v.read_at >= since}
        newest = sorted(versions)[-self._keep :]
        kept = sorted((n for n in read if n not in newest), key=lambda n: read[n])[-self._keep :]
        for old in versions.keys() - {*newest, *kept}:
            del versions[old]

    def _held(self, key: str, *, reads: bool) -> tuple[Ref, Buffer] | None:
        kind, _, rest = key.partition("/")
        numbers = rest.split("/")
        if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
            return None
        with self._lock:
            version = self._versions.get((kind, int(numbers[0])), {}).get(int(numbers[1]))
            held = version.frames.get(key) if version is not None else None
            if reads and version is not None and held is not None:
                version.read_at = self._clock()
        return held
