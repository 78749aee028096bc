"""What the coordinator offers for download: the frames of its newest commits and snapshots, by reference."""

from __future__ import annotations

import threading

from diloco.comms.messages import Buffer, Commit, Snapshot
from diloco.comms.transfer import Ref, ref_of


class Outbox:
    """Thread-safe. Frames have the keys "commit/<fragment>/<version>/<index>" and "snapshot/...".

    All receivers of a message share them. Of each kind and fragment the newest `keep` versions are held.
    """

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._versions: dict[tuple[str, int], dict[int, dict[str, tuple[Ref, Buffer]]]] = {}

    def put(self, message: Commit | Snapshot) -> tuple[Ref, ...]:
        """Offer the frames of `message`; their Refs, in its order. Computes each CRC32C once."""
        kind = "commit" if isinstance(message, Commit) else "snapshot"
        offered = []
        for index, frame in message.frames:
            key = f"{kind}/{message.fragment}/{message.version}/{index}"
            known = self._held(key)
            # The checksum of a large frame takes long: never under the lock that readers need.
            offered.append((known[0] if known and known[1] is frame else ref_of(key, frame), frame))
        with self._lock:
            versions = self._versions.setdefault((kind, message.fragment), {})
            versions.setdefault(message.version, {}).update({ref.key: (ref, frame) for ref, frame in offered})
            for old in sorted(versions)[: -self._keep]:
                del versions[old]
        return tuple(ref for ref, _ in offered)

    def get(self, key: str) -> Buffer | None:
        """The frame under `key`, None when it is not (or no longer) offered."""
        held = self._held(key)
        return held[1] if held else None

    def _held(self, key: str) -> tuple[Ref, Buffer] | None:
        kind, _, rest = key.partition("/")
        numbers = rest.split("/")
        if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
            return None
        with self._lock:
            return self._versions.get((kind, int(numbers[0])), {}).get(int(numbers[1]), {}).get(key)
