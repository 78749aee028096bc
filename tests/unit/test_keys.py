"""`diloco keys`: what is on disk afterwards, who is in it, and what is never overwritten."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from diloco.cli import main
from diloco.comms import tls
from diloco.comms.revocation import read_revoked
from diloco.comms.tls import identity_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    assert keys("init", made, "--host", "coordinator.example", "--host", "192.0.2.7", "--days", "30") == 0
    return made


def keys(verb: str, folder: Path, *rest: str) -> int:
    return main(["keys", verb, *rest, "--keys", str(folder)])


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def hosts(path: Path) -> set[str]:
    names = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def test_init_makes_an_authority_and_a_coordinator_certificate_for_its_hosts(folder: Path) -> None:
    """P-256; localhost and the given hosts; 30 days from now, an hour earlier at the start; the CA signs no CA."""
    path = folder / "coordinator.crt"
    assert hosts(path) == {
        tls.COORDINATOR_NAME,
        "localhost",
        "127.0.0.1",
        "::1",
        "coordinator.example",
        "192.0.2.7",
    }
    made, authority = certificate(path), certificate(folder / "ca.crt")
    made.verify_directly_issued_by(authority)
    key = made.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    seconds = (made.not_valid_after_utc - made.not_valid_before_utc).total_seconds()
    assert seconds == 30 * 86400 + 3600
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert identity_of(path.read_bytes()).role == "coordinator"


def test_a_workers_folder_holds_what_its_site_needs_and_no_more(folder: Path) -> None:
    """Three files; a client certificate with the worker's name as URI, no host, not usable as a server."""
    assert keys("worker", folder, "paris-1") == 0
    bundle = folder / "workers" / "paris-1"
    assert {p.name for p in bundle.iterdir()} == {"ca.crt", "worker.crt", "worker.key"}
    made = certificate(bundle / "worker.crt")
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == ["spiffe://diloco/worker/paris-1"] and len(list(names)) == 1
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert (bundle / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()


def test_only_the_owner_can_read_anything(folder: Path) -> None:
    """Folders 0700, files 0600, those of workers and operators included."""
    keys("worker", folder, "w")
    keys("operator", folder, "o")
    keys("revoke", folder, "w")
    paths = [folder, *folder.rglob("*")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_dir()} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_file()} == {0o600}


def test_nothing_is_overwritten_unless_renew_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second init or worker exits with 2 and changes no byte; --renew replaces the certificate, not the CA."""
    keys("worker", folder, "w")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert keys("init", folder) == 2
    assert keys("worker", folder, "w") == 2
    assert "--renew" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert keys("worker", folder, "w", "--renew") == 0
    assert keys("init", folder, "--renew", "--host", "second.example") == 0
    changed = {p.name for p, old in before.items() if p.read_bytes() != old}
    assert changed == {"worker.crt", "worker.key", "coordinator.crt", "coordinator.key"}
    assert {"coordinator.example", "second.example"} <= hosts(folder / "coordinator.crt")


def test_init_does_not_mix_keys_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert keys("init", tmp_path) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_list_names_everybody_and_revoke_marks_every_certificate_of_a_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A renewed worker has two certificates and loses both; a later one of the same name is good again."""
    keys("worker", folder, "a")
    keys("worker", folder, "b")
    keys("worker", folder, "a", "--renew")
    keys("operator", folder, "o")
    keys("revoke", folder, "a")
    keys("worker", folder, "a", "--renew")
    capsys.readouterr()
    assert keys("list", folder, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    found = sorted((row["role"], row["name"], row["revoked"]) for row in rows)
    assert found == [
        ("coordinator", "", False),
        ("operator", "o", False),
        ("worker", "a", False),
        ("worker", "a", True),
        ("worker", "a", True),
        ("worker", "b", False),
    ]
    good = identity_of((folder / "workers" / "a" / "worker.crt").read_bytes()).serial
    revoked = read_revoked(folder / "revoked.json")
    assert good not in revoked and set(revoked.values()) == {"spiffe://diloco/worker/a"}
    assert {int(row["serial"], 16) for row in rows if row["revoked"]} == set(revoked)
    keys("list", folder)
    assert "revoked" in capsys.readouterr().out


def test_a_second_revocation_keeps_the_first(folder: Path) -> None:
    for name in ("a", "b"):
        keys("worker", folder, name)
        keys("revoke", folder, name)
    assert set(read_revoked(folder / "revoked.json").values()) == {
        "spiffe://diloco/worker/a",
        "spiffe://diloco/worker/b",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("worker", "../../evil"), 2, "no name"),
        (("worker", "a/b"), 2, "no name"),
        (("worker", "ok", "--host", "http://x:1"), 2, "neither a host name nor an address"),
        (("worker", "ok", "--host", "coordinator.diloco.internal"), 2, "for coordinators alone"),
        (("revoke", "nobody"), 2, "has no certificate"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    assert keys(arguments[0], folder, *arguments[1:]) == code
    assert words in capsys.readouterr().err


def test_without_the_authoritys_key_nothing_is_issued_and_nothing_half_made_remains(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ca.key is kept elsewhere: exit 4 that says so, and no folder of the worker."""
    (folder / "ca.key").unlink()
    assert keys("worker", folder, "w") == 4
    assert "ca.key" in capsys.readouterr().err
    assert not (folder / "workers").exists()


def test_validity_is_bounded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        keys("worker", folder, "w", "--days", "4000")
    assert ended.value.code == 2 and "3650" in capsys.readouterr().err
