"""Row H12, and the flags of row H14 as far as they are about tokens: what claims make of their owner."""

from __future__ import annotations

import base64
import json
from typing import Any

import attrs
import pytest
from oidc_world import CLIENT, ISSUER, NOW, claims

from clusterproxy.errors import ConfigError
from clusterproxy.service_proxy.identity import Identity
from clusterproxy.service_proxy.oidc_claims import (
    OidcConfig,
    Rejected,
    claimed_issuer,
    identity_of,
)

CONFIG = OidcConfig(issuer_url=ISSUER, client_id=CLIENT)


@pytest.mark.parametrize(
    ("config", "said", "name", "groups"),
    [
        ({}, {}, f"{ISSUER}#test-user", ()),
        ({"username_prefix": "-"}, {}, "test-user", ()),
        ({"username_prefix": "oidc:"}, {}, "oidc:test-user", ()),
        ({"username_claim": "email", "username_prefix": "oidc:"}, {"email": "a@b"}, "oidc:a@b", ()),
        ({"username_claim": "email"}, {"email": "a@b", "email_verified": True}, "a@b", ()),
        ({"username_claim": "email"}, {"email": "a@b"}, "a@b", ()),
        # Says nothing of another claim.
        ({"username_claim": "name"}, {"name": "n", "email_verified": False}, f"{ISSUER}#n", ()),
        ({"groups_claim": "g", "groups_prefix": "oidc:"}, {"g": ["a", "b"]}, f"{ISSUER}#test-user", ("oidc:a", "oidc:b")),
        ({"groups_claim": "g"}, {"g": "a"}, f"{ISSUER}#test-user", ("a",)),
        ({"groups_claim": "g"}, {}, f"{ISSUER}#test-user", ()),
        ({"groups_claim": "g"}, {"g": []}, f"{ISSUER}#test-user", ()),
        ({}, {"g": ["a"]}, f"{ISSUER}#test-user", ()),
        ({"groups_claim": "g", "reserved_name_prefixes": ("dev:",)}, {"g": ["system:masters"]}, f"{ISSUER}#test-user", ("system:masters",)),
        ({"groups_claim": "g", "reserved_name_prefixes": ()}, {"g": ["system:masters"]}, f"{ISSUER}#test-user", ("system:masters",)),
        ({"required_claims": (("hd", "x"), ("t", "y"))}, {"hd": "x", "t": "y"}, f"{ISSUER}#test-user", ()),
        ({}, {"aud": ["other", CLIENT]}, f"{ISSUER}#test-user", ()),
        ({}, {"exp": NOW}, f"{ISSUER}#test-user", ()),
        ({}, {"exp": int(NOW) + 1}, f"{ISSUER}#test-user", ()),
        ({}, {"nbf": NOW + 300}, f"{ISSUER}#test-user", ()),
        ({}, {"iat": NOW + 9999}, f"{ISSUER}#test-user", ()),
    ],
)  # fmt: skip
def test_who_it_is(
    config: dict[str, Any], said: dict[str, Any], name: str, groups: tuple[str, ...]
) -> None:
    found = identity_of(claims(**said), attrs.evolve(CONFIG, **config), NOW)
    assert found == Identity(name, (*groups, "system:authenticated"))


def test_everybody_is_said_once() -> None:
    """Row H16."""
    config = attrs.evolve(CONFIG, groups_claim="g", reserved_name_prefixes=())
    said = claims(g=["system:authenticated", "a", "a"])
    assert identity_of(said, config, NOW).groups == ("system:authenticated", "a")


@pytest.mark.parametrize(
    ("config", "said", "why"),
    [
        ({}, {"iss": "https://foreign.example"}, "another issuer"),
        ({}, {"iss": f"{ISSUER}/"}, "another issuer"),
        ({}, {"iss": None}, "another issuer"),
        ({}, {"iss": [ISSUER]}, "another issuer"),
        ({}, {"aud": "other"}, "another audience"),
        ({}, {"aud": None}, "another audience"),
        ({}, {"aud": [["test-client"]]}, "another audience"),
        ({}, {"aud": {"test-client": 1}}, "another audience"),
        ({}, {"aud": f"{CLIENT},other"}, "another audience"),
        ({}, {"exp": NOW - 1}, "expired"),
        ({}, {"exp": None}, "expired"),
        ({}, {"exp": str(NOW + 10)}, "exp is no time"),
        ({}, {"exp": True}, "exp is no time"),
        ({}, {"exp": float("inf")}, "exp is no time"),
        ({}, {"exp": float("nan")}, "exp is no time"),
        ({}, {"exp": 10**400}, "exp is no time"),
        ({}, {"nbf": NOW + 301}, "not valid yet"),
        ({}, {"nbf": "soon"}, "nbf is no time"),
        ({"username_claim": "email"}, {}, "no claim email"),
        ({"username_claim": "email"}, {"email": ""}, "no claim email"),
        ({"username_claim": "email"}, {"email": ["a"]}, "no claim email"),
        ({"username_claim": "email"}, {"email": "a", "email_verified": False}, "not verified"),
        ({"username_claim": "email"}, {"email": "a", "email_verified": "true"}, "not verified"),
        ({"username_claim": "email"}, {"email": "a", "email_verified": 1}, "not verified"),
        ({"username_prefix": "-"}, {"sub": "system:admin"}, "username cannot use the reserved system:"),
        ({"username_prefix": "system:"}, {}, "username cannot use the reserved system:"),
        ({"username_prefix": "sys"}, {"sub": "tem:admin"}, "username cannot use the reserved system:"),
        ({"username_prefix": "-", "reserved_name_prefixes": ("system:", "dev:")}, {"sub": "dev:a"}, "reserved dev:"),
        ({"groups_claim": "g"}, {"g": ["a", "system:masters"]}, "groups cannot use the reserved system:"),
        ({"groups_claim": "g", "reserved_name_prefixes": ("dev:",)}, {"g": "dev:ops"}, "reserved dev:"),
        ({"groups_claim": "g"}, {"g": ["a", 42]}, "no list of texts"),
        ({"groups_claim": "g"}, {"g": {"a": "b"}}, "no list of texts"),
        ({"groups_claim": "g"}, {"g": [["a"]]}, "no list of texts"),
        ({"required_claims": (("hd", "x"),)}, {}, "required claim hd=x"),
        ({"required_claims": (("hd", "x"),)}, {"hd": "other"}, "required claim hd=x"),
        ({"required_claims": (("hd", "x"),)}, {"hd": ["x"]}, "required claim hd=x"),
        ({"required_claims": (("n", "1"),)}, {"n": 1}, "required claim n=1"),
    ],
)  # fmt: skip
def test_who_it_is_not(config: dict[str, Any], said: dict[str, Any], why: str) -> None:
    with pytest.raises(Rejected, match=why):
        identity_of(claims(**said), attrs.evolve(CONFIG, **config), NOW)


def test_google_leaves_its_scheme_out() -> None:
    config = attrs.evolve(CONFIG, issuer_url="https://accounts.google.com")
    said = claims(iss="accounts.google.com")
    assert identity_of(said, config, NOW).username == "https://accounts.google.com#test-user"


def peeked(payload: bytes) -> str:
    return claimed_issuer(f"h.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.s")


def test_the_issuer_of_what_is_no_token() -> None:
    assert peeked(json.dumps(claims()).encode()) == ISSUER
    deep = b'{"iss":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    for payload in (b"", b"null", b"[]", b'"x"', b"{", b'{"iss": 1}', b"{}", b"\xff", deep):
        assert peeked(payload) == "", payload[:20]
    assert peeked(b'{"iss": "x", "n": ' + b"1" * 5000 + b"}") == ""
    for token in ("", "garbage", "a.b", "a.!!!.c", "a.b.c.d", "a.x.c"):
        assert claimed_issuer(token) == "", token


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"client_id": ""}, "--oidc-issuer-url and --oidc-client-id must be specified together"),
        ({"issuer_url": ""}, "--oidc-issuer-url and --oidc-client-id must be specified together"),
        ({"issuer_url": "http://i.example"}, "URL scheme must be https"),
        ({"issuer_url": "i.example"}, "URL scheme must be https"),
        ({"issuer_url": "https://u@i.example"}, "must not contain a username or password"),
        ({"issuer_url": "https://u:p@i.example"}, "must not contain a username or password"),
        ({"issuer_url": "https://i.example?"}, "must not contain a query"),
        ({"issuer_url": "https://i.example?a=b"}, "must not contain a query"),
        ({"issuer_url": "https://i.example/#"}, "must not contain a fragment"),
        ({"issuer_url": "https://"}, "must have a host"),
        ({"issuer_url": "https://i.example/ x"}, "must have a host, and be plain"),
        ({"issuer_url": "https://\u00e4.example"}, "must have a host, and be plain"),
        ({"issuer_url": "https://i.example:x"}, "issuer.url: Invalid value"),
        ({"issuer_url": "https://[::1"}, "issuer.url: Invalid value"),
        ({"username_claim": ""}, "claimMappings.username: Required value"),
        ({"reserved_name_prefixes": ("a", "")}, "must not contain an empty prefix"),
        ({"signing_algs": ("RS256", "HS256")}, 'unsupported OIDC signing algorithm "HS256"'),
        ({"signing_algs": ("none",)}, 'unsupported OIDC signing algorithm "none"'),
        ({"signing_algs": ("rs256",)}, 'unsupported OIDC signing algorithm "rs256"'),
    ],
)
def test_mistakes(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attrs.evolve(CONFIG, **config).validate()
    assert text in caught.value.message


def test_what_is_right() -> None:
    CONFIG.validate()
    attrs.evolve(
        CONFIG, issuer_url="https://i.example:8443/a/", signing_algs=("ES512", "PS384")
    ).validate()
