"""Who may say whose a token is, and the order in which they are asked.

Source: upstream ``pkg/serviceproxy/authentication.go``, ``token_authenticator.go``; the cache as in
``k8s.io/apiserver/pkg/authentication/token/cache``.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from clusterproxy.errors import KubeError
from clusterproxy.kube.resource import list_at, text_at, value_at
from clusterproxy.kube.token_reviews import TokenReviews
from clusterproxy.kube.token_reviews import without_token as hide

from .identity import GroupMapping, Identity, of_hub
from .lookups import Lookups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object

    from .metrics import ServiceProxyMetrics

_log = logging.getLogger("clusterproxy.service_proxy")

# What an apiserver says of a token that none of its authenticators knows; OpenShift says more around it.
_REJECTION: Final = "invalid bearer token"

_MAX_TEXT: Final = 1024


class NobodyKnows(Exception):
    """A provider could not find out whose a token is; the text has the reason."""


class NotAuthenticated(Exception):
    """A request goes no further; the text is for the client, and has no token in it."""


class Provider(Protocol):
    """Somebody who knows tokens."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    @property
    def target(self) -> str:
        """What a token that it does not know is not valid for."""
        ...

    async def identify(self, token: str, source: str) -> Identity | None:
        """Return whose the token is, None if it is not known there.

        Raises:
          NobodyKnows: that cannot be found out now.
        """
        ...

    def here(self, user: Identity) -> Identity | None:
        """Return who a user is on this cluster; None: its apiserver knows that by the token itself.

        Raises:
          Refused: nobody whom there may be here.
        """
        ...


class Reviewer:
    """An apiserver that reviews tokens.

    Args:
      ttl_s: how long what it said of a token holds.
      hub_groups: of the hub: what its groups are called here; None for the cluster's own.
    """

    def __init__(
        self,
        name: str,
        target: str,
        api: KubeApi,
        ttl_s: float,
        *,
        hub_groups: GroupMapping | None = None,
    ) -> None:
        self.name = name
        self.target = target
        self._hub_groups = hub_groups
        self._reviews = TokenReviews(api, who="tokens")
        self._lookups = Lookups[bytes, Identity | None](ttl_s)

    async def identify(self, token: str, source: str) -> Identity | None:
        """Return whose the token is; asked once for all who have it now.

        Raises:
          NobodyKnows: the apiserver did not answer, or could not tell.
        """
        key = hashlib.sha256(token.encode()).digest()
        return await self._lookups.find(key, partial(self._ask, token, source))

    def here(self, user: Identity) -> Identity | None:
        """Return who a user of the hub is on this cluster; None for a user of this one."""
        return None if self._hub_groups is None else of_hub(user, self._hub_groups)

    async def _ask(self, token: str, source: str) -> Identity | None:
        try:
            # Takes 20 s at most, with the wait for a turn; upstream's limit is 30 s.
            return self._judge(await self._reviews.review(token, source), token)
        except KubeError as error:
            raise NobodyKnows(hide(str(error), token)) from None

    def _judge(self, review: Object, token: str) -> Identity | None:
        said = value_at(review, "status", "error")
        if said:
            text = hide(str(said), token)
            if _REJECTION in text.lower():
                return None
            raise NobodyKnows(f"{self.name} TokenReview: {text}")
        if value_at(review, "status", "authenticated") is not True:
            return None
        username = text_at(review, "status", "user", "username")
        groups: list[Any] = list_at(review, "status", "user", "groups")
        if not username or not all(isinstance(group, str) for group in groups):
            raise NobodyKnows(f"{self.name} TokenReview: a user without a name, or groups without")
        return Identity(username, tuple(groups))


class Chain:
    """Asks providers in their order, until one knows a token."""

    def __init__(self, providers: Sequence[Provider], metrics: ServiceProxyMetrics) -> None:
        self._providers = tuple(providers)
        self._metrics = metrics
        self._told = ""

    async def authenticate(self, token: str, source: str) -> tuple[Provider, Identity]:
        """Return who knows the token, and whose it is.

        Raises:
          NotAuthenticated: nobody knows it, or one of them cannot tell; those behind him are not asked then.
        """
        if not token:
            # What an apiserver says of it.
            first = self._providers[0].name
            raise NotAuthenticated(
                f"{first} authentication failed: token is required for TokenReview in authentication"
            )
        for provider in self._providers:
            try:
                identity = await provider.identify(token, source)
            except NobodyKnows as error:
                self._count(provider, "error")
                text = f"{provider.name} authentication failed: {str(error)[:_MAX_TEXT]}"
                self._tell(text)
                raise NotAuthenticated(text) from error
            self._count(provider, "unknown" if identity is None else "known")
            if identity is not None:
                return provider, identity
        raise NotAuthenticated(f"authentication failed: token is {self._no_target()}")

    def _count(self, provider: Provider, result: str) -> None:
        self._metrics.authentications_total.labels(provider.name, result).inc()

    def _no_target(self) -> str:
        targets = [provider.target for provider in self._providers]
        if len(targets) == 1:
            return f"not valid for the {targets[0]}"
        if len(targets) == 2:
            return f"neither valid for {targets[0]} nor {targets[1]}"
        return f"not valid for {', '.join(targets[:-1])}, or {targets[-1]}"

    def _tell(self, text: str) -> None:
        """Log trouble when it is another than the last one: each request may meet it."""
        if text == self._told:
            _log.debug("%s", text)
            return
        self._told = text
        _log.warning("%s", text)
