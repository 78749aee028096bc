"""What a coordinator and its standby say to each other, as values. No encoding, no transport.

The standby holds a copy of the journal: the coordinator sends each record when it is on its own disk, the standby
acknowledges what is on its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PRIMARY = "primary"  # the peer name under which a standby knows the coordinator
STANDBY = "standby"  # and the other way round


# ---- from a standby ----


@dataclass(frozen=True, slots=True)
class Follow:
    """Send me your journal from record `count` on. `chain` is the digest of the records that I have (see `link`).

    `node` names this standby for as long as its journal exists. `epoch` is the highest that I know of: who leads a
    lower one has been replaced.
    """

    node: str
    run_id: str
    settings: str
    epoch: int
    count: int
    chain: str


@dataclass(frozen=True, slots=True)
class Ack:
    """Every record before `count` is on my disk. `ready`: I could take over from them at once."""

    count: int
    ready: bool = False


# ---- what the transport says of the other side; never sent ----


@dataclass(frozen=True, slots=True)
class Reached:
    """The way to the coordinator is open."""


@dataclass(frozen=True, slots=True)
class Parted:
    """The way to the other side broke."""


# ---- from the coordinator ----


@dataclass(frozen=True, slots=True)
class Entry:
    """Record number `index` with its bulk data. The coordinator's machine names it, the driver fills it in.

    Bulk data that the journal no longer has (a snapshot made it superfluous) is () while "blobs" still stands in the
    record; otherwise the record is without that key.
    """

    index: int
    record: Mapping[str, Any] = field(default_factory=dict)
    blobs: Sequence[bytes | bytearray | memoryview] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Beat:
    """I am here, and my journal has `count` records; -1: more is on its way."""

    count: int


@dataclass(frozen=True, slots=True)
class Turned:
    """You do not follow me (any longer).

    `kind`: run, settings (we are not the same run), diverged (your records are not mine: start with none), ahead (mine
    are the first of yours: I have lost some), slow (dropped; follow again), busy (another one follows), off, standby
    (I lead nothing myself), superseded (another coordinator has replaced me).
    """

    kind: str
    reason: str
    count: int = 0
    chain: str = ""


FromStandby = Follow | Ack | Parted
FromPrimary = Entry | Beat | Turned | Reached


def link(before: str, record: Mapping[str, Any]) -> str:
    """The digest of a journal with one more `record`: SHA-256 of the digest `before` it and the record, hex.

    Where its bulk data is stored does not count; commits and starting values name the digests of theirs.
    """
    bare = {key: value for key, value in record.items() if key != "blobs"}
    line = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{line}".encode()).hexdigest()
