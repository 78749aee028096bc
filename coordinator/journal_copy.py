"""What a standby and its coordinator need of a journal's folder besides appending: lines by number, whose it is.

node      the name of this folder, in bonds (see `diloco.coordinator.bond`)
copy      there while the journal is a standby's copy, which must not be continued as a coordinator's
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from diloco.comms.messages import Buffer
from diloco.coordinator.journal import BLOB_NAME, Record, fsync_folder, mapped
from diloco.errors import CorruptDataError, StorageError


class JournalLines:
    """Reads a journal that somebody else is appending to. Thread-safe for one reader at a time."""

    def __init__(self, folder: Path) -> None:
        self._path, self._blobs = folder / "journal.jsonl", folder / "blobs"
        self._ends: list[int] = []  # of each line

    def entry(self, index: int) -> tuple[str, str]:
        """Line number `index`, which must be there, and the name of the record's bulk data or ""."""
        with self._path.open("rb") as file:
            if index >= len(self._ends):
                file.seek(self._ends[-1] if self._ends else 0)
                while index >= len(self._ends) and (line := file.readline()).endswith(b"\n"):
                    self._ends.append(file.tell())
            if index >= len(self._ends):
                raise StorageError(f"{self._path}: has no line {index + 1}")
            start = self._ends[index - 1] if index else 0
            file.seek(start)
            line = file.read(self._ends[index] - start)
        blobs = json.loads(line).get("blobs")
        return line.decode().rstrip("\n"), str(blobs["file"]) if blobs else ""

    def blob(self, name: str) -> Buffer | None:
        """A record's bulk data; None when a snapshot has made it superfluous. Raises CorruptDataError for other names."""
        if not BLOB_NAME.fullmatch(name):
            raise CorruptDataError(f"{name!r} names no bulk data of a journal")
        try:
            return mapped(self._blobs / name)
        except FileNotFoundError:
            return None


def node_name(folder: Path) -> str:
    """The folder's name in bonds; a new one when it has none yet."""
    path = folder / "node"
    try:
        if not path.exists():
            _write(path, secrets.token_hex(8))
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot use {str(path)!r}: {error}") from None


def is_copy(folder: Path, records: Sequence[Record]) -> bool:
    """Whether the journal in `folder` is a standby's copy, and not one that its standby has taken over with."""
    if not (folder / "copy").exists():
        return False
    last = next((r for r, _ in reversed(records) if r["type"] == "standby"), None)
    return last is None or bool(last["attached"]) or last.get("node") != node_name(folder)


def mark_copy(folder: Path, copy: bool) -> None:
    path = folder / "copy"
    try:
        if copy and not path.exists():
            _write(path, "")
        elif not copy and path.exists():
            path.unlink()
            fsync_folder(folder)
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def set_aside(folder: Path) -> Path:
    """Move a journal out of the way; nothing of it is lost. Returns where it is now."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.aside-{number}")).exists():
        number += 1
    try:
        folder.rename(target)
    except OSError as error:
        raise StorageError(f"cannot move {str(folder)!r} to {str(target)!r}: {error.strerror}") from None
    return target


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    fsync_folder(path.parent)
