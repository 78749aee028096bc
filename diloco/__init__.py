"""DiLoCo: train one model across machines that can barely talk to each other.

The public names are loaded on first use, so that ``import diloco`` stays fast and pulls in no network library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diloco.comms.connect import connect as connect
    from diloco.config import RunConfig as RunConfig
    from diloco.coordinator.inprocess import local as local
    from diloco.errors import DilocoError as DilocoError
    from diloco.optim.gpa import GPA as GPA
    from diloco.optim.snoo import SNOO as SNOO
    from diloco.worker.session import DiLoCo as DiLoCo

__version__ = "0.1.0"

_HOMES = {
    "DiLoCo": "diloco.worker.session",
    "DilocoError": "diloco.errors",
    "GPA": "diloco.optim.gpa",
    "RunConfig": "diloco.config",
    "SNOO": "diloco.optim.snoo",
    "connect": "diloco.comms.connect",
    "local": "diloco.coordinator.inprocess",
}

__all__ = ["GPA", "SNOO", "DiLoCo", "DilocoError", "RunConfig", "__version__", "connect", "local"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diloco' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
