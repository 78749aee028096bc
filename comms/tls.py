"""Certificates of a run: who a peer is, whether its keys are good, and the gRPC credentials made of them.

Making and revoking certificates is in `diloco.keys`. Nothing here opens a socket.

Our own peers speak TLS 1.3 to each other. That the coordinator speaks nothing older to strangers is set in `diloco.cli`.
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from diloco.comms.grpc_options import grpc
from diloco.errors import EnvironmentProblem, RefusedError

CA = "ca"
ROLES = ("worker", "operator", "coordinator")
URI = "spiffe://diloco/"
# In the certificates of coordinators alone, whatever address they are reached at: clients insist on it, so that no
# other node of the run can pass for one, and tunnels, NAT and a move to another host change nothing.
COORDINATOR_NAME = "coordinator.diloco.internal"
REVOKED = "revoked.json"
SOON_DAYS = 30  # certificates that end earlier are worth a word


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate of this run's CA speaks for. `begins` and `ends` in seconds since 1970."""

    role: str
    name: str
    serial: int
    begins: float
    ends: float

    def __str__(self) -> str:
        return f"{self.role} {self.name!r}" if self.name else self.role


@dataclass(frozen=True, slots=True)
class Keys:
    """One node's keys, PEM, as read from `folder`."""

    folder: Path
    identity: Identity
    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def uri_of(role: str, name: str) -> str:
    return f"{URI}{role}/{name}" if name else f"{URI}{role}"


@functools.lru_cache(maxsize=1024)  # asked for with every call of a peer
def identity_of(certificate: bytes) -> Identity:
    """Whom a PEM certificate names. Raises RefusedError; signature and dates are not looked at."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise RefusedError(f"a certificate that names nobody of this project: {error}") from None
    if len(uris) != 1 or not uris[0].startswith(URI):
        raise RefusedError(f"a certificate that names {uris}, not one {URI}ROLE/NAME")
    role, _, name = uris[0].removeprefix(URI).partition("/")
    if role not in ROLES or bool(name) == (role == "coordinator"):
        raise RefusedError(f"a certificate that names {uris[0]!r}, which is no role of a run")
    begins, ends = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    return Identity(role, name, parsed.serial_number, begins.timestamp(), ends.timestamp())


def load_keys(folder: Path, roles: Sequence[str], now: float) -> Keys:
    """The first of ROLE.crt and ROLE.key in `folder`, checked against its ca.crt and the time `now`.

    Raises EnvironmentProblem for files that are not there or not readable, RefusedError for keys with which no
    peer would have us: expired, not yet valid, of another CA, not belonging together, or readable by everybody.
    """
    role = next((role for role in roles if (folder / f"{role}.crt").exists()), None)
    if role is None:
        wanted = " or ".join(f"{role}.crt" for role in roles)
        raise EnvironmentProblem(
            f"keys: no {wanted} in {str(folder)!r}; make keys with `diloco keys` and give their folder as --keys"
        )
    authority, certificate = _read(folder / f"{CA}.crt"), _read(folder / f"{role}.crt")
    key = _read(folder / f"{role}.key", secret=True)
    identity = identity_of(certificate)
    if identity.role != role:
        raise RefusedError(f"keys: {folder / role!s}.crt belongs to the {identity}")
    check_dates(identity, now)
    _check_pair(folder / f"{role}.crt", certificate, key)
    _check_issuer(folder / f"{role}.crt", certificate, authority)
    return Keys(folder, identity, authority, certificate, key)


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        if secret and os.stat(path).st_mode & 0o007:
            raise RefusedError(
                f"keys: everybody on this machine may read {str(path)!r}: chmod 600 it, and renew it if others did"
            )
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(f"keys: cannot read {str(path)!r}: {error.strerror}") from None


def check_dates(identity: Identity, now: float) -> None:
    """Raises RefusedError outside the certificate's time."""
    if now < identity.begins:
        raise RefusedError(
            f"the certificate of the {identity} is valid from {day(identity.begins)} on, and the clock of this machine "
            f"says {day(now)}: set the clock (timedatectl, chrony)"
        )
    if now > identity.ends:
        raise RefusedError(
            f"the certificate of the {identity} has expired on {day(identity.ends)} (it is {day(now)} here): renew it "
            f"with `diloco keys {_renewal(identity)} --renew --keys DIR`"
        )


def _renewal(identity: Identity) -> str:
    return "init" if identity.role == "coordinator" else f"{identity.role} {identity.name}"


def _check_pair(path: Path, certificate: bytes, key: bytes) -> None:
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"keys: {str(path.with_suffix('.key'))!r} holds no private key: {error}") from None
    if private.public_key() != x509.load_pem_x509_certificate(certificate).public_key():
        raise RefusedError(f"keys: {str(path)!r} and its .key do not belong together: copy both again")


def _check_issuer(path: Path, certificate: bytes, authority: bytes) -> None:
    parsed = x509.load_pem_x509_certificate(certificate)
    try:
        issuers = x509.load_pem_x509_certificates(authority)
    except ValueError as error:
        raise RefusedError(f"keys: {str(path.with_name('ca.crt'))!r} holds no certificate: {error}") from None
    for issuer in issuers:
        try:
            parsed.verify_directly_issued_by(issuer)
            return
        except (ValueError, TypeError, InvalidSignature):
            continue
    raise RefusedError(
        f"keys: {str(path)!r} was not issued by the CA in ca.crt beside it: copy the whole folder again"
    )


def day(seconds: float) -> str:
    """A moment for people, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def channel_options(keys: Keys | None) -> list[tuple[str, str]]:
    """Of a channel with these credentials: the name that the other side has to have."""
    return [] if keys is None else [("grpc.ssl_target_name_override", COORDINATOR_NAME)]


def channel_credentials(keys: Keys) -> grpc.ChannelCredentials:
    """For a client that shows its certificate and trusts this CA alone."""
    return grpc.ssl_channel_credentials(keys.authority, keys.key, keys.certificate)


def server_credentials(keys: Keys) -> grpc.ServerCredentials:
    """For a coordinator that lets in holders of certificates of its CA; renewed files are used without a restart."""
    renewals: Any = _Renewals(keys)  # may answer None, which the types of gRPC do not know
    return grpc.dynamic_ssl_server_credentials(
        _configuration(keys), renewals, require_client_authentication=True
    )


def _configuration(keys: Keys) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(keys.key, keys.certificate)], keys.authority)


class _Renewals:
    """Called at each handshake: the new configuration when the files have changed and are good, else None."""

    def __init__(self, keys: Keys) -> None:
        self._folder, self._role = keys.folder, keys.identity.role
        self._seen = self._stamp()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            now = datetime.datetime.now(datetime.UTC).timestamp()
            return _configuration(load_keys(self._folder, [self._role], now))
        except (EnvironmentProblem, RefusedError):
            return None  # half copied: the next change is looked at again

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        return tuple(
            stamp_of(self._folder / name) for name in ("ca.crt", f"{self._role}.crt", f"{self._role}.key")
        )


def stamp_of(path: Path) -> tuple[int, int]:
    """Changes when the file does; (0, 0) when there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino
