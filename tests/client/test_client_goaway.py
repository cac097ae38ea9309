"""Servers that are going away: what they have not looked at goes to a new connection (RFC 9113 §6.8)."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from harness import PROXY, dial_ok, settle
from scripted_proxy import Connector, Dial, ScriptedProxy, patch_connector, scripted

from clusterproxy import ConnectCause, ConnectError, DialCause, DialError, DialReason, open_tunnel
from clusterproxy.http2.adapter import ErrorCode
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.server import RpcServer
from clusterproxy_proto import Data, DialRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from scripted_proxy import ProxyWorld

    from clusterproxy.rpc.server import ServerCall
    from clusterproxy.transport.stream import Transport

either_use = pytest.mark.parametrize("reusable", [True, False])


async def leave_at_once(transport: Transport) -> None:
    """Say goodbye with the first bytes."""
    connection = Http2Connection(transport, client=False, limits=Http2Limits())
    connection.announce_end()
    await connection.run()


async def leave_when_asked(transport: Transport) -> None:
    """Say goodbye right behind the answer to the client's PING."""
    connection = Http2Connection(transport, client=False, limits=Http2Limits())
    answer = connection.answer_ping

    def answer_and_leave(payload: memoryview) -> None:
        answer(payload)
        connection.announce_end()

    connection.answer_ping = answer_and_leave  # type: ignore[method-assign]
    await connection.run()


async def leave_at_the_first_stream(transport: Transport) -> None:
    """Take a stream no more: the goodbye names none that was looked at."""

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        call.connection.h2._raw_goaway(0, ErrorCode.NO_ERROR)
        call.connection.output.pull()
        return ScriptedProxy(call).run

    await RpcServer({PROXY: open_call}, limits=Http2Limits()).serve(transport)


async def say_nothing(transport: Transport) -> None:
    with closing(transport):
        while await transport.receive():
            pass


async def answer_a_dial(world: ProxyWorld, dial: Dial) -> None:
    """The dial has come to the scripted server: it leads to a stream that works."""
    request = await world.peer.next()
    assert isinstance(request, DialRequest)
    world.peer.send(dial_ok(1, request.random), Data(connect_id=1, data=b"hello"))
    await dial.done.wait()
    assert dial.stream is not None
    assert await dial.stream.receive_some() == b"hello"


# -- connecting ------------------------------------------------------------------------------------


@either_use
@pytest.mark.parametrize("leave", [leave_at_once, leave_when_asked])
async def test_a_fresh_connection_is_told_of_the_end(
    autojump_clock: trio.testing.MockClock,
    leave: Callable[[Transport], Awaitable[None]],
    reusable: bool,
) -> None:
    async with scripted(stand_ins=[leave, leave], reusable=reusable) as world:
        await world.connect()
        assert len(world.connector.attempts) == 3
        assert [transport.closed for transport in world.connector.transports] == [True, True, False]


@pytest.mark.parametrize("leave", [leave_at_once, leave_when_asked])
async def test_every_fresh_connection_is_told_of_the_end(
    autojump_clock: trio.testing.MockClock, leave: Callable[[Transport], Awaitable[None]]
) -> None:
    """The error says so, and advises no other certificate."""
    async with trio.open_nursery() as nursery:
        connector = Connector(nursery, leave)
        with patch_connector(connector), pytest.raises(ConnectError, match="going away") as caught:
            async with open_tunnel("/leaving"):
                pytest.fail("there is no tunnel")
        assert caught.value.cause is ConnectCause.CLOSED
        assert "certificate" not in caught.value.advice
        assert len(connector.attempts) == 3
        nursery.cancel_scope.cancel()


async def test_all_attempts_together_have_the_time_to_connect(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        connector = Connector(nursery, say_nothing)
        connector.stand_ins += [leave_at_once]
        before = trio.current_time()
        with patch_connector(connector), pytest.raises(ConnectError, match="within 1 s") as caught:
            async with open_tunnel("/mute", connect_timeout=1):
                pytest.fail("there is no tunnel")
        assert caught.value.cause is ConnectCause.TIMEOUT
        assert trio.current_time() - before == pytest.approx(1)
        assert len(connector.attempts) == 2
        nursery.cancel_scope.cancel()


# -- dials -----------------------------------------------------------------------------------------


@either_use
async def test_the_end_comes_before_the_dial(
    autojump_clock: trio.testing.MockClock, reusable: bool
) -> None:
    told = trio.Event()

    async def leave_later(transport: Transport) -> None:
        connection = Http2Connection(transport, client=False, limits=Http2Limits())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await told.wait()
            connection.announce_end()

    async with scripted(stand_ins=[leave_later], reusable=reusable) as world:
        told.set()
        await settle()
        assert world.connector.transports[0].closed
        await world.connect()
        assert len(world.connector.attempts) == 2


@either_use
async def test_the_end_crosses_the_dial(
    autojump_clock: trio.testing.MockClock, reusable: bool
) -> None:
    """The stream is opened, but the server names it as one that it has not looked at."""
    stand_ins = [leave_at_the_first_stream] * 2
    async with scripted(stand_ins=stand_ins, reusable=reusable) as world:
        dial = Dial(world.tunnel, "target:80")
        world.nursery.start_soon(dial.run)
        await trio.sleep(1)
        await answer_a_dial(world, dial)
        assert len(world.connector.attempts) == 3
        assert world.failures == {}
        assert world.states == {"ok": 1}
        assert not world.tunnel.closed


@either_use
async def test_the_end_crosses_every_dial(
    autojump_clock: trio.testing.MockClock, reusable: bool
) -> None:
    stand_ins = [leave_at_the_first_stream] * 10
    async with scripted(stand_ins=stand_ins, reusable=reusable) as world:
        with pytest.raises(DialError, match="going away") as caught:
            await world.tunnel.dial("target:80")
        assert caught.value.reason is DialReason.STREAM_SETUP
        assert caught.value.cause is DialCause.CLOSED
        assert len(world.connector.attempts) == 3
        assert world.tunnel.closed is not reusable
        await settle()
        assert all(transport.closed for transport in world.connector.transports)


async def test_single_use_that_is_refused_is_dialled_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Without a goodbye: on the same connection."""
    async with scripted(reusable=False) as world:
        dial, _ = await world.start_dial()
        call = world.peer.call
        call.connection.reset_stream(call.stream, ErrorCode.REFUSED_STREAM)
        await trio.sleep(1)
        await answer_a_dial(world, dial)
        assert len(world.connector.attempts) == 1


@either_use
async def test_what_the_server_has_looked_at_is_not_tried_again(
    autojump_clock: trio.testing.MockClock, reusable: bool
) -> None:
    """It may have reached the service, whatever became of the connection then."""
    async with scripted(reusable=reusable) as world:
        dial, _ = await world.start_dial()
        world.peer.call.connection.announce_end()
        await settle()
        assert not dial.done.is_set()
        world.connector.transports[0].close()
        await dial.done.wait()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.TUNNEL_CLOSED
        await trio.sleep(10)
        assert len(world.connector.attempts) == 1
        assert world.tunnel.closed is not reusable
