"""Runs without a coordinator: the lowest live peer leads, and whoever dies, the others go on alike."""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from typing import Any

import pytest
import torch

from diloco.comms.machine import Connected, Persist, Received, Send, Stop
from diloco.comms.messages import Aborted, Commit, Heartbeat, Message, Progress, Rejected, Resend, Snapshot
from diloco.comms.peering import Ask, Beacon, Handover, Under
from diloco.comms.sim import Weather
from diloco.config import RunConfig
from diloco.coordinator.succession import successor
from diloco.errors import RefusedError
from diloco.peer import Peer, better
from diloco.worker.replica import Replica
from tests.sim.faults import CALM, ROUGH, STORM
from tests.sim.peers import Swarm, ToyPeer, require_promises
from tests.toy import Cluster, ToyModel, config, plan_of

torch.set_num_threads(1)

OVERLAP: dict[str, dict[str, Any]] = {
    "none": {"overlap": "none"},
    "inner": {"overlap": "inner", "tau": 2},
    "delay_corrected": {"overlap": "delay_corrected", "tau": 3},
    "delayed": {"overlap": "delayed"},
    "eager": {"overlap": "eager"},
}


def of(mode: str = "inner", **sections: dict[str, Any]) -> RunConfig:
    codec = {"up": "e3m0", "block": 16, "ef": "on", "down": "relay"}
    topology = {"kind": "replicated", "workers": 3}
    return config(codec=codec, topology=topology, stream=OVERLAP[mode], **sections)


def central(c: RunConfig) -> str:
    """The digest of the same run with a coordinator."""
    return Cluster(c, flavours=(0, 1, 2)).run().coordinator.global_digest()


def leaderless(c: RunConfig, seed: int = 0, weather: Weather | None = None) -> Swarm:
    return Swarm(c, seed=seed, weather=weather)


@pytest.mark.parametrize("mode", OVERLAP)
def test_a_run_without_a_coordinator_gives_the_same_bits(mode: str) -> None:
    """The lowest name leads from the start to the end, and the result is that of a central run."""
    swarm = leaderless(of(mode)).run()
    assert swarm.digest() == central(of(mode))
    assert {p.replica.digest() for p in swarm.peers} == {swarm.digest()}
    assert swarm.leaders == ["w0"]
    require_promises(swarm)


@pytest.mark.parametrize("mode", OVERLAP)
def test_timing_changes_no_bit(mode: str) -> None:
    """Without deaths, delays, losses, duplicates and slow peers change nothing."""
    expected = central(of(mode))
    for seed in range(2):
        swarm = leaderless(of(mode), seed, ROUGH)
        swarm.peers[seed % 3].step_s = 1.7
        assert swarm.run().digest() == expected, seed
        require_promises(swarm)


@pytest.mark.parametrize("rule", ["centered_clip", "norm_outlier"])
def test_robust_rules_work_without_a_coordinator(rule: str) -> None:
    """Who counts is the leader's word in the commit; how they combine, with its state, is computed by each."""
    c = of(robust={"kind": rule})
    swarm = leaderless(c, 1, ROUGH).run()
    assert swarm.digest() == central(c)
    require_promises(swarm)


@pytest.mark.parametrize("mode", OVERLAP)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["the leader", "the next", "the last"])
def test_whoever_dies_whenever_the_others_go_on_alike(mode: str, position: int) -> None:
    """Killed between any two actions: nothing published is lost or doubled, and the survivors agree on every bit."""
    for seed in range(2):
        swarm = leaderless(of(mode), seed, (CALM, ROUGH, STORM)[(seed + position) % 3])
        victim = swarm.peers[position]
        swarm.once_started(2.0 + 5.7 * seed, partial(setattr, victim, "fuse", 2 + 3 * seed + position))
        swarm.run(until_s=600.0)
        require_promises(swarm)
        assert [p.name for p in swarm.live] == [f"w{i}" for i in range(3) if i != position]
        assert swarm.leaders[-1] == ("w1" if position == 0 else "w0")


def test_a_leader_killed_after_any_action_leaves_a_whole_run() -> None:
    """Every point of its publishing: before it sends, between two sends, before and after the record is out."""
    c = of(run={"inner_steps_total": 12})
    successions = 0
    for fuse in range(0, 110, 9):
        swarm = leaderless(c, fuse)
        swarm.once_started(0.0, partial(setattr, swarm.peers[0], "fuse", fuse))
        swarm.run(until_s=400.0)
        require_promises(swarm)
        successions += swarm.leaders[-1] == "w1" and len(swarm.live) == 2
    assert successions >= 10  # the last fuses may be longer than the run


@pytest.mark.parametrize(
    "codec",
    [
        {"up": "e3m0", "block": 16, "roles": {"embed": "int8", "scalar": "fp32"}},
        {"up": "stat", "groups": "tensor"},
    ],
    ids=["roles", "groups"],
)
def test_a_leader_dies_where_a_frame_says_too_little_of_its_codec(codec: dict[str, Any]) -> None:
    """Coded per role or per tensor, a payload is opened only by who has the plan; a successor takes it over all the same."""
    topology = {"kind": "replicated", "workers": 3}
    c = config(codec={**codec, "down": "relay"}, topology=topology, run={"inner_steps_total": 15})
    swarm = leaderless(c)
    swarm.once_started(6.0, swarm.peers[0].kill)
    swarm.run(until_s=600.0)
    require_promises(swarm)
    assert swarm.leaders == ["w0", "w1"]


def test_the_succession_takes_a_lease_and_no_longer() -> None:
    """The expiry is the round's time-out where that is shorter than what is called dead."""
    ends = {}
    for timeout in (15.0, 600.0):
        c = of(fault={"round_timeout_s": timeout, "fixed_grace_s": 5.0})
        swarm = leaderless(c)
        swarm.once_started(7.0, swarm.peers[0].kill)
        ends[timeout] = swarm.run().sim.now
        require_promises(swarm)
    normal = leaderless(of()).run().sim.now
    assert 5.0 < ends[15.0] - normal < 25.0
    assert 20.0 < ends[600.0] - ends[15.0] < 30.0  # 40 s without a sign of life are death


def test_two_leaders_in_a_row_can_die() -> None:
    """The last peer leads itself and finishes alone."""
    for seed in range(2):
        swarm = leaderless(of(run={"inner_steps_total": 40}), seed, ROUGH if seed % 2 else CALM)
        swarm.once_started(4.0 + seed, swarm.peers[0].kill)
        swarm.once_started(60.0 + seed, swarm.peers[1].kill)
        swarm.run(until_s=900.0)
        require_promises(swarm)
        assert swarm.leaders == ["w0", "w1", "w2"]


def test_a_leader_that_comes_back_from_nothing_leads_again() -> None:
    """A new life follows, fetches value and momentum, and as the lowest name takes over from its successor."""
    for seed in range(3):
        swarm = leaderless(of(run={"inner_steps_total": 40}), seed, ROUGH if seed % 2 else CALM)
        swarm.once_started(5.0, swarm.peers[0].kill)
        swarm.once_started((8.0, 30.0, 55.0)[seed], partial(swarm.join, "w0", 5))
        swarm.run(until_s=1500.0)
        require_promises(swarm)
        assert len(swarm.live) == 3 and swarm.leaders[-1] == "w0"
        lives = {(s.worker, s.incarnation) for p in swarm.live for s in p.peer.seats}
        assert ("w0", 2) in lives


def test_a_newcomer_gets_the_outer_state_and_contributes() -> None:
    """A fourth peer in the middle of a run takes a seat, trains on the run's value and counts."""
    swarm = leaderless(of(run={"inner_steps_total": 40}), 2)
    swarm.once_started(12.0, partial(swarm.join, "w3", 3))
    swarm.run(until_s=900.0)
    require_promises(swarm)
    assert any(3 in record["indices"] for record, _ in swarm.published.values())


def test_a_parted_leader_publishes_nothing_and_comes_back() -> None:
    """With a quorum above half its side cannot commit; the others go on, and it takes their value in the end."""
    for seed in range(2):
        c = of(run={"inner_steps_total": 40}, fault={"quorum": 2, "fixed_grace_s": 5.0})
        swarm = leaderless(c, seed, ROUGH if seed % 2 else CALM)

        def part(swarm: Swarm = swarm) -> None:
            swarm.cut = frozenset({"w0"})

        def heal(swarm: Swarm = swarm) -> None:
            assert swarm.leaders == ["w0", "w1"]
            swarm.cut = frozenset()

        swarm.once_started(6.0 + seed, part)
        swarm.once_started(75.0, heal)
        swarm.run(until_s=1500.0)
        require_promises(swarm)
        assert len(swarm.live) == 3


def test_a_survivor_and_a_new_life_together_make_a_quorum() -> None:
    """A commit that only one peer can hold waits for a second, which gets it with its first snapshot."""
    for seed in (1, 2):
        swarm = leaderless(of(run={"inner_steps_total": 30}, fault={"quorum": 2}), seed)
        swarm.once_started(5.0 + seed, swarm.peers[0].kill)
        swarm.once_started(20.0 + seed, partial(swarm.join, "w1", 5))
        swarm.run(until_s=1500.0)
        require_promises(swarm)
        assert sorted(p.name for p in swarm.live) == ["w1", "w2"]


@pytest.mark.parametrize("batch", range(4))
def test_mixed_faults_leave_every_run_whole(batch: int) -> None:
    """Deaths of leaders and others, new lives, newcomers, slow peers, losses and duplicates, mixed by seed."""
    for seed in range(3 * batch, 3 * batch + 3):
        source = random.Random(seed)
        c = of(source.choice(sorted(OVERLAP)), run={"inner_steps_total": 30})
        swarm = leaderless(c, seed, source.choice([CALM, ROUGH, STORM]))
        said: list[str] = []
        for _ in range(source.randrange(1, 4)):
            swarm.once_started(source.uniform(0.0, 30.0), partial(fault, swarm, source, said))
        try:
            swarm.run(until_s=3000.0)
            require_promises(swarm)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}; faults {said}") from error


def fault(swarm: Swarm, source: random.Random, said: list[str]) -> None:
    training = [p for p in swarm.live if not p.finished]
    kind = source.choice(["kill", "kill the leader", "restart", "slow"])
    if not training:
        return
    victim: ToyPeer = source.choice(training)
    if kind == "kill the leader" and swarm.leader is not None and not swarm.leader.finished:
        victim = swarm.leader
    others = [p for p in swarm.live if p is not victim and p.fuse is None and p.peer.able]
    if kind != "slow" and not others:
        return  # what nobody else holds cannot outlive its only holder
    said.append(f"{kind}: {victim.name}")
    if kind == "restart":
        swarm.join(victim.name, 5)
    elif kind == "slow":
        victim.step_s = source.uniform(0.2, 8.0)
    else:
        victim.fuse = source.randrange(9)


# ---- single rules ----


def peer(name: str = "w1", others: tuple[str, ...] = ("w0", "w2")) -> Peer:
    c = of()
    return Peer(Replica(plan_of(c), c, ToyModel(plan_of(c), 0), worker=name, nonce=1), others)


def beacon(name: str, epoch: int, leader: str, **changes: Any) -> Beacon:
    plain = {"able": False, "heads": ((-1, ""),) * 4, "whole": (0,) * 4, "step": 0}
    return Beacon(name, epoch, leader, **{**plain, **changes})


def test_of_two_claims_everybody_follows_the_same() -> None:
    """A later epoch wins, then the lower name; nobody's claim loses to any other. It is an order."""
    claims = [(2, "b"), (2, "c"), (2, ""), (1, "a"), (1, ""), (0, "")]
    for i, a in enumerate(claims):
        for j, b in enumerate(claims):
            assert better(a, b) == (i < j)


def test_nobody_leads_in_a_name_that_another_life_claimed() -> None:
    """A peer that starts anew hears that it is followed; it says that it does not lead."""
    p = peer("w0", ("w1",))
    p.handle(Connected("w1"), 0.0)
    p.handle(Received("w1", beacon("w1", 3, "w0")), 0.1)
    assert (p.epoch, p.leader, p.leads) == (3, "", False)


def test_nobody_claims_in_the_name_of_another() -> None:
    """A beacon counts only from the peer that it names, and only of the same model."""
    p = peer("w1", ("w0", "w2"))
    p.handle(Received("w2", beacon("w0", 3, "w0")), 0.1)
    p.handle(Received("w0", beacon("w0", 3, "w0", heads=((0, "x"),))), 0.2)
    assert (p.epoch, p.leader) == (0, "")
    p.handle(Received("w0", beacon("w0", 3, "w0")), 0.3)
    assert (p.epoch, p.leader) == (3, "w0")


def test_a_peer_of_another_run_stops_with_the_reason() -> None:
    """The leader refuses it as a coordinator would, and its error reaches its driver once; the run does not notice."""
    swarm = leaderless(of())
    stops: list[Stop] = []
    swarm.config = of(outer={"lr": 0.1})
    stranger = swarm.join("w9", 3)
    swarm.config = of()
    swarm.sim.on_stop["w9"] = stops.append
    swarm.sim.run(600.0, lambda: all(p.finished for p in swarm.peers if p is not stranger))
    assert len(stops) == 1 and isinstance(stops[0].error, RefusedError)
    assert "outer.lr = 0.1 on the worker" in str(stops[0].error)
    assert swarm.digest() == central(of())


def test_what_is_about_no_fragment_of_the_plan_is_dropped() -> None:
    """From a follower, from the leader, with a candidate: no error, no answer, and nothing of it is kept."""
    swarm = leaderless(of())
    swarm.sim.run(600.0, lambda: bool(swarm.published))
    p, donor = swarm.peers[1].peer, swarm.peers[1].peer.holdings.hand_over(0)
    assert donor is not None
    before, claim = p.beacon(), (p.epoch, p.leader)
    assert p.ruling and p.leader == "w0"
    for fragment in (4, 2**32 - 1):
        value = dataclasses.replace(donor[0], fragment=fragment)
        commit = Commit(fragment, 9, ((0, 1.0),), ((0, 9),), "", ())
        inner = (commit, value, Rejected(fragment, 1, "late"), Aborted(fragment, 1, ""), Resend(fragment, 1))
        ours = [Under(*claim, message) for message in inner]
        handed = [Handover(*claim, value, None), Handover(*claim, donor[0], commit)]
        messages: list[Message] = [Ask(*claim, fragment), *ours, *handed]
        for message in messages:
            assert p.handle(Received("w0", message), p.now) == [], message
            assert p.beacon() == before
        candidate = peer("w1", ("w0",))
        candidate.epoch, candidate.leader = 9, "w1"
        candidate.handle(Received("w0", Handover(9, "w1", value, None)), 1.0)
        candidate.handle(Received("w0", Handover(9, "w1", donor[0], commit)), 1.0)
        assert candidate.taken == {}


def test_a_handover_that_is_damaged_is_not_taken() -> None:
    """What does not have the digest that it names leaves the candidate waiting, and asking again."""
    donor = leaderless(of()).run().peers[1].peer
    good = donor.holdings.hand_over(0)
    assert good is not None and good[1] is not None and good[0].version == good[1].version
    p = peer("w0", ("w1",))
    p.epoch, p.leader = 9, "w0"
    bad = (type(good[0])(0, good[0].version, "no digest", good[0].frames), good[1])
    p.handle(Received("w1", Handover(9, "w0", *bad)), 1.0)
    assert p.taken == {}
    p.handle(Received("w1", Handover(8, "w0", *good)), 1.1)
    assert p.taken == {}, "of an earlier epoch"
    p.handle(Received("w1", Handover(9, "w0", *good)), 1.2)
    assert set(p.taken) == {0}


def test_nothing_is_handed_to_who_is_not_followed() -> None:
    """A candidate of another epoch gets no answer."""
    donor = leaderless(of()).run().peers[1].peer
    asked = donor.handle(Received("w0", Ask(donor.epoch, donor.leader, 0)), donor.now)
    assert any(isinstance(getattr(a, "message", None), Handover) for a in asked)
    refused = donor.handle(Received("w2", Ask(donor.epoch + 1, "w2", 0)), donor.now)
    assert not any(isinstance(getattr(a, "message", None), Handover) for a in refused)


def test_a_value_taken_over_without_its_commit_is_sent_whole() -> None:
    """Nobody had every contributor's frame: whoever is behind gets value and outer state instead of the commit."""
    donor = leaderless(of()).run().peers[1].peer
    held = [donor.holdings.hand_over(p) for p in range(4)]
    values = {p: (pair[0], None) for p, pair in enumerate(held) if pair is not None}
    seats = [dataclasses.replace(seat, gone=False, finished="") for seat in donor.seats]
    heads = {seat.worker: donor.holdings.heads() for seat in seats}
    c, first = successor(
        donor.config, donor.replica.plan, seats, values, epoch=5, step=20, live=heads, now=0.0
    )
    assert c.epoch == 5 and c.versions() == tuple(values[p][0].version for p in range(4))
    assert not any(isinstance(a, Persist) and a.record["type"] == "commit" for a in first)
    said = c.handle(Received("w1", Heartbeat("w1", 1, Progress(), (0, 0, 0, 0))), 1.0)
    sent = [a.message for a in said if isinstance(a, Send) and isinstance(a.message, Snapshot)]
    assert [m.fragment for m in sent] == [0, 1, 2, 3] and all(len(m.frames) == 2 for m in sent)
    assert c.global_digest() == donor.replica.digest()
