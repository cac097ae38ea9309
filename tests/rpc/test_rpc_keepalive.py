"""Keepalive of many connections by one task."""

from __future__ import annotations

import h2.events
import trio
import trio.testing
from rpc_ends import connected, raw_client

from clusterproxy.rpc.keepalive import keep_alive


async def test_a_peer_that_answers_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with connected() as ends:
        ends.nursery.start_soon(keep_alive, ends.server.connections, 30.0)
        ends.nursery.start_soon(keep_alive, [ends.connection], 0.5)
        await trio.sleep(600)
        assert ends.connection.lost is None
        await ends.check_bystander()


async def test_a_silent_peer_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_client() as (peer, server):
        await peer.wait_for(h2.events.RemoteSettingsChanged)
        (connection,) = server.connections
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_alive, server.connections, 30.0)
            # The PING, 30 s after the last sign of life, and 20 s for its answer.
            await trio.sleep(49)
            assert connection in server.connections
            await trio.sleep(3)
            nursery.cancel_scope.cancel()
        assert not server.connections
        assert connection.lost == "keepalive ping failed to receive ACK within timeout"
        await peer.wait_for(h2.events.PingReceived)
