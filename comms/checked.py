"""Values out of a message, each with its bound: what a peer may not send raises CorruptDataError with the field's name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage

from diloco.errors import CorruptDataError

MAX_LIST = 100_000
MAX_NAME = 1024  # names, keys, digests, kinds: characters
MAX_REASON = 16 * 1024
MAX_JSON = 3 << 20
MAX_TIMELINE = 256 << 10

P = TypeVar("P", bound=ProtoMessage)
T = TypeVar("T")


def parse(kind: type[P], raw: bytes) -> P:
    """`raw` as a message of class `kind`; CorruptDataError when it is none."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise CorruptDataError(f"{kind.__name__}: {error}") from error


def text(name: str, value: str, limit: int) -> str:
    if len(value) > limit:
        raise CorruptDataError(f"{name}: {len(value)} characters, at most {limit} are allowed")
    return value


def word(name: str, value: str) -> str:
    """Not empty, and short."""
    if not value:
        raise CorruptDataError(f"{name}: is empty")
    return text(name, value, MAX_NAME)


def listed(name: str, values: Iterable[T]) -> tuple[T, ...]:
    found = tuple(values)
    if len(found) > MAX_LIST:
        raise CorruptDataError(f"{name}: {len(found)} elements, at most {MAX_LIST} are allowed")
    return found


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise CorruptDataError(f"{name}: {value} is not a finite number")
    return value
