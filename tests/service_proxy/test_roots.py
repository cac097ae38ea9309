"""Row H15: whom the apiserver's and services' certificates may come from."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

from clusterproxy.errors import ConfigError
from clusterproxy.service_proxy.roots import parse_bundle, services_context

if TYPE_CHECKING:
    from pathlib import Path

ONE, TWO = (trustme.CA().cert_pem.bytes() for _ in range(2))
BROKEN = TWO.replace(b"MII", b"AAA", 1)


def der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def test_a_bundle() -> None:
    assert parse_bundle(b"# mine\n" + ONE + b"\xff\n" + TWO) == der(ONE) + der(TWO)
    assert parse_bundle(ONE.replace(b"\n", b"\r\n")) == der(ONE)


@pytest.mark.parametrize(
    ("pem", "why"),
    [
        (b"", "no certificate in PEM form"),
        (b"garbage", "no certificate in PEM form"),
        (der(ONE), "no certificate in PEM form"),
        (ONE[:-30], "has no end"),
        # To say so took minutes.
        (b"-----BEGIN CERTIFICATE-----" * 38_000, "has no end"),
        (TWO + ONE[:-30], "has no end"),
        (ONE[:100] + ONE, "has no end"),
        (BROKEN, "certificate 1 of 1 cannot be parsed"),
        (ONE + BROKEN, "certificate 2 of 2 cannot be parsed"),
        (ONE.replace(b"MII", b"\xff\xff\xff", 1), "certificate 1 of 1 cannot be parsed"),
        (b"-----BEGIN CERTIFICATE----------END CERTIFICATE-----", "certificate 1 of 1"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "certificate 1 of 1"),
    ],
)
def test_what_is_no_bundle(pem: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_bundle(pem)


def trusted(root: Path, additional: Path | str = "") -> set[bytes]:
    return set(services_context(str(root), str(additional)).get_ca_certs(binary_form=True))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "ca.crt"
    path.write_bytes(ONE)
    return path


def test_the_apiservers_authority_alone(root: Path, tmp_path: Path) -> None:
    assert trusted(root) == {der(ONE)}
    assert trusted(root, tmp_path / "missing.crt") == {der(ONE)}
    assert trusted(root, tmp_path / "missing" / "x.crt") == {der(ONE)}


def test_more_of_them(root: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.crt"
    more.write_bytes(TWO + ONE)
    assert trusted(root, more) == {der(ONE), der(TWO)}


@pytest.mark.parametrize("content", [b"", b"x", BROKEN, ONE + BROKEN])
def test_malformed(root: Path, tmp_path: Path, content: bytes) -> None:
    more = tmp_path / "more.crt"
    more.write_bytes(content)
    with pytest.raises(ConfigError, match=f"CA certificates {more}: ") as caught:
        trusted(root, more)
    assert caught.value.field == "additional-service-ca"
    root.write_bytes(content)
    with pytest.raises(ConfigError, match=f"CA certificates {root}: "):
        trusted(root)


def test_unreadable(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        trusted(root, tmp_path)
    with pytest.raises(ConfigError, match="Not a directory"):
        trusted(root, root / "x")
    root.unlink()
    with pytest.raises(ConfigError, match=f"{root}: No such file"):
        trusted(root)
