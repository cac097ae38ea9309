from __future__ import annotations

import errno
import ssl
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest
import trustme

from clusterproxy.errors import ConfigError
from clusterproxy.transport.tls import GO_CIPHER_SUITES, client_context, server_context

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "proxy.example"

# What Go 1.26's defaultCipherSuites gives where AES has hardware, in OpenSSL's names.
GO_DEFAULT_TLS12 = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA",
]


@attrs.frozen
class Files:
    """A CA and a pair that it signed, in files."""

    ca: str
    cert: str
    key: str


def make_files(directory: Path, authority: trustme.CA | None = None) -> Files:
    directory.mkdir(exist_ok=True)
    authority = authority or trustme.CA()
    leaf = authority.issue_cert(NAME, common_name="common.example")
    files = Files(*(str(directory / name) for name in ("ca.crt", "tls.crt", "tls.key")))
    authority.cert_pem.write_to_path(files.ca)
    leaf.private_key_pem.write_to_path(files.key)
    for index, blob in enumerate(leaf.cert_chain_pems):
        blob.write_to_path(files.cert, append=index > 0)
    return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path / "pki")


def server(
    files: Files,
    *,
    client_ca: str | None = None,
    min_version: str = "",
    cipher_suites: Sequence[str] = (),
    alpn: Sequence[str] = (),
) -> ssl.SSLContext:
    return server_context(
        cert=files.cert,
        key=files.key,
        client_ca=client_ca,
        min_version=min_version,
        cipher_suites=cipher_suites,
        alpn=alpn,
    )


def client(files: Files, *, pair: bool = False, alpn: Sequence[str] = ()) -> ssl.SSLContext:
    pair_files = (files.cert, files.key) if pair else (None, None)
    return client_context(ca=files.ca, cert=pair_files[0], key=pair_files[1], alpn=alpn)


def handshake(
    client_side: ssl.SSLContext, server_side: ssl.SSLContext, name: str = NAME
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands in memory. Raises what either end raises."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    a = client_side.wrap_bio(to_client, to_server, server_hostname=name)
    b = server_side.wrap_bio(to_server, to_client, server_side=True)
    pending = [a, b]
    for _ in range(6):
        for end in tuple(pending):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            pending.remove(end)
    assert not pending
    # With TLS 1.3 a client learns only by reading that its certificate was refused.
    with pytest.raises(ssl.SSLWantReadError):
        a.read(1)
    return a, b


def tls12(context: ssl.SSLContext) -> list[str]:
    return [c["name"] for c in context.get_ciphers() if c["protocol"] != "TLSv1.3"]


def test_names_are_those_of_go_and_openssl_knows_them() -> None:
    assert len(GO_CIPHER_SUITES) == 13
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(":".join(GO_CIPHER_SUITES.values()))
    assert {c["name"] for c in context.get_ciphers()} == set(GO_CIPHER_SUITES.values())


def test_defaults_are_those_of_go(files: Files) -> None:
    for context in (server(files), client(files)):
        assert tls12(context) == GO_DEFAULT_TLS12
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION


def test_cipher_suites_keep_the_order_of_go(files: Files) -> None:
    wanted = ["TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"]
    context = server(files, cipher_suites=wanted)
    assert tls12(context) == ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-SHA"]
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_suite_of_tls13_has_no_effect(files: Files) -> None:
    suite = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"
    context = server(files, cipher_suites=["TLS_AES_256_GCM_SHA384", suite])
    assert tls12(context) == ["ECDHE-ECDSA-AES128-GCM-SHA256"]


def test_suites_of_tls13_alone_leave_tls13_alone(files: Files) -> None:
    context = server(files, cipher_suites=["TLS_AES_128_GCM_SHA256"])
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize(
    "name", ["TLS_RSA_WITH_AES_128_CBC_SHA256", "ECDHE-RSA-AES128-SHA", "", "ALL"]
)
def test_other_suites_are_refused(files: Files, name: str) -> None:
    with pytest.raises(ConfigError, match="not supported, doesn't exist or considered") as caught:
        server(files, cipher_suites=[name])
    assert caught.value.field == "cipher-suites"


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("VersionTLS10", ssl.TLSVersion.TLSv1_2),
        ("VersionTLS11", ssl.TLSVersion.TLSv1_2),
        ("VersionTLS12", ssl.TLSVersion.TLSv1_2),
        ("VersionTLS13", ssl.TLSVersion.TLSv1_3),
    ],
)
def test_min_version(files: Files, name: str, version: ssl.TLSVersion) -> None:
    assert server(files, min_version=name).minimum_version is version


def test_an_unknown_min_version_is_refused(files: Files) -> None:
    with pytest.raises(ConfigError, match="VersionTLS14"):
        server(files, min_version="VersionTLS14")


def test_handshake_with_client_certificates(files: Files) -> None:
    a, b = handshake(
        client(files, pair=True, alpn=["extra", "h2"]),
        server(files, client_ca=files.ca, alpn=["h2"]),
    )
    assert a.selected_alpn_protocol() == b.selected_alpn_protocol() == "h2"
    assert a.version() == "TLSv1.3"
    certificate = b.getpeercert()
    assert certificate
    assert certificate["subjectAltName"] == (("DNS", NAME),)


def test_handshake_without_client_certificates(files: Files) -> None:
    _, b = handshake(client(files), server(files))
    assert not b.getpeercert()


def test_certificates_in_memory_are_trusted_alone(files: Files, tmp_path: Path) -> None:
    others = make_files(tmp_path / "others")
    der = ssl.PEM_cert_to_DER_cert(Path(files.ca).read_text())
    context = client_context(ca=der, cert=None, key=None, alpn=())
    handshake(context, server(files))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, server(others))


def test_handshake_with_tls12(files: Files) -> None:
    old = client(files)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    a, _ = handshake(old, server(files))
    cipher = a.cipher()
    assert cipher is not None
    assert cipher[:2] == ("ECDHE-ECDSA-AES128-GCM-SHA256", "TLSv1.2")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_tickets_are_given_out(files: Files, version: ssl.TLSVersion) -> None:
    context = client(files)
    context.maximum_version = version
    a, _ = handshake(context, server(files))
    assert a.session is None or not a.session.has_ticket


def test_a_client_without_a_certificate_is_refused(files: Files) -> None:
    with pytest.raises(ssl.SSLError, match=r"(?i)peer.did.not.return.a.certificate"):
        handshake(client(files), server(files, client_ca=files.ca))


def test_a_certificate_of_another_ca_is_refused(files: Files, tmp_path: Path) -> None:
    foreign = make_files(tmp_path / "foreign")
    context = client_context(ca=files.ca, cert=foreign.cert, key=foreign.key, alpn=[])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, server(files, client_ca=files.ca))


def test_a_server_of_another_ca_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client(files), server(make_files(tmp_path / "foreign")))


@pytest.mark.parametrize("name", ["other.example", "common.example"])
def test_another_server_name_is_refused(files: Files, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(client(files), server(files), name)


def test_an_intermediate_is_a_root_as_in_go(tmp_path: Path) -> None:
    root = trustme.CA()
    files = make_files(tmp_path / "pki", root.create_child_ca())
    handshake(client(files, pair=True), server(files, client_ca=files.ca))


def broken(call: str, files: Files, **changes: str) -> ConfigError:
    changed = attrs.evolve(files, **changes)
    make = partial(server, client_ca=changed.ca) if call == "server" else partial(client, pair=True)
    with pytest.raises(ConfigError) as caught:
        make(changed)
    return caught.value


@pytest.mark.parametrize("call", ["server", "client"])
@pytest.mark.parametrize("field", ["ca", "cert", "key"])
class TestBrokenFiles:
    def test_missing(self, files: Files, tmp_path: Path, call: str, field: str) -> None:
        error = broken(call, files, **{field: str(tmp_path / "gone.pem")})
        assert error.field == field
        assert str(tmp_path / "gone.pem") in error.message
        assert "No such file or directory" in error.message

    def test_a_directory(self, files: Files, tmp_path: Path, call: str, field: str) -> None:
        error = broken(call, files, **{field: str(tmp_path)})
        assert (error.field, "Is a directory" in error.message) == (field, True)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe garbage", b"-----BEGIN NONSENSE-----\n"])
    def test_not_pem(
        self, files: Files, tmp_path: Path, call: str, field: str, content: bytes
    ) -> None:
        path = tmp_path / "bad.pem"
        path.write_bytes(content)
        error = broken(call, files, **{field: str(path)})
        assert (error.field, str(path) in error.message) == (field, True)

    def test_cut_short(self, files: Files, tmp_path: Path, call: str, field: str) -> None:
        path = tmp_path / "half.pem"
        with open(getattr(files, field), "rb") as whole:
            content = whole.read()
        path.write_bytes(content[: len(content) // 2])
        error = broken(call, files, **{field: str(path)})
        assert (error.field, str(path) in error.message) == (field, True)

    def test_a_nul_in_the_path(self, files: Files, call: str, field: str) -> None:
        assert broken(call, files, **{field: "a\0b"}).field == field


def test_an_unreadable_key(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if str(path) == files.key:
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    error = broken("server", files)
    assert (error.field, error.message) == (
        "key",
        f"private key {files.key}: Permission denied",
    )


def test_a_pair_that_does_not_match(files: Files, tmp_path: Path) -> None:
    other = make_files(tmp_path / "other")
    error = broken("server", files, key=other.key)
    assert error.field == "key"
    assert error.message == f"private key {other.key} does not belong to certificate {files.cert}"


def test_an_encrypted_key_asks_nobody(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "encrypted.key"
    path.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
        "MIGjMF8GCSqGSIb3DQEFDTBSMDEGCSqGSIb3DQEFDDAkBBBiJ6Qb2PL0Q3aYFjRb\n"
        "-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    error = broken("server", files, key=str(path))
    assert (error.field, error.message) == (
        "key",
        f"private key {path}: is encrypted, which is not supported",
    )


@pytest.mark.parametrize(("field", "told"), [("ca", "ca"), ("cert", "cert"), ("key", "cert")])
def test_a_file_that_vanishes_while_it_is_read(
    files: Files, monkeypatch: pytest.MonkeyPatch, field: str, told: str
) -> None:
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        content = whole(path)
        if str(path) == getattr(files, field):
            path.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    error = broken("server", files)
    assert error.field == told
    assert getattr(files, field) in error.message
    assert "No such file or directory" in error.message


def test_a_client_certificate_without_a_key(files: Files) -> None:
    with pytest.raises(ConfigError) as caught:
        client_context(ca=files.ca, cert=files.cert, key=None, alpn=[])
    assert caught.value.field == "key"
    assert caught.value.message == f"certificate {files.cert}: is there without its private key"


def test_a_clients_key_without_a_certificate(files: Files) -> None:
    with pytest.raises(ConfigError) as caught:
        client_context(ca=files.ca, cert=None, key=files.key, alpn=[])
    assert caught.value.field == "cert"
    assert caught.value.message == f"private key {files.key}: is there without its certificate"
