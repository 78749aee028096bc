"""A coordinator inside the calling process: the same machine, without sockets or a journal on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diloco.comms.local import LocalConnection, LocalHub
from diloco.comms.machine import Persist
from diloco.config import RunConfig
from diloco.coordinator.state import Coordinator


def local_hub(config: RunConfig) -> LocalHub:
    """A hub for several workers in one process (threads); each takes `hub.connect()`."""
    return LocalHub(Coordinator(config), config.model_dump(mode="json"), _forget)


def local(config: RunConfig | Mapping[str, Any] | None = None) -> LocalConnection:
    """A connection to a coordinator of its own in this process, for one worker.

    The outer optimizer without any network: ``diloco.DiLoCo(model, optimizer, diloco.local())``.
    """
    raw = config.model_dump(mode="json") if isinstance(config, RunConfig) else dict(config or {})
    raw["topology"] = {**raw.get("topology", {}), "workers": 1}
    return local_hub(RunConfig.from_dict(raw)).connect()


def _forget(action: Persist) -> None:
    """One process lives and dies as a whole: there is nobody to restart from a journal."""
