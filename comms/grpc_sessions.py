"""A worker's open session at the coordinator, and what is counted of it. Opening and ending them is in `grpc_server`."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.convert import parse, worker_from_proto
from diloco.comms.grpc_access import Context, NoSessionError
from diloco.comms.grpc_options import grpc
from diloco.comms.messages import FromWorker
from diloco.comms.tls import Identity

MAX_QUEUED = 10_000  # control messages to one worker; one that lets more pile up is cut off


@dataclass(slots=True)
class Session:
    worker: str
    nonce: int
    identity: Identity | None  # None without TLS
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)
    queue: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED))
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""
    code: grpc.StatusCode = grpc.StatusCode.ABORTED

    def end(self, why: str, code: grpc.StatusCode = grpc.StatusCode.ABORTED) -> None:
        if not self.ended.is_set():
            self.why, self.code = why, code
            self.ended.set()

    def put(self, raw: bytes) -> None:
        """Queue a message to the worker; one that does not read is cut off."""
        try:
            self.queue.put_nowait(raw)
        except asyncio.QueueFull:
            self.end(f"{MAX_QUEUED} messages are waiting: the worker does not read")

    def check(self) -> None:
        """Raises NoSessionError once it is over: transfers end with their session."""
        if self.ended.is_set():
            raise NoSessionError(f"the session is over: {self.why}")


@dataclass(slots=True)
class Counts:
    """Bytes of one worker: of frames, and of what gRPC was given for them, repeats and framing included."""

    frames_up: int = 0
    frames_down: int = 0
    wire_up: int = 0
    wire_down: int = 0


def read_message(raw: bytes) -> FromWorker:
    return worker_from_proto(parse(pb.SessionRequest, raw).message)


async def write_messages(session: Session, context: Context) -> None:
    while True:
        await context.write(await session.queue.get())
