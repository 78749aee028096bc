"""The exception tree: what a caller can do about an error decides where it stands.

DilocoError
├── ConfigError        a key, value or combination in the configuration is wrong: fix it (exit 2)
├── RefusedError       the other side will not have us: identity, plan or run differ (exit 3)
├── EnvironmentProblem the machine is in the way: port taken, disk full, no such file (exit 4)
│   ├── StorageError   the journal, a snapshot or a checkpoint could not be written or read
│   └── TransportError the network failed for longer than we are willing to wait
├── CorruptDataError   bytes that do not mean what they claim: bad CRC, size, scale, digest
└── NonFiniteError     NaN or infinity where a finite number is needed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DilocoError(Exception):
    """Root of every error this package raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(DilocoError):
    exit_code = 2


class RefusedError(DilocoError):
    exit_code = 3


class EnvironmentProblem(DilocoError):
    exit_code = 4


class StorageError(EnvironmentProblem):
    pass


class TransportError(EnvironmentProblem):
    pass


class CorruptDataError(DilocoError):
    exit_code = 4


class NonFiniteError(DilocoError):
    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'lr'?`` for an unknown `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
