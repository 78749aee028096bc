"""Questions to a coordinator, without joining its run."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diloco.comms.diloco_v1_pb2 import GetStatusRequest, GetStatusResponse
from diloco.comms.diloco_v1_pb2_grpc import CoordinatorServiceStub
from diloco.comms.grpc_options import grpc
from diloco.comms.tls import Keys, channel_credentials, channel_options, load_keys
from diloco.comms.tls_probe import probe
from diloco.errors import RefusedError

READERS = ("worker", "operator", "coordinator")  # whose keys may read the status
PROBE_BYTES = 1 << 20
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """Of the way to a coordinator: bytes per second, the round trip of a call, and its clock less ours, in seconds."""

    status: dict[str, Any]
    rtt_s: float
    up_bps: float
    down_bps: float
    skew_s: float


def reader_keys(folder: Path | None) -> Keys | None:
    """The keys in `folder` with which a status can be read. Raises EnvironmentProblem, RefusedError."""
    return None if folder is None else load_keys(folder, READERS, time.time())


def fetch_status(addresses: str, timeout_s: float = 5.0, keys: Path | None = None) -> dict[str, Any] | None:
    """The run's state from the first of "host:port[,host:port]" that answers; None if none does in `timeout_s`.

    Raises RefusedError where one answers but will not tell us, or is not who it should be.
    """
    own = reader_keys(keys)
    every = addresses.removeprefix("grpc://").split(",")
    for address in every:
        with _channel(address, own) as channel:
            try:
                answer = _ask(channel, GetStatusRequest(), timeout_s)
            except grpc.RpcError as error:
                _raise_if_refused(error)
                continue
            facts: dict[str, Any] = json.loads(answer.json)
            return facts
    for address in every:
        found = probe(address, own, timeout_s)
        if found.outcome == "refused":
            raise RefusedError(f"{address}: {found.words}")
    return None


def measure(address: str, keys: Keys | None, timeout_s: float = 20.0) -> LinkFacts | None:
    """Status, round trip, rates and clock of the coordinator at `address`; None if it does not answer.

    A rate is the best of a few transfers of 1 MiB with the round trip taken off: one connection's, from a cold start.
    Raises RefusedError.
    """
    with _channel(address, keys) as channel:
        try:
            first = _ask(channel, GetStatusRequest(), timeout_s)  # pays for the handshake
            rtt, skew = min(_round_trip(channel, timeout_s) for _ in range(5))
            up = max(_rate(channel, GetStatusRequest(padding=bytes(PROBE_BYTES)), rtt) for _ in range(ROUNDS))
            down = max(_rate(channel, GetStatusRequest(echo=PROBE_BYTES), rtt) for _ in range(ROUNDS))
        except grpc.RpcError as error:
            _raise_if_refused(error)
            return None
    return LinkFacts(json.loads(first.json), rtt, up, down, skew)


def _channel(address: str, keys: Keys | None) -> grpc.Channel:
    options: list[tuple[str, int | str]] = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    options += channel_options(keys)
    if keys is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, channel_credentials(keys), options=options)


def _ask(channel: grpc.Channel, request: GetStatusRequest, timeout_s: float) -> GetStatusResponse:
    stub: Any = CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
    return stub.GetStatus(request, timeout=timeout_s)  # type: ignore[no-any-return]


def _raise_if_refused(error: Any) -> None:
    if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        raise RefusedError(f"refused by the coordinator: {error.details()}") from None


def _round_trip(channel: grpc.Channel, timeout_s: float) -> tuple[float, float]:
    """(seconds, the other clock less ours): the shortest round trip has the best clock."""
    before, began = time.time(), time.monotonic()
    answer = _ask(channel, GetStatusRequest(), timeout_s)
    took = time.monotonic() - began
    return took, answer.time - (before + took / 2)


def _rate(channel: grpc.Channel, request: GetStatusRequest, rtt_s: float) -> float:
    began = time.monotonic()
    _ask(channel, request, 60.0)
    return PROBE_BYTES / max(1e-6, time.monotonic() - began - rtt_s)
