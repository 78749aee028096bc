"""What the coordinator knows, as plain values for people and programs: `diloco status`, metrics, the report."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from diloco.coordinator import leasing
from diloco.coordinator.membership import Member
from diloco.coordinator.state import Coordinator


def phase(coordinator: Coordinator) -> str:
    if coordinator.complete:
        return "complete"
    if not coordinator.started or coordinator.plan is None:
        return "gathering"
    return "running" if len(coordinator.ledgers) == len(coordinator.plan.fragments) else "seeding"


def status(coordinator: Coordinator, now: float, seconds: float) -> dict[str, Any]:
    """The whole state as JSON values; unknown numbers are None. `now` is on the machine's clock."""
    plan = coordinator.plan
    versions = coordinator.versions()
    members = sorted(coordinator.members.values(), key=lambda m: (m.index, m.name))
    return {
        "run_id": coordinator.config.run.run_id,
        "phase": phase(coordinator),
        "epoch": coordinator.epoch,
        "commits": coordinator.commits,
        "aborted": coordinator.aborts,
        "inner_step": coordinator.inner_step(),
        "inner_steps_total": coordinator.config.run.inner_steps_total,
        "tokens": coordinator.tokens,
        "fragments": [
            {"index": f.index, "numel": f.numel, "version": versions[f.index]}
            for f in (plan.fragments if plan else ())
        ],
        "members": [_member(member, now, coordinator.ended) for member in members],
        "rejections": dict(coordinator.rejections),
        "global_digest": coordinator.global_digest() if coordinator.complete else "",
        "seconds": seconds,
        "data": leasing.facts(coordinator),
        "config": coordinator.config.model_dump(mode="json"),
    }


def _member(member: Member, now: float, ended: int) -> dict[str, Any]:
    facts = {k: finite(v) for k, v in dataclasses.asdict(member.progress).items()}
    return {
        "id": member.name,
        "index": member.index,
        "state": member.status.value,
        "incarnation": member.incarnation,
        "versions": list(member.versions),
        **facts,
        "heartbeat_age_s": round(max(0.0, now - member.last_seen), 3),
        "digest": member.digest,
        "finished": member.finished,
        "live": member.live,
        "rejected": dict(member.rejected),
        "quarantined": member.conduct.barred(ended),
    }


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
