"""The part of the configuration that every node of a run must share, and how to say in what two nodes differ."""

from __future__ import annotations

import json
from typing import Any

from diloco.config import RunConfig
from diloco.late import late_settings

# What decides the numbers that cross the wire. The rest (devices, batch sizes, paths) is each node's own affair.
SHARED = ("outer", "stream", "codec", "weights", "robust")


def settings_json(config: RunConfig) -> str:
    """Canonical JSON of the shared sections and the run's identity, length and seed."""
    shared: dict[str, Any] = {name: getattr(config, name).model_dump(mode="json") for name in SHARED}
    # When a worker takes a commit in, and how fast it sends, changes nothing for the others (2501.18512).
    del shared["stream"]["tau"], shared["stream"]["pace"]
    shared["topology"] = {"kind": config.topology.kind}
    shared["fault"] = late_settings(config)
    shared["data"] = {"mode": config.data.mode}
    if config.data.mode != "static":
        shared["model"] = {"sequence_length": config.model.sequence_length}
    if config.data.mode == "deficit":
        shared["data"]["shards"] = config.data.shards or config.topology.workers
    shared["run"] = {"seed": config.run.seed, "inner_steps_total": config.run.inner_steps_total}
    return json.dumps(shared, sort_keys=True)


def difference(ours: str, theirs: str) -> str | None:
    """The first setting in which a worker's settings differ from the run's, in words; None if they agree."""
    try:
        a, b = json.loads(ours), json.loads(theirs)
    except (ValueError, RecursionError):
        return "the worker's settings are not valid JSON"
    for section, keys in a.items():
        for key, value in keys.items():
            found = b.get(section) if isinstance(b, dict) else None
            other = found.get(key) if isinstance(found, dict) else None
            if other != value:
                return f"{section}.{key} = {other!r} on the worker and {value!r} in the run: use the same configuration"
    return None
