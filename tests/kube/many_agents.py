"""Plays many clusters in one process: the real agent's sessions, as often as asked for (the Go twin is konnbench's agents).

    many_agents.py HOST:PORT COUNT CA CERT KEY IDENTIFIERS

``%d`` in the identifiers is the agent's number, from 1. Prints a line when all are connected; SIGTERM ends it.
"""

from __future__ import annotations

import signal
import sys
from functools import partial

import trio

from clusterproxy.agent.config import AgentConfig
from clusterproxy.agent.dialer import ServerDialer
from clusterproxy.agent.resolver import Resolver
from clusterproxy.agent.servers import Servers
from clusterproxy.agent.state import AgentState, PacketCounters
from clusterproxy.telemetry.agent_metrics import AgentMetrics
from clusterproxy.telemetry.logs import configure_logging
from clusterproxy.transport.reload import ReloadingContext
from clusterproxy.transport.tls import client_context
from clusterproxy.tunnel.budget import Budget


async def main(server: str, count: int, ca: str, cert: str, key: str, identifiers: str) -> None:
    """Run until SIGTERM."""
    factory = partial(client_context, ca=ca, cert=cert, key=key, alpn=["h2"])
    tls = ReloadingContext(factory, [ca, cert, key])
    host, _, port = server.rpartition(":")
    everybody = []
    configure_logging(format="text", verbosity=4)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tls.watch)
            for number in range(1, count + 1):
                config = AgentConfig(
                    proxy_server_host=host,
                    proxy_server_port=int(port),
                    agent_id=f"agent-{number}",
                    agent_identifiers=identifiers.replace("%d", str(number)),
                )
                metrics = AgentMetrics()
                state = AgentState(
                    config=config,
                    metrics=metrics,
                    budget=Budget(each=2**24, total=2**29),
                    resolver=Resolver(),
                    data_packets=PacketCounters(metrics),
                )
                servers = Servers(state, ServerDialer(state, tls))
                everybody.append(servers)
                nursery.start_soon(servers.sync)
            while not all(servers.connected for servers in everybody):  # noqa: ASYNC110
                await trio.sleep(0.05)
            print(f"all {count} are connected", flush=True)  # noqa: T201
            await anext(signals)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(partial(main, sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
