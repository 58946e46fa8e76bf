"""Files for mutual TLS that are of no use: each is named, with the way out."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from pki import CA, Authority

from guestd.model.errors import ConfigError
from guestd.wire import tls
from guestd.wire.tls import ServerCertificates, TlsFiles, tls_problem

DAY = timedelta(days=1)


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return CA.issue("broker").write(tmp_path, CA)


def encrypt(key: Path) -> None:
    loaded = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))


BAD: dict[str, tuple[Callable[[TlsFiles], object], str]] = {
    "no certificate": (lambda one: one.certificate.unlink(), r"one\.pem: cannot be read: No such file"),
    "no key": (lambda one: one.key.unlink(), r"one\.key: cannot be read: No such file"),
    "no ca": (lambda one: one.ca.unlink(), r"one-ca\.pem: cannot be read: No such file"),
    "a directory": (lambda one: (one.key.unlink(), one.key.mkdir()), r"one\.key: cannot be read: Is a directory"),
    "certificate no PEM": (lambda one: one.certificate.write_text("?"), r"one\.pem: holds no certificate in PEM"),
    "certificate empty": (lambda one: one.certificate.write_text(""), r"one\.pem: holds no certificate in PEM"),
    "key no PEM": (lambda one: one.key.write_text("?"), r"one\.key: must hold a private key in PEM"),
    "key encrypted": (lambda one: encrypt(one.key), r"one\.key: must hold a private key in PEM, without a passphrase"),
    "another's key": (
        lambda one: one.key.write_bytes(CA.issue("other").key),
        r"one\.key: is not the key of .*one\.pem",
    ),
    "ca no PEM": (lambda one: one.ca.write_bytes(b"\0\xff"), r"one-ca\.pem: holds no certificate in PEM"),
    "ca no CA": (
        lambda one: one.ca.write_bytes(CA.issue("x").certificate),
        r"one-ca\.pem: holds no certificate of a CA",
    ),
    "ca expired": (
        lambda one: one.ca.write_bytes(Authority("old", ends=-DAY).pem),
        r"one-ca\.pem: holds only CAs that have expired",
    ),
    "expired": (
        lambda one: one.certificate.write_bytes(_renewed(one, ends=-DAY)),
        r"one\.pem: has expired; renew it",
    ),
    "not yet valid": (
        lambda one: one.certificate.write_bytes(_renewed(one, begins=DAY, ends=3 * DAY)),
        r"one\.pem: is not valid yet; is the clock right\?",
    ),
}


def _renewed(files: TlsFiles, **times: timedelta) -> bytes:
    pair = CA.issue("broker", **times)
    files.key.write_bytes(pair.key)
    return pair.certificate


@pytest.mark.parametrize("what", BAD)
def test_a_file_of_no_use_is_named_with_the_way_out(files: TlsFiles, what: str) -> None:
    spoil, said = BAD[what]
    spoil(files)
    with pytest.raises(ConfigError, match=said):
        ServerCertificates(files)


def test_good_files_are_good_for_both_sides(files: TlsFiles) -> None:
    assert files.date_problem(server=True) is None
    assert files.date_problem(server=False) is None
    assert files.read() == tuple(path.read_bytes() for path in (files.certificate, files.key, files.ca))


def test_a_ca_that_renewed_itself_may_stand_beside_the_old_one(files: TlsFiles) -> None:
    files.ca.write_bytes(Authority("old", ends=-DAY).pem + CA.pem)
    ServerCertificates(files)


def test_a_certificate_is_taken_up_when_its_time_has_come(
    files: TlsFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_RETRY_SECONDS", 0.05)
    certificates = ServerCertificates(files)
    files.certificate.write_bytes(_renewed(files, begins=timedelta(seconds=2), ends=3 * DAY))
    taken, end = None, time.monotonic() + 20
    while taken is None and time.monotonic() < end:
        taken = certificates.changed()
        time.sleep(0.02)
    assert taken is not None
    assert [record.levelname for record in caplog.records if record.levelname == "ERROR"] == ["ERROR"], "said once"
    assert "is not valid yet" in caplog.text
    assert certificates.changed() is None


def test_what_cannot_be_taken_up_is_not_tried_with_each_connection(
    files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = ServerCertificates(files)
    files.key.write_bytes(CA.issue("other").key)
    assert certificates.changed() is None
    monkeypatch.setattr(TlsFiles, "read", lambda self: pytest.fail("so soon"))
    assert certificates.changed() is None


async def test_a_host_that_can_have_no_such_name_is_an_error_in_words(files: TlsFiles) -> None:
    for name in ("db1..example", "x" * 70 + ".example"):
        assert "is not a name that a host may have" in str(await tls_problem(name, 4748, files))


def test_only_what_changed_on_disk_is_read_again(files: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    certificates = ServerCertificates(files)
    assert certificates.changed() is None
    pair = CA.issue("broker")
    files.certificate.write_bytes(pair.certificate)
    assert certificates.changed() is None  # the key does not fit yet
    assert certificates.changed() is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # said once
    assert "is not the key of" in caplog.text
    files.key.write_bytes(pair.key)
    assert certificates.changed() is not None
    assert certificates.changed() is None
    files.ca.unlink()
    assert certificates.changed() is None
    assert "one-ca.pem: cannot be read: No such file" in caplog.text
