"""Who may join a run: identity, settings, plan and history must fit. Pure checks; no state changes."""

from __future__ import annotations

from collections.abc import Sequence

from diloco.comms.messages import PROTOCOL, Join, Refused
from diloco.errors import ConfigError
from diloco.fragments import FragmentPlan
from diloco.settings import difference


def refusal(
    message: Join,
    *,
    run_id: str,
    settings: str,
    plan: FragmentPlan | None,
    complete: bool,
    versions: Sequence[int],
) -> Refused | None:
    """Why the coordinator of this run, plan and `versions` will not have the worker; None if it will."""
    if message.protocol != PROTOCOL:
        return Refused(
            "protocol", f"protocol {message.protocol} here needs {PROTOCOL}: install the same version"
        )
    if message.run_id != run_id:
        return Refused("run", f"run.run_id = {message.run_id!r} but this is run {run_id!r}")
    if (found := difference(settings, message.settings)) is not None:
        return Refused("settings", found)
    try:
        theirs = FragmentPlan.from_description(message.plan)
    except ConfigError as error:
        return Refused("plan", str(error))
    if plan is not None and theirs.digest() != plan.digest():
        return Refused("plan", plan.difference(theirs))
    if complete:
        return Refused("complete", "this run is complete")
    if any(v > (versions[p] if p < len(versions) else 0) for p, v in enumerate(message.versions)):
        return Refused(
            "corrupt",
            f"the worker holds versions {list(message.versions)} but the coordinator only {list(versions)}: it lost "
            "committed rounds; restart it with --resume on the run's own journal",
        )
    return None
