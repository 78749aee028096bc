"""The coordinator's memory on disk: one JSON line per record, bulk data in a file beside it, fsync before return.

A journal is a folder:

    journal.jsonl          one record a line; "blobs" names the file and sizes of its bulk data
    blobs/00000042.bin     the frames of record 42, one after another
    lock                   held by the coordinator that writes here

A record counts when its whole line is there, and its blobs were durable before the line was begun. A torn last
line is what a crash leaves behind and is cut off; damage anywhere else is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diloco.comms.machine import Persist
from diloco.comms.messages import Buffer
from diloco.errors import ConfigError, EnvironmentProblem, StorageError

Record = tuple[Mapping[str, Any], Sequence[Buffer]]

BLOB_NAME = re.compile(r"[0-9]{8,20}\.bin")
SUPERSEDED = ("commit", "snapshot", "late")  # bulk data that a later snapshot of the fragment stands for


class Journal:
    """Append records and read them back. One writer per folder; every append is durable when it returns."""

    def __init__(self, folder: Path, *, fsync: bool = True) -> None:
        self.folder, self._fsync = folder, fsync
        self.bytes_written = 0
        self._blobs = folder / "blobs"
        self._path = folder / "journal.jsonl"
        self._commits: dict[int, list[tuple[int, str]]] = {}
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"cannot use the journal folder {str(folder)!r}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise EnvironmentProblem(
                f"another coordinator is writing the journal {str(folder)!r}: stop it, or use another run.run_id"
            ) from None
        try:
            self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            os.close(self._lock)
            raise StorageError(f"cannot open the journal {str(self._path)!r}: {error.strerror}") from None
        if fsync:  # the names of new files and folders must survive a power loss as well
            fsync_folder(folder)
            fsync_folder(folder.parent)
        self._count = 0

    @property
    def empty(self) -> bool:
        return os.fstat(self._file).st_size == 0

    def read(self) -> list[Record]:
        """Every record with its blobs; blobs that compaction removed come back empty.

        Cuts a torn last line off the file. Raises StorageError for damage elsewhere, and for bulk data that is
        missing although a restart needs it.
        """
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        records: list[Record] = []
        for number, line in enumerate(data[:whole].splitlines()):
            try:
                record = json.loads(line)
                _require_record(record)
            except (ValueError, TypeError, LookupError, RecursionError):
                raise StorageError(
                    f"{self._path}: line {number + 1} is damaged; restore the journal from a copy"
                ) from None
            records.append((record, self._read_blobs(record)))
            self._remember(record)
        self._require_blobs(records)
        self._count = len(records)
        return records

    def first(self, count: int) -> list[Record]:
        """The first `count` records with their blobs, on any thread, while more are appended; changes nothing.

        Raises StorageError for bulk data that is missing although a restart needs it.
        """
        lines = self._path.read_bytes().splitlines()[:count]
        records: list[Record] = [(record, self._read_blobs(record)) for record in map(json.loads, lines)]
        self._require_blobs(records)
        return records

    def _require_blobs(self, records: Sequence[Record]) -> None:
        """Only what a later snapshot of the same fragment made superfluous may be missing."""
        newest = {int(r["fragment"]): int(r["version"]) for r, _ in records if r["type"] == "snapshot"}
        for record, blobs in records:
            superfluous = record["type"] in SUPERSEDED and int(record["version"]) < newest.get(
                int(record["fragment"]), 0
            )
            if "blobs" in record and not blobs and not superfluous:
                path = self._blobs / str(record["blobs"]["file"])
                raise StorageError(f"{path} is missing; restore the journal from a copy")

    def append(self, action: Persist) -> None:
        """Make one record durable. StorageError when the disk will not have it; earlier records stay whole."""
        record = dict(action.record)
        size_before = os.fstat(self._file).st_size
        try:
            if action.blobs:
                record["blobs"] = self._write_blobs(action.blobs)
            line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
            _write_all(self._file, line)
            if self._fsync:
                os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size_before)
            raise StorageError(
                f"cannot write the journal in {str(self.folder)!r}: {error.strerror}; free space there and restart "
                "with --resume: nothing that was committed is lost"
            ) from None
        self._count += 1
        self.bytes_written += len(line)
        self._remember(record)
        if record["type"] == "snapshot":
            self._compact(int(record["fragment"]), int(record["version"]))

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    def _write_blobs(self, blobs: Sequence[Buffer]) -> dict[str, Any]:
        name = f"{self._count:08d}.bin"
        target = self._blobs / name
        handle = os.open(target, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        try:
            for blob in blobs:
                _write_all(handle, blob)
                self.bytes_written += memoryview(blob).nbytes
            if self._fsync:
                os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                target.unlink()
            raise
        finally:
            os.close(handle)
        if self._fsync:
            fsync_folder(self._blobs)
        return {"file": name, "sizes": [memoryview(blob).nbytes for blob in blobs]}

    def _read_blobs(self, record: Mapping[str, Any]) -> list[Buffer]:
        listed = record.get("blobs")
        if listed is None:
            return []
        path = self._blobs / str(listed["file"])
        try:
            data = mapped(path)
        except FileNotFoundError:
            return []
        if len(data) != sum(listed["sizes"]):
            raise StorageError(f"{path}: has {len(data)} bytes where the journal says {sum(listed['sizes'])}")
        blobs, at = [], 0
        for size in listed["sizes"]:
            blobs.append(data[at : at + size])
            at += size
        return list(blobs)

    def _remember(self, record: Mapping[str, Any]) -> None:
        # Starting values are never compacted: a restart begins with them, whatever snapshot it then loads.
        if record["type"] in SUPERSEDED and "blobs" in record:
            kept = self._commits.setdefault(int(record["fragment"]), [])
            kept.append((int(record["version"]), str(record["blobs"]["file"])))

    def _compact(self, fragment: int, version: int) -> None:
        """A snapshot makes older bulk data superfluous; the commit it was taken at stays, to answer resends."""
        kept = self._commits[fragment]
        for older, name in kept:
            if older < version:
                with contextlib.suppress(FileNotFoundError):
                    (self._blobs / name).unlink()
        self._commits[fragment] = [(v, n) for v, n in kept if v >= version]


def open_journal(folder: Path, *, resume: bool, fsync: bool = True) -> Journal:
    """Open for a new run or to continue one; ConfigError if what is there does not fit `resume`."""
    journal = Journal(folder, fsync=fsync)
    if not resume and not journal.empty:
        journal.close()
        raise ConfigError(
            f"{str(folder)!r} holds the journal of an earlier run: continue it with --resume, or use another run.run_id"
        )
    return journal


def mapped(path: Path) -> memoryview:
    """A file's bytes without reading them all into memory: a journal may hold many rounds of a large model."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _require_record(record: Any) -> None:
    """TypeError, LookupError or ValueError unless it is one, with all that the journal itself needs of it."""
    if not isinstance(record, dict) or not isinstance(record.get("type"), str):
        raise TypeError("not a record")
    if record["type"] in SUPERSEDED and not all(
        isinstance(record.get(k), int) for k in ("fragment", "version")
    ):
        raise ValueError("of no fragment or version")
    if "blobs" in record:
        named, sizes = record["blobs"]["file"], record["blobs"]["sizes"]
        if not BLOB_NAME.fullmatch(named) or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError("no bulk data has that name or size")


def _write_all(handle: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view.nbytes:
        view = view[os.write(handle, view) :]


def fsync_folder(folder: Path) -> None:
    """Names of new and removed files in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
