"""From a source to a `Corpus`: two arrays of tokens, for training and held out, and what is known about them.

Here: tokenizers, the split, pre-tokenised files. Not here: reading documents (corpus.py), the order in which
windows are drawn (sampler.py). Nothing is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diloco.errors import ConfigError, EnvironmentProblem
from diloco.worker.corpus import STDLIB, read_documents, resolve_format, source_files, stdlib_files

Tokens = npt.NDArray[np.unsignedinteger[Any]]

SEPARATOR = b"\n"  # after every document, in every format, so that documents never run into each other
_SCAN = 1 << 22  # tokens looked at in one go when a memmap is scanned
_SAMPLE = 1 << 16  # held-out tokens decoded to measure bytes per token of a pre-tokenised file


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """`train` and `heldout`: 1-D uint8, uint16 or uint32 (memmaps when pre-tokenised), ids below `vocab_size`.

    nats/byte = (nats/token) / bytes_per_token, which is measured on the held-out documents, separators
    included, or on the whole stream where the split cuts a document.
    """

    train: Tokens
    heldout: Tokens
    vocab_size: int
    bytes_per_token: float


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """`encode` gives ids of dtype `dtype` below `vocab_size`; `decoded_size` the UTF-8 bytes that ids stand for."""

    vocab_size: int
    dtype: npt.DTypeLike
    encode: Callable[[bytes], Tokens]
    decoded_size: Callable[[Tokens], int]


def load_corpus(
    source: str,
    format: str = "auto",
    tokenizer: str = "bytes",
    heldout_every: int = 20,
    *,
    field: str = "text",
) -> Corpus:
    """Read, tokenise and split `source`.

    source      "stdlib" (the Python standard library's .py files without tests, about 11 MB), a path or a glob.
    format      "auto" (by suffix: .jsonl and .ndjson, .parquet, else text), "text", "jsonl", "parquet", or
                "uint16" / "uint32" for one file of little-endian token ids and nothing else, mapped, not read.
    tokenizer   "bytes" (ids are byte values), or the path of a `tokenizers` JSON file.
    field       the text field of jsonl records or parquet columns.

    Split: with at least `heldout_every` documents (a file, a JSONL line, a parquet row), documents 0,
    heldout_every, 2 * heldout_every... are held out; with fewer, and for pre-tokenised files, the last
    1/heldout_every of the tokens are (5 % by default).

    For pre-tokenised files vocab_size is the tokenizer's; with tokenizer "bytes" it is the largest id + 1 (at
    least 256) and bytes_per_token is 1, so losses are nats/byte only if the ids really are bytes, and
    nats/token otherwise.

    Raises ConfigError (source, format, tokenizer or field is wrong) and EnvironmentProblem (a file cannot be
    read, an optional package is missing).
    """
    if heldout_every < 2:
        raise ConfigError(
            f"heldout_every = {heldout_every}: must be at least 2, or nothing is left to train on"
        )
    files = stdlib_files() if source == STDLIB else source_files(source)
    kind = resolve_format(source, files, format)
    tokens = load_tokenizer(tokenizer)
    if kind in ("uint16", "uint32"):
        corpus = _pretokenised(source, files, kind, tokenizer, tokens, heldout_every)
    else:
        corpus = _tokenise(list(read_documents(files, kind, field)), tokens, heldout_every)
    if len(corpus.train) < 2 or len(corpus.heldout) < 2:
        raise ConfigError(
            f"data.source = {source!r}: {len(corpus.train)} tokens to train on and {len(corpus.heldout)} held out "
            "are too few; name more text"
        )
    return corpus


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes", or the one in the `tokenizers` JSON file `name` (no special tokens are added)."""
    if name == "bytes":
        return Tokenizer(256, np.uint8, lambda text: np.frombuffer(text, np.uint8), len)
    if not Path(name).is_file():
        raise ConfigError(
            f"data.tokenizer = {name!r}: no such file; use 'bytes' or the path of a tokenizers JSON file"
        )
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise EnvironmentProblem(
            f"data.tokenizer = {name!r} needs the package tokenizers: pip install 'diloco[data]'"
        ) from error
    try:
        library = Library.from_file(name)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"data.tokenizer = {name!r}: not a tokenizers JSON file ({error})") from error
    vocab_size = int(library.get_vocab_size())
    dtype: npt.DTypeLike = np.uint16 if vocab_size <= 1 << 16 else np.uint32

    def encode(text: bytes) -> Tokens:
        ids = library.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids
        return np.asarray(ids, dtype=dtype)

    def decoded_size(ids: Tokens) -> int:
        return len(library.decode(ids.tolist(), skip_special_tokens=False).encode())

    return Tokenizer(vocab_size, dtype, encode, decoded_size)


def _tokenise(documents: list[bytes], tokenizer: Tokenizer, heldout_every: int) -> Corpus:
    if len(documents) >= heldout_every:
        heldout_text = [text + SEPARATOR for text in documents[::heldout_every]]
        del documents[::heldout_every]
        heldout = _encode(heldout_text, tokenizer)
        train = _encode([text + SEPARATOR for text in documents], tokenizer)
        size = sum(map(len, heldout_text))
    else:
        texts = [text + SEPARATOR for text in documents]
        everything = _encode(texts, tokenizer)
        train, heldout = _cut(everything, heldout_every)
        size = round(sum(map(len, texts)) * len(heldout) / max(1, len(everything)))
    return Corpus(train, heldout, tokenizer.vocab_size, size / max(1, len(heldout)))


def _encode(texts: list[bytes], tokenizer: Tokenizer) -> Tokens:
    if tokenizer.dtype is np.uint8:
        return np.frombuffer(b"".join(texts), np.uint8)
    empty = np.empty(0, tokenizer.dtype)
    return np.concatenate([empty, *(tokenizer.encode(text) for text in texts)])


def _cut(tokens: Tokens, heldout_every: int) -> tuple[Tokens, Tokens]:
    edge = len(tokens) - len(tokens) // heldout_every
    return tokens[:edge], tokens[edge:]


def _pretokenised(
    source: str, files: list[Path], kind: str, name: str, tokenizer: Tokenizer, heldout_every: int
) -> Corpus:
    if len(files) != 1:
        raise ConfigError(
            f"data.source = {source!r}: names {len(files)} files; format {kind!r} takes one, join them first"
        )
    dtype = np.dtype("<u2" if kind == "uint16" else "<u4")
    size = files[0].stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ConfigError(
            f"data.source = {source!r}: {size} bytes are no whole number of {dtype.itemsize}-byte tokens above "
            f"zero; check data.format = {kind!r} and that the file is complete"
        )
    tokens: Tokens = np.memmap(files[0], dtype=dtype, mode="r")
    largest = max(int(tokens[at : at + _SCAN].max()) for at in range(0, len(tokens), _SCAN))
    train, heldout = _cut(tokens, heldout_every)
    if name == "bytes":
        return Corpus(train, heldout, max(256, largest + 1), 1.0)
    if largest >= tokenizer.vocab_size:
        raise ConfigError(
            f"data.tokenizer = {name!r}: {source!r} holds token {largest}, but the tokenizer has "
            f"{tokenizer.vocab_size}; name the tokenizer that made the file, and check data.format = {kind!r}"
        )
    sample = heldout[:_SAMPLE]
    return Corpus(train, heldout, tokenizer.vocab_size, tokenizer.decoded_size(sample) / max(1, len(sample)))
