"""Certificates that the administrator provides (signer type ``Provided``): looked at, never written. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .certificates import (
    PURPOSES,
    CertificateError,
    Usage,
    go_time,
    hosts_of,
    is_authority,
    issued_by,
    load_pair,
    purposes_of,
    subject_of,
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

    It may be for more hosts than are wanted, for them by a wildcard, for any purpose, and come by way of intermediates
    that follow it in ``tls.crt``. A client's need not be for any host: who verifies it asks for its CA alone.
    """
    try:
        return _why_unusable(data, leaf, trusted, now)
    except CertificateError as error:
        return str(error)


def _why_unusable(
    data: Mapping[str, bytes], leaf: Leaf, trusted: Sequence[x509.Certificate], now: datetime
) -> str | None:
    chain = load_pair(data)
    certificate = chain[0]
    if not _is_valid(certificate, now):
        return f"tls.crt is valid {_validity(certificate)}"
    if not _is_for(certificate, leaf.usage):
        return f"tls.crt is not for use by a {leaf.usage}: its extended key usage lacks {leaf.usage}Auth"
    if leaf.usage is Usage.SERVER:
        hosts = hosts_of(certificate)
        missing = [host for host in sorted(set(leaf.hosts)) if not _covers(hosts, host)]
        if missing:
            return f"tls.crt is not for {', '.join(missing)}"
    return _gap(chain, trusted, leaf.usage, now)


def _gap(
    chain: Sequence[x509.Certificate],
    trusted: Sequence[x509.Certificate],
    usage: Usage,
    now: datetime,
) -> str | None:
    """Return why none of *trusted* vouches for the first of a chain, or None if one does."""
    if chain[0] in trusted and issued_by(chain[0], chain[0]):
        return None
    told = "tls.crt does not come from a CA in ca.crt of secret proxy-server-ca"
    for place, certificate in enumerate(chain):
        for authority in trusted:
            if issued_by(certificate, authority):
                problem = _why_no_issuer(authority, usage, now)
                if problem is None:
                    return None
                told = f"ca.crt of secret proxy-server-ca: {problem}"
        following = chain[place + 1 : place + 2]
        if not following or not issued_by(certificate, following[0]):
            break
        problem = _why_no_issuer(following[0], usage, now)
        if problem is not None:
            return f"tls.crt: {problem}"
    return told


def _why_no_issuer(certificate: x509.Certificate, usage: Usage, now: datetime) -> str | None:
    name = subject_of(certificate)
    if not is_authority(certificate, name):
        return f"{name} is no CA: it lacks CA:TRUE or the usage certSign"
    if not _is_valid(certificate, now):
        return f"{name} is valid {_validity(certificate)}"
    if not _is_for(certificate, usage):
        return f"{name} is a CA, but not of certificates for a {usage}"
    return None


def _is_for(certificate: x509.Certificate, usage: Usage) -> bool:
    purposes = purposes_of(certificate, subject_of(certificate))
    # OpenSSL takes anyExtendedKeyUsage for none of the two.
    return purposes is None or PURPOSES[usage] in purposes


def _is_valid(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


def _validity(certificate: x509.Certificate) -> str:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return f"from {go_time(begin)} to {go_time(end)}"


def _covers(names: set[str], host: str) -> bool:
    """Whether a certificate for *names* is one for *host*; a wildcard stands for one label (RFC 6125, 6.4.3)."""
    lower = {name.lower() for name in names}
    label, _, domain = host.lower().partition(".")
    return host.lower() in lower or (bool(label and domain) and f"*.{domain}" in lower)
