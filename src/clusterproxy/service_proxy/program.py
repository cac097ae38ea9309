"""The service proxy program: what it asks of two apiservers, its ports, and its end."""

from __future__ import annotations

import logging
import signal
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import ConfigError
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.tls_profile import TlsProfile
from clusterproxy.kube.tls_profile_watch import ProfileWatch
from clusterproxy.reverse_proxy.drain import Drain
from clusterproxy.reverse_proxy.origin import Origin, Pool
from clusterproxy.reverse_proxy.server import serve_http
from clusterproxy.telemetry.admin import http_proxy_health_handler
from clusterproxy.telemetry.listener import serve_http_socket
from clusterproxy.transport.listener import accept_forever, listen_tcp

from .authentication import Chain, Provider, Reviewer
from .certificates import Certificates
from .metrics import ServiceProxyMetrics
from .names import Names
from .proxy import ServiceProxy
from .target import APISERVER

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable

    from clusterproxy.kube.api import KubeApi

    from .config import ServiceProxyConfig
    from .oidc import OidcProvider
    from .target import Target

_log = logging.getLogger("clusterproxy.service_proxy")

_USER_AGENT: Final = "cluster-proxy-service-proxy"

# Until the apiserver has told the profile.
_NO_PROFILE: Final = TlsProfile()


async def run_service_proxy(config: ServiceProxyConfig) -> int:
    """Run the service proxy until SIGINT or SIGTERM, and until requests are over then; return its exit status.

    A second signal ends it at once.

    Raises:
      ConfigError: a file, a kubeconfig, the TLS profile or a port cannot be used.
    """
    trio.socket.set_custom_hostname_resolver(Names())
    async with AsyncExitStack() as apis:
        managed = await _open_api(apis, config, "kubeconfig", config.kubeconfig)
        hub: KubeApi | None = None
        if config.enable_impersonation:
            hub = await _open_api(apis, config, "hub-kubeconfig", config.hub_kubeconfig)
        with ExitStack() as opened:
            ports = [
                opened.enter_context(listen_tcp(config.bind_address, port, flag))
                for port, flag in ((config.port, "port"), (config.health_port, "health-port"))
            ]
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                program = Program(config, managed, hub)
                async with trio.open_nursery() as nursery:

                    async def run() -> None:
                        await program.run(*ports)
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(run)
                    await anext(signals)
                    _log.info("draining")
                    program.drain.begin()
                    await anext(signals)
                    nursery.cancel_scope.cancel()
    _log.info("stopped")
    return 0


async def _open_api(
    apis: AsyncExitStack, config: ServiceProxyConfig, flag: str, kubeconfig: str
) -> KubeApi:
    qps, burst = config.kube_api_qps, config.kube_api_burst
    try:
        return await apis.enter_async_context(
            open_kube_api(kubeconfig, qps=qps, burst=burst, user_agent=_USER_AGENT)
        )
    except ConfigError as error:
        raise ConfigError(flag, error.message) from error


class Program:
    """The program between its start and its end.

    Args:
      managed: the cluster's apiserver.
      hub: the hub's, if its users are let in.

    Attributes:
      drain: begins the end.
      certificates: None until they are loaded.
    """

    def __init__(self, config: ServiceProxyConfig, managed: KubeApi, hub: KubeApi | None) -> None:
        self._config = config
        self._managed = managed
        self._hub = hub
        self.metrics = ServiceProxyMetrics()
        self.drain = Drain(config.min_drain_duration_s, config.drain_timeout_s)
        self.certificates: Certificates | None = None

    async def run(self, public: socket.socket, health: socket.socket) -> None:
        """Serve on two listening sockets until :attr:`drain` has ended.

        Raises:
          ConfigError: a certificate, or the TLS profile.

        Cancellation: ends what is under way.
        """
        config = self._config
        profiles = ProfileWatch(self._managed, config.pod_namespace, self._profile_changed)
        async with trio.open_nursery() as nursery:
            await profiles.start(nursery)
            certificates = self.certificates = Certificates(
                config, self.metrics, lambda: profiles.profile or _NO_PROFILE
            )
            pool = Pool(
                max_idle=config.max_idle_conns,
                idle_timeout_s=config.idle_conn_timeout_s,
                handshake_timeout_s=config.tls_handshake_timeout_s,
                expect_continue_s=config.expect_continue_timeout_s,
            )
            oidc = self._oidc()
            for work in (certificates.watch, pool.run, *([oidc.run] if oidc is not None else ())):
                nursery.start_soon(work)
            handler = http_proxy_health_handler(
                self.metrics, lambda: certificates.problem, lambda: self.drain.draining
            )
            nursery.start_soon(accept_forever, health, partial(serve_http_socket, handler), nursery)
            proxy = self._proxy(oidc, Origins(config, pool, certificates.services.current))
            await serve_http(
                [public],
                context=certificates.listener.current,
                decide=proxy.decide,
                drain=self.drain,
                observer=self.metrics,
            )
            nursery.cancel_scope.cancel()

    def _profile_changed(self) -> None:
        # Before there are any, they will be made with it.
        if self.certificates is not None:
            self.certificates.listener.reload()

    def _proxy(self, oidc: OidcProvider | None, origins: Origins) -> ServiceProxy:
        config = self._config
        ttl_s = config.token_review_cache_ttl_s
        local = Reviewer("managed cluster", "managed cluster", self._managed, ttl_s)
        others: list[Provider] = []
        if self._hub is not None:
            groups = config.groups
            others.append(Reviewer("hub", "hub cluster", self._hub, ttl_s, hub_groups=groups))
        if oidc is not None:
            others.append(oidc)
        chain = Chain([local, *others], self.metrics)
        return ServiceProxy(
            # Where there is nobody to ask but the apiserver itself, it may look on its own.
            apiserver=chain if others else None,
            services=chain if config.authenticate_services else None,
            origin=origins.of,
            token_file=config.token_file,
            metrics=self.metrics,
        )

    def _oidc(self) -> OidcProvider | None:
        config = self._config
        if config.oidc is None:
            return None
        # Verifying signatures takes libraries that nothing else needs.
        from .oidc import CaConfigMap, OidcProvider

        name = config.oidc_ca_configmap
        ca = CaConfigMap(self._managed, config.pod_namespace, name) if name else None
        return OidcProvider(config.oidc, ca)


class Origins:
    """Where targets are reached.

    Args:
      context: gives what connections to them are secured with.
    """

    def __init__(
        self, config: ServiceProxyConfig, pool: Pool, context: Callable[[], ssl.SSLContext]
    ) -> None:
        self._apiserver = config.apiserver or (APISERVER.host, APISERVER.port)
        self._pool = pool
        self._context = context

    def of(self, target: Target) -> Origin:
        """Return where a target is reached."""
        host, port = self._apiserver if target.is_apiserver else (target.host, target.port)
        return Origin(
            scheme=target.scheme,
            host=host,
            port=port,
            pool=self._pool,
            label=f"{target.host}:{target.port}",
            context=self._context if target.scheme == "https" else None,
            server_name=target.host,
        )
