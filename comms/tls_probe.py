"""Why a coordinator cannot be talked to: what gRPC reports as "unavailable", in words, by one handshake of our own.

Blocking sockets, no gRPC. A refusal is a fact about keys that trying again does not change.
"""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from typing import Literal

from diloco.comms import tls
from diloco.comms.address import parse_address
from diloco.comms.tls import Identity, Keys
from diloco.errors import RefusedError

# The client preface of HTTP/2 with empty SETTINGS: any gRPC server answers with its own SETTINGS.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_HEADER = 9
_SETTINGS = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """`rtt_s`: of the TCP connection. `server` and `version` with TLS alone."""

    outcome: Literal["ok", "unreachable", "refused"]
    words: str
    rtt_s: float = 0.0
    server: Identity | None = None
    version: str = ""


def probe(address: str, keys: Keys | None, timeout_s: float = 5.0) -> Probe:
    """One handshake with the coordinator at "host:port", with `keys` or in the clear."""
    host, port = parse_address(address)
    began = time.monotonic()
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Probe("unreachable", f"the name {host!r} cannot be resolved: {error}")
    began = time.monotonic()
    try:
        connection = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        tried = ", ".join(sorted({str(info[4][0]) for info in infos}))
        return Probe("unreachable", f"nobody answers at {address} ({tried}): {error}")
    rtt = time.monotonic() - began
    with connection:
        return _in_clear(connection, address, rtt) if keys is None else _with(connection, keys, rtt)


def _in_clear(connection: socket.socket, address: str, rtt: float) -> Probe:
    try:
        connection.sendall(_PREFACE)
        if _is_http2(connection.recv(_HEADER)):
            return Probe("ok", "it answers without TLS", rtt)
    except OSError as error:
        if not isinstance(error, ConnectionError):
            return Probe("unreachable", f"{address} is silent: {error}", rtt)
    if _speaks_tls(address, connection.gettimeout()):
        return Probe(
            "refused",
            f"the coordinator at {address} asks for TLS: give the keys of this node with --keys",
            rtt,
        )
    return Probe("unreachable", f"something else than a coordinator listens at {address}", rtt)


def _speaks_tls(address: str, timeout_s: float | None) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is said over this connection
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(parse_address(address), timeout_s) as plain,
            context.wrap_socket(plain) as wrapped,
        ):
            return wrapped.version() is not None
    except OSError:
        return False


def _with(connection: socket.socket, keys: Keys, rtt: float) -> Probe:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=keys.authority.decode("ascii"))
    stem = keys.folder / keys.identity.role
    context.load_cert_chain(f"{stem}.crt", f"{stem}.key")
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=tls.COORDINATOR_NAME) as wrapped:
            shown = wrapped.getpeercert(binary_form=True) or b""
            server = tls.identity_of(ssl.DER_cert_to_PEM_cert(shown).encode("ascii"))
            version = wrapped.version() or ""
            wrapped.sendall(_PREFACE)
            if _is_http2(wrapped.recv(_HEADER)):
                return Probe("ok", f"{version}, both certificates accepted", rtt, server, version)
            return Probe(
                "refused",
                f"the coordinator hangs up on the certificate of the {keys.identity}: it trusts another CA, or by its "
                "clock this certificate is not valid",
                *(rtt, server, version),
            )
    except ssl.SSLCertVerificationError as error:
        return Probe("refused", _why_not_trusted(error), rtt)
    except RefusedError as error:
        return Probe("refused", f"the other side shows {error}", rtt)
    except ssl.SSLError as error:
        if error.reason in (
            "WRONG_VERSION_NUMBER",
            "HTTP_REQUEST",
            "UNKNOWN_PROTOCOL",
            "RECORD_LAYER_FAILURE",
        ):
            return Probe(
                "refused",
                "it speaks without TLS: start the coordinator with --keys, or this side without",
                rtt,
            )
        return Probe("unreachable", f"the TLS handshake fails: {error.reason or error}", rtt)
    except OSError as error:
        return Probe("unreachable", f"the connection breaks in the handshake: {error}", rtt)


def _why_not_trusted(error: ssl.SSLCertVerificationError) -> str:
    match error.verify_code:  # numbers of X509_STORE_CTX_get_error
        case 9:
            return "by the clock of this machine the coordinator's certificate is not valid yet: set the clocks right"
        case 10:
            return (
                "the coordinator's certificate has expired by the clock of this machine: renew it there with "
                "`diloco keys init --renew`, or set the clock right"
            )
        case 62 | 64:
            return "it shows the certificate of another node of the run, not the coordinator's"
        case _:
            return (
                "the coordinator's certificate is not from the CA of these keys: the keys are for another run, or "
                f"that is not the coordinator ({error.verify_message})"
            )


def _is_http2(header: bytes) -> bool:
    return len(header) == _HEADER and header[3] == _SETTINGS
