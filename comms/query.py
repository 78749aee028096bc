"""One question to a coordinator, without joining its run."""

from __future__ import annotations

import json
from typing import Any

import grpc

from diloco.comms.diloco_v1_pb2 import GetStatusRequest
from diloco.comms.diloco_v1_pb2_grpc import CoordinatorServiceStub


def fetch_status(addresses: str, timeout_s: float = 5.0) -> dict[str, Any] | None:
    """The run's state from the first of "host:port[,host:port]" that answers; None if none does in `timeout_s`."""
    for address in addresses.removeprefix("grpc://").split(","):
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                answer = stub.GetStatus(GetStatusRequest(), timeout=timeout_s)
            except grpc.RpcError:
                continue
            facts: dict[str, Any] = json.loads(answer.json)
            return facts
    return None
