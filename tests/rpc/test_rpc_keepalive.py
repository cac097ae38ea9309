"""Keepalive of many connections by one task."""

from __future__ import annotations

import h2.events
import pytest
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
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_alive, server.connections, 30.0)
            await trio.testing.wait_all_tasks_blocked()
            (connection,) = server.connections
            while server.connections:
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        # The PING, 30 s after the last sign of life, and 20 s for its answer.
        assert trio.current_time() - started == pytest.approx(51, abs=1.5)
        assert connection.lost == "keepalive ping failed to receive ACK within timeout"
        await peer.wait_for(h2.events.PingReceived)
