"""How a peer that everybody has agreed to follow begins to lead: it takes what is newest anywhere. Functions over a Peer.

Who is followed is decided in `diloco.peer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diloco.comms import frame
from diloco.comms.machine import COORDINATOR, Action, Connected, Send
from diloco.comms.messages import Commit, Snapshot
from diloco.comms.peering import Ask, Beacon
from diloco.coordinator.state import Coordinator
from diloco.coordinator.succession import successor

if TYPE_CHECKING:
    from diloco.peer import Peer


def found(peer: Peer) -> None:
    """Once all who live have reported: ask for what others have and I lack; when nothing is missing, lead."""
    live, claim = peer.live(peer.lease_s), (peer.epoch, peer.leader)
    reports = {p: b for p, b in peer.beacons.items() if p in live and (b.epoch, b.leader) == claim}
    if live - reports.keys() - {peer.name} or len(live) < peer.needed():
        return
    plan, actions = peer.replica.plan, list[Action]()
    if peer.able or any(b.able for b in reports.values()):
        reports[peer.name] = peer.beacon()
        known = [_newest(peer, f.index, list(reports.values())) for f in plan.fragments]
        values = {value.fragment: (value, commit) for value, commit in filter(None, known)}
        if len(values) < len(plan.fragments):
            return
        led, actions = successor(
            peer.config,
            plan,
            peer.seats,
            values,
            epoch=peer.epoch,
            step=max(b.step for b in reports.values()),
            live={name: b.heads for name, b in reports.items()},
            now=peer.now,
        )
    else:
        led = Coordinator(peer.config)
        led.epoch = peer.epoch
    shards = [ledger.shard for _, ledger in sorted(led.ledgers.items())]
    founded = tuple((shard.version, frame.digest(shard.params)) for shard in shards)
    if not peer.ready_for(founded):
        return
    peer.coordinator, peer.founded, peer.ruling = led, founded, True
    peer.tell(*sorted(peer.known))
    peer.from_coordinator(actions)
    peer.to_replica(Connected(COORDINATOR))


def _newest(peer: Peer, p: int, reports: Sequence[Beacon]) -> tuple[Snapshot, Commit | None] | None:
    """Fragment `p` from who has it newest, best with the commit that made it; None until it is here."""
    version = max(b.heads[p][0] for b in reports)
    best = [b for b in reports if b.heads[p][0] == version]
    holders = [b.peer for b in best if b.whole[p] == version] or [b.peer for b in best]
    if peer.name in holders:
        return peer.holdings.hand_over(p)
    held = peer.taken.get(p)
    if held is not None and held.value.version >= version:
        return held.value, held.commit
    if peer.now >= peer.asked.get(p, -math.inf) + peer.config.fault.heartbeat_s:
        peer.asked[p] = peer.now
        peer.out.append(Send(holders[0], Ask(peer.epoch, peer.leader, p)))
    return None
