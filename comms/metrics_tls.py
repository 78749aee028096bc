"""The metrics page over mutual TLS. What is on the page is in `metrics`.

The library's own server shakes hands on the thread that accepts: one silent peer would stop all scrapes, and the
end of the process with them. Here each connection shakes hands on its own thread, and has a time limit.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from diloco.comms.tls import load_keys

QUIET_S = 10.0
SERVERS = ("coordinator", "worker")


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that breaks off, or has no certificate, is nothing to print a traceback for."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = QUIET_S

    def log_message(self, format: str, *args: Any) -> None:
        pass


def start_tls_server(
    port: int, host: str, registry: CollectorRegistry, keys: Path
) -> tuple[WSGIServer, threading.Thread]:
    """Serve `registry` to holders of certificates of the CA in `keys`.

    Raises OSError if the address cannot be used, EnvironmentProblem and RefusedError for the keys.
    """
    mine = load_keys(keys, SERVERS, time.time())
    stem = keys / mine.identity.role
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(f"{stem}.crt", f"{stem}.key")
    context.load_verify_locations(cafile=keys / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    kind = _Server6 if ":" in host else _Server
    server = make_server(host, port, make_wsgi_app(registry), kind, _Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, name="diloco-metrics", daemon=True)
    thread.start()
    return server, thread
