"""The issuer of tokens that tests use issues what OpenID Connect says, and fails as they want it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import jwt
import pytest

if TYPE_CHECKING:
    from oidc import OidcIssuer


def published(issuer: OidcIssuer) -> dict[str, jwt.PyJWK]:
    """Return the keys that anybody finds by the issuer's URL."""
    with issuer.client() as client:
        found = client.get("/.well-known/openid-configuration").json()
        assert found["issuer"] == issuer.issuer
        keys = jwt.PyJWKSet.from_dict(client.get(found["jwks_uri"]).json()).keys
    return {str(key.key_id): key for key in keys}


def verified(issuer: OidcIssuer, token: str, audience: str = "kubernetes") -> dict[str, Any]:
    header = jwt.get_unverified_header(token)
    claims: dict[str, Any] = jwt.decode(
        token,
        # Not the PyJWK, which takes a key that names no algorithm for one of RS256 only.
        published(issuer)[header["kid"]].key,
        algorithms=[header["alg"]],
        audience=audience,
        issuer=issuer.issuer,
    )
    return claims


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "ES384", "EdDSA"])
def test_token_is_what_somebody_gets_who_logs_in(oidc_issuer: OidcIssuer, algorithm: str) -> None:
    token = oidc_issuer.token("bob", audience="app", algorithm=algorithm, groups=["a", "b"])
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    claims = verified(oidc_issuer, token, "app")
    assert claims["sub"] == "bob"
    assert claims["groups"] == ["a", "b"]
    assert claims["exp"] - claims["iat"] == 3600


def test_token_expires(oidc_issuer: OidcIssuer) -> None:
    token = oidc_issuer.token(lifetime_s=1)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 1


@pytest.mark.parametrize("keep_old", [True, False])
def test_keys_rotate(oidc_issuer: OidcIssuer, keep_old: bool) -> None:
    before = oidc_issuer.token()
    oidc_issuer.rotate(keep_old=keep_old)
    after = oidc_issuer.token()
    assert verified(oidc_issuer, after)["sub"] == "alice"
    kid = jwt.get_unverified_header(before)["kid"]
    assert kid != jwt.get_unverified_header(after)["kid"]
    assert (kid in published(oidc_issuer)) is keep_old


def test_nobody_is_trusted_but_its_ca(oidc_issuer: OidcIssuer) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(oidc_issuer.issuer, trust_env=False)


def test_issuer_refuses_and_hangs(oidc_issuer: OidcIssuer) -> None:
    token = oidc_issuer.token()
    with oidc_issuer.refusing(), pytest.raises(httpx.ConnectError):
        published(oidc_issuer)
    with oidc_issuer.hanging(), oidc_issuer.client() as client:
        client.timeout = httpx.Timeout(0.3)
        with pytest.raises(httpx.TimeoutException):
            client.get("/.well-known/openid-configuration")
    assert verified(oidc_issuer, token)["sub"] == "alice"
