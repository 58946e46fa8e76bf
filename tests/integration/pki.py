"""Certificates for tests, as an operator's own CA would make them."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from guestd.wire.tls import TlsFiles

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate with its key, PEM."""

    certificate: bytes
    key: bytes

    def write(self, directory: Path, ca: "Authority", name: str = "one") -> TlsFiles:
        """These files, and those of the CA that the other side is to be of."""
        files = TlsFiles(directory / f"{name}.pem", directory / f"{name}.key", directory / f"{name}-ca.pem")
        files.certificate.write_bytes(self.certificate)
        files.key.write_bytes(self.key)
        files.ca.write_bytes(ca.pem)
        return files


class Authority:
    """A CA."""

    def __init__(self, name: str, ends: timedelta = _DAY) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key, ends)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.pem = builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def issue(self, name: str, *, host: str = "localhost", ends: timedelta = _DAY, begins: timedelta = -_DAY) -> Pair:
        """A certificate for a DNS name; also for the loopback address where that is localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names: list[x509.GeneralName] = [x509.DNSName(host)]
        if host == "localhost":
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        builder = _builder(subject, self._name, key, ends, begins)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)
        return Pair(certificate, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    ends: timedelta,
    begins: timedelta = -3 * _DAY,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + min(begins, ends - _DAY))
        .not_valid_after(now + ends)
    )


CA, OTHER = Authority("ca"), Authority("other")
"""Whom both sides believe, and whom neither does."""
