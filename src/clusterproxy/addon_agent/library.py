"""For programs beside the hub: a way to its proxy servers, what their TLS needs, and the names of what they reach.

What ``clusteradm proxy`` and others take from upstream's ``pkg/util``. The client library does the rest::

    async with (
        open_hub(kubeconfig) as hub,
        forward_to_pods(hub, namespace, PROXY_SERVERS, 8090) as port,
        clusterproxy.open_tunnel(f"localhost:{port}", tls=await tls_of_secrets(hub, namespace)) as tunnel,
        await tunnel.dial("cluster1:443") as stream,
    ):
        ...
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import ConfigError
from clusterproxy.kube.client import USER_AGENT, KubeClient, open_kube_api
from clusterproxy.kube.resource import SECRETS, text_at
from clusterproxy.transport.listener import accept_forever, listen_tcp
from clusterproxy.transport.tls import client_context
from clusterproxy.tunnel.agent_identity import service_proxy_host as service_proxy_host

from .local_proxy import LocalProxy, Pods

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Generator
    from contextlib import AbstractAsyncContextManager

#: The labels of proxy servers' pods.
PROXY_SERVERS: Final = "proxy.open-cluster-management.io/component-name=proxy-server"


def service_host(cluster: str, namespace: str, service: str) -> str:
    """Return the host by which clients of older releases reach a Service of a cluster.

    Source: upstream ``pkg/util/serviceurl.go`` ``GenerateServiceURL``.
    """
    digest = hashlib.sha256(f"{cluster} {namespace} {service}".encode()).hexdigest()
    # A label of DNS has up to 63 characters.
    return f"cluster-proxy-{digest}"[:63]


def open_hub(kubeconfig: str = "") -> AbstractAsyncContextManager[KubeClient]:
    """Open a client of the hub's apiserver.

    Args:
      kubeconfig: a file; without one the service account of the pod.

    Raises:
      ConfigError: there is no usable configuration.
    """
    return open_kube_api(kubeconfig, user_agent=USER_AGENT)


@contextlib.asynccontextmanager
async def forward_to_pods(
    hub: KubeClient, namespace: str, selector: str, port: int, *, local_port: int = 0
) -> AsyncGenerator[int]:
    """Forward a port of 127.0.0.1 to pods, for as long as the block runs; yield the port.

    Each connection goes to a running pod of its own choice, through the apiserver, by the right to ``pods/portforward``
    and to list ``pods``. One that cannot be forwarded is closed, and the log (``clusterproxy.addon_agent``) says why.

    Args:
      selector: the pods' labels, ``NAME=VALUE``, several with commas between.
      port: of the pods.
      local_port: 0 for any.

    Raises:
      ConfigError: the local port cannot be used.

    Cancellation: ends every connection at once, as the end of the block does.
    """

    async def there() -> KubeClient:
        return hub

    proxy = LocalProxy(there, Pods(namespace=namespace, selector=selector, port=port))
    with listen_tcp("127.0.0.1", local_port, "local-port") as listener:
        number: int = listener.getsockname()[1]
        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_forever, listener, proxy.serve, nursery)
            try:
                yield number
            except BaseException as error:
                # Raised below, where no nursery makes a group of it.
                failure = error
            # Where somebody outside has cancelled, too: the tasks here would raise that, and nobody would see the failure.
            nursery.cancel_scope.shield = True
            nursery.cancel_scope.cancel()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure


async def tls_of_secrets(
    hub: KubeClient,
    namespace: str,
    *,
    ca_secret: str = "proxy-server-ca",  # noqa: S107  a name
    client_secret: str = "proxy-client",  # noqa: S107
) -> ssl.SSLContext:
    """Return the TLS context of clients of the proxy servers, from secrets on the hub.

    The servers' certificates are for ``localhost`` and ``127.0.0.1`` as well as ``proxy-entrypoint.NAMESPACE``.
    Source: upstream ``pkg/util/secrets.go`` ``GetKonnectivityTLSConfig``.

    Raises:
      KubeError: a secret cannot be read.
      ConfigError: it lacks something, or that is no certificate or key.
    """
    authority = await _value(hub, namespace, ca_secret, "ca.crt")
    certificate = await _value(hub, namespace, client_secret, "tls.crt")
    key = await _value(hub, namespace, client_secret, "tls.key")
    # The ssl module reads files only.
    with _file(authority) as ca, _file(certificate) as crt, _file(key) as private:
        try:
            return client_context(ca=ca, cert=crt, key=private, alpn=())
        except ConfigError as error:
            name = ca_secret if error.field == "ca" else client_secret
            raise ConfigError(error.field, f"secret {namespace}/{name}: {error.message}") from error


async def _value(hub: KubeClient, namespace: str, name: str, key: str) -> bytes:
    secret = await hub.get(SECRETS, name, namespace)
    try:
        value = base64.b64decode(text_at(secret, "data", key), validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if not value:
        raise ConfigError(name, f"secret {namespace}/{name} has no {key}")
    return value


@contextlib.contextmanager
def _file(content: bytes) -> Generator[str]:
    """Have a file that is in no folder."""
    descriptor = os.memfd_create("secret")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
