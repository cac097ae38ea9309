"""The user server program: what it asks of the hub's apiserver, its ports, and its end."""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.tls_profile import TlsProfile
from clusterproxy.kube.tls_profile_watch import ProfileWatch
from clusterproxy.reverse_proxy.drain import Drain
from clusterproxy.reverse_proxy.exchange import Answer, Forward, Request
from clusterproxy.reverse_proxy.origin import Pool
from clusterproxy.reverse_proxy.server import serve_http
from clusterproxy.telemetry.admin import http_proxy_health_handler
from clusterproxy.telemetry.listener import serve_http_socket
from clusterproxy.transport.listener import accept_forever, listen_tcp

from .allowlist import Allowlist
from .certificates import Certificates
from .gate import Gate
from .metrics import UserServerMetrics
from .tunnel import ProxyServers

if TYPE_CHECKING:
    import socket

    from clusterproxy.kube.api import KubeApi

    from .config import UserServerConfig

_log = logging.getLogger("clusterproxy.user_server")

_USER_AGENT: Final = "cluster-proxy-user-server"

# Until the apiserver has told the profile.
_NO_PROFILE: Final = TlsProfile()


async def run_user_server(config: UserServerConfig) -> int:
    """Run the user server until SIGINT or SIGTERM, and until requests are over then; return its exit status.

    A second signal ends it at once.

    Raises:
      ConfigError: a file, the kubeconfig, the TLS profile or a port cannot be used.
    """
    async with open_kube_api(config.kubeconfig, user_agent=_USER_AGENT) as api:
        with ExitStack() as opened:
            ports = [
                opened.enter_context(listen_tcp("", port, flag))
                for port, flag in (
                    (config.server_port, "server-port"),
                    (config.health_port, "health-port"),
                )
            ]
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                program = Program(config, api)
                async with trio.open_nursery() as nursery:

                    async def run() -> None:
                        await program.run(*ports)
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(run)
                    await anext(signals)
                    _log.info("draining for up to %g s", config.drain_timeout_s)
                    program.drain.begin()
                    await anext(signals)
                    nursery.cancel_scope.cancel()
    _log.info("stopped")
    return 0


class Program:
    """The program between its start and its end.

    Attributes:
      drain: begins the end.
    """

    def __init__(self, config: UserServerConfig, api: KubeApi) -> None:
        self._config = config
        self._api = api
        self.metrics = UserServerMetrics()
        self.drain = Drain(config.min_drain_duration_s, config.drain_timeout_s)

    async def run(self, public: socket.socket, health: socket.socket) -> None:
        """Serve on two listening sockets until :attr:`drain` has ended.

        Users are served when the list of services and the TLS profile are known, or cannot be had for now.

        Raises:
          ConfigError: a certificate, or the TLS profile.

        Cancellation: ends what is under way.
        """
        config = self._config
        allowlist = Allowlist(
            self._api, config.pod_namespace, config.exposed_services_configmap, self.metrics
        )

        def current_profile() -> TlsProfile:
            return profiles.profile or _NO_PROFILE

        async with trio.open_nursery() as nursery:
            profiles = ProfileWatch(
                self._api, config.pod_namespace, lambda: certificates.listener.reload()
            )
            # Before whoever else reads the files: they know what the flags are called.
            certificates = Certificates(
                config, self.metrics, current_profile, lambda: servers.renew()
            )
            servers = ProxyServers(config, nursery)
            async with trio.open_nursery() as starting:
                starting.start_soon(profiles.start, nursery)
                starting.start_soon(nursery.start, allowlist.run)
            pool = Pool()
            nursery.start_soon(pool.run)
            nursery.start_soon(certificates.watch)
            handler = http_proxy_health_handler(
                self.metrics, lambda: certificates.problem, lambda: self.drain.draining
            )
            nursery.start_soon(accept_forever, health, partial(serve_http_socket, handler), nursery)
            gate = Gate(
                allowlist=allowlist,
                dial=servers.dial,
                context=certificates.service_proxy.current,
                pool=pool,
                metrics=self.metrics,
                denies=config.denies,
            )
            _log.info("serving users on port %d", config.server_port)
            await serve_http(
                [public],
                context=certificates.listener.current,
                decide=gate.decide,
                fail=_bad_gateway,
                drain=self.drain,
                observer=self.metrics,
            )
            nursery.cancel_scope.cancel()


def _bad_gateway(_request: Request, _forward: Forward, error: Exception) -> Answer:
    return Answer(502, f"proxy to anp-proxy-server failed because {error}")
