"""Who an ID token is about. Pure.

Rules: OpenID Connect Core 1.0 section 3.1.3.7, and Kubernetes' ``plugin/pkg/authenticator/token/oidc`` with go-oidc's verifier,
which upstream uses: ``exp`` has no leeway, ``nbf`` five minutes, ``iat`` is not looked at.
"""

from __future__ import annotations

import json
import math
from base64 import urlsafe_b64decode
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import quote

from .identity import Identity

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

#: Algorithms that are known: signatures with a key that only the issuer has.
SIGNING_ALGS: Final = tuple(
    f"{kind}{bits}" for kind in ("RS", "ES", "PS") for bits in (256, 384, 512)
)

_EVERYBODY: Final = "system:authenticated"
_NOT_BEFORE_LEEWAY_S: Final = 300.0
# OpenID Connect Core 1.0 section 15.6.2: Google leaves the scheme out at times.
_GOOGLE: Final = "accounts.google.com"


class Rejected(Exception):
    """The token does not say who somebody is; the text says why not."""


@attrs.frozen(kw_only=True)
class OidcConfig:
    """What an issuer's tokens have to be like, and what is made of them."""

    issuer_url: str = ""
    client_id: str = ""
    username_claim: str = "sub"
    username_prefix: str = ""
    groups_claim: str = ""
    groups_prefix: str = ""
    reserved_name_prefixes: tuple[str, ...] = ("system:",)
    signing_algs: tuple[str, ...] = ("RS256",)
    required_claims: tuple[tuple[str, str], ...] = ()

    def validate(self) -> None:
        """Check what can be checked without the issuer.

        Raises:
          ConfigError: the first mistake.
        """
        if not self.issuer_url or not self.client_id:
            raise ConfigError(
                "oidc-issuer-url",
                "--oidc-issuer-url and --oidc-client-id must be specified together",
            )
        if "" in self.reserved_name_prefixes:
            raise ConfigError(
                "oidc-reserved-name-prefixes",
                "--oidc-reserved-name-prefixes must not contain an empty prefix",
            )
        if problem := _problem_of_issuer(self.issuer_url):
            raise ConfigError(
                "oidc-issuer-url",
                f"invalid OIDC configuration: issuer.url: Invalid value: {quote(self.issuer_url)}: {problem}",
            )
        if not self.username_claim:
            raise ConfigError(
                "oidc-username-claim",
                "invalid OIDC configuration: claimMappings.username: Required value: "
                "claim or expression is required",
            )
        for alg in self.signing_algs:
            if alg not in SIGNING_ALGS:
                raise ConfigError(
                    "oidc-signing-algs", f"unsupported OIDC signing algorithm {quote(alg)}"
                )

    def prefixed(self, username: str) -> str:
        """Return a user's name as it is on this cluster."""
        prefix = self.username_prefix
        if not prefix and self.username_claim != "email":
            prefix = f"{self.issuer_url}#"
        return username if prefix == "-" else prefix + username


def _problem_of_issuer(url: str) -> str:
    """Return what is wrong with an issuer's URL (k8s.io/apiserver, ``validateIssuerURL``), empty if nothing."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme != "https":
        return "URL scheme must be https"
    if parts.username is not None or parts.password is not None:
        return "URL must not contain a username or password"
    if "?" in url:
        return "URL must not contain a query"
    if "#" in url:
        return "URL must not contain a fragment"
    if not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        return "URL must have a host, and be plain"
    return ""


def parse_object(data: bytes | str) -> Object:
    """Return a JSON object.

    Raises:
      ValueError: it is none.
    """
    try:
        found: Any = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  bad text is a bad value here
    return cast("Object", found)


def claimed_issuer(token: str) -> str:
    """Return the issuer that a token names, which nobody has verified; empty if it is no token of that kind."""
    parts = token.split(".")
    if len(parts) != 3:
        return ""
    try:
        claims = parse_object(urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return ""
    return _issuer(claims)


def _issuer(claims: Object) -> str:
    issuer = claims.get("iss")
    if issuer == _GOOGLE:
        return f"https://{_GOOGLE}"
    return issuer if isinstance(issuer, str) else ""


def identity_of(claims: Object, config: OidcConfig, now: float) -> Identity:
    """Return whom the claims of a token are about, whose signature was verified.

    Args:
      now: seconds since 1970.

    Raises:
      Rejected: they are not for us, not now, or not of the kind that was asked for.
    """
    if _issuer(claims) != config.issuer_url:
        raise Rejected("oidc: the token is of another issuer")
    _check_audience(claims, config.client_id)
    _check_time(claims, now)
    username = _username(claims, config)
    groups = _groups(claims, config)
    for claim, required in config.required_claims:
        if claims.get(claim) != required:
            raise Rejected(f"oidc: the token has not the required claim {claim}={required}")
    for prefix in config.reserved_name_prefixes:
        if username.startswith(prefix):
            raise Rejected(f"username cannot use the reserved {prefix} prefix")
        if any(group.startswith(prefix) for group in groups):
            raise Rejected(f"groups cannot use the reserved {prefix} prefix")
    return Identity(username, tuple(dict.fromkeys([*groups, _EVERYBODY])))


def _check_audience(claims: Object, client_id: str) -> None:
    if client_id not in _one_or_more(claims.get("aud")):
        raise Rejected("oidc: the token is for another audience")


def _one_or_more(found: object) -> list[object]:
    return cast("list[object]", found) if isinstance(found, list) else [found]


def _check_time(claims: Object, now: float) -> None:
    expires = _time(claims, "exp")
    if expires is None or expires < now:
        raise Rejected("oidc: token is expired")
    not_before = _time(claims, "nbf")
    if not_before is not None and now + _NOT_BEFORE_LEEWAY_S < not_before:
        raise Rejected("oidc: token is not valid yet")


def _time(claims: Object, claim: str) -> float | None:
    found = claims.get(claim)
    if found is None:
        return None
    try:
        if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
            return float(found)
    except OverflowError:
        pass
    raise Rejected(f"oidc: claim {claim} is no time")


def _username(claims: Object, config: OidcConfig) -> str:
    claim = config.username_claim
    username = claims.get(claim)
    if not isinstance(username, str) or not username:
        raise Rejected(f"oidc: the token has no claim {claim} that could be a user name")
    # Absent is as good as true; null is false, as for Go.
    if claim == "email" and claims.get("email_verified", True) is not True:
        raise Rejected("oidc: email not verified")
    return config.prefixed(username)


def _groups(claims: Object, config: OidcConfig) -> list[str]:
    if not config.groups_claim:
        return []
    found = claims.get(config.groups_claim)
    if found is None:
        return []
    groups = _one_or_more(found)
    texts = [group for group in groups if isinstance(group, str)]
    if len(texts) < len(groups):
        raise Rejected(f"oidc: claim {config.groups_claim} is no list of texts")
    return [config.groups_prefix + group for group in texts]
