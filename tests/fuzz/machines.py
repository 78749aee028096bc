"""Damaged messages in front of the machines that decide, and damaged journals in front of those who repeat them.

A machine has a state, so inputs come in blocks of `BLOCK`: each begins with a fresh one.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from diloco.comms import convert, convert_following, frame
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import messages as m
from diloco.comms.following import PRIMARY, STANDBY, Ack, Beat, Follow, Reached, Turned
from diloco.comms.machine import Action, Compute, Computed, Persist, Received, Send, Stop, Tick
from diloco.comms.transfer import Ref
from diloco.config import RunConfig
from diloco.coordinator.journal import Journal
from diloco.coordinator.lead import Lead
from diloco.coordinator.replay import replay
from diloco.coordinator.standby import Standby
from diloco.coordinator.state import Coordinator
from diloco.coordinator.status import status
from diloco.errors import DilocoError
from tests.fuzz.mutate import damaged, edited, other_json, other_text
from tests.fuzz.wire import NORM_AT, assembled
from tests.fuzz.words import garbled
from tests.toy import Cluster, config

Attempt = Callable[[Random], None]
BLOCK = 200
REF = Ref("key", 9, 7)
EVE = "w2"


def midway(c: RunConfig, until_s: float) -> Cluster:
    """A run of three in its middle, frozen."""
    cluster = Cluster(c, flavours=(0, 1, 2))
    cluster.sim.run(1000.0, lambda: cluster.sim.now >= until_s)
    return cluster


def sendable(actions: Sequence[Action]) -> None:
    """What a driver would do: every message has a protobuf form, every record a line."""
    for action in actions:
        if isinstance(action, Persist):
            json.dumps(action.record, allow_nan=False).encode()
        elif isinstance(action, Send) and isinstance(action.message, m.FromCoordinator):
            refs = [REF] * len(getattr(action.message, "frames", ()))
            convert.coordinator_to_proto(action.message, refs).SerializeToString()
        elif isinstance(action, Send) and isinstance(action.message, Beat | Turned):
            convert_following.response_to_proto(action.message).SerializeToString()
        elif isinstance(action, Send) and isinstance(action.message, Follow | Ack):
            convert_following.request_to_proto(action.message).SerializeToString()


def coordinators() -> Attempt:
    """A running coordinator hears one worker out of its mind; the worker's name is its own, as the transport sees to it."""
    modes = [
        {},
        {"stream": {"overlap": "async"}},
        {"robust": {"kind": "norm_outlier"}, "codec": {"down": "relay"}},
    ]
    state: dict[str, Any] = {"left": 0, "built": 0}

    def build() -> None:
        c = config(topology={"workers": 3}, **modes[state["built"] % len(modes)])
        cluster = midway(c, 8.5)
        lead = Lead(cluster.coordinator)
        member = cluster.coordinator.members[EVE]
        replica = cluster.workers[2].replica
        whole = {
            p: frame.encode_frame(
                cluster.coordinator.codecs[p], 0.01 * ledger.shard.params, fragment=p, round=0,
                base_version=ledger.shard.version, run_id=cluster.coordinator.run_hash, worker=member.index,
                incarnation=member.incarnation, steps=5, tokens=50,
            )
            for p, ledger in cluster.coordinator.ledgers.items()
        }  # fmt: skip
        join = m.Join(
            EVE, member.nonce, c.run.run_id, replica.plan.describe(), cluster.coordinator.settings, (), 0
        )
        state.update(lead=lead, cluster=cluster, whole=whole, join=join, now=cluster.sim.now, left=BLOCK)
        state["built"] += 1

    def said(rng: Random) -> m.FromWorker:
        c: Coordinator = state["lead"].coordinator
        who = (EVE, c.members[EVE].incarnation)
        p = rng.choice(list(c.ledgers))
        number = (
            c.rounds[p].answers and next(iter(c.rounds[p].answers.values())).round if p in c.rounds else 2
        )
        way = rng.random()
        if way < 0.45:
            head, payload = state["whole"][p][: frame.HEADER_SIZE], state["whole"][p][frame.HEADER_SIZE :]
            number = int(number or 0) + rng.choice((0, 0, 0, 1, -1, 1 << 40))
            version = c.ledgers[p].shard.version
            head = (
                head[:12]
                + (number % (1 << 64)).to_bytes(8, "little")
                + version.to_bytes(8, "little")
                + head[28:]
            )
            head = head[:40] + who[1].to_bytes(4, "little") + head[44:]
            if rng.random() < 0.5:
                payload = edited(rng, payload)
                try:
                    norm = c.codecs[p].norm(payload, len(payload) // 4)
                    head = head[:NORM_AT] + struct.pack("<f", norm) + head[NORM_AT + 4 :]
                except (DilocoError, OverflowError):
                    pass
            whole = assembled(edited(rng, head, 2) if rng.random() < 0.3 else head, payload)
            return m.Contribution(*who, p, number, damaged(rng, whole) if rng.random() < 0.1 else whole)
        progress = m.Progress(step=9, loss=2.0, steps_per_s=1.0)
        if way < 0.65:
            return m.Heartbeat(*who, progress, c.versions(), ((p, int(number or 0)),))
        if way < 0.75:
            return m.Skip(*who, p, int(number or 0), "why")
        if way < 0.82:
            return m.Fetch(*who, p, "ab" * 32)
        if way < 0.95:
            join: m.Join = state["join"]
            plan = other_text(rng, join.plan) if rng.random() < 0.5 else join.plan
            settings = other_text(rng, join.settings) if rng.random() < 0.3 else join.settings
            plan, settings = (text.encode("utf-8", "replace").decode() for text in (plan, settings))
            nonce = join.nonce + rng.choice((0, 0, 1))
            return m.Join(EVE, nonce, join.run_id, plan, settings, c.versions(), 3)
        if way < 0.97:
            return m.Initial(*who, p, state["whole"][p])
        if way < 0.99:
            return m.Vote(EVE, 102, "1/x", "standby")
        return m.Leave(*who, rng.choice(("complete", "caught")), progress, "ab" * 32, "[]")

    def attempt(rng: Random) -> None:
        if state["left"] <= 0:
            build()
        state["left"] -= 1
        lead: Lead = state["lead"]
        state["now"] += rng.choice((0.0, 0.01, 0.3))
        message = said(rng)
        if rng.random() < 0.6:
            ref = REF if isinstance(message, m.Contribution | m.Initial) else None
            raw = garbled(rng, convert.worker_to_proto(message, ref))
            message = convert.worker_from_proto(
                convert.parse(pb.WorkerMessage, raw), getattr(message, "frame", b"")
            )
        if message.worker != EVE:
            return  # the transport ends such a session
        sendable(lead.handle(Received(EVE, message), state["now"]))
        if rng.random() < 0.1:
            sendable(lead.handle(Tick(), state["now"]))
        lead.check()
        json.dumps(status(lead.coordinator, state["now"], 1.0), allow_nan=False)

    return attempt


def _journal_of_a_run() -> tuple[RunConfig, list[tuple[dict[str, Any], list[bytes]]]]:
    c = config(topology={"workers": 3, "checkpoint_every_commits": 3})
    cluster = midway(c, 14.0)
    bond = {
        "type": "standby",
        "attached": True,
        "node": "node",
        "epoch": 1,
        "witnesses": [["w0", 100], ["w1", 101]],
    }
    records = [(record, [bytes(blob) for blob in blobs]) for record, blobs in cluster.disk.records]
    return c, [*records[:4], (bond, []), *records[4:]]


def standbys() -> Attempt:
    """A standby copies a journal of which now and then a record is damaged; and a coordinator hears a mad standby."""
    c, records = _journal_of_a_run()
    state: dict[str, Any] = {"left": 0}

    def build() -> None:
        kept: list[Any] = []
        machine = Standby(c, "node", [], lambda n: kept[:n], 0.0)
        lead = Lead(midway(c, 8.5).coordinator)
        state.update(left=BLOCK, machine=machine, kept=kept, now=0.0, lead=lead)
        perform(machine.handle(Received(PRIMARY, Reached()), 0.0))

    def perform(actions: Sequence[Action]) -> None:
        sendable(actions)
        for action in actions:
            if isinstance(action, Persist):
                state["kept"].append((dict(action.record), list(action.blobs)))
            elif isinstance(action, Compute):
                try:
                    result = action.job()
                except DilocoError as error:
                    raise AssertionError("a job keeps its error for the machine") from error
                perform(state["machine"].handle(Computed(result), state["now"]))
            elif isinstance(action, Stop):
                assert action.error is None or isinstance(action.error, DilocoError)
                state["left"] = 0

    def attempt(rng: Random) -> None:
        if state["left"] <= 0:
            build()
        state["left"] -= 1
        state["now"] += 0.01
        if rng.random() < 0.3:
            said = rng.choice(
                (Follow("node", "run", state["lead"].coordinator.settings, 1, 0, ""), Ack(3, True))
            )
            raw = garbled(rng, convert_following.request_to_proto(said))
            request = convert_following.request_from_proto(convert.parse(pb.FollowRequest, raw))
            sendable(state["lead"].handle(Received(STANDBY, request), 10.0 + state["now"]))
            return
        if rng.random() < 0.1:
            perform(state["machine"].handle(Received(PRIMARY, Beat(len(state["kept"]))), state["now"]))
        index = len(state["kept"])
        record, blobs = records[index % len(records)]
        whole = b"".join(blobs)
        named = (
            {**record, "blobs": {"file": "00000001.bin", "sizes": [len(b) for b in blobs]}}
            if blobs
            else record
        )
        line = json.dumps(named)
        if rng.random() < 0.15:
            line = other_text(rng, line).encode("utf-8", "replace").decode()
        if blobs and rng.random() < 0.05:
            whole = edited(rng, whole)
        proto = convert_following.entry_to_proto(index, line, REF if blobs and rng.random() < 0.97 else None)
        if rng.random() < 0.1:
            proto = convert.parse(pb.FollowResponse, garbled(rng, proto))
        if proto.WhichOneof("response") == "entry":
            entry = convert_following.entry_from_proto(
                proto.entry, whole if proto.entry.HasField("blob") else None
            )
            perform(state["machine"].handle(Received(PRIMARY, entry), state["now"]))
        else:
            message = convert_following.response_from_proto(proto)
            perform(state["machine"].handle(Received(PRIMARY, message), state["now"]))

    return attempt


def journals() -> Attempt:
    """A journal on disk with damage in its lines or its bulk data is read, and repeated if it can be read."""
    c, records = _journal_of_a_run()
    folder = Path(tempfile.mkdtemp(prefix="diloco-fuzz-"))
    journal = Journal(folder / "good", fsync=False)
    for record, blobs in records:
        journal.append(Persist(record, blobs))
    journal.close()
    good = (folder / "good" / "journal.jsonl").read_bytes()
    files = {path.name: path.read_bytes() for path in (folder / "good" / "blobs").iterdir()}
    bad = folder / "bad"
    shutil.copytree(folder / "good", bad)

    def attempt(rng: Random) -> None:
        lines, touched = good.splitlines(keepends=True), None
        way = rng.random()
        if way < 0.65:
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(other_json(rng, json.loads(lines[at]))).encode() + b"\n"
        elif way < 0.8:
            at = rng.randrange(len(lines))
            lines[at] = damaged(rng, lines[at])
        else:
            touched = rng.choice(list(files))
            new = damaged(rng, files[touched])
            if rng.random() < 0.5:  # as a whole frame whose checksum is right
                new = assembled(edited(rng, new[:80].ljust(80, b"\0"), 2), edited(rng, new[80:]))
            (bad / "blobs" / touched).write_bytes(new)
        (bad / "journal.jsonl").write_bytes(b"".join(lines))
        try:
            opened = Journal(bad, fsync=False)
            try:
                replay(Coordinator(c), opened.read(), 0.0)
            finally:
                opened.close()
        finally:
            if touched is not None:
                (bad / "blobs" / touched).write_bytes(files[touched])

    return attempt
