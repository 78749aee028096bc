"""The journal's records as plain dictionaries. Replaying them is in `diloco.coordinator.replay`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diloco.comms import downlink
from diloco.comms.machine import Persist
from diloco.coordinator.membership import Member
from diloco.coordinator.rounds import Answer, Committed
from diloco.fragments import FragmentPlan


def _member(member: Member) -> dict[str, Any]:
    return {
        "worker": member.name,
        "nonce": member.nonce,
        "incarnation": member.incarnation,
        "index": member.index,
    }


def start_record(plan: FragmentPlan, epoch: int, cohort: Sequence[Member]) -> Persist:
    """The run begins: one record with all its first members, so that a crash cannot part them."""
    members = [_member(member) for member in cohort]
    return Persist({"type": "start", "plan": plan.describe(), "epoch": epoch, "members": members})


def member_record(member: Member) -> Persist:
    """A worker joins the running run, or begins a new life in it."""
    return Persist({"type": "member", **_member(member)})


def commit_record(
    fragment: int,
    done: Committed,
    answers: Sequence[Answer],
    contributors: Sequence[str],
    *,
    step: int,
    epoch: int,
) -> Persist:
    """All that repeats the commit: who, with what weight, and as blobs the contributions' frames."""
    record: dict[str, Any] = {
        "type": "commit",
        "fragment": fragment,
        "version": done.version,
        "contributors": list(contributors),
        "weights": [w for _, w in done.weights],
        "digest": done.digest,
        "indices": [a.index for a in answers],
        "rounds": [a.round for a in answers],
        "tokens": [a.tokens for a in answers],
        "step": step,
        "epoch": epoch,
    }
    if done.local_steps:
        record["local_steps"] = [list(pair) for pair in done.local_steps]
    if any(a.ranges for a in answers):
        record["ranges"] = [[list(r) for r in a.ranges] for a in answers]
    return Persist(record, [a.frame for a in answers])


def snapshot_record(fragment: int, ledger: downlink.Ledger, run_hash: int) -> Persist:
    """A fragment's whole state, so that a restart need not repeat the commits before it."""
    tensors, version = ledger.tensors(), ledger.shard.version
    names = sorted(tensors)
    blobs = [downlink.value_frame(tensors[name], fragment, version, run_hash) for name in names]
    return Persist({"type": "snapshot", "fragment": fragment, "version": version, "names": names}, blobs)
