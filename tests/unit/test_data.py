"""Loading and splitting corpora: every source, the split by document, pre-tokenised files, and the errors."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from diloco.errors import ConfigError, EnvironmentProblem
from diloco.worker.corpus import stdlib_files
from diloco.worker.data import load_corpus


def write_texts(folder: Path, count: int) -> list[bytes]:
    texts = [f"document {i:03d} ü".encode() for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(text)
    return texts


def word_tokenizer(path: Path, vocab: dict[str, int]) -> str:
    library = Library(WordLevel(vocab, unk_token="?"))
    library.pre_tokenizer = WhitespaceSplit()
    library.save(str(path))
    return str(path)


def test_the_standard_library_is_megabytes_of_python_without_tests_or_packages() -> None:
    """The default source needs no download; its order is that of the relative paths, on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in stdlib_files()]
    assert names == sorted(names) and "argparse.py" in names and "json/decoder.py" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    corpus = load_corpus("stdlib")
    assert corpus.train.dtype == np.uint8 and corpus.vocab_size == 256 and corpus.bytes_per_token == 1.0
    assert len(corpus.train) > 8_000_000
    assert 0.02 < len(corpus.heldout) / len(corpus.train) < 0.1
    assert corpus.heldout.tobytes().startswith((root / names[0]).read_bytes() + b"\n")


def test_every_twentieth_file_is_held_out_whole(tmp_path: Path) -> None:
    """With enough files the split is by file; nothing is lost and nothing is in both parts."""
    texts = write_texts(tmp_path, 45)
    corpus = load_corpus(str(tmp_path / "*.txt"), "text")
    held = [0, 20, 40]
    assert corpus.heldout.tobytes() == b"".join(texts[i] + b"\n" for i in held)
    assert corpus.train.tobytes() == b"".join(t + b"\n" for i, t in enumerate(texts) if i not in held)


def test_few_files_are_split_at_the_end_of_the_stream(tmp_path: Path) -> None:
    """One file cannot be held out whole: the last 1/heldout_every of its tokens is."""
    (tmp_path / "one.txt").write_bytes(bytes(range(97, 122)) * 4)
    corpus = load_corpus(str(tmp_path / "one.txt"), heldout_every=10)
    assert (corpus.train.tobytes() + corpus.heldout.tobytes()) == bytes(range(97, 122)) * 4 + b"\n"
    assert len(corpus.heldout) == 10


def test_a_recursive_pattern_goes_into_folders(tmp_path: Path) -> None:
    """`**` finds nested files, in sorted order."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("second")
    (tmp_path / "a.md").write_text("first")
    corpus = load_corpus(f"{tmp_path}/**/*.md", heldout_every=3)
    assert corpus.train.tobytes() + corpus.heldout.tobytes() == b"first\nsecond\n"


@pytest.mark.parametrize("field", ["text", "body"])
def test_jsonl_records_are_documents(tmp_path: Path, field: str) -> None:
    """Each line's field is one document, blank lines are none; every heldout_every-th line is held out."""
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n".join(json.dumps({field: f"né{i}", "id": i}) for i in range(6)) + "\n")
    corpus = load_corpus(str(path), heldout_every=3, field=field)
    assert corpus.heldout.tobytes().decode() == "né0\nné3\n"
    assert corpus.train.tobytes().decode() == "né1\nné2\nné4\nné5\n"


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    """Each row's text column is one document; missing values are skipped."""
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["a", "b", None, "c", "d"], "n": [1, 2, 3, 4, 5]}), path)
    corpus = load_corpus(str(path), heldout_every=2)
    assert (corpus.heldout.tobytes(), corpus.train.tobytes()) == (b"a\nc\n", b"b\nd\n")


@pytest.mark.parametrize(("format", "dtype"), [("uint16", "<u2"), ("uint32", "<u4")])
def test_pretokenised_files_are_mapped_and_split_at_five_percent(
    tmp_path: Path, format: str, dtype: str
) -> None:
    """Tokens stay on disk as they are; the vocabulary covers the largest id."""
    ids = np.arange(1000, dtype=dtype)
    path = tmp_path / "ids.bin"
    ids.tofile(path)
    corpus = load_corpus(str(path), format)
    assert isinstance(corpus.train, np.memmap) and isinstance(corpus.heldout, np.memmap)
    assert np.array_equal(corpus.train, ids[:950]) and np.array_equal(corpus.heldout, ids[950:])
    assert corpus.vocab_size == 1000 and corpus.bytes_per_token == 1.0


def test_a_tokenizer_file_gives_ids_and_bytes_per_token(tmp_path: Path) -> None:
    """Ids are the library's, and bytes_per_token is held-out bytes (separators included) over held-out ids."""
    name = word_tokenizer(tmp_path / "t.json", {"?": 0, "one": 1, "three": 2})
    for i, text in enumerate(["one three three", "three one", "what"]):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = load_corpus(f"{tmp_path}/*.txt", "text", name, heldout_every=2)
    assert corpus.heldout.tolist() == [1, 2, 2, 0] and corpus.train.tolist() == [2, 1]
    assert corpus.train.dtype == np.uint16 and corpus.vocab_size == 3
    assert corpus.bytes_per_token == (len("one three three\n") + len("what\n")) / 4


def test_a_tokenizer_tells_bytes_per_token_of_a_pretokenised_file(tmp_path: Path) -> None:
    """The held-out ids are decoded and measured; ids that the tokenizer does not have are refused."""
    name = word_tokenizer(tmp_path / "t.json", {"?": 0, "one": 1, "three": 2})
    path = tmp_path / "ids.bin"
    np.array([2] * 36 + [1, 1, 2, 2], dtype="<u2").tofile(path)
    corpus = load_corpus(str(path), "uint16", name, 10)
    assert corpus.vocab_size == 3 and corpus.bytes_per_token == len("one one three three") / 4
    np.array([0, 1, 2, 3] * 10, dtype="<u2").tofile(path)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .* holds token 3, but the tokenizer has 3"):
        load_corpus(str(path), "uint16", name)


@pytest.mark.parametrize(
    ("name", "content", "format", "message"),
    [
        ("gone-*.txt", None, "auto", r"data\.source = .*no file matches"),
        ("", None, "auto", r"data\.source = .*is a folder; name its files"),
        ("d.txt", b"some text", "utf8", r"data\.format = 'utf8': must be one of"),
        ("d.bin", b"\0" * 80, "auto", r"data\.format = 'auto': .*set it to 'uint16' or 'uint32'"),
        ("d.bin", b"\0" * 81, "uint16", r"81 bytes are no whole number of 2-byte tokens.*'uint16'"),
        ("d.bin", b"\0" * 82, "uint32", r"82 bytes are no whole number of 4-byte tokens.*'uint32'"),
        ("d.bin", b"", "uint16", r"0 bytes are no whole number"),
        (
            "d.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            "auto",
            r"data\.field = 'text': .* line 2 .*\['body'\]",
        ),
        ("d.jsonl", b'{"text": 3}\n', "auto", r"data\.field = 'text': .* line 1"),
        ("d.jsonl", b"[1]\n", "auto", r"data\.field = 'text': .* line 1 .*list"),
        ("d.jsonl", b"{\n", "auto", r"line 1 is not JSON"),
        ("d.parquet", b"not parquet", "auto", r"cannot be read as parquet"),
        ("d.txt", b"", "auto", r"1 tokens to train on and 0 held out are too few"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_with_a_way_out(
    tmp_path: Path, name: str, content: bytes | None, format: str, message: str
) -> None:
    """Every mistake in [data] is a ConfigError with the field, the value and what to do."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_corpus(os.path.join(tmp_path, name), format)


def test_a_missing_or_wordless_parquet_column_is_named(tmp_path: Path) -> None:
    """The error lists the columns there are, or says what the column holds."""
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(ConfigError, match=r"data\.field = 'text': .*\['body', 'n'\]"):
        load_corpus(str(path))
    with pytest.raises(ConfigError, match=r"data\.field = 'n': .*holds int64"):
        load_corpus(str(path), field="n")


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    """A pattern that catches JSONL beside text would train on JSON syntax without a word."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="mixes jsonl and text files"):
        load_corpus(f"{tmp_path}/*")


def test_several_pretokenised_files_are_refused(tmp_path: Path) -> None:
    """One memory map is one file."""
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(b"\0" * 80)
    with pytest.raises(ConfigError, match="names 2 files"):
        load_corpus(f"{tmp_path}/*.bin", "uint16")


@pytest.mark.parametrize("content", [None, b"{}"])
def test_a_wrong_tokenizer_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    """No such file, or not a tokenizer: data.tokenizer is to blame, and the message says so."""
    write_texts(tmp_path, 2)
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*t\.json"):
        load_corpus(f"{tmp_path}/*.txt", tokenizer=str(path))


@pytest.mark.parametrize("package", ["tokenizers", "pyarrow"])
def test_a_missing_optional_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """The extra is named; nothing else of the loader needs it."""
    write_texts(tmp_path, 2)
    (tmp_path / "t.json").write_text("{}")
    (tmp_path / "d.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        EnvironmentProblem, match=rf"needs the package {package}: pip install 'diloco\[data\]'"
    ):
        if package == "tokenizers":
            load_corpus(f"{tmp_path}/*.txt", tokenizer=str(tmp_path / "t.json"))
        else:
            load_corpus(str(tmp_path / "d.parquet"))
    assert len(load_corpus(f"{tmp_path}/*.txt", heldout_every=3).train) > 0


def test_holding_out_every_document_is_refused() -> None:
    """heldout_every = 1 would leave nothing to train on."""
    with pytest.raises(ConfigError, match="heldout_every = 1"):
        load_corpus("stdlib", heldout_every=1)
