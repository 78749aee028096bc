"""Messages and configurations, damaged: as bytes, and field by field so that they still are messages."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as Proto

from diloco.comms import convert, convert_following
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms import messages as m
from diloco.comms.following import Ack, Beat, Follow, Turned
from diloco.comms.transfer import Ref
from diloco.config import RunConfig
from tests.fuzz.mutate import TELLING, damaged, other_text

Attempt = Callable[[Random], None]

REF = Ref("key", 9, 7)
WHO: tuple[str, int] = ("w0", 1)
FROM_WORKER: tuple[m.FromWorker, ...] = (
    m.Join("w0", 5, "run", "{}", "{}", (1, 2), 30),
    m.Heartbeat(*WHO, m.Progress(step=3, loss=2.5), (1, 2, 3), ((0, 1), (2, 5))),
    m.Contribution(*WHO, 1, 2, b"frame", 5),
    m.Initial(*WHO, 1, b"frame"),
    m.Skip(*WHO, 1, 2, "not finite"),
    m.Fetch(*WHO, 1, "ab" * 32),
    m.Leave(*WHO, "complete", m.Progress(), "ab" * 32, "[]"),
    m.Vote("w0", 5, "1/x", "standby"),
)
FROM_COORDINATOR: tuple[m.FromCoordinator, ...] = (
    m.Waiting(("w0", "w1"), 3),
    m.Welcome("w0", 1, 0, 2, 1, 30, (1, 2), True),
    m.Refused("run", "another run"),
    m.Commit(1, 17, ((0, 0.5), (1, 0.5)), ((0, 16), (1, 16)), "ab" * 32, ((0, b"f"), (1, b"g")), ((0, 9),)),
    m.Rejected(1, 2, "late"),
    m.Aborted(1, 2, "no quorum"),
    m.Resend(1, 2),
    m.Snapshot(1, 17, "ab" * 32, ((0, b"f"),), 16),
    m.Claim("1/x", "standby"),
)


def stirred(rng: Random, proto: Proto) -> None:
    """One field, however deep, gets a value that its type allows."""
    fields: list[Any] = list(proto.DESCRIPTOR.fields)
    given: list[Any] = [f for f, _ in proto.ListFields()]
    field = rng.choice(given) if given and rng.random() < 0.8 else rng.choice(fields)
    if field.is_repeated:
        several: Any = getattr(proto, field.name)
        if field.message_type is not None:
            if not several or rng.random() < 0.2:
                several.add()
            stirred(rng, rng.choice(several))
        elif several and rng.random() < 0.3:
            del several[0]
        else:
            several.extend([_scalar(rng, field)] * (1 if rng.random() < 0.99 else convert_limit(rng)))
    elif field.message_type is not None:
        stirred(rng, getattr(proto, field.name))
    else:
        setattr(proto, field.name, _scalar(rng, field))


def convert_limit(rng: Random) -> int:
    """Around what a list may hold."""
    return rng.choice((100, 5_000, 100_001))


def _scalar(rng: Random, field: FieldDescriptor) -> Any:
    number = rng.choice(TELLING) if rng.random() < 0.7 else rng.getrandbits(rng.choice((3, 8, 64)))
    match field.cpp_type:
        case field.CPPTYPE_INT32 | field.CPPTYPE_ENUM:
            return (number & 0xFFFFFFFF) - (1 << 31)
        case field.CPPTYPE_INT64:
            return (number & ((1 << 64) - 1)) - (1 << 63) if rng.random() < 0.5 else number & ((1 << 63) - 1)
        case field.CPPTYPE_UINT32:
            return number & 0xFFFFFFFF
        case field.CPPTYPE_UINT64:
            return number & ((1 << 64) - 1)
        case field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case field.CPPTYPE_FLOAT | field.CPPTYPE_DOUBLE:
            return rng.choice((0.0, -1.0, 1e30, -1e30, float("nan"), float("inf"), 0.5))
        case _:
            long = rng.choice((1_025, 17_000, 300_000, (3 << 20) + 1)) if rng.random() < 0.01 else 0
            text = "x" * long or rng.choice(("", "a", "w1", "complete", "é\x00\n", "[" * 500, "{}"))
            return text if field.type == field.TYPE_STRING else text.encode()


def garbled(rng: Random, proto: Proto) -> bytes:
    """The message with some fields stirred, or its bytes damaged, or another behind it."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    way = rng.random()
    if way < 0.6:
        for _ in range(rng.randint(1, 4)):
            stirred(rng, copy)
        return copy.SerializeToString()
    raw = copy.SerializeToString()
    return damaged(rng, raw) if way < 0.95 else raw + damaged(rng, raw)


def messages() -> Attempt:
    """Messages of both directions; one that is taken can be sent again and is then the same."""
    workers = [convert.worker_to_proto(one, REF if hasattr(one, "frame") else None) for one in FROM_WORKER]
    coordinators = [
        convert.coordinator_to_proto(one, [REF] * len(getattr(one, "frames", ()))) for one in FROM_COORDINATOR
    ]

    def from_worker(rng: Random) -> None:
        proto = convert.parse(pb.WorkerMessage, garbled(rng, rng.choice(workers)))
        ref = convert.worker_ref(proto)
        message = convert.worker_from_proto(proto, None if ref is None else b"frame")
        again = convert.worker_to_proto(message, ref).SerializeToString()
        back = convert.worker_from_proto(
            convert.parse(pb.WorkerMessage, again), None if ref is None else b"frame"
        )
        assert repr(back) == repr(message)  # NaN is not equal to itself

    def from_coordinator(rng: Random) -> None:
        proto = convert.parse(pb.CoordinatorMessage, garbled(rng, rng.choice(coordinators)))
        refs = convert.coordinator_refs(proto)
        bulk = [b"frame"] * len(refs)
        message = convert.coordinator_from_proto(proto, bulk)
        again = convert.coordinator_to_proto(message, refs).SerializeToString()
        assert convert.coordinator_from_proto(convert.parse(pb.CoordinatorMessage, again), bulk) == message

    return lambda rng: from_worker(rng) if rng.random() < 0.6 else from_coordinator(rng)


def following() -> Attempt:
    """What a coordinator and its standby say to each other, and the journal's records in it."""
    requests = [
        convert_following.request_to_proto(one)
        for one in (Follow("node", "run", "{}", 1, 3, "ab" * 32), Ack(7, True))
    ]
    record = (
        '{"type":"commit","fragment":0,"version":1,"epoch":1,"blobs":{"file":"00000003.bin","sizes":[4,5]}}'
    )
    responses = [
        convert_following.entry_to_proto(3, record, REF),
        convert_following.entry_to_proto(1, '{"type":"member","worker":"w0","nonce":5}', None),
        convert_following.response_to_proto(Beat(7)),
        convert_following.response_to_proto(Turned("ahead", "words", 3, "ab" * 32)),
    ]

    def attempt(rng: Random) -> None:
        if rng.random() < 0.4:
            raw = garbled(rng, rng.choice(requests))
            convert_following.request_from_proto(convert.parse(pb.FollowRequest, raw))
            return
        proto = convert.parse(pb.FollowResponse, garbled(rng, rng.choice(responses)))
        if proto.WhichOneof("response") != "entry":
            convert_following.response_from_proto(proto)
            return
        if rng.random() < 0.5:
            proto.entry.record = _damaged_text(rng, record)
        ref = convert_following.entry_ref(proto.entry)
        convert_following.entry_from_proto(proto.entry, None if ref is None else b"123456789")

    return attempt


def _damaged_text(rng: Random, text: str) -> str:
    return other_text(rng, text).encode("utf-8", "replace").decode("utf-8")


TOML = """
[run]
run_id = "r"
seed = 3
inner_steps_total = 100
[model]
preset = "nano"
[data]
source = "stdlib"
[optim]
kind = "adamw"
[schedule]
kind = "cosine"
warmup = 5
[outer]
lr = 0.7
momentum = 0.9
[stream]
H = 10
offsets = [0, 3]
overlap = "inner"
[codec]
up = "stat"
bits = 4
[codec.roles]
embed = "int8"
[fault]
quorum = 2
[robust]
kind = "trimmed"
rho = 1.5
[topology]
workers = 4
"""
SENSIBLE = ("1", "2", "0.5")
VALUES = (
    "1", "-1", "0", "0.5", "nan", "inf", "1e999", "true", '""', '"x"', "[]", "[1]", "{}", "{a=1}", "1979-05-27",
    "07:32:00", "1979-05-27T07:32:00Z", "9" * 400, "9" * 5000, "0x10", "[" * 200 + "]" * 200, '"""\n"""', "'a'",
)  # fmt: skip


def configurations() -> Attempt:
    """A configuration with another value, another key, a line gone or bytes damaged; and one override."""
    lines = TOML.strip().splitlines()

    def attempt(rng: Random) -> None:
        changed = list(lines)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(changed))
            key, _, value = changed[at].partition(" = ")
            match rng.randrange(5):
                case 0 | 1 if value:
                    changed[at] = f"{key} = {rng.choice(VALUES if rng.random() < 0.6 else SENSIBLE)}"
                case 2 if value:
                    changed[at] = f"{rng.choice(('x', 'H', 'kind', 'a.b', '', 'run'))} = {value}"
                case 3:
                    changed[at] = damaged(rng, changed[at].encode()).decode("utf-8", "replace")
                case _:
                    changed.insert(at, rng.choice(lines))
        overrides: tuple[str, ...] = ()
        if rng.random() < 0.3:
            key = rng.choice(
                ("stream.H", "codec.roles.embed", "run", "run.seed", "a.b", "", "stream.offsets")
            )
            overrides = (f"{key}={rng.choice(VALUES)}",)
        RunConfig.from_toml("\n".join(changed), overrides)

    return attempt
