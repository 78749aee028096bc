"""Network addresses as text: "host:port", with IPv6 hosts in brackets."""

from __future__ import annotations

import ipaddress


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of "host:port"; the host without brackets. ValueError saying what is wrong."""
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError(f"{text!r} is not host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    elif not set(host) <= _HOST_CHARACTERS:
        raise ValueError(f"{host!r} is not a host name (IPv6 addresses stand in brackets)")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"{port!r} is not a port: a number from 0 to 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")
