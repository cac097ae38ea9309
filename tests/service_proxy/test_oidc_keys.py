"""Row H12: signatures, and what is tried in their stead."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from oidc_world import claims, ec_key, public_jwk, rsa_key, signed

from clusterproxy.service_proxy.oidc_claims import SIGNING_ALGS, Rejected
from clusterproxy.service_proxy.oidc_keys import parse_keys, verified_claims

ONE = public_jwk(rsa_key("one"), kid="one", alg="RS256", use="sig")
CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}


def keys(*jwks: Any) -> Any:
    return parse_keys({"keys": list(jwks)})


def unsigned(header: Any, payload: Any = None, signature: str = "") -> str:
    parts = (header, claims() if payload is None else payload)
    encoded = (
        base64.urlsafe_b64encode(
            part if isinstance(part, bytes) else json.dumps(part).encode()
        ).decode()
        for part in parts
    )
    return ".".join((*(text.rstrip("=") for text in encoded), signature))


@pytest.mark.parametrize("alg", SIGNING_ALGS)
@pytest.mark.parametrize("named", [True, False])
def test_all_algorithms(alg: str, named: bool) -> None:
    key: Any = ec_key(CURVES[alg]) if alg in CURVES else rsa_key("one")
    jwk = public_jwk(key, kid="k", alg=alg if named else None)
    token = signed(claims(), key, alg, "k")
    assert verified_claims(token, keys(jwk), [alg]) == claims()
    others = [other for other in SIGNING_ALGS if other != alg]
    with pytest.raises(Rejected, match="algorithm that is not allowed"):
        verified_claims(token, keys(jwk), others)


def test_which_key() -> None:
    two = public_jwk(rsa_key("two"), kid="two")
    assert verified_claims(signed(claims()), keys(two, ONE), ["RS256"]) == claims()
    # A token that names none is tried with all.
    assert verified_claims(signed(claims(), kid=None), keys(two, ONE), ["RS256"]) == claims()
    assert verified_claims(signed(claims()), keys(two), ["RS256"]) is None
    # By the right name, and another key.
    assert verified_claims(signed(claims(), rsa_key("two")), keys(two, ONE), ["RS256"]) is None
    # The key is for another algorithm.
    token = signed(claims(), alg="RS512")
    assert verified_claims(token, keys(ONE), ["RS256", "RS512"]) is None


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", "HS256", "HS512", "RS256 ", "EdDSA"])
@pytest.mark.parametrize("allowed", [["RS256"], list(SIGNING_ALGS), ["HS256", "none"]])
def test_algorithms_that_are_none(alg: str, allowed: list[str]) -> None:
    token = unsigned({"alg": alg, "kid": "one", "typ": "JWT"})
    with pytest.raises(Rejected, match="algorithm that is not allowed"):
        verified_claims(token, keys(ONE), allowed)


def test_a_public_key_is_no_shared_secret() -> None:
    """Key confusion: HS256 with what everybody can read."""
    public = rsa_key("one").public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem, json.dumps(ONE).encode(), b""):
        head = unsigned({"alg": "HS256", "kid": "one"}).rsplit(".", 1)[0]
        mac = hmac.new(secret, head.encode(), hashlib.sha256).digest()
        token = f"{head}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"
        with pytest.raises(Rejected, match="algorithm that is not allowed"):
            verified_claims(token, keys(ONE), SIGNING_ALGS)
    # Nor is a secret that is published a key.
    assert keys({"kty": "oct", "k": "c2VjcmV0", "kid": "one", "alg": "HS256"}) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda head, body, mac: (head, body, ""),
        lambda head, body, mac: (head, body, mac[:-2]),
        lambda head, body, mac: (head, body, "A" * len(mac)),
        lambda head, body, mac: (head, unsigned({}, claims(sub="admin")).split(".")[1], mac),
        lambda head, body, mac: (
            unsigned({"alg": "RS256", "kid": "one", "x": 1}).split(".")[0],
            body,
            mac,
        ),
    ],
)
def test_changed_tokens(change: Any) -> None:
    token = ".".join(change(*signed(claims()).split(".")))
    assert verified_claims(token, keys(ONE), ["RS256"]) is None


@pytest.mark.parametrize(
    "header",
    [
        {"kid": "one"},
        {"alg": None, "kid": "one"},
        {"alg": ["RS256"], "kid": "one"},
        {"alg": {"RS256": 1}},
        {"alg": "RS256", "kid": 1},
        {"alg": "RS256", "kid": ["one"]},
        [],
        b"\xff",
        b"null",
        b"[" * 30_000,
        {"alg": "RS256", "crit": ["x"], "x": 1},
        {"alg": "RS256", "crit": []},
        {"alg": "RS256", "b64": False, "crit": ["b64"]},
        {"alg": "RS256", "b64": True},
    ],
)
def test_headers_of_any_shape(header: Any) -> None:
    with pytest.raises(Rejected):
        verified_claims(unsigned(header, signature="AAAA"), keys(ONE), ["RS256"])


@pytest.mark.parametrize("token", ["", "x", "a.b", "...", "!.!.!", "a.b.c.d"])
def test_what_is_no_token(token: str) -> None:
    with pytest.raises(Rejected):
        verified_claims(token, keys(ONE), ["RS256"])


def test_a_payload_that_is_none() -> None:
    for payload in (b"[]", b"\xff", b"[" * 30_000):
        token = jwt.PyJWS().encode(payload, rsa_key("one"), "RS256", headers={"kid": "one"})
        with pytest.raises(Rejected, match="malformed"):
            verified_claims(token, keys(ONE), ["RS256"])


@pytest.mark.parametrize(
    "jwk",
    [
        None,
        [],
        {},
        {"kty": "RSA"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kty": "RSA", "n": 1, "e": []},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "EC", "crv": ["P-256"]},
        {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AA"},
        {"kty": 1},
        {**ONE, "use": "enc"},
        {**ONE, "d": "AQAB"},
        public_jwk(rsa_key("small", 1024), kid="small"),
    ],
)
def test_keys_that_are_left_out(jwk: Any) -> None:
    found = keys(jwk, ONE)
    assert [key.kid for key in found] == ["one"]


def test_what_is_no_key_set() -> None:
    shapes: list[Any] = [None, {"a": 1}, [], "x"]
    for found in shapes:
        assert parse_keys({"keys": found}) == []
    assert parse_keys({}) == []
