from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from golden_objects import HOSTNAME, golden, golden_configuration

from clusterproxy.addon import certificates
from clusterproxy.addon.certificates import (
    Authority,
    CertificateError,
    Leaf,
    Usage,
    go_time,
    hosts_of,
    issue,
    load_authority,
    load_certificates,
    new_authority,
    new_key,
    not_after,
    why_reissue,
)
from clusterproxy.addon.configuration import parse_configuration
from clusterproxy.addon.hub_objects import service_proxy_leaf, wanted_leaves

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric import rsa

NOW = datetime(2026, 11, 23, 1, 15, 42, 500_000, tzinfo=UTC)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
SERVER = Leaf(
    name="proxy-server", hosts=("localhost", "127.0.0.1", "a.example"), usage=Usage.SERVER
)


@pytest.fixture(scope="module")
def keys() -> list[rsa.RSAPrivateKey]:
    return [new_key() for _ in range(2)]


@pytest.fixture(scope="module")
def authority(keys: list[rsa.RSAPrivateKey]) -> Authority:
    return new_authority(NOW, private_key=keys[0])


@pytest.fixture(scope="module")
def other(keys: list[rsa.RSAPrivateKey]) -> Authority:
    return new_authority(NOW, private_key=keys[1])


@pytest.fixture(scope="module")
def secret(authority: Authority) -> dict[str, bytes]:
    crt, key = issue(authority, SERVER, NOW)
    return {"tls.crt": crt, "tls.key": key}


def describe(certificate: x509.Certificate) -> dict[str, object]:
    """Say of a certificate what the golden files say."""
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    try:
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "validity": certificate.not_valid_after_utc - certificate.not_valid_before_utc,
        "usage": (usage.critical, usage.value.key_cert_sign),
        "purposes": [purpose.dotted_string for purpose in purposes],
        "ca": (constraints.critical, constraints.value.ca),
        "names": set(names.get_values_for_type(x509.DNSName)),
        "addresses": {str(address) for address in names.get_values_for_type(x509.IPAddress)},
    }


def golden_description(text: str) -> dict[str, object]:
    def moment(name: str) -> datetime:
        (found,) = re.findall(rf"{name}=(.*?) GMT", text)
        return datetime.strptime(found, "%b %d %H:%M:%S %Y").replace(tzinfo=UTC)

    (subject,), (issuer,) = (
        re.findall("subject=CN = (.*?);", text),
        re.findall("issuer=CN = (.*?);", text),
    )
    purposes = {
        "TLS Web Server Authentication": ExtendedKeyUsageOID.SERVER_AUTH,
        "TLS Web Client Authentication": ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    stated = [oid.dotted_string for purpose, oid in purposes.items() if purpose in text]
    return {
        "subject": f"CN={subject}",
        "issuer": f"CN={issuer}",
        "validity": moment("notAfter") - moment("notBefore"),
        "usage": ("Key Usage: critical" in text, "Certificate Sign" in text),
        "purposes": stated or [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE.dotted_string],
        "ca": ("Basic Constraints: critical" in text, "CA:TRUE" in text),
        "names": set(re.findall(r"DNS:([^,;'>]+?)(?=,|;|$| \||>)", text)),
        "addresses": set(re.findall(r"IP Address:([0-9a-f.:]+)", text)),
    }


@pytest.mark.parametrize(
    "name", ["proxy-server", "agent-server", "proxy-client", "cluster-proxy-user-serving-cert"]
)
def test_certificates_are_the_originals(name: str, keys: list[rsa.RSAPrivateKey]) -> None:
    authority = new_authority(NOW - SECOND, private_key=keys[0])
    text: str = golden(HOSTNAME)["Secret", name]["data"]["tls.crt"]
    _, leaf_text, authority_text = re.sub(r"\s+", " ", text).split(" | ")
    leaf = wanted_leaves(parse_configuration(golden_configuration(HOSTNAME)))[name]
    chain = load_certificates(issue(authority, leaf, NOW)[0], "tls.crt")
    assert len(chain) == 2
    assert describe(chain[0]) == golden_description(leaf_text)
    assert describe(chain[1]) == golden_description(authority_text)


def test_an_authority_is_read_as_it_was_made(authority: Authority) -> None:
    assert load_authority(authority.crt, authority.key, NOW) == authority
    assert authority.key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert b"PRIVATE" not in repr(authority).encode()
    certificate = authority.certificate
    assert certificate.not_valid_before_utc == NOW.replace(microsecond=0)
    identifier = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert identifier == x509.SubjectKeyIdentifier.from_public_key(certificate.public_key())


def test_a_certificate_is_of_the_originals_layout(
    authority: Authority, secret: dict[str, bytes]
) -> None:
    assert secret["tls.key"].startswith(b"-----BEGIN RSA PRIVATE KEY-----")
    leaf, issuer = load_certificates(secret["tls.crt"], "tls.crt")
    assert issuer == authority.certificate
    # The authority is of the same second, and nothing is valid before it.
    assert leaf.not_valid_before_utc == NOW.replace(microsecond=0)
    assert leaf.not_valid_after_utc == NOW.replace(microsecond=0) + 180 * DAY
    identifier = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert identifier.key_identifier == own.key_identifier
    assert hosts_of(leaf) == {"localhost", "127.0.0.1", "a.example"}
    assert not_after(secret["tls.crt"]) == leaf.not_valid_after_utc
    assert go_time(leaf.not_valid_after_utc) == "2027-05-22 01:15:42 +0000 UTC"
    later = load_certificates(issue(authority, SERVER, NOW + DAY)[0], "tls.crt")[0]
    assert later.not_valid_before_utc == NOW.replace(microsecond=0) + DAY - SECOND


def test_nothing_outlives_its_authority(authority: Authority) -> None:
    end = authority.certificate.not_valid_after_utc
    crt, _ = issue(authority, SERVER, end - DAY)
    assert not_after(crt) == end - 2 * SECOND
    assert not authority.expired(end - 3 * SECOND)
    assert authority.expired(end - 2 * SECOND)
    with pytest.raises(CertificateError, match=r"ca\.crt expired at 2036-"):
        issue(authority, SERVER, end - 2 * SECOND)
    with pytest.raises(CertificateError, match=r"ca\.crt expired at 2036-"):
        load_authority(authority.crt, authority.key, end)
    assert load_authority(authority.crt, authority.key).expired(end)


def test_a_name_too_long_for_the_subject_is_a_san(authority: Authority) -> None:
    long = "a" * 60 + ".example"
    leaf = Leaf(name="x", hosts=(long, "b.example"), usage=Usage.SERVER)
    made = load_certificates(issue(authority, leaf, NOW)[0], "tls.crt")[0]
    assert made.subject.rfc4514_string() == "CN=b.example"
    assert long in hosts_of(made)
    leaf = Leaf(name="x", hosts=(long,), usage=Usage.SERVER)
    crt, key = issue(authority, leaf, NOW)
    made = load_certificates(crt, "tls.crt")[0]
    assert not list(made.subject)
    assert made.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
    assert why_reissue({"tls.crt": crt, "tls.key": key}, leaf, (authority,), NOW) is None


def test_a_host_that_no_certificate_can_hold_is_an_error(authority: Authority) -> None:
    leaf = Leaf(name="proxy-server", hosts=("münchen.example",), usage=Usage.SERVER)
    with pytest.raises(CertificateError, match="proxy-server cannot hold its hosts"):
        issue(authority, leaf, NOW)


def test_the_service_proxies_certificate(authority: Authority) -> None:
    made = load_certificates(issue(authority, service_proxy_leaf(), NOW)[0], "tls.crt")[0]
    assert made.subject.rfc4514_string() == "CN=*"
    assert hosts_of(made) == {"*", "localhost", "127.0.0.1", "*.open-cluster-management.proxy"}


def pem_of(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def test_authorities_that_cannot_be_used(
    authority: Authority, other: Authority, secret: dict[str, bytes]
) -> None:
    key = authority.private_key
    secret_key = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    elliptic = pem_of(ec.generate_private_key(ec.SECP256R1()), PrivateFormat.PKCS8)
    for crt, pem, message in (
        (b"", authority.key, "ca.crt is missing"),
        (b"garbage", authority.key, "ca.crt is no certificate in PEM"),
        (authority.crt[:200], authority.key, "ca.crt is no certificate in PEM"),
        (authority.crt[:200] + b"x" + authority.crt[200:], authority.key, "ca.crt is no cert"),
        (authority.crt, b" ", "ca.key is missing"),
        (authority.crt, b"garbage", "ca.key is no unencrypted PKCS#8 key"),
        (authority.crt, pem_of(key, PrivateFormat.TraditionalOpenSSL), "openssl pkcs8 -topk8"),
        (authority.crt, secret_key, "ca.key is no unencrypted PKCS#8 key"),
        (authority.crt, authority.key[:100], "ca.key cannot be read"),
        (authority.crt, elliptic, "ca.key must be an RSA key"),
        (authority.crt, other.key, "ca.key is not the key of the first certificate in ca.crt"),
        (secret["tls.crt"], authority.key, "ca.crt is not the certificate of a CA"),
    ):
        with pytest.raises(CertificateError) as caught:
            load_authority(crt, pem)
        assert message in str(caught.value)
        assert str(caught.value).startswith(caught.value.key)


def test_a_valid_certificate_stays(authority: Authority, secret: dict[str, bytes]) -> None:
    assert why_reissue(secret, SERVER, (authority,), NOW) is None
    assert why_reissue(secret, SERVER, (authority,), NOW + 0.8 * 180 * DAY - SECOND) is None
    assert why_reissue({**secret, "foreign": b"x"}, SERVER, (authority,), NOW) is None
    # The clock of whoever issued it was ahead.
    assert why_reissue(secret, SERVER, (authority,), NOW - timedelta(minutes=4)) is None


def test_a_clock_that_was_ahead_by_no_more_than_five_minutes(authority: Authority) -> None:
    """Of an authority that is older, so that the certificate alone begins in the future."""
    later = NOW + 10 * DAY
    crt, key = issue(authority, SERVER, later)
    data = {"tls.crt": crt, "tls.key": key}
    begin = x509.load_pem_x509_certificate(crt).not_valid_before_utc
    five = timedelta(minutes=5)
    assert why_reissue(data, SERVER, (authority,), begin - five) is None
    assert why_reissue(data, SERVER, (authority,), begin - five - SECOND) == (
        f"tls.crt is not valid before {go_time(begin)}"
    )


def test_why_a_certificate_is_replaced(
    authority: Authority, other: Authority, secret: dict[str, bytes]
) -> None:
    def why(
        crt: bytes = secret["tls.crt"],
        key: bytes = secret["tls.key"],
        leaf: Leaf = SERVER,
        by: Authority = authority,
        now: datetime = NOW,
    ) -> str:
        return str(why_reissue({"tls.crt": crt, "tls.key": key}, leaf, (by,), now))

    assert why_reissue({}, SERVER, (authority,), NOW) == "tls.crt is missing"
    assert why(crt=b"x").startswith("tls.crt is no certificate in PEM")
    assert why(key=b"").startswith("tls.key is missing")
    assert why(key=b"x").startswith("tls.key cannot be read")
    assert why(key=other.key) == "tls.key is not the key of tls.crt"
    assert why(now=NOW + 181 * DAY) == "tls.crt expired at 2027-05-22 01:15:42 +0000 UTC"
    assert "80% of its life is over" in why(now=NOW + 0.8 * 180 * DAY + SECOND)
    assert why(by=other) == "tls.crt was issued by another CA"
    assert "is not for use by a client" in why(
        leaf=Leaf(name="x", hosts=SERVER.hosts, usage=Usage.CLIENT)
    )
    changed = Leaf(name="x", hosts=("localhost", "a.example", "::1"), usage=Usage.SERVER)
    assert why(leaf=changed) == (
        "the hosts have changed: DNS name ::1 is new, DNS name 127.0.0.1 is gone, "
        "IP address ::1 is new, IP address 127.0.0.1 is gone"
    )


def test_a_certificate_of_the_future_is_replaced_unless_its_authority_is(
    authority: Authority,
) -> None:
    crt, key = issue(authority, SERVER, NOW + DAY)
    data = {"tls.crt": crt, "tls.key": key}
    assert "not valid before" in str(why_reissue(data, SERVER, (authority,), NOW))
    # Whatever is issued begins with its authority: it would be replaced for ever.
    crt, key = issue(authority, SERVER, NOW - DAY)
    data = {"tls.crt": crt, "tls.key": key}
    assert why_reissue(data, SERVER, (authority,), NOW - DAY) is None


def test_certificates_that_the_parser_trips_over(
    authority: Authority, keys: list[rsa.RSAPrivateKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the library raises for a strange certificate is told as what is wrong with it."""

    def fail(_: bytes) -> list[x509.Certificate]:
        raise x509.DuplicateExtension("Duplicate extension", ExtensionOID.KEY_USAGE)

    monkeypatch.setattr(x509, "load_pem_x509_certificates", fail)
    with pytest.raises(CertificateError, match=r"ca\.crt is no certificate in PEM: Duplicate"):
        load_authority(authority.crt, authority.key)


def shake_hands(
    server: dict[str, bytes],
    trusted: bytes,
    directory: str,
    host: str,
    flags: ssl.VerifyFlags = ssl.VerifyFlags.VERIFY_DEFAULT,
) -> None:
    """Run a TLS handshake in memory; raise what the client raises."""
    crt, key = f"{directory}/tls.crt", f"{directory}/tls.key"
    for path, data in ((crt, server["tls.crt"]), (key, server["tls.key"])):
        with open(path, "wb") as file:
            file.write(data)
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(crt, key)
    connecting = ssl.create_default_context(cadata=trusted.decode())
    connecting.verify_flags |= flags
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        connecting.wrap_bio(to_client, to_server, server_hostname=host),
        accepting.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(3):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_certificates_stand_up_to_strict_verification(
    keys: list[rsa.RSAPrivateKey], tmp_path: Path
) -> None:
    """Python verifies so by default from 3.13 on."""
    now = datetime.now(UTC)
    authority = new_authority(now, private_key=keys[0])
    crt, key = issue(authority, SERVER, now)
    strict = ssl.VerifyFlags.VERIFY_X509_STRICT
    data = {"tls.crt": crt, "tls.key": key}
    shake_hands(data, authority.crt, str(tmp_path), "localhost", strict)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "a.example"])
def test_openssl_finds_the_issuer_among_authorities_of_one_name(
    host: str, keys: list[rsa.RSAPrivateKey], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also if the old one bears no key identifier, as one that was made by hand may."""
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, certificates.AUTHORITY_NAME)])
    plain = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(keys[0].public_key())
        .serial_number(1)
        .not_valid_before(now - DAY)
        .not_valid_after(now + 400 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(keys[0], hashes.SHA256())
    )
    old = load_authority(
        plain.public_bytes(Encoding.PEM), pem_of(keys[0], PrivateFormat.PKCS8), now
    )
    new = new_authority(now, private_key=keys[1], distinct=True)
    assert new.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == (
        "open-cluster-management:cluster-proxy"
    )
    directory = str(tmp_path_factory.mktemp("tls"))
    for bundle in (old.crt + new.crt, new.crt + old.crt):
        for signer in (old, new):
            crt, key = issue(signer, SERVER, now)
            shake_hands({"tls.crt": crt, "tls.key": key}, bundle, directory, host)
    crt, key = issue(old, SERVER, now)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands({"tls.crt": crt, "tls.key": key}, new.crt, directory, host)
