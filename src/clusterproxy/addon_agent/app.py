"""The add-on agent program: health port, lease, and the way to the hub's proxy servers if it is asked to be one."""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import ConfigError
from clusterproxy.telemetry.listener import serve_http_socket
from clusterproxy.transport.listener import accept_forever, listen_tcp

from .health import Certificates, health_handler
from .lease import AddonLease
from .proxy_agent import ProxyAgent

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from clusterproxy.kube.client import KubeClient

    from .config import AddonAgentConfig
    from .local_proxy import LocalProxy

_log = logging.getLogger("clusterproxy.addon_agent")

# The original's.
_USER_AGENT: Final = "proxy-agent-addon-agent"
_REQUEST_S: Final = 10.0

# A klusterlet writes the kubeconfig when the hub has signed a certificate.
_KUBECONFIG_S: Final = 2.0
# How long a connection waits for that. Who has made it gives up, too.
_HUB_S: Final = 5.0

# So long what is forwarded may go on after SIGTERM; the proxy agent of the pod drains meanwhile.
_GRACE_S: Final = 35.0

_LOOPBACK: Final = "127.0.0.1"


async def run_addon_agent(config: AddonAgentConfig) -> int:
    """Run the add-on agent until SIGINT or SIGTERM; return its exit status.

    What is forwarded at that time goes on until the proxy agent ends it, a second signal comes, or 35 s are over.

    Raises:
      ConfigError: a kubeconfig or an address cannot be used.
    """
    with contextlib.ExitStack() as opened:
        health = opened.enter_context(
            listen_tcp(*config.health_address, "health-probe-bind-address")
        )
        forwarded = (
            opened.enter_context(
                listen_tcp(_LOOPBACK, config.port_forward_port, "port-forward-port")
            )
            if config.enable_port_forward_proxy
            else None
        )
        agent = _AddonAgent(config)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as process:
                # First of all: a proxy agent whose probe is refused is restarted.
                process.start_soon(
                    accept_forever, health, partial(serve_http_socket, agent.health), process
                )
                process.start_soon(agent.run, forwarded)
                await anext(signals)
                _log.info("stopping")
                await agent.drain(signals)
                process.cancel_scope.cancel()
    _log.info("stopped")
    return 0


class _AddonAgent:
    """What the parts of the program know of each other."""

    def __init__(self, config: AddonAgentConfig) -> None:
        self._config = config
        self._proxy_agent = ProxyAgent(*config.proxy_agent_address)
        self._hub: KubeClient | None = None
        self._hub_there = trio.Event()
        self._forwarding: LocalProxy | None = None
        self._work = trio.CancelScope()
        directory = Path(config.certificate_directory)
        certificates = Certificates(
            [directory / "tls.crt", directory / "tls.key"], lambda: self._proxy_agent.reloads
        )
        self.health = health_handler(
            {
                "certificates": certificates.check,
                "port forward proxy readiness": self._check_forwarding,
            }
        )

    def _check_forwarding(self) -> str:
        needed = self._config.enable_port_forward_proxy
        ready = self._forwarding is not None and self._forwarding.accepted
        return "" if ready or not needed else "not ready"

    async def run(self, forwarded: socket.socket | None) -> None:
        """Work until :meth:`drain`, forwarding what is accepted by *forwarded*."""
        # In a thread: it takes a while, and probes want an answer meanwhile.
        await trio.to_thread.run_sync(importlib.import_module, "clusterproxy.kube.client")
        async with trio.open_nursery() as connections:
            with self._work:
                async with trio.open_nursery() as nursery:
                    if forwarded is not None:
                        self._forward(forwarded, nursery, connections)
                    nursery.start_soon(self._keep_hub)
                    await self._keep_lease()

    def _forward(
        self, listener: socket.socket, nursery: trio.Nursery, connections: trio.Nursery
    ) -> None:
        from .local_proxy import LocalProxy, Pods

        servers = Pods(
            namespace=self._config.proxy_server_namespace,
            selector="proxy.open-cluster-management.io/component-name=proxy-server",
            port=self._config.proxy_server_port,
        )
        self._forwarding = LocalProxy(self._await_hub, servers)
        nursery.start_soon(accept_forever, listener, self._forwarding.serve, connections)

    async def _await_hub(self) -> KubeClient | None:
        # At the start the proxy agent dials before there is one.
        with trio.move_on_after(_HUB_S):
            await self._hub_there.wait()
        return self._hub

    async def _keep_lease(self) -> Never:
        from clusterproxy.kube.client import open_kube_api

        config = self._config
        check = config.enable_proxy_agent_health_check
        async with open_kube_api(
            config.kubeconfig, user_agent=_USER_AGENT, timeout_s=_REQUEST_S
        ) as api:
            await AddonLease(
                api,
                config.pod_namespace,
                hub=lambda: self._hub,
                cluster=config.cluster_name,
                ready=self._proxy_agent.look if check else _always,
                interval_s=config.lease_interval_s,
            ).run()

    async def _keep_hub(self) -> Never:
        """Have a client of the hub's apiserver, as soon as there is a kubeconfig."""
        from clusterproxy.kube.client import open_kube_api

        path = self._config.hub_kubeconfig
        if path and not await trio.Path(path).exists():
            _log.warning("--hub-kubeconfig %s is not there yet: waiting for it", path)
            while not await trio.Path(path).exists():  # noqa: ASYNC110  nobody tells
                await trio.sleep(_KUBECONFIG_S)
        try:
            async with open_kube_api(path, user_agent=_USER_AGENT, timeout_s=_REQUEST_S) as api:
                self._hub = api
                self._hub_there.set()
                await trio.sleep_forever()
        except ConfigError as error:
            raise ConfigError("hub-kubeconfig", f"--hub-kubeconfig: {error.message}") from error
        raise AssertionError  # pragma: no cover  the block ends by cancellation only

    async def drain(self, signals: AsyncIterator[int]) -> None:
        """Take nothing new, and wait until nothing is forwarded any more, a signal comes, or it is enough."""
        self._work.cancel()
        if self._forwarding is None or not self._forwarding.open:
            return
        _log.info("%d connections are forwarded yet", self._forwarding.open)
        with trio.move_on_after(_GRACE_S):
            async with trio.open_nursery() as nursery:

                async def second_signal() -> None:
                    await anext(signals)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(second_signal)
                await self._forwarding.idle()
                nursery.cancel_scope.cancel()


async def _always() -> bool:
    return True
