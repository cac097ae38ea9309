"""A program: steady dials of clusters' apiservers until SIGTERM; then it writes how many there were, and what failed.

Usage: dials.py SERVER CA CERT KEY CLUSTER... Each is a tunnel of its own, as most clients have it, and a request over TLS.
With ``--once`` each cluster is dialled once, by one tunnel, and what they answered is written. With ``--journal`` each dial is
written when it is over, as a line of JSON.
"""

from __future__ import annotations

import json
import signal
import ssl
import sys
import time

import trio

import clusterproxy

PER_S = 10


async def ask(tunnel: clusterproxy.Tunnel, cluster: str) -> str:
    """Return the body of what a cluster's apiserver says of its health."""
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    async with await tunnel.dial(f"{cluster}:443") as stream:
        secure = trio.SSLStream(stream, nobody, https_compatible=True)
        head = f"GET /healthz HTTP/1.1\r\nHost: {cluster}\r\nConnection: close\r\n\r\n"
        await secure.send_all(head.encode())
        answer = b"".join([bytes(data) async for data in secure])
    return answer.partition(b"\r\n\r\n")[2].decode()


class Dials:
    def __init__(
        self, server: str, tls: clusterproxy.ClientTLS, clusters: list[str], *, journal: bool
    ) -> None:
        self.server, self.tls, self.clusters = server, tls, clusters
        self.journal = journal
        self.begun = 0
        self.failures: list[str] = []

    async def counted(self, cluster: str, number: int) -> None:
        # Of all processes the same clock.
        began = time.monotonic()
        problem = await self.one(cluster)
        if problem:
            self.failures.append(problem)
        if self.journal:
            took_s = time.monotonic() - began
            print(json.dumps([number, cluster, began, took_s, problem]), flush=True)  # noqa: T201

    async def one(self, cluster: str) -> str:
        began = trio.current_time()
        try:
            with trio.fail_after(60):
                async with clusterproxy.open_tunnel(
                    self.server, tls=self.tls, reusable=False
                ) as tunnel:
                    answer = await ask(tunnel, cluster)
        except (clusterproxy.ClusterProxyError, trio.BrokenResourceError, trio.TooSlowError, OSError) as error:  # fmt: skip
            took = trio.current_time() - began
            return f"{cluster} after {took:.1f} s: {type(error).__name__}: {error}"
        return "" if answer == "ok" else f"{cluster}: {answer!r}"

    async def until_told(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                with trio.CancelScope() as going_on:

                    async def wait() -> None:
                        async for _ in signals:
                            going_on.cancel()
                            return

                    nursery.start_soon(wait)
                    while True:
                        cluster = self.clusters[self.begun % len(self.clusters)]
                        nursery.start_soon(self.counted, cluster, self.begun)
                        self.begun += 1
                        await trio.sleep(1 / PER_S)
        print(json.dumps({"begun": self.begun, "failures": self.failures}))  # noqa: T201


async def once(server: str, tls: clusterproxy.ClientTLS, clusters: list[str]) -> None:
    async with clusterproxy.open_tunnel(server, tls=tls) as tunnel:
        for cluster in clusters:
            print(cluster, await ask(tunnel, cluster))  # noqa: T201


def main() -> None:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--")]
    server, ca, cert, key, *clusters = arguments
    tls = clusterproxy.ClientTLS(ca_cert=ca, cert=cert, key=key)
    if "--once" in sys.argv:
        trio.run(once, server, tls, clusters)
    else:
        trio.run(Dials(server, tls, clusters, journal="--journal" in sys.argv).until_told)


if __name__ == "__main__":
    main()
