"""The list of revoked certificates: a JSON file that a running coordinator looks at again and again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diloco.comms.tls import stamp_of
from diloco.errors import EnvironmentProblem

log = logging.getLogger(__name__)


def read_revoked(path: Path) -> dict[int, str]:
    """Serial -> identity. Raises EnvironmentProblem for a file that is missing or damaged."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        entries = raw["revoked"]
        return {int(entry["serial"], 16): str(entry["identity"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(
            f"keys: cannot read the list of revoked certificates {str(path)!r}: {error!r}; bring it from where the "
            "certificates are made: without it those who were shut out would come back"
        ) from None


class Revocations:
    """The newest readable state of the file. Raises EnvironmentProblem when it is unreadable at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = stamp_of(path)
        self._serials: Mapping[int, str] = read_revoked(path)

    def __contains__(self, serial: int) -> bool:
        return serial in self._serials

    def refresh(self) -> None:
        """Look at the file again. While it is damaged or gone what was revoked stays revoked."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._serials = {**self._serials, **read_revoked(self._path)}
        except EnvironmentProblem as error:
            log.error("%s; the list as it was before stays in force", error)
