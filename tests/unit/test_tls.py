"""Keys are judged before anything is connected: dates, issuer, pair, permissions, and the names in a certificate."""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from diloco.comms import tls
from diloco.comms.audit import Audit
from diloco.comms.authority import Authority
from diloco.comms.connect import connect
from diloco.comms.limits import Budgets
from diloco.comms.revocation import Revocations
from diloco.errors import EnvironmentProblem, RefusedError

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
DAY = 86400.0


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    """The folder of worker "w", valid in 2030."""
    authority = Authority(tmp_path / "keys", NOW)
    authority.create([], 30)
    return authority.member("worker", "w", [], 30)


def test_good_keys_say_whose_they_are(worker: Path) -> None:
    keys = tls.load_keys(worker, ["operator", "worker"], NOW.timestamp())
    assert str(keys.identity) == "worker 'w'"
    assert keys.identity.ends == NOW.timestamp() + 30 * DAY
    assert keys.key not in repr(keys).encode() and "PRIVATE" not in repr(keys)


@pytest.mark.parametrize(
    ("days", "words"),
    [(30.01, "has expired on 2030-01-31"), (-1.0, "set the clock"), (29.99, None), (-0.04, None)],
)
def test_dates_are_checked_with_an_hour_to_spare_at_the_start(
    worker: Path, days: float, words: str | None
) -> None:
    """Expired and not yet valid are told apart, each with its remedy."""
    now = NOW.timestamp() + days * DAY
    if words is None:
        tls.load_keys(worker, ["worker"], now)
        return
    with pytest.raises(RefusedError, match=words):
        tls.load_keys(worker, ["worker"], now)


def test_connect_judges_the_keys_before_it_dials(worker: Path) -> None:
    """These are of the year 2030: refused at once, though nobody listens at the address."""
    with pytest.raises(RefusedError, match="valid from 2029-12-31"):
        connect("grpc://127.0.0.1:9", keys=worker)
    with pytest.raises(EnvironmentProblem, match=r"no worker\.crt"):
        connect("grpc://127.0.0.1:9", keys=str(worker.parent))


def test_keys_that_do_not_belong_together_are_refused(worker: Path, tmp_path: Path) -> None:
    """The key of another worker, the CA of another run, a renamed certificate, garbage."""
    authority = Authority(tmp_path / "keys", NOW)
    other = authority.member("worker", "other", [], 30)
    foreign = Authority(tmp_path / "foreign", NOW)
    foreign.create([], 30)

    def refused(words: str, **files: bytes) -> None:
        saved = {name: (worker / name).read_bytes() for name in ("ca.crt", "worker.crt", "worker.key")}
        for name, content in files.items():
            (worker / name.replace("_", ".")).write_bytes(content)
        with pytest.raises(RefusedError, match=words):
            tls.load_keys(worker, ["worker"], NOW.timestamp())
        for name, content in saved.items():
            (worker / name).write_bytes(content)

    refused("do not belong together", worker_key=(other / "worker.key").read_bytes())
    refused("not issued by the CA", ca_crt=(tmp_path / "foreign" / "ca.crt").read_bytes())
    refused("belongs to the coordinator", worker_crt=(tmp_path / "keys" / "coordinator.crt").read_bytes())
    refused("holds no private key", worker_key=b"-----BEGIN")
    refused("holds no certificate", ca_crt=b"")
    refused("names nobody", worker_crt=b"junk")
    tls.load_keys(worker, ["worker"], NOW.timestamp())


def test_a_key_that_everybody_can_read_is_not_used(worker: Path) -> None:
    (worker / "worker.key").chmod(0o644)
    with pytest.raises(RefusedError, match="chmod 600"):
        tls.load_keys(worker, ["worker"], NOW.timestamp())
    (worker / "worker.key").chmod(0o640)
    tls.load_keys(worker, ["worker"], NOW.timestamp())


def self_signed(*names: x509.GeneralName) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([])
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + datetime.timedelta(days=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["spiffe://other/worker/w"],
        ["spiffe://diloco/worker/"],
        ["spiffe://diloco/worker"],
        ["spiffe://diloco/coordinator/x"],
        ["spiffe://diloco/owner/w"],
        ["spiffe://diloco/worker/a", "spiffe://diloco/worker/b"],
    ],
)
def test_a_certificate_names_exactly_one_node_of_a_run_or_nobody(uris: list[str]) -> None:
    with pytest.raises(RefusedError):
        tls.identity_of(self_signed(*map(x509.UniformResourceIdentifier, uris)))


def test_the_name_is_the_uris_not_the_hosts() -> None:
    pem = self_signed(x509.DNSName("w"), x509.UniformResourceIdentifier("spiffe://diloco/operator/eva"))
    assert (tls.identity_of(pem).role, tls.identity_of(pem).name) == ("operator", "eva")


# ---- the list of revoked certificates ----


def listed(path: Path, *serials: int) -> None:
    rows = [{"serial": f"{serial:x}", "identity": "spiffe://diloco/worker/w"} for serial in serials]
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"revoked": rows}))
    fresh.replace(path)


def test_a_changed_list_counts_after_a_refresh_and_nothing_comes_back(tmp_path: Path) -> None:
    """Added serials count; a damaged, shortened or vanished list takes none away."""
    path = tmp_path / "revoked.json"
    listed(path, 5)
    revoked = Revocations(path)
    assert 5 in revoked and 6 not in revoked
    listed(path, 5, 6)
    assert 6 not in revoked
    revoked.refresh()
    assert 6 in revoked
    path.write_text("{")
    os.utime(path, ns=(1, 1))
    revoked.refresh()
    assert 5 in revoked and 6 in revoked
    path.unlink()
    revoked.refresh()
    listed(path, 7)
    revoked.refresh()
    assert all(serial in revoked for serial in (5, 6, 7)) and 8 not in revoked


@pytest.mark.parametrize("text", ["", "[]", '{"revoked": [{}]}', '{"revoked": [{"serial": "zz"}]}', None])
def test_a_coordinator_does_not_start_without_a_whole_list(tmp_path: Path, text: str | None) -> None:
    """Missing counts too: whoever was shut out would come back unseen."""
    path = tmp_path / "revoked.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EnvironmentProblem, match="list of revoked"):
        Revocations(path)


# ---- bounds ----


def test_a_budget_is_a_burst_and_a_rate_per_peer() -> None:
    """Three at once, one more each two seconds; another peer is not touched; the table is bounded."""
    clock = [0.0]
    budgets = Budgets(3, 0.5, lambda: clock[0])
    assert [budgets.take("a") for _ in range(4)] == [True, True, True, False]
    assert budgets.take("b")
    clock[0] = 1.9
    assert not budgets.take("a")
    clock[0] = 2.1
    assert [budgets.take("a") for _ in range(2)] == [True, False]
    for number in range(5000):
        budgets.take(f"peer {number}")
    assert budgets.take("a")  # forgotten, as the longest silent one


def test_the_audit_log_is_bounded_in_size_and_one_event_cannot_wash_out_the_others(tmp_path: Path) -> None:
    """Two files of at most the given size; of a flood 100 lines, then the number of those left out."""
    path = tmp_path / "audit.jsonl"
    flooded = Audit(path)
    flooded.write("joined", worker="w")
    for _ in range(1000):
        flooded.write("refused", reason="x" * 5000)
    flooded.write("left", worker="w")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines[:1] + lines[-1:]] == ["joined", "left"]
    assert 102 <= len(lines) < 130 and lines[-1]["dropped"] > 800
    assert max(len(line.get("reason", "")) for line in lines) == 500

    small = Audit(tmp_path / "small.jsonl", max_bytes=2000)
    for number in range(90):
        small.write("joined", number=number)
    files = sorted(tmp_path.glob("small*"))
    assert [f.name for f in files] == ["small.1.jsonl", "small.jsonl"]
    assert all(0 < f.stat().st_size <= 2000 for f in files)
    assert json.loads(files[1].read_text().splitlines()[-1])["number"] == 89


def test_an_audit_log_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    Audit(tmp_path / "no" / "such" / "folder.jsonl").write("joined", worker="w")
    Audit(None).write("joined", worker="w")


def test_a_certificate_of_now_passes_now(tmp_path: Path) -> None:
    """The clock of the process is the one that counts."""
    authority = Authority(tmp_path / "keys", datetime.datetime.now(datetime.UTC))
    authority.create([], 1)
    assert tls.load_keys(tmp_path / "keys", ["coordinator"], time.time()).identity.role == "coordinator"
