"""What `diloco doctor` finds: one fact, how bad it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diloco.errors import DilocoError, EnvironmentProblem


@dataclass(frozen=True, slots=True)
class Finding:
    """`exit_code` counts where `level` is "fail"; `fix` is empty where nothing has to be done."""

    check: str
    level: Literal["ok", "warn", "fail"]
    words: str
    fix: str = ""
    exit_code: int = 0


def ok(check: str, words: str) -> Finding:
    return Finding(check, "ok", words)


def warn(check: str, words: str, fix: str) -> Finding:
    return Finding(check, "warn", words, fix)


def failed(check: str, words: str, fix: str, kind: type[DilocoError] = EnvironmentProblem) -> Finding:
    """`kind`: the error with which the run itself would end."""
    return Finding(check, "fail", words, fix, kind.exit_code)
