"""Signatures of ID tokens: the one module that imports PyJWT. Pure.

What an issuer publishes and what tokens say of themselves is not believed further than needed: an algorithm has to be one of
those that are configured and of the kind that the key is for, so that no key is taken for a shared secret.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import attrs
import jwt
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from clusterproxy.kube.resource import Object, list_at, text_at

from .oidc_claims import Rejected, parse_object

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger("clusterproxy.service_proxy")

# RFC 7518 sections 3.3 to 3.5: the kind of key, for elliptic curves the curve.
_KINDS: Final = {
    **{f"{kind}{bits}": "RSA" for kind in ("RS", "PS") for bits in (256, 384, 512)},
    "ES256": "P-256",
    "ES384": "P-384",
    "ES512": "P-521",
}
# RFC 7518 section 3.3.
_SMALLEST_RSA_BITS: Final = 2048


@attrs.frozen
class Key:
    """A key that tokens are verified with.

    Attributes:
      kind: ``RSA``, or the curve.
      alg: the one algorithm that it is for, empty for any of its kind.
    """

    kid: str
    kind: str
    alg: str
    public: Any


def parse_keys(key_set: Object) -> list[Key]:
    """Return the keys of a JSON Web Key Set that can be used; others are left out, as RFC 7517 section 5 wants it."""
    keys: list[Key] = []
    found: list[Any] = list_at(key_set, "keys")
    for jwk in found:
        try:
            key = _key(jwk)
        except Exception as error:
            _log.debug("a key of the OIDC issuer is left out: %s", error)
        else:
            keys += [] if key is None else [key]
    return keys


def _key(jwk: Object) -> Key | None:
    if jwk.get("use", "sig") != "sig" or "d" in jwk:
        return None
    kid, alg = text_at(jwk, "kid"), text_at(jwk, "alg")
    if jwk["kty"] == "RSA":
        public = RSAAlgorithm.from_jwk(jwk)
        return Key(kid, "RSA", alg, public) if public.key_size >= _SMALLEST_RSA_BITS else None
    if jwk["kty"] == "EC" and jwk["crv"] in _KINDS.values():
        return Key(kid, jwk["crv"], alg, ECAlgorithm.from_jwk(jwk))
    return None


def verified_claims(token: str, keys: Sequence[Key], algorithms: Sequence[str]) -> Object | None:
    """Return the claims of a token, None if none of the keys has signed it.

    Raises:
      Rejected: no key could have.
    """
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, RecursionError) as error:
        # Older releases of PyJWT, which will do, let the second through for a header that is nested deeply.
        raise Rejected(f"oidc: malformed token: {error}") from error
    alg, kid = header.get("alg"), header.get("kid", "")
    if alg not in algorithms or alg not in _KINDS:
        raise Rejected("oidc: the token is signed with an algorithm that is not allowed")
    # Extensions that a verifier has to know (RFC 7515 section 4.1.11), and we know none.
    if "crit" in header or "b64" in header:
        raise Rejected("oidc: the token has critical headers")
    for key in keys:
        fits = key.kind == _KINDS[alg] and key.alg in {"", alg} and kid in {"", key.kid}
        payload = _payload(token, key, alg) if fits else None
        if payload is not None:
            try:
                return parse_object(payload)
            except ValueError as error:
                raise Rejected(f"oidc: malformed token: {error}") from error
    return None


def _payload(token: str, key: Key, alg: str) -> bytes | None:
    try:
        payload: bytes = jwt.PyJWS().decode(token, key=key.public, algorithms=[alg])
    except (jwt.PyJWTError, RecursionError):
        return None
    return payload
