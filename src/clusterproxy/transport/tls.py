"""TLS contexts that treat peers as Go's crypto/tls does.

Sources: Go 1.26 ``crypto/tls`` (``CipherSuites``, ``defaultCipherSuites``), and
``pkg/util/certificates.go`` and ``getTLSConfig`` of ``cmd/server/app/server.go`` of
apiserver-network-proxy.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final

from clusterproxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

GO_CIPHER_SUITES: Final[dict[str, str]] = {
    # TLS 1.3: always on, as in Go, so listing them has no effect.
    "TLS_AES_128_GCM_SHA256": "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384": "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256": "TLS_CHACHA20_POLY1305_SHA256",
    # TLS 1.2 in Go's order of preference, which no configuration changes.
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
}
"""Go's names of its suites that are not insecure, and OpenSSL's names of the same."""

_MIN_VERSIONS: Final = {
    "": ssl.TLSVersion.TLSv1_2,
    # Accepted because Go takes them; whoever parses the flag warns.
    "VersionTLS10": ssl.TLSVersion.TLSv1_2,
    "VersionTLS11": ssl.TLSVersion.TLSv1_2,
    "VersionTLS12": ssl.TLSVersion.TLSv1_2,
    "VersionTLS13": ssl.TLSVersion.TLSv1_3,
}


def server_context(
    *,
    cert: str,
    key: str,
    client_ca: str | None,
    min_version: str,
    cipher_suites: Sequence[str],
    alpn: Sequence[str],
) -> ssl.SSLContext:
    """Return the context of a listener. Clients need a certificate of *client_ca* if that is given.

    *min_version* and *cipher_suites* are in Go's names; an empty list means Go's defaults.

    Raises:
        ConfigError: a file cannot be used (the message names it), or a name is unknown.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context, alpn)
    if min_version not in _MIN_VERSIONS:
        raise ConfigError("tls-min-version", f"unknown tls version {min_version!r}")
    context.minimum_version = _MIN_VERSIONS[min_version]
    _set_cipher_suites(context, cipher_suites)
    # A resumed session would not be held against a new CA. Go clients keep none anyway.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    # Every suite that is left is sound, so the client may choose. Go clients put AES-128 first, which
    # a Go server would choose as well; OpenSSL would take AES-256, which costs both ends more.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    _load_pair(context, cert, key)
    if client_ca is not None:
        _load_ca(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    *, ca: str | bytes | None, cert: str | None, key: str | None, alpn: Sequence[str]
) -> ssl.SSLContext:
    """Return the context of a client that trusts *ca* alone, with a certificate of its own or none.

    *ca* is a file, or certificates in DER form one behind the other. Without it the context trusts whom the system trusts.

    Raises:
        ConfigError: a file cannot be used; the message names it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context, alpn)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _set_cipher_suites(context, ())
    # As Go: names are those in the SAN.
    context.hostname_checks_common_name = False
    if ca is None:
        context.load_default_certs()
    elif isinstance(ca, bytes):
        context.load_verify_locations(cadata=ca)
    else:
        _load_ca(context, ca)
    if cert or key:
        _load_pair(context, cert or "", key or "")
    return context


def _harden(context: ssl.SSLContext, alpn: Sequence[str]) -> None:
    # On by default from Python 3.13, and the certificates of existing installations fail it: those
    # that upstream's certificate scripts make lack a key identifier. Chain, dates, usage and names
    # are verified all the same.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # In Go whatever is in the pool is a root, an intermediate too.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if alpn:
        context.set_alpn_protocols(list(alpn))


def _set_cipher_suites(context: ssl.SSLContext, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in GO_CIPHER_SUITES]
    if unknown:
        raise ConfigError(
            "cipher-suites",
            f"cipher suite {unknown[0]} not supported, doesn't exist or considered as insecure",
        )
    wanted = [
        suite
        for name, suite in GO_CIPHER_SUITES.items()
        if name != suite and (not names or name in names)
    ]
    if wanted:
        context.set_ciphers(":".join(wanted))
    else:
        # Suites of TLS 1.3 alone: no TLS 1.2 handshake would get anywhere.
        context.minimum_version = ssl.TLSVersion.TLSv1_3


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    if not cert:
        raise ConfigError("cert", f"private key {key}: is there without its certificate")
    if not key:
        raise ConfigError("key", f"certificate {cert}: is there without its private key")
    if b"-----BEGIN CERTIFICATE-----" not in _read("cert", cert, "certificate"):
        raise ConfigError("cert", f"certificate {cert}: no certificate in PEM form in it")
    key_pem = _read("key", key, "private key")
    if b"PRIVATE KEY-----" not in key_pem:
        raise ConfigError("key", f"private key {key}: no private key in PEM form in it")
    if b"ENCRYPTED" in key_pem:
        raise ConfigError("key", f"private key {key}: is encrypted, which is not supported")
    try:
        # With a password OpenSSL never asks the terminal for one.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                "key", f"private key {key} does not belong to certificate {cert}"
            ) from error
        field, path = ("cert", cert) if not _has_certificates(cert) else ("key", key)
        what = "certificate" if field == "cert" else "private key"
        raise ConfigError(field, f"{what} {path}: cannot be parsed ({_reason(error)})") from error
    except (OSError, ValueError) as error:
        raise ConfigError("cert", f"certificate {cert}, private key {key}: {error}") from error


def _load_ca(context: ssl.SSLContext, ca: str) -> None:
    _read("ca", ca, "CA certificates")
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(
            "ca", f"CA certificates {ca}: no usable certificate in it ({_reason(error)})"
        ) from error
    except OSError as error:
        raise ConfigError("ca", f"CA certificates {ca}: {error}") from error


def _has_certificates(path: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError:
        return False
    return True


def _read(field: str, path: str, what: str) -> bytes:
    """Read a file first: errors of the ssl module do not say which one they are about."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(field, f"{what} {path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(field, f"{what} {path!r}: {error}") from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "not in PEM form").lower().replace("_", " ")
