"""Certificates for tests that run TLS."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtensionOID, NameOID

if TYPE_CHECKING:
    from pathlib import Path

    import trustme


def write_ca(authority: trustme.CA, directory: Path, name: str = "ca") -> str:
    path = directory / f"{name}.crt"
    authority.cert_pem.write_to_path(path)
    return str(path)


def write_pair(authority: trustme.CA, directory: Path, name: str, host: str) -> tuple[str, str]:
    """Write a certificate for *host* and its key, and return their paths."""
    leaf = authority.issue_cert(host)
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    leaf.private_key_pem.write_to_path(key)
    leaf.cert_chain_pems[0].write_to_path(cert)
    return str(cert), str(key)


def write_agent_pair(
    authority: trustme.CA, directory: Path, name: str, *uris: str | bytes
) -> tuple[str, str]:
    """Write an agent's certificate with any bytes as URIs and its key, and return their paths."""
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    signer = load_pem_private_key(authority.private_key_pem.bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    own = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    common_name = x509.NameAttribute(NameOID.COMMON_NAME, "open-cluster-management:cluster-proxy")
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([common_name]))
        .issuer_name(issuer.subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
    )
    if uris:
        # RFC 5280 §4.2.1.6: a SEQUENCE of GeneralNames; [6] is a URI, [2] a DNS name.
        names = _der(0x82, b"agent.test")
        names += b"".join(_der(0x86, uri.encode() if isinstance(uri, str) else uri) for uri in uris)
        extension = x509.UnrecognizedExtension(
            ExtensionOID.SUBJECT_ALTERNATIVE_NAME, _der(0x30, names)
        )
        builder = builder.add_extension(extension, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    cert.write_bytes(certificate.public_bytes(Encoding.PEM))
    key.write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(cert), str(key)


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 128:
        return bytes((tag, size)) + content
    length = size.to_bytes(3, "big").lstrip(b"\0")
    return bytes((tag, 0x80 | len(length))) + length + content
