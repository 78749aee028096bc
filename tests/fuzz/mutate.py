"""Damage to valid inputs, from a `random.Random`: the same generator state gives the same damage."""

from __future__ import annotations

import json
from random import Random
from typing import Any

TELLING = (
    0,
    1,
    2,
    7,
    255,
    4096,
    65535,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
WORDS: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf"), "", "x", "nan", "\ud800",
    "../../x", [], {}, [[]], [None], {"type": 1}, "9" * 5000,
)  # fmt: skip


def edited(rng: Random, data: bytes, most: int = 8) -> bytes:
    """1 to `most` edits; the length stays."""
    found = bytearray(data)
    for _ in range(rng.randint(1, most) if found else 0):
        at = rng.randrange(len(found))
        match rng.randrange(4):
            case 0:
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                found[at] = rng.randrange(256)
            case 2:
                found[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
            case _:
                width = rng.choice((2, 4, 8))
                number = rng.choice(TELLING) & ((1 << 8 * width) - 1)
                found[at : at + width] = number.to_bytes(width, "little")[: len(found) - at]
    return bytes(found)


def reshaped(rng: Random, data: bytes) -> bytes:
    """Cut off, cut out, repeated, or with something put in; may be of any length up to twice that of `data`."""
    a, b = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    match rng.randrange(5):
        case 0:
            return data[:a]
        case 1:
            return data[:a] + data[b:]
        case 2:
            return data[:b] + data[a:]
        case 3:
            return data[:a] + rng.randbytes(rng.randint(1, 16)) + data[a:]
        case _:
            return edited(rng, data[:b] + data[a:])


def damaged(rng: Random, data: bytes) -> bytes:
    return edited(rng, data) if rng.random() < 0.6 else reshaped(rng, data)


def other_json(rng: Random, value: Any) -> Any:
    """`value` with one thing in it changed: another type, another number, a key or an element gone or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = other_json(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.3:
            return (
                value[:at] + value[at + 1 :] if rng.random() < 0.5 else value[:at] + value[max(0, at - 1) :]
            )
        return [*value[:at], other_json(rng, value[at]), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2, -(1 << 31), 1 << 33))
    return rng.choice(WORDS)


def other_text(rng: Random, text: str) -> str:
    """JSON `text` damaged: as JSON, as bytes that still are text, or nested beyond all sense."""
    way = rng.random()
    if way < 0.7:
        try:
            return json.dumps(other_json(rng, json.loads(text)))
        except ValueError:
            pass
    if way < 0.72:
        return "[" * 100_000
    return damaged(rng, text.encode("utf-8", "replace")).decode("utf-8", "replace")
