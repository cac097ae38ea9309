"""The certificates of the user server, which change while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import ConfigError
from clusterproxy.transport.reload import OK, ReloadingContext
from clusterproxy.transport.tls import client_context, server_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from clusterproxy.kube.tls_profile import TlsProfile

    from .config import UserServerConfig
    from .metrics import UserServerMetrics

# What clients may speak: upgrades need HTTP/1.1.
_ALPN: Final = ("h2", "http/1.1")


class Certificates:
    """What connections to come are secured with. Files are loaded again when they change.

    Args:
      profile: what listeners are to demand at the time.
      renewed: called when there are other certificates for the proxy server.

    Attributes:
      listener: for users.
      service_proxy: for service proxies, within the tunnel.
      proxy_server: as it is for the proxy server; the tunnel reads the files itself.

    Raises:
      ConfigError: a file cannot be used; the message names its flag.
    """

    def __init__(
        self,
        config: UserServerConfig,
        metrics: UserServerMetrics,
        profile: Callable[[], TlsProfile],
        renewed: Callable[[], None],
    ) -> None:
        self._metrics = metrics

        def listener() -> ssl.SSLContext:
            demanded = profile()
            return server_context(
                cert=config.server_cert,
                key=config.server_key,
                client_ca=None,
                min_version=demanded.min_version,
                cipher_suites=demanded.cipher_suites,
                alpn=_ALPN,
            )

        self.listener = self._load(
            {"cert": ("server-cert", config.server_cert), "key": ("server-key", config.server_key)},
            listener,
        )
        self.proxy_server = self._load(
            {
                "ca": ("proxy-ca-cert", config.proxy_ca_cert),
                "cert": ("proxy-cert", config.proxy_cert),
                "key": ("proxy-key", config.proxy_key),
            },
            lambda: client_context(
                ca=config.proxy_ca_cert, cert=config.proxy_cert, key=config.proxy_key, alpn=("h2",)
            ),
            renewed,
        )
        self.service_proxy = self._load(
            {"ca": ("service-proxy-ca-cert", config.service_proxy_ca_cert)},
            lambda: client_context(
                ca=config.service_proxy_ca_cert, cert=None, key=None, alpn=("http/1.1",)
            ),
        )

    def _load(
        self,
        files: Mapping[str, tuple[str, str]],
        make: Callable[[], ssl.SSLContext],
        renewed: Callable[[], None] | None = None,
    ) -> ReloadingContext:
        def factory() -> ssl.SSLContext:
            try:
                return make()
            except ConfigError as error:
                flag, _ = files.get(error.field, (error.field, ""))
                raise ConfigError(flag, error.message) from error

        certificate = files.get("cert", ("", ""))[1]

        def on_reload(result: str) -> None:
            self._metrics.certificate_reload_total.labels(result).inc()
            note_expiry()
            if result == OK and renewed is not None:
                renewed()

        def note_expiry() -> None:
            not_after = contexts.not_after()
            if not_after is not None:
                self._metrics.certificate_expiry_seconds.labels(certificate).set(not_after)

        contexts = ReloadingContext(
            factory,
            [file for _, file in files.values() if file],
            certificate=certificate or None,
            on_reload=on_reload,
        )
        note_expiry()
        return contexts

    @property
    def _all(self) -> tuple[ReloadingContext, ...]:
        return self.listener, self.proxy_server, self.service_proxy

    @property
    def problem(self) -> str:
        """What keeps changed files from being loaded, empty if nothing."""
        return next((contexts.failure for contexts in self._all if contexts.failure), "")

    async def watch(self) -> None:
        """Load what changes, until cancelled."""
        async with trio.open_nursery() as nursery:
            for contexts in self._all:
                nursery.start_soon(contexts.watch)
