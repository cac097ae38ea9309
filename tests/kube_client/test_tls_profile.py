from __future__ import annotations

from typing import Any

import pytest

from clusterproxy.errors import ConfigError
from clusterproxy.kube.tls_profile import TlsProfile, parse_tls_profile
from clusterproxy.transport.tls import GO_CIPHER_SUITES

GOOD = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"
OTHER = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
INSECURE = "TLS_RSA_WITH_AES_128_CBC_SHA"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, "VersionTLS12"),
        ("", "VersionTLS12"),
        ("VersionTLS10", "VersionTLS10"),
        ("VersionTLS13", "VersionTLS13"),
        ("TLSv1.1", "VersionTLS11"),
        (" TLSv1.3 ", "VersionTLS13"),
    ],
)
def test_versions(version: str | None, expected: str) -> None:
    data = {} if version is None else {"minTLSVersion": version}
    assert parse_tls_profile({"data": data}).min_version == expected


@pytest.mark.parametrize(
    "config_map", [None, {}, {"data": None}, {"data": {}}, {"data": ["x"]}, {"metadata": {}}]
)
def test_without_a_word_it_is_tls_1_2(config_map: Any) -> None:
    assert parse_tls_profile(config_map) == TlsProfile("VersionTLS12", ())


@pytest.mark.parametrize("version", ["VersionTLS14", "1.2", "tlsv1.2", "VersionTLS1"])
def test_an_unknown_version_is_named(version: str) -> None:
    with pytest.raises(ConfigError, match=f"minTLSVersion is .*{version}"):
        parse_tls_profile({"data": {"minTLSVersion": version}})


def test_suites_keep_their_order_and_others_are_told() -> None:
    profile = parse_tls_profile(
        {
            "data": {
                "cipherSuites": f"{OTHER}, {GOOD},,{INSECURE},ECDHE-RSA-AES128-GCM-SHA256,{OTHER}"
            }
        }
    )
    assert profile.cipher_suites == (OTHER, GOOD)
    assert [INSECURE in warning for warning in profile.warnings] == [True, False]
    assert "unknown" in profile.warnings[1]
    # What was left out does not make it another profile.
    assert profile == TlsProfile("VersionTLS12", (OTHER, GOOD))


@pytest.mark.parametrize("suites", ["NONE_SUCH", INSECURE, f"{INSECURE},x"])
def test_none_that_can_be_used_is_a_mistake(suites: str) -> None:
    with pytest.raises(ConfigError, match="cipherSuites has none that can be used"):
        parse_tls_profile({"data": {"cipherSuites": suites}})


def test_all_of_gos_suites_are_known() -> None:
    profile = parse_tls_profile({"data": {"cipherSuites": ",".join(GO_CIPHER_SUITES)}})
    assert profile.cipher_suites == tuple(GO_CIPHER_SUITES)
    assert not profile.warnings
