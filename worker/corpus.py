"""Where documents come from: the standard library, text files, JSONL, parquet. Reading only.

A source is a stream of raw UTF-8 documents (bytes) in an order that depends on names and file contents alone.
Not here: tokens, splits and pre-tokenised files (data.py), sample order (sampler.py).
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from diloco.errors import ConfigError, EnvironmentProblem

STDLIB = "stdlib"
FORMATS = ("auto", "text", "jsonl", "parquet", "uint16", "uint32")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_files() -> list[Path]:
    """The .py files of the running Python's standard library without its tests, sorted by relative path.

    Raises EnvironmentProblem when Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for folder, children, names in os.walk(root):
        children[:] = [name for name in children if name not in _NOT_STDLIB]
        found += [(Path(folder, name).relative_to(root)).as_posix() for name in names if name.endswith(".py")]
    if not found:
        raise EnvironmentProblem(
            f"data.source = 'stdlib': no .py files below {root}; name text files in data.source"
        )
    return [root / name for name in sorted(found)]


def source_files(source: str) -> list[Path]:
    """The files that `source` names, sorted: a path, or a glob (`**` goes into folders, `~` is home).

    Raises ConfigError when it is a folder or names no file.
    """
    expanded = os.path.expanduser(source)
    if os.path.isdir(expanded):
        raise ConfigError(f"data.source = {source!r}: is a folder; name its files, as in '{source}/**/*.txt'")
    if os.path.isfile(expanded):
        return [Path(expanded)]
    files = sorted(name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
    if not files:
        raise ConfigError(
            f"data.source = {source!r}: no such file, and no file matches it as a pattern from {os.getcwd()!r}; "
            "give a path, a glob, or 'stdlib'"
        )
    return [Path(name) for name in files]


def resolve_format(source: str, files: list[Path], format: str) -> str:
    """`format`, or for "auto" the one that the suffix of every file agrees on (text for unknown suffixes)."""
    if format not in FORMATS:
        raise ConfigError(f"data.format = {format!r}: must be one of {', '.join(FORMATS)}")
    if format != "auto":
        return format
    if any(path.suffix == ".bin" for path in files):
        raise ConfigError(
            f"data.format = 'auto': {source!r} names .bin files, which do not say how wide their tokens are; "
            "set it to 'uint16' or 'uint32'"
        )
    kinds = {_SUFFIXES.get(path.suffix, "text") for path in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"data.source = {source!r}: mixes {' and '.join(sorted(kinds))} files; name one kind, "
            "or set data.format"
        )
    return kinds.pop()


def read_documents(files: list[Path], format: str, field: str) -> Iterator[bytes]:
    """The documents of `files` in order: one per file (text), per line (jsonl) or per row (parquet)."""
    for path in files:
        if format == "jsonl":
            yield from _read_jsonl(path, field)
        elif format == "parquet":
            yield from _read_parquet(path, field)
        else:
            yield _read_bytes(path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(f"data.source: cannot read {str(path)!r}: {error.strerror}") from error


def _read_jsonl(path: Path, field: str) -> Iterator[bytes]:
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"data.source: {str(path)!r} line {number} is not JSON ({error}); write one object per line"
            ) from error
        names = list(record) if isinstance(record, dict) else []
        if field not in names or not isinstance(record[field], str):
            raise ConfigError(
                f"data.field = {field!r}: {str(path)!r} line {number} has no such text; "
                f"it has {names if names else type(record).__name__}"
            )
        # JSON may hold lone surrogates, which are no text; they become '?' rather than end the run.
        yield record[field].encode("utf-8", errors="replace")


def _read_parquet(path: Path, field: str) -> Iterator[bytes]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentProblem(
            "data.format = 'parquet' needs the package pyarrow: pip install 'diloco[data]'"
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ConfigError(f"data.field = {field!r}: {str(path)!r} has no such column; it has {names}")
            kind = file.schema_arrow.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ConfigError(
                    f"data.field = {field!r}: the column in {str(path)!r} holds {kind}; name a column of text"
                )
            for batch in file.iter_batches(columns=[field]):
                yield from (text.encode() for text in batch.column(0).to_pylist() if text is not None)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"data.source: {str(path)!r} cannot be read as parquet ({error}); set data.format"
        ) from error
