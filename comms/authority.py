"""A run's own certificate authority in a folder: issues, renews, lists and revokes. Nobody else is asked.

    DIR/ca.crt ca.key                 the authority; ca.key is needed to issue, not to run: keep it offline
    DIR/coordinator.crt .key          what the coordinator shows
    DIR/revoked.json                  what it refuses
    DIR/issued/SERIAL.crt             every certificate ever issued
    DIR/workers/NAME/, operators/NAME/  what that node needs, and nothing more: ca.crt, worker.crt, worker.key

Folders have mode 0700, files 0600. Keys are ECDSA P-256: the TLS library inside gRPC refuses Ed25519.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from diloco.comms.revocation import read_revoked
from diloco.comms.tls import CA, COORDINATOR_NAME, REVOKED, Identity, identity_of, uri_of
from diloco.errors import ConfigError, EnvironmentProblem

CA_DAYS = 3650
BACKDATED = datetime.timedelta(hours=1)  # clocks of different sites differ
OWN_HOSTS = (COORDINATOR_NAME, "localhost", "127.0.0.1", "::1")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Issued:
    identity: Identity
    revoked: bool


class Authority:
    """The authority in `folder`. `now` is the time of day of every certificate made."""

    def __init__(self, folder: Path, now: datetime.datetime) -> None:
        self.folder, self._now = folder, now

    def create(self, hosts: Sequence[str], days: int) -> None:
        """A new authority and its coordinator's certificate. Raises ConfigError if there is one already."""
        if (self.folder / f"{CA}.crt").exists():
            raise ConfigError(
                f"keys: {str(self.folder)!r} has an authority already; a new one would shut out every worker. "
                "Renew the coordinator's certificate with --renew, or choose another folder"
            )
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"keys: {str(self.folder)!r} is not empty; choose a folder for keys alone")
        _folder(self.folder)
        _folder(self.folder / "issued")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(f"diloco CA {os.urandom(4).hex()}", key, None, CA_DAYS, [], [])
        _write(self.folder / f"{CA}.key", _private(key))
        _write(self.folder / f"{CA}.crt", _pem(certificate))
        _write(self.folder / REVOKED, b'{"revoked": []}\n')
        self.coordinator(hosts, days)

    def coordinator(self, hosts: Sequence[str], days: int, *, renew: bool = False) -> None:
        """The coordinator's certificate for this machine and `hosts`; a renewed one keeps the hosts of the old one."""
        path = self.folder / "coordinator.crt"
        known = _hosts_of(path.read_bytes()) if renew and path.exists() else []
        every = list(dict.fromkeys([*OWN_HOSTS, *known, *hosts]))
        self._issue(self.folder, "coordinator", "", every, days, renew)

    def member(self, role: str, name: str, hosts: Sequence[str], days: int, *, renew: bool = False) -> Path:
        """A folder with the keys of a worker or operator. With `hosts` it may serve metrics over TLS there;
        a renewed one keeps the hosts of the old one."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"keys: {name!r} is no name: letters, digits, '.', '_' and '-', at most 64")
        folder = self.folder / f"{role}s" / name
        if folder.exists() and not renew:
            raise ConfigError(
                f"keys: {role} {name!r} has keys in {str(folder)!r}; replace them with --renew (the old certificate "
                "stays good until it is revoked or expires)"
            )
        self._issuer()  # before anything is written
        if COORDINATOR_NAME in (host.lower().removeprefix("*.") for host in hosts):
            raise ConfigError(f"keys: {COORDINATOR_NAME} is for coordinators alone")
        path = folder / f"{role}.crt"
        known = _hosts_of(path.read_bytes()) if path.exists() else []
        hosts = list(dict.fromkeys([*known, *hosts]))
        _folder(folder.parent)
        _folder(folder)
        self._issue(folder, role, name, hosts, days, renew)
        _write(folder / f"{CA}.crt", (self.folder / f"{CA}.crt").read_bytes(), replace=renew)
        return folder

    def issued(self) -> list[Issued]:
        """Every certificate, by role, name and age."""
        revoked = read_revoked(self.folder / REVOKED)
        found = [identity_of(path.read_bytes()) for path in (self.folder / "issued").glob("*.crt")]
        found.sort(key=lambda i: (i.role, i.name, i.begins, i.serial))
        return [Issued(identity, identity.serial in revoked) for identity in found]

    def revoke(self, name: str) -> list[Identity]:
        """Revoke all certificates of the worker or operator `name`; returns those that were good until now."""
        mine = [i for i in self.issued() if i.identity.name == name]
        if not mine:
            known = ", ".join(sorted({i.identity.name for i in self.issued() if i.identity.name})) or "nobody"
            raise ConfigError(f"keys: {name!r} has no certificate here; {known} has")
        fresh = [i.identity for i in mine if not i.revoked]
        path = self.folder / REVOKED
        entries = [
            {"serial": f"{i.identity.serial:x}", "identity": uri_of(i.identity.role, i.identity.name)}
            for i in self.issued()
            if i.revoked or i.identity in fresh
        ]
        _write(path, json.dumps({"revoked": entries}, indent=1).encode() + b"\n", replace=True)
        return fresh

    def _issue(
        self, folder: Path, role: str, name: str, hosts: Sequence[str], days: int, renew: bool
    ) -> None:
        issuer = self._issuer()
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if hosts:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names = [x509.UniformResourceIdentifier(uri_of(role, name)), *map(_host, hosts)]
        certificate = self._sign(name or role, key, issuer, days, names, usages)
        _write(self.folder / "issued" / f"{certificate.serial_number:x}.crt", _pem(certificate))
        # The key first: a reader in between finds a pair that does not fit, and waits for the next change.
        _write(folder / f"{role}.key", _private(key), replace=renew)
        _write(folder / f"{role}.crt", _pem(certificate), replace=renew)

    def _issuer(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        try:
            certificate = x509.load_pem_x509_certificate((self.folder / f"{CA}.crt").read_bytes())
            raw = (self.folder / f"{CA}.key").read_bytes()
            key = serialization.load_pem_private_key(raw, None)
        except OSError as error:
            raise EnvironmentProblem(
                f"keys: {error.filename!r}: {error.strerror}; begin with `diloco keys init`, or bring ca.key back"
            ) from None
        except (ValueError, TypeError) as error:
            raise EnvironmentProblem(
                f"keys: the authority in {str(self.folder)!r} is damaged: {error}"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise EnvironmentProblem(f"keys: {str(self.folder / 'ca.key')!r} is not an ECDSA key")
        return certificate, key

    def _sign(
        self,
        common_name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
        days: int,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        ends = self._now + datetime.timedelta(days=days)
        if issuer is not None:
            ends = min(ends, issuer[0].not_valid_after_utc)
        public, is_ca = key.public_key(), issuer is None
        signer = issuer[1] if issuer else key
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer[0].subject if issuer else subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - BACKDATED)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
            .add_extension(_key_usage(is_ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=True)
        return builder.sign(signer, hashes.SHA256())


def _key_usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", text):
        raise ConfigError(f"keys: --host {text!r} is neither a host name nor an address (no port, no scheme)")
    return x509.DNSName(text)


def _hosts_of(certificate: bytes) -> list[str]:
    parsed = x509.load_pem_x509_certificate(certificate)
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName) + [
        str(address) for address in names.get_values_for_type(x509.IPAddress)
    ]


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def _write(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Whole or not at all, mode 0600. An existing file stays, with FileExistsError, unless `replace`."""
    target = path.with_name(f".{path.name}.new") if replace else path
    if replace:
        target.unlink(missing_ok=True)
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if replace:
        target.replace(path)
