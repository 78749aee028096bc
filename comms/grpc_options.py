"""How gRPC is set up, on both sides: the one place that imports it first, its channel options, our method names.

Reasons for the numbers: gRPC's defaults never notice a vanished peer, a client with keepalive is thrown out by
a server without, and a frozen process answers at TCP level, so the ping timeout is set as well: a dead peer is
found in about 6 s. Only GetStatus may be retried by gRPC itself: its retries on streams lose messages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

# With fork support on, a fork (a DataLoader worker) of a process with open channels crashes. Both are read at import.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# The core writes to stderr about every peer that goes away; what matters reaches us as exceptions.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from diloco.comms.chunks import MAX_MESSAGE_BYTES

__all__ = ["aio", "grpc", "health_pb2", "health_pb2_grpc"]

COORDINATOR_SERVICE = "diloco.v1.CoordinatorService"
TRANSFER_SERVICE = "diloco.v1.TransferService"
FOLLOW_SERVICE = "diloco.v1.FollowService"
SESSION = f"/{COORDINATOR_SERVICE}/Session"
GET_STATUS = f"/{COORDINATOR_SERVICE}/GetStatus"
BEGIN_UPLOAD = f"/{TRANSFER_SERVICE}/BeginUpload"
UPLOAD = f"/{TRANSFER_SERVICE}/Upload"
COMMIT_UPLOAD = f"/{TRANSFER_SERVICE}/CommitUpload"
DOWNLOAD = f"/{TRANSFER_SERVICE}/Download"
FOLLOW = f"/{FOLLOW_SERVICE}/Follow"
FETCH_BLOB = f"/{FOLLOW_SERVICE}/FetchBlob"

STALL_S = 30.0  # a stream on which no chunk moves for so long is given up
UNARY_S = 10.0  # the deadline of unary calls

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": COORDINATOR_SERVICE, "method": "GetStatus"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.5},
}

_COMMON: list[tuple[str, int | str]] = [
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
MAX_CONNECTIONS = "grpc.max_allowed_incoming_connections"
SERVER_OPTIONS = [
    *_COMMON,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a second coordinator on the same port must fail, not share it
    ("grpc.max_concurrent_streams", 256),
    ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing is cut off
    ("grpc.max_metadata_size", 8 << 10),
]
CLIENT_OPTIONS = [
    *_COMMON,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),  # each channel has a connection of its own
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
]


def message_or_end(read: object) -> bytes | None:
    """What `call.read()` gave: a message, or None at the end of the stream."""
    return read if isinstance(read, bytes) else None


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None, options: Sequence[tuple[str, str]] = ()
) -> aio.Channel:
    """`options` on top of CLIENT_OPTIONS."""
    if credentials is None:
        return aio.insecure_channel(address, options=[*CLIENT_OPTIONS, *options])
    return aio.secure_channel(address, credentials, options=[*CLIENT_OPTIONS, *options])


async def add_health(server: aio.Server) -> None:
    """Answer grpc.health.v1: this server and both of our services are serving."""
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    for service in ("", COORDINATOR_SERVICE, TRANSFER_SERVICE):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
