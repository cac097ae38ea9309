"""Kubeconfigs of tests, and keys with their certificate requests."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kube.control_plane import ControlPlane

Object = dict[str, Any]


def kubeconfig(plane: ControlPlane, user: Object, *, namespace: str = "", server: str = "") -> str:
    """Return a kubeconfig of a control plane, with the names that OCM's klusterlet gives its parts.

    *server* is its URL where that is not the one here.
    """
    context = {"cluster": "hub", "user": "default-auth"} | (
        {"namespace": namespace} if namespace else {}
    )
    cluster = {
        "server": server or plane.server,
        "certificate-authority-data": encoded(plane.ca.read_bytes()),
    }
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "hub", "cluster": cluster}],
            "users": [{"name": "default-auth", "user": user}],
            "contexts": [{"name": "default-context", "context": context}],
            "current-context": "default-context",
        }
    )


def encoded(data: bytes) -> str:
    """Return bytes as JSON has them."""
    return base64.b64encode(data).decode()


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a key as a klusterlet makes them."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key as a klusterlet writes it, ``EC PRIVATE KEY``."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def certificate_request(
    key: ec.EllipticCurvePrivateKey,
    user: str,
    groups: Iterable[str] = (),
    units: Iterable[str] = (),
    *,
    names: Iterable[str] = (),
    uris: Iterable[str] = (),
) -> bytes:
    """Return a request in PEM, of these DNS names and URIs."""
    attributes = [
        *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups),
        *(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in units),
        x509.NameAttribute(NameOID.COMMON_NAME, user, _validate=False),
    ]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives += [x509.UniformResourceIdentifier(uri) for uri in uris]
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
