"""What the service proxy's connections are secured with, and files that change while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.transport.reload import ReloadingContext
from clusterproxy.transport.tls import server_context

from .roots import services_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from clusterproxy.kube.tls_profile import TlsProfile

    from .config import ServiceProxyConfig
    from .metrics import ServiceProxyMetrics

# Upgrades need HTTP/1.1.
_ALPN: Final = ("h2", "http/1.1")


class Certificates:
    """Loaded again when they change.

    Args:
      profile: what the listener is to demand at the time.

    Attributes:
      listener: for requests.
      services: for the apiserver and services.

    Raises:
      ConfigError: a file cannot be used; the message names it.
    """

    def __init__(
        self,
        config: ServiceProxyConfig,
        metrics: ServiceProxyMetrics,
        profile: Callable[[], TlsProfile],
    ) -> None:
        def listener() -> ssl.SSLContext:
            demanded = profile()
            return server_context(
                cert=config.cert,
                key=config.key,
                client_ca=None,
                min_version=demanded.min_version,
                cipher_suites=demanded.cipher_suites,
                alpn=_ALPN,
            )

        def services() -> ssl.SSLContext:
            return services_context(config.root_ca, config.additional_service_ca)

        def reloaded(result: str) -> None:
            metrics.certificate_reload_total.labels(result).inc()
            note_expiry()

        def note_expiry() -> None:
            expiry = metrics.certificate_expiry_seconds.labels(config.cert)
            expiry.set(self.listener.not_after() or 0.0)

        self.listener = ReloadingContext(
            listener, (config.cert, config.key), certificate=config.cert, on_reload=reloaded
        )
        self.services = ReloadingContext(
            services,
            [file for file in (config.root_ca, config.additional_service_ca) if file],
            on_reload=reloaded,
        )
        note_expiry()

    @property
    def problem(self) -> str:
        """What keeps changed files from being loaded, empty if nothing."""
        return self.listener.failure or self.services.failure

    async def watch(self) -> None:
        """Load what changes, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.listener.watch)
            nursery.start_soon(self.services.watch)
