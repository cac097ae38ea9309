from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

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


def test_a_client_must_be_allowed_to_be_one() -> None:
    assert verdict(pair(leaf=CLIENT)) == (
        "tls.crt is not for use by a server: its extended key usage lacks serverAuth"
    )
    assert verdict(pair(), CLIENT) == (
        "tls.crt is not for use by a client: its extended key usage lacks clientAuth"
    )


@pytest.mark.parametrize(
    ("names", "covered"),
    [
        (("*.example.com",), True),
        (("PROXY.example.com",), True),
        (("*.com",), False),
        (("example.com",), False),
        (("*",), False),
        (("*.proxy.example.com",), False),
    ],
)
def test_a_wildcard_stands_for_one_label(names: tuple[str, ...], covered: bool) -> None:
    wanted = Leaf(name="s", hosts=("proxy.example.com",), usage=Usage.SERVER)
    found = verdict(pair(leaf=Leaf(name="s", hosts=names, usage=Usage.SERVER)), wanted)
    assert found == (None if covered else "tls.crt is not for proxy.example.com")


class Chain:
    """A leaf by way of an intermediate."""

    def __init__(
        self,
        *,
        ca: bool = True,
        end: datetime = NOW + timedelta(days=10),
        purpose: x509.ObjectIdentifier | None = None,
    ) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "intermediate")])
        intermediate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(AUTHORITY.certificate.subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(NOW - timedelta(hours=1))
            .not_valid_after(end)
            .add_extension(
                x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True
            )
        )
        if purpose is not None:
            usage = x509.ExtendedKeyUsage([purpose])
            intermediate = intermediate.add_extension(usage, critical=False)
        leaf_key = ec.generate_private_key(ec.SECP256R1())
        # Without an extended key usage it is for anything.
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
        signed = intermediate.sign(AUTHORITY.private_key, hashes.SHA256())
        self.leaf, self.intermediate = (each.public_bytes(Encoding.PEM) for each in (leaf, signed))
        self.key = leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def data(self, following: bytes | None = None) -> dict[str, bytes]:
        rest = self.intermediate if following is None else following
        return {"tls.crt": self.leaf + rest, "tls.key": self.key}


def test_an_intermediate_is_followed_and_a_gap_is_not() -> None:
    chain = Chain()
    assert verdict(chain.data()) is None
    assert verdict(chain.data(), CLIENT) is None
    told = verdict(chain.data(b""))
    assert told == "tls.crt does not come from a CA in ca.crt of secret proxy-server-ca"
    assert verdict(chain.data(pair(OTHER)["tls.crt"])) == told


def test_whoever_issues_must_be_allowed_to() -> None:
    assert verdict(Chain(ca=False).data()) == (
        "tls.crt: CN=intermediate is no CA: it lacks CA:TRUE or the usage certSign"
    )
    assert verdict(Chain(end=NOW).data()) == (
        "tls.crt: CN=intermediate is valid from 2026-11-26 11:00:00 +0000 UTC to 2026-11-26 12:00:00 +0000 UTC"
    )
    clients = Chain(purpose=ExtendedKeyUsageOID.CLIENT_AUTH).data()
    assert verdict(clients, CLIENT) is None
    assert verdict(clients) == (
        "tls.crt: CN=intermediate is a CA, but not of certificates for a server"
    )


def test_one_of_the_trusted_must_be_valid() -> None:
    data = pair()
    # Nothing that we issue outlives its CA, but what is provided may.
    old = new_authority(NOW - timedelta(days=4000), private_key=AUTHORITY.private_key)
    told = why_unusable(data, SERVER, old.certificates, NOW)
    assert told is not None
    assert told.startswith("ca.crt of secret proxy-server-ca: CN=open-cluster-management:")
    assert "is valid from 2015-" in told
    both = (*old.certificates, *AUTHORITY.certificates)
    assert why_unusable(data, SERVER, both, NOW) is None


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
