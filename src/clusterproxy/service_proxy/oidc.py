"""The provider that knows ID tokens: an issuer, and the authorities by which it is believed.

Source: upstream ``pkg/serviceproxy/oidc_authenticator.go`` and ``oidc_configmap_controller.go``.
"""

from __future__ import annotations

import binascii
import logging
import time
from base64 import b64decode
from functools import partial
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.kube.api import Change
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import CONFIG_MAPS, map_at
from clusterproxy.transport.tls import client_context

from .authentication import NobodyKnows
from .https_get import fetch_object
from .identity import check_not_of_hub
from .oidc_issuer import Issuer
from .roots import parse_bundle

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from clusterproxy.kube.api import KubeApi, WatchEvent
    from clusterproxy.kube.resource import Object

    from .identity import Identity
    from .oidc_claims import OidcConfig

_log = logging.getLogger("clusterproxy.service_proxy")

_KEY: Final = "ca.crt"
_NOT_YET: Final = "oidc authenticator is not initialized"


class CaConfigMap:
    """The authorities of an issuer, from a ConfigMap that may come, change and go.

    Attributes:
      bundle: certificates in DER form, None while there are none that can be used.
      trouble: why there are none.
      changed: set when they are others; replaced by a new event each time.
    """

    def __init__(self, api: KubeApi, namespace: str, name: str) -> None:
        self._where = f"OIDC CA ConfigMap {namespace}/{name}"
        self._reflector = Reflector(
            api, CONFIG_MAPS, namespace, field_selector=f"metadata.name={name}"
        )
        self.bundle: bytes | None = None
        self.trouble = _NOT_YET
        self.changed = trio.Event()

    async def run(self) -> Never:
        """Follow it. Cancellation: at any time; what it was stays."""
        self._reflector.subscribe(self._take)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reflector.run)
            await self._reflector.synced.wait()
            if not self._reflector.items:
                self._set(None, f"{self._where} is not available")
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    def _take(self, event: WatchEvent) -> None:
        if event.change is Change.DELETED:
            self._set(None, f"{self._where} is not available")
            return
        try:
            bundle = _bundle_in(event.object)
        except ValueError as error:
            self._set(None, f"{self._where} {error}")
        else:
            self._set(bundle, "")

    def _set(self, bundle: bytes | None, trouble: str) -> None:
        if (bundle, trouble) == (self.bundle, self.trouble):
            return
        if trouble:
            _log.warning("no OIDC authentication: %s", trouble)
        self.bundle, self.trouble = bundle, trouble
        changed, self.changed = self.changed, trio.Event()
        changed.set()


def _bundle_in(config_map: Object) -> bytes:
    data, binary = map_at(config_map, "data"), map_at(config_map, "binaryData")
    text = data[_KEY] if _KEY in data else binary.get(_KEY)
    if not isinstance(text, str):
        raise ValueError(f"does not contain {_KEY}")  # noqa: TRY004  an object of any shape
    if not text:
        raise ValueError(f"has an empty {_KEY} entry")
    try:
        return parse_bundle(text.encode() if _KEY in data else b64decode(text, validate=True))
    except (UnicodeEncodeError, binascii.Error) as error:
        raise ValueError(f"has a {_KEY} entry that cannot be decoded") from error
    except ValueError as error:
        raise ValueError(f"has a {_KEY} entry that cannot be used: {error}") from error


class OidcProvider:
    """Knows ID tokens of the configured issuer, while :meth:`run` runs.

    Args:
      ca: the authorities that its certificate may come from; None for those of the system.
    """

    name = "oidc"
    target = "the configured OIDC issuer"

    def __init__(
        self,
        config: OidcConfig,
        ca: CaConfigMap | None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._ca = ca
        self._clock = clock
        self._issuer: Issuer | None = None

    async def identify(self, token: str, source: str) -> Identity | None:
        """Return whom a token is about, None if it is not one of the issuer, or not good.

        Raises:
          NobodyKnows: the issuer has not told how to verify it, or is not to be believed.
        """
        issuer = self._issuer
        if issuer is None:
            raise NobodyKnows((self._ca and self._ca.trouble) or _NOT_YET)
        return await issuer.identify(token)

    def here(self, user: Identity) -> Identity | None:
        """Return who a user of the issuer is on this cluster.

        Raises:
          Refused: the name is that of another.
        """
        check_not_of_hub(user)
        return user

    async def run(self) -> Never:
        """Keep up with the issuer and its authorities. Cancellation: at any time; no token is known then."""
        async with trio.open_nursery() as nursery:
            if self._ca is None:
                context = client_context(ca=None, cert=None, key=None, alpn=("http/1.1",))
                nursery.start_soon(self._run_issuer, context)
            else:
                nursery.start_soon(self._ca.run)
                nursery.start_soon(self._follow, self._ca)
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    async def _follow(self, ca: CaConfigMap) -> Never:
        while True:
            changed = ca.changed
            async with trio.open_nursery() as nursery:
                if ca.bundle is not None:
                    context = client_context(ca=ca.bundle, cert=None, key=None, alpn=("http/1.1",))
                    nursery.start_soon(self._run_issuer, context)
                await changed.wait()
                # What was found out with authorities that are trusted no more is not to be used.
                nursery.cancel_scope.cancel()

    async def _run_issuer(self, context: ssl.SSLContext) -> None:
        self._issuer = Issuer(self._config, partial(fetch_object, context=context), self._clock)
        try:
            await self._issuer.run()
        finally:
            self._issuer = None
