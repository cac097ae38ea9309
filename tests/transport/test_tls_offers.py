"""Which ciphers and key exchanges are offered, as docs/security.md has it."""

from __future__ import annotations

import ast
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

_DOC: Final = (Path(__file__).parents[2] / "docs" / "security.md").read_text()

# IANA's numbers, TLS Cipher Suites and TLS Supported Groups.
_TLS13: Final = {
    "TLS_AES_256_GCM_SHA384": 0x1302,
    "TLS_CHACHA20_POLY1305_SHA256": 0x1303,
    "TLS_AES_128_GCM_SHA256": 0x1301,
}
_TLS12: Final = [
    *(0xC02B, 0xC02F, 0xC02C, 0xC030, 0xCCA9, 0xCCA8),
    # CBC.
    *(0xC009, 0xC013, 0xC00A, 0xC014),
]
_GROUPS: Final = {
    "X25519MLKEM768": 0x11EC, "X25519": 0x1D, "P-256": 0x17, "X448": 0x1E, "P-384": 0x18, "P-521": 0x19,
    "ffdhe2048": 0x100, "ffdhe3072": 0x101, "ffdhe4096": 0x102, "ffdhe6144": 0x103, "ffdhe8192": 0x104,
}  # fmt: skip
# Not a suite: that renegotiation is safe (RFC 5746 §3.3), where TLS 1.2 is offered by OpenSSL before 3.5.
_SIGNAL: Final = 0x00FF

_SUPPORTED_GROUPS: Final = 10

_CLIENT: Final = """
import ssl
from clusterproxy.transport.tls import client_context
arrived, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
client = client_context(ca=None, cert=None, key=None, alpn=()).wrap_bio(arrived, sent, server_hostname="a.test")
try:
    client.do_handshake()
except ssl.SSLWantReadError:
    print(sent.read())
"""


def offered(configuration: Path | None = None) -> tuple[list[int], list[int]]:
    """Return the suites and groups of a ClientHello (RFC 8446 §4.1.2)."""
    environment = os.environ | ({"OPENSSL_CONF": str(configuration)} if configuration else {})
    done = subprocess.run(
        (sys.executable, "-c", _CLIENT), env=environment, capture_output=True, check=True
    )
    hello: bytes = ast.literal_eval(done.stdout.decode())
    # Behind the heads of record and message, version and random.
    at = 5 + 4 + 2 + 32
    at += 1 + hello[at]
    suites, at = _numbers(hello, at)
    at += 1 + hello[at] + 2
    while int.from_bytes(hello[at : at + 2]) != _SUPPORTED_GROUPS:
        at += 4 + int.from_bytes(hello[at + 2 : at + 4])
    groups, _ = _numbers(hello, at + 4)
    return [suite for suite in suites if suite != _SIGNAL], groups


def _numbers(data: bytes, at: int) -> tuple[list[int], int]:
    """Return a list with its length in front, and where it ends."""
    end = at + 2 + int.from_bytes(data[at : at + 2])
    return [int.from_bytes(data[i : i + 2]) for i in range(at + 2, end, 2)], end


def documented(row: str) -> str:
    found = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", _DOC, re.MULTILINE)
    assert found is not None
    return found[1]


def test_suites_are_those_of_the_documentation() -> None:
    named = re.findall(r"`(TLS_\w+)`", documented("TLS 1.3"))
    suites, _ = offered()
    assert suites == [*(_TLS13[name] for name in named), *_TLS12]


@pytest.mark.skipif(
    ssl.OPENSSL_VERSION_INFO[:2] not in {(3, 0), (3, 5)}, reason="another OpenSSL than those named"
)
def test_key_exchanges_are_those_of_the_documentation() -> None:
    major, minor, *_ = ssl.OPENSSL_VERSION_INFO
    text = documented(f"key exchange, OpenSSL {major}.{minor}")
    text = text.replace("ffdhe2048 to ffdhe8192", ", ".join(n for n in _GROUPS if "ffdhe" in n))
    named = re.findall("|".join(sorted(_GROUPS, key=len, reverse=True)), text)
    assert offered()[1] == [_GROUPS[name] for name in named]


def test_openssls_configuration_restricts_what_is_offered(tmp_path: Path) -> None:
    found = re.search(r"^```ini\n(.*?)^```", _DOC, re.DOTALL | re.MULTILINE)
    assert found is not None
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(found[1])
    suites, groups = offered(configuration)
    assert suites == [0x1302, 0x1301, *_TLS12]
    assert groups == [_GROUPS["P-256"], _GROUPS["P-384"]]
