"""An OIDC issuer for tests: keys, tokens, and the documents that it publishes."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

import attrs
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from clusterproxy.service_proxy.https_get import FetchError

if TYPE_CHECKING:
    from collections.abc import Callable

ISSUER: Final = "https://issuer.example/realm"
CLIENT: Final = "test-client"
NOW: Final = 1_800_000_000.0


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key that is made once for each name."""
    del name
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(curve: str) -> ec.EllipticCurvePrivateKey:
    curves: dict[str, ec.EllipticCurve] = {
        "P-256": ec.SECP256R1(),
        "P-384": ec.SECP384R1(),
        "P-521": ec.SECP521R1(),
    }
    return ec.generate_private_key(curves[curve])


def public_jwk(key: Any, **more: Any) -> dict[str, Any]:
    """What an issuer publishes of a key; None takes a member out."""
    kind: Any = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    jwk = cast("dict[str, Any]", json.loads(kind.to_jwk(key.public_key())))
    jwk = {name: value for name, value in jwk.items() if name != "key_ops"} | more
    return {name: value for name, value in jwk.items() if value is not None}


def claims(**overrides: Any) -> dict[str, Any]:
    """Good claims, changed; None takes one out."""
    good = {"iss": ISSUER, "aud": CLIENT, "sub": "test-user", "exp": NOW + 3600, "iat": NOW - 60}
    return {name: value for name, value in (good | overrides).items() if value is not None}


def signed(
    said: dict[str, Any],
    key: Any = None,
    alg: str = "RS256",
    kid: str | None = "one",
    **headers: Any,
) -> str:
    """A token; by default of the key that :class:`Documents` publish."""
    headers = headers if kid is None else {"kid": kid, **headers}
    return jwt.encode(said, rsa_key("one") if key is None else key, algorithm=alg, headers=headers)


@attrs.define
class Documents:
    """What the issuer publishes, by URL; an error is raised instead."""

    issuer: str = ISSUER
    keys: list[dict[str, Any]] = attrs.Factory(
        lambda: [public_jwk(rsa_key("one"), kid="one", alg="RS256", use="sig")]
    )
    error: Exception | None = None
    discovery: dict[str, Any] | None = None
    fetched: list[str] = attrs.Factory(list[str])
    gate: Callable[[], Any] | None = None

    async def fetch(self, url: str) -> dict[str, Any]:
        self.fetched.append(url)
        if self.gate is not None:
            await self.gate()
        if self.error is not None:
            raise self.error
        if url == self.issuer.removesuffix("/") + "/.well-known/openid-configuration":
            found = {"issuer": self.issuer, "jwks_uri": "https://issuer.example/keys"}
            return found if self.discovery is None else self.discovery
        if url == "https://issuer.example/keys":
            return {"keys": self.keys}
        raise FetchError(f"{url}: 404")
