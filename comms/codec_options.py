"""Checks of the options that `diloco.comms.codec.get` takes: each says what is wrong and what is right."""

from __future__ import annotations

from typing import Any

from diloco.errors import ConfigError, nearest
from diloco.kernels import reference_stat as stat


def known_options(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            takes = ", ".join((*known, "stochastic"))
            raise ConfigError(
                f"codec {name}: unknown option {option!r}{nearest(option, known)}; it takes {takes}"
            )


def power_of_two(name: str, option: str, value: Any, largest: int) -> int:
    if type(value) is not int or not 2 <= value <= largest or value & (value - 1):
        raise ConfigError(f"codec {name}: {option}={value!r} must be a power of two from 2 to {largest}")
    return value


def bits_of(name: str, value: Any) -> int:
    if type(value) is not int or value not in stat.BITS:
        raise ConfigError(f"codec {name}: bits={value!r} must be 2, 4 or 8")
    return value


def spans_of(value: Any) -> tuple[int, ...]:
    spans = tuple(value)
    if not all(type(span) is int and span > 0 for span in spans):
        raise ConfigError(f"codec stat: spans={value!r} must be positive integers")
    return spans
