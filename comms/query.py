"""One question to a coordinator, without joining its run."""

from __future__ import annotations

import json
from typing import Any

from diloco.comms import grpc_options as options
from diloco.comms.diloco_v1_pb2 import GetStatusRequest
from diloco.comms.diloco_v1_pb2_grpc import CoordinatorServiceStub

import grpc  # after grpc_options, which sets the environment gRPC reads on import


def fetch_status(addresses: str, timeout_s: float = 5.0) -> dict[str, Any] | None:
    """The run's state from the first of "host:port[,host:port]" that answers; None if none does in `timeout_s`."""
    for address in addresses.removeprefix("grpc://").split(","):
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                answer = CoordinatorServiceStub(channel).GetStatus(GetStatusRequest(), timeout=timeout_s)
            except grpc.RpcError:
                continue
            facts: dict[str, Any] = json.loads(answer.json)
            return facts
    return None
