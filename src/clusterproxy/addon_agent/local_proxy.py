"""A local port that leads to pods of a cluster, through its apiserver.

Source: upstream ``pkg/util/portforward.go`` (``NewRoundRobinLocalProxy``).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.errors import KubeError
from clusterproxy.kube.resource import PODS, list_at, text_at, value_at
from clusterproxy.transport.stream import tune

from .pod_stream import PodPort, PodStreamError, open_pod_stream

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from clusterproxy.kube.client import KubeClient
    from clusterproxy.kube.resource import Object

    from .pod_stream import PodStream

_log = logging.getLogger("clusterproxy.addon_agent")

# Pods that are tried for one connection.
_ATTEMPTS: Final = 3

_RECEIVE: Final = 64 * 1024


@attrs.frozen(kw_only=True)
class Pods:
    """Pods of which any will do.

    Attributes:
      selector: their labels, ``NAME=VALUE``, several with commas between.
      port: that is to be reached.
    """

    namespace: str
    selector: str
    port: int


class LocalProxy:
    """Connects accepted sockets with pods, each with one of its own.

    Of pods that are ready those come first to which the fewest connections go, at random among equals: so an agent
    finds all proxy servers soon, although it can only ask for another one.

    Attributes:
      accepted: whether a connection has ever come.
      open: how many there are.

    Args:
      api: returns the client of the apiserver, None if there is none yet.
    """

    def __init__(self, api: Callable[[], Awaitable[KubeClient | None]], pods: Pods) -> None:
        self.accepted = False
        self.open = 0
        self._api = api
        self._pods = pods
        self._used: Counter[str] = Counter()
        self._idle = trio.Event()

    async def serve(self, sock: socket.socket) -> None:
        """Serve one connection until both sides have ended, or one has failed. Cancellation: closes it at once."""
        self.accepted = True
        self.open += 1
        try:
            tune(sock, user_timeout=False)
            async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
                try:
                    await self._connect(stream)
                except (KubeError, PodStreamError) as error:
                    _log.warning("a connection was not forwarded: %s", error)
        finally:
            self.open -= 1
            if not self.open:
                self._idle.set()
                self._idle = trio.Event()

    async def idle(self) -> None:
        """Wait until there is no connection."""
        while self.open:
            await self._idle.wait()

    async def _connect(self, local: trio.SocketStream) -> None:
        api = await self._api()
        if api is None:
            raise PodStreamError("there is no way to the apiserver yet")
        pods = await self._find(api)
        if not pods:
            raise PodStreamError(
                f"no pod with {self._pods.selector} runs in the namespace {self._pods.namespace}"
            )
        failure: PodStreamError | None = None
        for pod in pods[:_ATTEMPTS]:
            where = PodPort(self._pods.namespace, pod, self._pods.port)
            self._used[pod] += 1
            try:
                async with open_pod_stream(api, where) as remote:
                    _log.info("forwarding a connection to %s", where)
                    await _join(local, remote)
                    return
            except PodStreamError as error:
                _log.debug("%s", error)
                failure = error
            finally:
                self._used[pod] -= 1
                self._used += Counter()  # forgets those that are zero
        assert failure is not None  # noqa: S101
        raise failure

    async def _find(self, api: KubeClient) -> list[str]:
        listing = await api.list(
            PODS, self._pods.namespace, label_selector=self._pods.selector, keep=_essence
        )
        pods = [pod for pod in listing.items if text_at(pod, "status", "phase") == "Running"]
        random.shuffle(pods)
        pods.sort(
            key=lambda pod: (not _is_ready(pod), self._used[text_at(pod, "metadata", "name")])
        )
        return [name for pod in pods if (name := text_at(pod, "metadata", "name"))]


def _essence(pod: Object) -> Object:
    """Return what of a pod is of interest; the rest may be large."""
    return {
        "metadata": {key: value_at(pod, "metadata", key) for key in ("name", "deletionTimestamp")},
        "status": {
            "phase": value_at(pod, "status", "phase"),
            "conditions": list_at(pod, "status", "conditions"),
        },
    }


def _is_ready(pod: Object) -> bool:
    """Whether it takes connections, and is not about to end."""
    ready = any(
        text_at(each, "type") == "Ready" and text_at(each, "status") == "True"
        for each in list_at(pod, "status", "conditions")
    )
    return ready and not value_at(pod, "metadata", "deletionTimestamp")


async def _join(local: trio.SocketStream, remote: PodStream) -> None:
    """Copy both ways until both have ended, or there is nothing any more that could be answered."""
    async with trio.open_nursery() as nursery:

        async def upwards() -> None:
            try:
                while data := await local.receive_some(_RECEIVE):
                    await remote.send_all(data)
                await remote.send_eof()
            except trio.BrokenResourceError as error:
                _log.debug("forwarding ends: %s", error)
                nursery.cancel_scope.cancel()

        nursery.start_soon(upwards)
        try:
            while data := await remote.receive_some():
                await local.send_all(data)
            await local.send_eof()
        except trio.BrokenResourceError as error:
            _log.debug("forwarding ends: %s", error)
            nursery.cancel_scope.cancel()
        if remote.over:
            nursery.cancel_scope.cancel()
