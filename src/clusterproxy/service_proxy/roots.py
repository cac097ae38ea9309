"""Authorities that are trusted: bundles of certificates, in which every one has to be one.

A bundle of which a part is broken is refused as a whole: half of what somebody wants to trust is not what he wants.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from clusterproxy.errors import ConfigError
from clusterproxy.transport.tls import client_context

_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"
_END: Final = b"-----END CERTIFICATE-----"


def parse_bundle(pem: bytes) -> bytes:
    """Return the certificates of a bundle in PEM form as DER, one behind the other; what is between them is ignored.

    Raises:
      ValueError: there is none, or one is broken.
    """
    found: list[bytes] = []
    for text in pem.split(_BEGIN)[1:]:
        inner, end, _ = text.partition(_END)
        if not end:
            raise ValueError("a certificate in it has no end")
        found.append(_BEGIN + inner + end)
    if not found:
        raise ValueError("no certificate in PEM form in it")
    bundle = b""
    for number, text in enumerate(found, 1):
        try:
            der = ssl.PEM_cert_to_DER_cert(text.decode("ascii"))
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=der)
        except (ValueError, ssl.SSLError) as error:
            raise ValueError(f"certificate {number} of {len(found)} cannot be parsed") from error
        bundle += der
    return bundle


def services_context(service_account_ca: str, additional: str) -> ssl.SSLContext:
    """Return the context for connections to the apiserver and to services.

    Args:
      service_account_ca: the file with the apiserver's authority.
      additional: a file with more of them, which may be missing; empty for none.

    Raises:
      ConfigError: a file cannot be read, or something in it cannot be parsed.
    """
    bundle = _read("service-account", service_account_ca)
    if additional:
        bundle += _read("additional-service-ca", additional, may_miss=True)
    return client_context(ca=bundle, cert=None, key=None, alpn=("http/1.1",))


def _read(field: str, path: str, *, may_miss: bool = False) -> bytes:
    try:
        return parse_bundle(Path(path).read_bytes())
    except FileNotFoundError as error:
        if may_miss:
            return b""
        raise ConfigError(field, f"CA certificates {path}: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(field, f"CA certificates {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(field, f"CA certificates {path}: {error}") from error
