"""What a worker holds of the run, for a run without a coordinator: told to others, handed over, given up.

Functions over a `Replica`; when they are called is decided in `diloco.peer`.
"""

from __future__ import annotations

from collections.abc import Mapping

from diloco.aggregate import rda_pieces
from diloco.comms import downlink, frame
from diloco.comms.messages import Commit, Snapshot
from diloco.errors import CorruptDataError
from diloco.outer import OuterShard
from diloco.worker.replica import Replica
from diloco.worker.replica_slots import Slot, shard_of


class Holdings:
    """The commits and digests of one replica, by fragment and version, as far back as a successor may need them."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.commits: dict[int, dict[int, Commit]] = {p: {} for p in range(len(replica.slots))}
        self.digests: dict[int, dict[int, str]] = {p: {} for p in range(len(replica.slots))}

    def note(self, message: Commit | Snapshot) -> None:
        """Before the replica takes it: a commit is kept with this worker's own contribution put back."""
        p, version = message.fragment, message.version
        slot = self.replica.slots[p]
        self.digests[p][version] = message.digest
        # The first that comes: when it is repeated, this worker's own frame may be gone.
        if isinstance(message, Commit) and version not in self.commits[p]:
            self.commits[p][version] = _whole(message, self.replica.index, slot)
        for kept in (self.digests[p], self.commits[p]):
            for old in [v for v in kept if v < slot.version]:
                del kept[old]

    def heads(self) -> tuple[tuple[int, str], ...]:
        """By fragment the newest version here and its digest; (-1, "") where there is none to rely on."""
        return tuple(self._head(slot) for slot in self.replica.slots)

    def _head(self, slot: Slot) -> tuple[int, str]:
        if slot.shard is None or slot.broken:
            return (-1, "")
        version, known = slot.known, self.digests[slot.index]
        if version not in known:
            if version != slot.version or slot.jobs:
                return (-1, "")
            known[version] = frame.digest(slot.shard.params)
        return (version, known[version])

    def whole(self) -> tuple[int, ...]:
        """By fragment the newest version whose commit is here with every contributor's frame; 0 for none."""
        return tuple(
            max((v for v, c in kept.items() if _complete(c)), default=0) for kept in self.commits.values()
        )

    def hand_over(self, p: int) -> tuple[Snapshot, Commit | None] | None:
        """Fragment `p` with its outer state, and the commit that made it; None while it is being worked on."""
        r, slot = self.replica, self.replica.slots[p]
        if slot.jobs or slot.broken or slot.shard is None:
            return None
        shard = _copy(slot.shard)
        try:
            if slot.kept is not None and slot.kept.version > shard.version:
                shard = shard_of(slot.kept, r.plan, r.config)
            while (commit := self.commits[p].get(shard.version + 1)) is not None:
                pieces = rda_pieces(r.plan.fragments[p]) if r.rule.by_direction else ()
                mode, codec = r.config.codec.down, r.codecs[p]
                downlink.open_commit(
                    mode, shard, commit.frames, commit.weights, codec, rule=r.rule, pieces=pieces
                )
                if frame.digest(shard.params) != commit.digest:
                    raise CorruptDataError(f"fragment {p} version {commit.version}: digests differ")
        except (CorruptDataError, KeyError, ValueError, RuntimeError):
            return None  # a snapshot is on its way
        frames = downlink.snapshot_frames(r.config.codec.down, shard, fragment=p, run_id=r.run_hash)
        made = self.commits[p].get(shard.version)
        made = made if made is not None and _complete(made) else None
        return Snapshot(p, shard.version, frame.digest(shard.params), frames), made

    def doubt(self, p: int) -> None:
        """Others went on from another value: what is here is of no branch that lives, only a snapshot helps.

        Work that is in flight was measured from it and counts for nobody.
        """
        slot = self.replica.slots[p]
        self.commits[p].clear()
        self.digests[p].clear()
        slot.waiting.clear()
        slot.kept = None
        if slot.shard is not None:
            slot.shard.version, slot.broken = 0, True
        if slot.flight is not None and not slot.flight.outcome:
            slot.flight.base, slot.flight.refused = -1, True

    def differs(self, founded: tuple[tuple[int, str], ...]) -> list[int]:
        """Fragments in which this worker is ahead of, or beside, what the run goes on from."""
        here = self.heads()
        return [
            p
            for p, (mine, theirs) in enumerate(zip(here, founded, strict=False))
            if mine[0] > theirs[0] or (mine[0] == theirs[0] and mine != theirs)
        ]


def _whole(commit: Commit, index: int, slot: Slot) -> Commit:
    frames: Mapping[int, object] = dict(commit.frames)
    flight = slot.flight
    if index not in dict(commit.weights) or index in frames or flight is None or flight.frame is None:
        return commit
    return Commit(
        commit.fragment,
        commit.version,
        commit.weights,
        commit.rounds,
        commit.digest,
        tuple(sorted((*commit.frames, (index, flight.frame)), key=lambda pair: pair[0])),
        commit.local_steps,
    )


def _complete(commit: Commit) -> bool:
    return {i for i, _ in commit.weights} <= dict(commit.frames).keys()


def _copy(shard: OuterShard) -> OuterShard:
    state = {name: tensor.clone() for name, tensor in shard.state.items()}
    return OuterShard(shard.optimizer, shard.params.clone(), shard.version, state)
