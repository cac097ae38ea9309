"""Certificates for tests that run TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
