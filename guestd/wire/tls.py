"""Mutual TLS: the files it takes, whether they are any good, and why it does not come about.

gRPC does TLS by itself and says nothing about what went wrong. So the files are tried out here before it gets them,
in a handshake in memory, and a connection that fails is tried once more with Python's own TLS, which gives reasons.
"""

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from guestd.model.errors import ConfigError, DeniedError, GuestdError, UnreachableError

_log = logging.getLogger(__name__)
_PROBE_SECONDS = 3.0
_RETRY_SECONDS = 3.0
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and empty SETTINGS
_EXPIRED, _NOT_YET_VALID, _NAME_MISMATCH, _IP_MISMATCH = 10, 9, 62, 64  # X509_V_ERR_ of OpenSSL
_UNTRUSTED = frozenset({18, 19, 20, 21})
_DATE_PROBLEMS = {_EXPIRED: "has expired; renew it", _NOT_YET_VALID: "is not valid yet; is the clock right?"}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one side: its certificate (and what leads to its CA) with the key, and the CAs of the other side."""

    certificate: Path
    key: Path
    ca: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, key and CA, which belong together.

        :raise ConfigError: When a file cannot be read, or is not what it should be.
        """
        contents = tuple(_read(path) for path in (self.certificate, self.key, self.ca))
        _context(ssl.PROTOCOL_TLS_CLIENT, self)
        return contents[0], contents[1], contents[2]

    def date_problem(self, *, server: bool) -> str | None:
        """Why nobody will take the certificate of this side, in words; None when it is good now."""
        ends = (_context(ssl.PROTOCOL_TLS_CLIENT, self), _context(ssl.PROTOCOL_TLS_SERVER, self))
        for end in ends:
            end.check_hostname, end.verify_mode = False, ssl.CERT_NONE
        judge = ends[0] if server else ends[1]
        judge.verify_mode = ssl.CERT_REQUIRED
        judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        judge.load_verify_locations(self.certificate)
        try:
            _handshake(*ends)
        except ssl.SSLCertVerificationError as error:
            return _DATE_PROBLEMS.get(error.verify_code, f"is of no use here: {error.verify_message}")
        except ssl.SSLError as error:
            return f"is of no use: {error.reason}"
        return None


_Stamps = tuple[tuple[int, int, int] | None, ...]


class ServerCertificates:
    """The files of a server, as they are: what is changed on disk holds from the next connection on. What is of no use
    (one that is not valid yet, say) is tried again with later ones.

    :raise ConfigError: When they are of no use.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen: _Stamps = self._stamps()
        self._failed: _Stamps | None = None  # what could not be taken up,
        self._complaint, self._try_at = "", 0.0  # why, and when it is tried again
        self._first = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`: nobody gets in without a certificate of the CA."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self.changed,  # type: ignore[arg-type]  # None is one of its answers, says gRPC itself
            require_client_authentication=True,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new ones, None when there are none. gRPC asks at each connection, in a thread of its own."""
        stamps = self._stamps()
        if stamps == self._seen:
            return None
        if stamps == self._failed and time.monotonic() < self._try_at:
            return None
        try:
            fresh = self._load()
        except ConfigError as error:
            self._failed, self._try_at = stamps, time.monotonic() + _RETRY_SECONDS
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.error("%s; until then the monitor keeps the certificates that it has", error)
            return None
        self._seen, self._failed, self._complaint = stamps, None, ""
        _log.info("the monitor has taken up new certificates: %s, %s", self._files.certificate, self._files.ca)
        return fresh

    def _load(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, ca = self._files.read()
        problem = self._files.date_problem(server=True)
        if problem is not None:
            raise _bad(self._files.certificate, problem)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    def _stamps(self) -> _Stamps:
        return tuple(_stamp(path) for path in (self._files.certificate, self._files.key, self._files.ca))


async def tls_problem(host: str, port: int, files: TlsFiles) -> GuestdError:
    """Why a connection did not come about, found out by making one."""
    where = f"{host}:{port}"
    context = _context(ssl.PROTOCOL_TLS_CLIENT, files)
    context.load_verify_locations(files.ca)
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                writer.write(_HTTP2_PREFACE)
                heard = await reader.read(1)
            finally:
                writer.transport.abort()
    except ssl.SSLCertVerificationError as error:
        return UnreachableError(f"{where}: {_distrust(error, host, files)}")
    except ssl.SSLError as error:
        return UnreachableError(f"{where} does not speak TLS as a broker's monitor does ({error.reason})")
    except TimeoutError:
        return UnreachableError(f"{where}: no answer in time")
    except (ConnectionResetError, BrokenPipeError):
        return UnreachableError(f"{where} ends the connection; is it a broker's monitor, and has it too many clients?")
    except UnicodeError:  # of `getaddrinfo`
        return UnreachableError(f"{where}: {host!r} is not a name that a host may have")
    except OSError as error:
        return UnreachableError(f"{where}: {error.strerror or error}; is [monitor] listen set in its broker.toml?")
    if heard:
        return UnreachableError(f"{where}: the connection was lost; try again")
    problem = files.date_problem(server=False)
    return DeniedError(
        f"{where} does not accept the client certificate {files.certificate}: "
        + (f"it {problem}" if problem else "it must be signed by the CA of monitor.client_ca in its broker.toml")
    )


def _distrust(error: ssl.SSLCertVerificationError, host: str, files: TlsFiles) -> str:
    match error.verify_code:
        case code if code in _UNTRUSTED:
            return f"the broker's certificate is not signed by {files.ca}"
        case code if code in (_NAME_MISMATCH, _IP_MISMATCH):
            return f"the broker's certificate is not for {host}; call it by a name or address that is in there"
        case code:
            return f"the broker's certificate {_DATE_PROBLEMS.get(code, f'is of no use: {error.verify_message}')}"


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    """One that shows the certificate, and trusts nobody yet.

    :raise ConfigError: When a file is not what it should be.
    """
    _check_certificates(files.certificate)
    _check_cas(files.ca)
    context = ssl.SSLContext(protocol)
    try:
        context.load_cert_chain(files.certificate, files.key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _bad(files.key, f"is not the key of {files.certificate}; put both of one pair there") from error
        raise _bad(files.key, "must hold a private key in PEM, without a passphrase") from error
    return context


def _check_certificates(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise _bad(path, "holds no certificate in PEM") from error
    return context


def _check_cas(path: Path) -> None:
    ends = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in _check_certificates(path).get_ca_certs()]
    if not ends:
        raise _bad(path, "holds no certificate of a CA, which is what those of the other side must be signed by")
    if max(ends) < time.time():
        raise _bad(path, "holds only CAs that have expired; renew them")


def _handshake(client_side: ssl.SSLContext, server_side: ssl.SSLContext) -> None:
    """:raise ssl.SSLError: When it fails."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}; see to the file and its mode") from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs when a file was changed or replaced; None when it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _bad(path: Path, problem: str) -> ConfigError:
    return ConfigError(str(path), "", None, problem)
