"""The coordinator's journal: what it promises to hold after a crash, on a damaged or a full disk."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diloco.comms.machine import Persist
from diloco.coordinator.journal import Journal, open_journal
from diloco.errors import ConfigError, EnvironmentProblem, StorageError


@contextmanager
def _open(folder: Path, *, resume: bool = True) -> Iterator[Journal]:
    journal = open_journal(folder, resume=resume)
    try:
        yield journal
    finally:
        journal.close()


def _commit(version: int, *, kind: str = "commit", fragment: int = 0) -> Persist:
    return Persist(
        {"type": kind, "fragment": fragment, "version": version}, [b"frame %d" % version, b"second"]
    )


INITIAL = Persist({"type": "initial", "fragment": 0}, [b"starting values"])


def _write(folder: Path, *actions: Persist) -> None:
    with _open(folder) as journal:
        journal.read()
        for action in actions:
            journal.append(action)


def _read(folder: Path) -> list[tuple[dict[str, Any], list[bytes]]]:
    with _open(folder) as journal:
        return [(dict(record), [bytes(blob) for blob in blobs]) for record, blobs in journal.read()]


def test_what_was_appended_is_read_back_in_order_with_its_blobs(tmp_path: Path) -> None:
    """Records and bulk data survive closing and opening; records without blobs have none."""
    _write(tmp_path, Persist({"type": "start", "plan": "{}"}), INITIAL, _commit(1))
    _write(tmp_path, _commit(2))
    found = _read(tmp_path)
    assert [record["type"] for record, _ in found] == ["start", "initial", "commit", "commit"]
    assert [blobs for _, blobs in found] == [
        [],
        [b"starting values"],
        [b"frame 1", b"second"],
        [b"frame 2", b"second"],
    ]


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_a_torn_last_line_is_cut_off_and_writing_goes_on_after_it(tmp_path: Path, keep: int) -> None:
    """Whatever part of the last line a crash left: the records before stay, and the next one is whole."""
    _write(tmp_path, INITIAL, _commit(1), _commit(2))
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    _write(tmp_path, _commit(7))
    assert [record.get("version") for record, _ in _read(tmp_path)] == [None, 1, 7]
    assert _read(tmp_path)[-1][1] == [b"frame 7", b"second"]


@pytest.mark.parametrize("damage", [b"\x00\xff garbage\n", b"[1, 2]\n", b'{"version": 1}\n', b"\n"])
def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path: Path, damage: bytes) -> None:
    """A damaged line that is not the torn last one must never be skipped in silence."""
    _write(tmp_path, INITIAL, _commit(1), _commit(2))
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + lines[2])
    with pytest.raises(StorageError, match="line 2 is damaged"):
        _read(tmp_path)


@pytest.mark.parametrize("which", ["initial", "commit"])
def test_missing_bulk_data_that_a_restart_needs_is_an_error(tmp_path: Path, which: str) -> None:
    """A record whose blobs have gone is not replayed as if it had none."""
    _write(tmp_path, INITIAL, _commit(1))
    record = next(record for record, _ in _read(tmp_path) if record["type"] == which)
    (tmp_path / "blobs" / record["blobs"]["file"]).unlink()
    with pytest.raises(StorageError, match="missing"):
        _read(tmp_path)


def test_bulk_data_of_the_wrong_size_is_an_error(tmp_path: Path) -> None:
    """A blob file cut short is found at once."""
    _write(tmp_path, INITIAL)
    blob = next((tmp_path / "blobs").iterdir())
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(StorageError, match="14 bytes where the journal says 15"):
        _read(tmp_path)


def test_a_snapshot_removes_older_bulk_data_and_keeps_what_a_restart_needs(tmp_path: Path) -> None:
    """Starting values, the snapshot, its commit and everything newer stay; other fragments are not touched."""
    other = _commit(1, fragment=1)
    _write(
        tmp_path, INITIAL, other, _commit(1), _commit(2), _commit(3), _commit(3, kind="snapshot"), _commit(4)
    )
    found = _read(tmp_path)
    empty = [(r["type"], r["fragment"], r.get("version")) for r, blobs in found if not blobs]
    assert empty == [("commit", 0, 1), ("commit", 0, 2)]
    assert len(list((tmp_path / "blobs").iterdir())) == 5
    _write(tmp_path, _commit(5), _commit(5, kind="snapshot"))
    kept = [(r["type"], r["fragment"], r.get("version")) for r, blobs in _read(tmp_path) if blobs]
    assert kept == [("initial", 0, None), ("commit", 1, 1), ("commit", 0, 5), ("snapshot", 0, 5)]


def test_compaction_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Bulk data written before the restart is removed by a snapshot taken after it."""
    _write(tmp_path, INITIAL, _commit(1), _commit(2))
    _write(tmp_path, _commit(2, kind="snapshot"))
    assert len(list((tmp_path / "blobs").iterdir())) == 3


def test_two_coordinators_cannot_write_one_journal(tmp_path: Path) -> None:
    """The second is told so; once the first has ended, its journal can be opened."""
    with _open(tmp_path), pytest.raises(EnvironmentProblem, match="another coordinator"):
        open_journal(tmp_path, resume=True)
    _write(tmp_path, INITIAL)


def test_an_earlier_runs_journal_is_continued_only_on_request(tmp_path: Path) -> None:
    """Without resume a journal with records is refused, and is as before."""
    with _open(tmp_path, resume=False):
        pass
    _write(tmp_path, INITIAL)
    with pytest.raises(ConfigError, match="--resume"):
        open_journal(tmp_path, resume=False)
    assert len(_read(tmp_path)) == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "journal").write_text("no folder", encoding="utf-8")
    with pytest.raises(StorageError, match="journal"):
        open_journal(tmp_path / "journal", resume=False)


def test_a_write_that_fails_half_way_leaves_the_earlier_records_whole(tmp_path: Path) -> None:
    """The disk takes a part of the line and no more: nothing of it stays, and the message says what to do."""
    with _open(tmp_path) as journal:
        journal.append(INITIAL)
        with (
            pytest.raises(StorageError, match="free space"),
            _file_size_limit(tmp_path / "journal.jsonl", 40),
        ):
            journal.append(Persist({"type": "note", "text": "x" * 1000}))
        journal.append(_commit(1))
    assert [record["type"] for record, _ in _read(tmp_path)] == ["initial", "commit"]


@contextmanager
def _file_size_limit(path: Path, more: int) -> Iterator[None]:
    """No file may grow by more than `more` bytes beyond the size of `path`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
