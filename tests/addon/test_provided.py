from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from clusterproxy.addon.certificates import Authority, Leaf, Usage, issue, new_authority
from clusterproxy.addon.provided import why_unusable

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
SERVER = Leaf(name="s", hosts=("localhost", "127.0.0.1"), usage=Usage.SERVER)
CLIENT = Leaf(name="c", hosts=("localhost", "127.0.0.1"), usage=Usage.CLIENT)
AUTHORITY = new_authority(NOW - timedelta(days=1))
OTHER = new_authority(NOW - timedelta(days=1))


def pair(
    authority: Authority = AUTHORITY, leaf: Leaf = SERVER, at: datetime = NOW
) -> dict[str, bytes]:
    crt, key = issue(authority, leaf, at)
    return {"tls.crt": crt, "tls.key": key}


def verdict(data: dict[str, bytes], leaf: Leaf = SERVER, now: datetime = NOW) -> str | None:
    return why_unusable(data, leaf, AUTHORITY.certificates, now)


def test_more_names_and_another_end_are_fine() -> None:
    more = Leaf(name="s", hosts=("localhost", "127.0.0.1", "hub.example.com"), usage=Usage.SERVER)
    assert verdict(pair(leaf=more)) is None
    # Nobody renews it but its owner: its age is none of our business.
    assert verdict(pair(), now=NOW + timedelta(days=179)) is None


def test_a_client_need_not_be_anybody() -> None:
    nobody = Leaf(name="c", hosts=("someone.example.com",), usage=Usage.CLIENT)
    assert verdict(pair(leaf=nobody), CLIENT) is None


def test_an_intermediate_is_followed_and_a_gap_is_not() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "intermediate")])
    intermediate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(AUTHORITY.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(hours=1))
        .not_valid_after(NOW + timedelta(days=10))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(AUTHORITY.private_key, hashes.SHA256())
    )
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(name)
        .public_key(leaf_key.public_key())
        .serial_number(2)
        .not_valid_before(NOW - timedelta(hours=1))
        .not_valid_after(NOW + timedelta(days=10))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName("127.0.0.1")]),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    pem_key = leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = [each.public_bytes(Encoding.PEM) for each in (leaf, intermediate)]
    assert verdict({"tls.crt": b"".join(chain), "tls.key": pem_key}) is None
    told = verdict({"tls.crt": chain[0], "tls.key": pem_key})
    assert told == "tls.crt does not come from a CA in ca.crt of secret proxy-server-ca"
    unrelated = pair(OTHER)["tls.crt"]
    assert verdict({"tls.crt": chain[0] + unrelated, "tls.key": pem_key}) == told


@pytest.mark.parametrize(
    ("data", "now", "told"),
    [
        ({}, NOW, "tls.crt is missing"),
        ({"tls.crt": pair()["tls.crt"]}, NOW, "tls.key is missing"),
        ({"tls.crt": b"x", "tls.key": b"x"}, NOW, "tls.crt is no certificate"),
        (pair() | {"tls.key": pair()["tls.key"]}, NOW, "tls.key is not the key of tls.crt"),
        (pair(OTHER), NOW, "does not come from a CA"),
        (pair(), NOW - timedelta(days=1), "tls.crt is valid from"),
        (pair(), NOW + timedelta(days=181), "tls.crt is valid from"),
        (
            pair(leaf=Leaf(name="s", hosts=("localhost",), usage=Usage.SERVER)),
            NOW,
            "tls.crt is not for 127.0.0.1",
        ),
    ],
)
def test_what_is_wrong_is_told(data: dict[str, bytes], now: datetime, told: str) -> None:
    found = verdict(data, now=now)
    assert found is not None
    assert told in found
