"""A coordinator made of what workers hold, for a run without one of its own: the journal that it would have read.

A leader's knowledge is small: who has which seat, each fragment with its outer state, and the newest commit of each.
As records of a journal it restores a `Coordinator`, by the same code as after a crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diloco.comms import frame
from diloco.comms.machine import Action, Persist
from diloco.comms.messages import Buffer, Commit, Snapshot
from diloco.comms.peering import Head, Seat
from diloco.config import RunConfig
from diloco.coordinator.membership import Status
from diloco.coordinator.state import Coordinator
from diloco.errors import ConfigError
from diloco.fragments import FragmentPlan
from diloco.overlap import outer_optimizer
from diloco.robust import rule_of

Record = tuple[Mapping[str, Any], Sequence[Buffer]]


def seats_of(c: Coordinator) -> tuple[Seat, ...]:
    """Everybody who was ever let in, by index."""
    return tuple(
        Seat(m.name, m.nonce, m.incarnation, m.index, m.cohort, m.status is Status.GONE, m.finished)
        for m in c.by_index()
        if m.index >= 0
    )


def newest(*rosters: Sequence[Seat]) -> tuple[Seat, ...]:
    """Of each worker the last life that anybody knows, and that it left if anybody heard it."""
    found: dict[str, Seat] = {}
    for seat in (seat for roster in rosters for seat in roster):
        known = found.get(seat.worker)
        if known is None or (seat.incarnation, seat.gone) > (known.incarnation, known.gone):
            found[seat.worker] = seat
    taken: set[int] = set()
    for name in sorted(found, key=lambda name: (found[name].index, name)):
        if found[name].index in taken:  # let in by two leaders who did not know of each other: it joins again
            del found[name]
        else:
            taken.add(found[name].index)
    return tuple(sorted(found.values(), key=lambda seat: seat.index))


def successor(
    config: RunConfig,
    plan: FragmentPlan,
    seats: Sequence[Seat],
    values: Mapping[int, tuple[Snapshot, Commit | None]],
    *,
    epoch: int,
    step: int,
    live: Mapping[str, Sequence[Head]],
    now: float,
) -> tuple[Coordinator, list[Action]]:
    """The coordinator that leads in `epoch`, and its first actions.

    `live`: by name what each live peer holds. The newest commits are published again, for their leader may have died
    before it did, and sent to whoever lacks them. ConfigError where data is leased: the table would be lost.
    """
    if config.data.mode != "static":
        raise ConfigError(
            f"data.mode = {config.data.mode!r} needs a coordinator with a journal, which a run led by its workers has not: "
            "set data.mode = 'static'"
        )
    c = Coordinator(config)
    first = {"type": "start", "plan": plan.describe(), "epoch": epoch - 1}
    records: list[Record] = [({**first, "members": [_seat(s) for s in seats if s.cohort]}, ())]
    records += [({"type": "member", **_seat(s)}, ()) for s in seats if not s.cohort]
    for seat in (s for s in seats if s.gone):
        records.append(({"type": "leave", "worker": seat.worker, "reason": seat.finished, "digest": ""}, ()))
    names = {s.index: s.worker for s in seats}
    for p, (value, commit) in sorted(values.items()):
        records += _fragment(config, c.run_hash, p, value, commit, names, epoch=epoch, step=step)
    records.append(({"type": "epoch", "epoch": epoch - 1}, ()))
    actions = c.restore(records, now)
    actions += [Persist(record, blobs) for record, blobs in records if record["type"] == "commit"]
    for member in c.by_index():
        if member.status is Status.ACTIVE and member.name not in live:
            member.status = Status.DEAD
        elif member.status is Status.ACTIVE:
            for p, (value, _) in values.items():
                if live[member.name][p][0] < value.version:
                    c.send_commit(member, p)
    return c, actions


def _seat(seat: Seat) -> dict[str, Any]:
    return {
        "worker": seat.worker,
        "nonce": seat.nonce,
        "incarnation": seat.incarnation,
        "index": seat.index,
    }


def _fragment(
    config: RunConfig,
    run_hash: int,
    p: int,
    value: Snapshot,
    commit: Commit | None,
    names: Mapping[int, str],
    *,
    epoch: int,
    step: int,
) -> list[Record]:
    """A fragment's start, its newest commit and its snapshot; the commit is not repeated, only known."""
    params = value.frames[0][1]
    records: list[Record] = [({"type": "initial", "fragment": p, "digest": value.digest}, [params])]
    if commit is not None and commit.version == value.version:
        rounds, frames = dict(commit.rounds), dict(commit.frames)
        indices = [i for i, _ in commit.weights]
        blobs = [frames[i] for i in indices]
        record = {
            "type": "commit",
            "fragment": p,
            "version": commit.version,
            "contributors": [names.get(i, "") for i in indices],
            "weights": [w for _, w in commit.weights],
            "digest": commit.digest,
            "indices": indices,
            "rounds": [rounds[i] for i in indices],
            "tokens": [frame.read_header(blob).tokens for blob in blobs],
            "step": step,
            "epoch": epoch,
            "local_steps": [list(pair) for pair in commit.local_steps],
        }
        records.append((record, blobs))
    if value.version == 0:
        return records  # the state is the one that everybody begins with
    flat = frame.decode_frame(params)[1]
    # Snapshots carry the outer state by name.
    state = sorted({**outer_optimizer(config).init(flat), **rule_of(config).state(flat.numel())})
    tensors = ["params", *(f"state.{name}" for name in state)]
    snapshot = {"type": "snapshot", "fragment": p, "version": value.version, "names": tensors}
    records.append((snapshot, [blob for _, blob in value.frames]))
    return records
