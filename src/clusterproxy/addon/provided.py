"""Certificates that the administrator provides (signer type ``Provided``): looked at, never written. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .certificates import (
    CertificateError,
    Usage,
    go_time,
    hosts_of,
    issued_by,
    load_certificates,
    load_public_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from cryptography import x509

    from .certificates import Leaf


def why_unusable(
    data: Mapping[str, bytes], leaf: Leaf, trusted: Sequence[x509.Certificate], now: datetime
) -> str | None:
    """Return what keeps a provided certificate from use as *leaf*, or None.

    It may be for more hosts than are wanted, and come by way of intermediates that follow it in ``tls.crt``. A
    client's need not be for any: who verifies it asks for its CA alone.
    """
    try:
        chain = load_certificates(data.get("tls.crt", b""), "tls.crt")
        key = load_public_key(data.get("tls.key", b""))
        missing = sorted(set(leaf.hosts) - hosts_of(chain[0]))
    except CertificateError as error:
        return str(error)
    certificate = chain[0]
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if certificate.public_key() != key:
        return "tls.key is not the key of tls.crt"
    if not begin <= now < end:
        return f"tls.crt is valid from {go_time(begin)} to {go_time(end)}"
    if not _leads_to(chain, trusted):
        return "tls.crt does not come from a CA in ca.crt of secret proxy-server-ca"
    if missing and leaf.usage is Usage.SERVER:
        return f"tls.crt is not for {', '.join(missing)}"
    return None


def _leads_to(chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]) -> bool:
    for place, certificate in enumerate(chain):
        if any(issued_by(certificate, authority) for authority in trusted):
            return True
        if not any(issued_by(certificate, following) for following in chain[place + 1 : place + 2]):
            return False
    return False
