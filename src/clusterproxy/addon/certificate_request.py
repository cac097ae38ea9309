"""What stands in a certificate request: whether it is what it must be, and nothing more. Pure."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from clusterproxy.errors import ClusterProxyError
from clusterproxy.kube.resource import text_at

from .registration import ADDON_NAME

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

    from clusterproxy.kube.resource import Object

    from .registration import Subject

#: The only host that the certificates are for, as the klusterlet asks for it.
AGENT_HOST: Final = f"{ADDON_NAME}.addon.open-cluster-management.io"

#: In the place of a request that is not kept: it is far larger than any of an agent.
TOO_LARGE: Final = "too large"

# The klusterlet may put all into that group in which they are anyway.
_EVERYBODY: Final = "system:authenticated"
_SMALLEST_RSA: Final = 2048
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

_UNPARSABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class RequestRefused(ClusterProxyError):
    """A request must not get a certificate.

    Attributes:
      reason: one word for why.
      message: a sentence, which names what to mend.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def load_request(request: Object, subject: Subject) -> x509.CertificateSigningRequest:
    """Return what a CertificateSigningRequest has in it.

    Args:
      request: of any shape.
      subject: whose name it must bear.

    Raises:
      RequestRefused: it is too large, or cannot be read, or is for another name, or for a host that is not the agent's, or its key is
        weak. Its URIs are not looked at, see :func:`check_uris`, and the other extensions that it wants are no matter.
    """
    text = text_at(request, "spec", "request")
    if text == TOO_LARGE:
        raise RequestRefused(
            "TooLarge", "spec.request: with labels and annotations it is too large"
        )
    try:
        pem = base64.b64decode(text, validate=True)
        parsed = x509.load_pem_x509_csr(pem)
        if not parsed.is_signature_valid:
            raise RequestRefused(
                "Malformed", "spec.request is not signed by the key that it is for"
            )
        _check_key(parsed.public_key())
        _check_subject(parsed.subject, subject)
        _check_hosts(parsed)
    except (binascii.Error, *_UNPARSABLE) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise RequestRefused(
            "Malformed", f"spec.request is no certificate request in PEM: {lines[0][:200]}"
        ) from error
    return parsed


def check_uris(parsed: x509.CertificateSigningRequest, allowed: str) -> None:
    """Check that a request has no URI but the one that is *allowed*.

    Raises:
      RequestRefused: it has.
    """
    for name in names_of(parsed):
        if isinstance(name, x509.UniformResourceIdentifier) and name.value != allowed:
            raise RequestRefused(
                "ForeignName", f"spec.request: it must not have the URI {name.value[:200]!r}"
            )


def names_of(parsed: x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    """Return the names beside the subject that a request wants."""
    try:
        return list(parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _check_key(key: CertificatePublicKeyTypes) -> None:
    if isinstance(key, rsa.RSAPublicKey):
        good = key.key_size >= _SMALLEST_RSA
    elif isinstance(key, ec.EllipticCurvePublicKey):
        good = isinstance(key.curve, _CURVES)
    else:
        good = isinstance(key, ed25519.Ed25519PublicKey)
    if not good:
        raise RequestRefused(
            "WeakKey",
            f"spec.request: the key must be of RSA with {_SMALLEST_RSA} bits or more, P-256, P-384, P-521 or Ed25519",
        )


def _check_subject(name: x509.Name, wanted: Subject) -> None:
    expected = {
        NameOID.COMMON_NAME: {wanted.user},
        NameOID.ORGANIZATION_NAME: {*wanted.groups},
        NameOID.ORGANIZATIONAL_UNIT_NAME: {*wanted.organization_units},
    }
    found: dict[x509.ObjectIdentifier, set[str | bytes]] = {oid: set() for oid in expected}
    for attribute in name:
        if attribute.oid == NameOID.COMMON_NAME and found[NameOID.COMMON_NAME]:
            raise RequestRefused("ForeignSubject", "spec.request: the subject has several CN")
        found.setdefault(attribute.oid, set()).add(attribute.value)
    found[NameOID.ORGANIZATION_NAME].discard(_EVERYBODY)
    if found != expected:
        raise RequestRefused(
            "ForeignSubject",
            f"spec.request: the subject is {name.rfc4514_string()[:300]!r}, and registered are CN {wanted.user}, "
            f"O {', '.join(wanted.groups)}, OU {', '.join(wanted.organization_units) or 'none'}",
        )


def _check_hosts(parsed: x509.CertificateSigningRequest) -> None:
    for name in names_of(parsed):
        if isinstance(name, x509.UniformResourceIdentifier):
            continue
        if not isinstance(name, x509.DNSName) or name.value != AGENT_HOST:
            raise RequestRefused(
                "ForeignName",
                f"spec.request: it is for {str(name.value)[:200]!r}, and may be for {AGENT_HOST} only",
            )
