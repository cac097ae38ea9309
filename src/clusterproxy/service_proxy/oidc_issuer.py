"""An OIDC issuer: finds out how to verify its tokens, and keeps up with its keys.

Source: OpenID Connect Discovery 1.0 section 4; upstream ``pkg/serviceproxy/oidc_authenticator.go``, which leaves it to
Kubernetes and go-oidc: discovery is tried every ten seconds until it succeeds.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.gotext import quote
from clusterproxy.kube.resource import text_at

from .authentication import NobodyKnows
from .https_get import FetchError
from .oidc_claims import Rejected, claimed_issuer, identity_of
from .oidc_keys import Key, parse_keys, verified_claims

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.kube.resource import Object

    from .identity import Identity
    from .oidc_claims import OidcConfig

_log = logging.getLogger("clusterproxy.service_proxy")

# Until the issuer has answered, and the soonest that an unknown key makes it be asked again: anybody can invent one.
_RETRY_S: Final = 10.0
# Keys that the issuer has withdrawn are forgotten after so long.
_RENEW_S: Final = 600.0


class Issuer:
    """Verifies tokens of one issuer while :meth:`run` runs.

    Args:
      fetch: returns the JSON object at a URL, or raises FetchError.
      clock: seconds since 1970.
    """

    def __init__(
        self,
        config: OidcConfig,
        fetch: Callable[[str], Awaitable[Object]],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._fetch = fetch
        self._clock = clock
        # None until there was an answer.
        self._keys: list[Key] | None = None
        self._trouble = "oidc authenticator is not initialized"
        self._looking = False
        self._looked_at = 0.0
        self._looked = trio.Event()
        self._wanted = trio.Event()

    async def run(self) -> Never:
        """Ask the issuer for its keys, again and again.

        Cancellation: at any time; tokens are verified with what is known.
        """
        try:
            while True:
                self._looking = True
                await self._look()
                self._looking = False
                self._looked_at = trio.current_time()
                looked, self._looked = self._looked, trio.Event()
                self._wanted = trio.Event()
                looked.set()
                with trio.move_on_after(_RETRY_S if self._trouble else _RENEW_S):
                    await self._wanted.wait()
        finally:
            self._looking = False
            self._looked.set()

    async def identify(self, token: str) -> Identity | None:
        """Return whom a token is about, None if it is not one of this issuer, or not good.

        Raises:
          NobodyKnows: the issuer has not told how to verify it.
        """
        if claimed_issuer(token) != self._config.issuer_url:
            return None
        if self._keys is None:
            raise NobodyKnows(self._trouble)
        try:
            claims = self._claims(token)
            if claims is None and await self._look_again():
                claims = self._claims(token)
            if claims is not None:
                return identity_of(claims, self._config, self._clock())
        except Rejected as error:
            _log.debug("OIDC token rejected: %s", error)
            return None
        if self._trouble:
            raise NobodyKnows(self._trouble)
        _log.debug("OIDC token rejected: signed with no key of the issuer")
        return None

    def _claims(self, token: str) -> Object | None:
        return verified_claims(token, self._keys or (), self._config.signing_algs)

    async def _look_again(self) -> bool:
        """Have the keys fetched, if that was not done just now; return whether they may be others."""
        if not self._looking and trio.current_time() < self._looked_at + _RETRY_S:
            return False
        self._wanted.set()
        await self._looked.wait()
        return True

    async def _look(self) -> None:
        url = self._config.issuer_url
        try:
            keys = await self._published_keys(url)
        except FetchError as error:
            trouble = f"oidc: issuer {quote(url)} does not tell its keys: {error}"
            level = logging.DEBUG if trouble == self._trouble else logging.WARNING
            _log.log(level, "trying again in %g s: %s", _RETRY_S, trouble)
            self._trouble = trouble
        else:
            if self._trouble:
                _log.info("OIDC issuer %s: %d keys", url, len(keys))
            self._trouble = ""
            self._keys = keys

    async def _published_keys(self, url: str) -> list[Key]:
        # As go-oidc, which takes one slash away and compares to the letter.
        document = await self._fetch(url.removesuffix("/") + "/.well-known/openid-configuration")
        named = text_at(document, "issuer")
        if named != url:
            raise FetchError(
                "oidc: issuer did not match the issuer returned by provider, "
                f"expected {quote(url)} got {quote(named)}"
            )
        keys = parse_keys(await self._fetch(text_at(document, "jwks_uri")))
        if not keys:
            raise FetchError("the issuer publishes no key that can be used")
        return keys
