"""The certificate authority, and the certificates that it issues. Pure; the time comes in as a parameter.

Layout and contents are those of the original (open-cluster-management.io/sdk-go ``pkg/certrotation``, upstream
``pkg/proxyserver/operator/authentication/selfsigned``), so that either manager goes on with the other's secrets.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clusterproxy.errors import ClusterProxyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_E = TypeVar("_E", bound=x509.ExtensionType)

AUTHORITY_NAME: Final = "open-cluster-management:cluster-proxy"
AUTHORITY_VALIDITY: Final = timedelta(days=3650)
LEAF_VALIDITY: Final = timedelta(days=180)

#: How much of its life a certificate is used for.
RENEWAL: Final = 0.8

# A leaf ends so long before its issuer, and begins so long before now.
_BEFORE_THE_END: Final = timedelta(seconds=2)
_BACKDATED: Final = timedelta(seconds=1)
# The clock of whoever issued a certificate may be so far ahead of ours.
_SKEW: Final = timedelta(minutes=5)

_KEY_BITS: Final = 2048
_EXPONENT: Final = 65537
# The longest common name that X.509 has room for.
_LONGEST_NAME: Final = 64

# What the parser says of bytes that are no certificate or no key.
_UNPARSABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class CertificateError(ClusterProxyError):
    """A certificate or key that cannot be used.

    Attributes:
      key: which one, by its key in the secret.
      message: what is wrong with it.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key} {message}")
        self.key = key
        self.message = message


class Usage(StrEnum):
    """What a leaf is for."""

    SERVER = "server"
    CLIENT = "client"


#: What a certificate says that it is for.
PURPOSES: Final = {
    Usage.SERVER: ExtendedKeyUsageOID.SERVER_AUTH,
    Usage.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH,
}


@attrs.frozen(kw_only=True)
class Leaf:
    """A certificate that is wanted.

    Attributes:
      name: of its secret.
      hosts: DNS names and IP addresses, in any order.
      usage: what it is for.
      validity: how long it is to be valid.
    """

    name: str
    hosts: tuple[str, ...]
    usage: Usage
    validity: timedelta = LEAF_VALIDITY


@attrs.frozen(kw_only=True)
class Authority:
    """A certificate authority.

    Attributes:
      crt: its certificates as PEM, that of *key* first.
      key: its private key, PKCS#8 in PEM.
      certificates: what *crt* holds.
      private_key: what *key* holds.
    """

    crt: bytes
    key: bytes = attrs.field(repr=False)
    certificates: tuple[x509.Certificate, ...] = attrs.field(eq=False, repr=False)
    private_key: rsa.RSAPrivateKey = attrs.field(eq=False, repr=False)

    @property
    def certificate(self) -> x509.Certificate:
        """The one that issues."""
        return self.certificates[0]

    @property
    def self_made(self) -> bool:
        """Whether we, or the original, have made it; otherwise it is somebody's own."""
        return f"CN={AUTHORITY_NAME}" in subject_of(self.certificate).split(",")

    def expired(self, now: datetime) -> bool:
        """Whether nothing can be issued any more."""
        return now >= self.certificate.not_valid_after_utc - _BEFORE_THE_END


def new_key() -> rsa.RSAPrivateKey:
    """Make a private key, which takes about a tenth of a second."""
    return rsa.generate_private_key(_EXPONENT, _KEY_BITS)


def new_authority(
    now: datetime, *, private_key: rsa.RSAPrivateKey | None = None, distinct: bool = False
) -> Authority:
    """Make a self-signed authority for ten years.

    Args:
      now: when it begins.
      private_key: its key; a new one by default.
      distinct: whether its subject is to have the time as serial number. While two authorities are trusted at once,
        a verifier that goes by names alone would take the one for the other.
    """
    private_key = private_key or new_key()
    begin = now.astimezone(UTC).replace(microsecond=0)
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, AUTHORITY_NAME)]
    if distinct:
        attributes.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{begin:%Y%m%d%H%M%S}"))
    name = x509.Name(attributes)
    public_key = private_key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + AUTHORITY_VALIDITY)
        .add_extension(_key_usage(issues=True), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(AUTHORITY_NAME)]), critical=False)
        .sign(private_key, hashes.SHA256())
    )
    return Authority(
        crt=certificate.public_bytes(Encoding.PEM),
        key=private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        certificates=(certificate,),
        private_key=private_key,
    )


def load_authority(
    ca_crt: bytes,
    ca_key: bytes,
    now: datetime | None = None,
    *,
    crt_name: str = "ca.crt",
    key_name: str = "ca.key",
) -> Authority:
    """Read an authority.

    Args:
      ca_crt: certificates as PEM, the issuing one first.
      ca_key: its key, which must be RSA in PKCS#8, as the original demands.
      now: if given, the authority must not have expired.
      crt_name: what *ca_crt* is called in errors.
      key_name: what *ca_key* is called in errors.

    Raises:
      CertificateError: one of them cannot be used.
    """
    certificates = load_certificates(ca_crt, crt_name)
    private_key = _load_authority_key(ca_key, key_name)
    certificate = certificates[0]
    if not is_authority(certificate, crt_name):
        raise CertificateError(
            crt_name, "is not the certificate of a CA: it lacks CA:TRUE or the usage certSign"
        )
    if certificate.public_key() != private_key.public_key():
        raise CertificateError(key_name, f"is not the key of the first certificate in {crt_name}")
    authority = Authority(
        crt=ca_crt, key=ca_key, certificates=certificates, private_key=private_key
    )
    if now is not None and authority.expired(now):
        raise CertificateError(crt_name, f"expired at {go_time(certificate.not_valid_after_utc)}")
    return authority


@lru_cache(maxsize=32)
def _private_key(pem: bytes) -> PrivateKeyTypes:
    # Checking one takes 40 ms, and the same few are looked at again and again.
    return load_pem_private_key(pem, None)


def _load_authority_key(pem: bytes, name: str) -> rsa.RSAPrivateKey:
    if not pem.strip():
        raise CertificateError(name, "is missing")
    if b"-----BEGIN PRIVATE KEY-----" not in pem:
        raise CertificateError(
            name,
            "is no unencrypted PKCS#8 key in PEM (BEGIN PRIVATE KEY): convert it by "
            "openssl pkcs8 -topk8 -nocrypt",
        )
    try:
        key = _private_key(pem)
    except _UNPARSABLE as error:
        raise CertificateError(name, f"cannot be read: {_first_line(error)}") from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise CertificateError(name, "must be an RSA key")
    return key


def load_certificates(pem: bytes, name: str) -> tuple[x509.Certificate, ...]:
    """Read certificates, at least one.

    Raises:
      CertificateError: which names *name*.
    """
    if not pem.strip():
        raise CertificateError(name, "is missing")
    try:
        certificates = tuple(x509.load_pem_x509_certificates(pem))
        for certificate in certificates:
            # Both are read when they are asked for, and not before.
            _ = certificate.extensions, certificate.public_key()
    except _UNPARSABLE as error:
        raise CertificateError(name, f"is no certificate in PEM: {_first_line(error)}") from error
    return certificates


def issue(authority: Authority, leaf: Leaf, now: datetime) -> tuple[bytes, bytes]:
    """Make a key and a certificate for it: return ``tls.crt``, with the authority's behind it, and ``tls.key``.

    Raises:
      CertificateError: the authority has expired, or a host is nothing that a certificate can hold.
    """
    issuer = authority.certificate
    if authority.expired(now):
        raise CertificateError("ca.crt", f"expired at {go_time(issuer.not_valid_after_utc)}")
    private_key = new_key()
    hosts = sorted(set(leaf.hosts))
    # Names longer than there is room for are in the SANs only, which are what is verified. Without a subject the
    # SANs are critical (RFC 5280, 4.2.1.6).
    name = next((host for host in hosts if 0 < len(host) <= _LONGEST_NAME), "")
    try:
        names = x509.SubjectAlternativeName(
            [x509.DNSName(host) for host in hosts]
            + [x509.IPAddress(address) for address in _addresses(hosts)]
        )
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    except ValueError as error:
        raise CertificateError(leaf.name, f"cannot hold its hosts: {_first_line(error)}") from error
    now = now.astimezone(UTC).replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject)
        .public_key(private_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - _BACKDATED, issuer.not_valid_before_utc))
        .not_valid_after(min(now + leaf.validity, issuer.not_valid_after_utc - _BEFORE_THE_END))
        .add_extension(_key_usage(issues=False), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([PURPOSES[leaf.usage]]), critical=False)
        .add_extension(_authority_key_identifier(authority), critical=False)
        .add_extension(names, critical=not name)
        .sign(authority.private_key, hashes.SHA256())
    )
    chain = b"".join(
        each.public_bytes(Encoding.PEM) for each in (certificate, *authority.certificates)
    )
    key = private_key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    return chain, key


def why_reissue(
    data: Mapping[str, bytes], leaf: Leaf, authorities: Sequence[Authority], now: datetime
) -> str | None:
    """Return why the certificate in a secret has to be replaced by one that is issued afresh, or None.

    Args:
      data: of the secret.
      leaf: what is wanted.
      authorities: whose certificates may stay, at least one.
      now: the time.
    """
    try:
        certificate = load_pair(data)[0]
        hosts, addresses, purposes = _contents(certificate)
    except CertificateError as error:
        return str(error)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end:
        return f"tls.crt expired at {go_time(end)}"
    # Nothing can begin before its CA does.
    soonest = max(each.certificate.not_valid_before_utc for each in authorities)
    if begin > max(now + _SKEW, soonest):
        return f"tls.crt is not valid before {go_time(begin)}"
    if aged(certificate, now):
        return f"tls.crt expires at {go_time(end)}: {RENEWAL:.0%} of its life is over"
    if not any(issued_by(certificate, authority.certificate) for authority in authorities):
        return "tls.crt was issued by another CA"
    if purposes is not None and PURPOSES[leaf.usage] not in purposes:
        return f"tls.crt is not for use by a {leaf.usage}"
    changes = _differences("DNS name", hosts, set(leaf.hosts)) + _differences(
        "IP address", addresses, {str(each) for each in _addresses(leaf.hosts)}
    )
    return f"the hosts have changed: {', '.join(changes)}" if changes else None


def not_after(tls_crt: bytes) -> datetime:
    """Return when the first certificate ends.

    Raises:
      CertificateError: there is none.
    """
    return load_certificates(tls_crt, "tls.crt")[0].not_valid_after_utc


def aged(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether it is time for another one: :data:`RENEWAL` of its life is over."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now - begin > (end - begin) * RENEWAL


def go_time(moment: datetime) -> str:
    """Write a time as Go's ``Time.String`` does: ``2027-05-22 01:15:42 +0000 UTC``."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} +0000 UTC"


def _key_usage(*, issues: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=True,
        key_cert_sign=issues,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _addresses(
    hosts: Sequence[str],
) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found: set[ipaddress.IPv4Address | ipaddress.IPv6Address] = set()
    for host in hosts:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            continue
        # A certificate has no room for a zone.
        if not getattr(address, "scope_id", None):
            found.add(address)
    return sorted(found, key=lambda address: (address.version, int(address)))


def is_authority(certificate: x509.Certificate, name: str) -> bool:
    """Whether it may issue certificates.

    Raises:
      CertificateError: its extensions cannot be read; *name* is what it is called there.
    """
    constraints = _extension(certificate, x509.BasicConstraints, name)
    usage = _extension(certificate, x509.KeyUsage, name)
    return constraints is not None and constraints.ca and (usage is None or usage.key_cert_sign)


def _extension(certificate: x509.Certificate, kind: type[_E], name: str) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except _UNPARSABLE as error:
        raise CertificateError(name, f"cannot be read: {_first_line(error)}") from error


def _authority_key_identifier(authority: Authority) -> x509.AuthorityKeyIdentifier:
    identifier = _extension(authority.certificate, x509.SubjectKeyIdentifier, "ca.crt")
    if identifier is not None:
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.private_key.public_key())


def subject_of(certificate: x509.Certificate) -> str:
    """Return a certificate's subject as RFC 4514 has it, its serial number if the subject cannot be read."""
    try:
        return certificate.subject.rfc4514_string()
    except _UNPARSABLE:
        return f"serial number {certificate.serial_number:x}"


def purposes_of(certificate: x509.Certificate, name: str) -> x509.ExtendedKeyUsage | None:
    """Return what a certificate is for, None if it is for anything.

    Raises:
      CertificateError: its extensions cannot be read; *name* is what it is called there.
    """
    return _extension(certificate, x509.ExtendedKeyUsage, name)


def hosts_of(certificate: x509.Certificate) -> set[str]:
    """Return the DNS names and IP addresses that a certificate is for.

    Raises:
      CertificateError: its extensions cannot be read.
    """
    hosts, addresses, _ = _contents(certificate)
    return hosts | addresses


def load_pair(data: Mapping[str, bytes]) -> tuple[x509.Certificate, ...]:
    """Read the certificates of a secret, of whose first ``tls.key`` has to be the key.

    Raises:
      CertificateError: one of the two cannot be used, or they do not belong together.
    """
    certificates = load_certificates(data.get("tls.crt", b""), "tls.crt")
    if certificates[0].public_key() != _load_public_key(data.get("tls.key", b"")):
        raise CertificateError("tls.key", "is not the key of tls.crt")
    return certificates


def _load_public_key(pem: bytes) -> object:
    """Return the public part of the private key under ``tls.key``.

    Raises:
      CertificateError: it is missing, or no unencrypted key in PEM.
    """
    if not pem.strip():
        raise CertificateError("tls.key", "is missing")
    try:
        return _private_key(pem).public_key()
    except _UNPARSABLE as error:
        raise CertificateError("tls.key", f"cannot be read: {_first_line(error)}") from error


def _contents(
    certificate: x509.Certificate,
) -> tuple[set[str], set[str], x509.ExtendedKeyUsage | None]:
    names = _extension(certificate, x509.SubjectAlternativeName, "tls.crt")
    purposes = purposes_of(certificate, "tls.crt")
    if names is None:
        return set(), set(), purposes
    return (
        set(names.get_values_for_type(x509.DNSName)),
        {str(address) for address in names.get_values_for_type(x509.IPAddress)},
        purposes,
    )


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the one certificate names and has the signature of the other."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *_UNPARSABLE):
        return False
    return True


def issued_only_by(
    certificate: x509.Certificate,
    replaced: Iterable[x509.Certificate],
    authority: x509.Certificate,
) -> bool:
    """Whether a certificate is of one of those that *authority* has replaced, and not its own.

    An authority that was renewed with its name and its key has issued what it has issued before, too.
    """
    return any(issued_by(certificate, each) for each in replaced) and not issued_by(
        certificate, authority
    )


def _differences(kind: str, present: set[str], wanted: set[str]) -> list[str]:
    return [f"{kind} {host} is new" for host in sorted(wanted - present)] + [
        f"{kind} {host} is gone" for host in sorted(present - wanted)
    ]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
