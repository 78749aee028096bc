"""From a URL to a connection: the one way in which a worker finds its coordinator."""

from __future__ import annotations

from pathlib import Path

from diloco.comms.address import parse_address
from diloco.comms.link import Link, Relay
from diloco.comms.machine import Connection
from diloco.errors import ConfigError, DilocoError


def connect(
    url: str, *, channels: int = 1, link: Link | None = None, keys: str | Path | None = None
) -> Connection:
    """A connection to "grpc://host:port[,host:port]" or "host:port"; it connects, and reconnects, by itself.

    With several addresses the next one is tried when one does not answer. `channels` is the number of TCP connections
    that share the chunks of an object: 8 pay on a lossy path, 4 on a long fast one. `link` puts an emulated slow link
    in between (see `diloco.comms.link`). `keys` is this worker's folder from `diloco keys worker`: mutual TLS.
    Raises ConfigError; for unusable keys EnvironmentProblem (not there) or RefusedError (expired, wrong).
    """
    scheme, separator, rest = url.rpartition("://")
    if separator and scheme != "grpc":
        raise ConfigError(f"coordinator: {url!r} has the scheme {scheme!r}; write grpc://host:port")
    addresses = rest.split(",")
    for address in addresses:
        try:
            _, port = parse_address(address)
        except ValueError as error:
            raise ConfigError(f"coordinator: {url!r}: {error}; write grpc://host:port") from error
        if port == 0:
            raise ConfigError(f"coordinator: {url!r}: port 0 cannot be connected to")
    from diloco.comms.grpc_client import GrpcConnection  # keeps gRPC out of processes that never connect

    folder = Path(keys) if keys is not None else None
    if link is None:
        return GrpcConnection(addresses, channels=channels, keys=folder)
    relays = [Relay(*parse_address(address), link) for address in addresses]
    shaped = [f"127.0.0.1:{relay.port}" for relay in relays]
    closers = [relay.close for relay in relays]
    try:
        return GrpcConnection(shaped, channels=channels, keys=folder, on_close=closers)
    except DilocoError:
        for close in closers:
            close()
        raise
