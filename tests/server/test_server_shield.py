"""Go clients that lose what comes right behind a DIAL_RSP are kept from it; nobody else waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from harness import GO, OURS, ClientPeer, ServerWorld, dial_ok, serving, settle

from clusterproxy_proto import CloseRequest, CloseResponse, Data, DialRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

GREETING = [Data(1, data=b"%d" % n * 10_000) for n in range(5)]


async def dialled(server: ServerWorld, *, user_agent: str = GO) -> tuple[ClientPeer, ClientPeer]:
    agent = await server.agent()
    client = await server.client(user_agent=user_agent)
    client.send(DialRequest("tcp", "target:22", 1))
    await agent.next()
    return agent, client


def hold_pings(server: ServerWorld) -> list[Callable[[], None]]:
    """Have the server's PINGs stay unanswered; what is returned answers them."""
    held: list[Callable[[], None]] = []
    for connection in server.frontends.connections:

        def ping(acknowledged: Callable[[], None] | None = None) -> None:
            assert acknowledged is not None
            held.append(acknowledged)

        connection.ping = ping  # type: ignore[method-assign]
    return held


def answer(pings: list[Callable[[], None]]) -> None:
    """Answer these, and those that are sent then."""
    while pings:
        pings.pop(0)()


async def test_others_are_not_held(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server, user_agent=OURS)
        pings = hold_pings(server)
        agent.send(dial_ok(1, 1), *GREETING)
        await client.expect(dial_ok(1, 1), *GREETING)
        assert trio.current_time() == 0
        assert not pings


async def test_until_the_answer_and_a_moment(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        agent.send(dial_ok(1, 1), *GREETING)
        await client.expect(dial_ok(1, 1))
        await client.expect_nothing_more()
        assert trio.current_time() == 0
        await client.expect(*GREETING)
        assert trio.current_time() == pytest.approx(0.005)
        agent.send(Data(1, data=b"more"))
        await client.expect(Data(1, data=b"more"))
        assert trio.current_time() == pytest.approx(0.005)


async def test_no_answer(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        pings = hold_pings(server)
        agent.send(dial_ok(1, 1), *GREETING)
        await client.expect(dial_ok(1, 1))
        await trio.sleep(5)
        await client.expect_nothing_more()
        answer(pings)
        await client.expect_nothing_more()
        await client.expect(*GREETING)
        assert trio.current_time() == pytest.approx(5.005)


async def test_a_client_that_is_not_let_run(autojump_clock: MockClock) -> None:
    """It has read the DIAL_RSP, and nothing since: the machine is busy with others."""
    async with serving() as server:
        agent, client = await dialled(server)
        pings = hold_pings(server)
        agent.send(dial_ok(1, 1), *GREETING)
        await client.expect(dial_ok(1, 1))
        pings.pop(0)()
        await trio.sleep(1)
        await client.expect_nothing_more()
        answer(pings)
        await client.expect(*GREETING)
        assert trio.current_time() == 1


async def test_data_after_the_answer(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        pings = hold_pings(server)
        agent.send(dial_ok(1, 1))
        await client.expect(dial_ok(1, 1))
        answer(pings)
        await trio.sleep(0.003)
        agent.send(GREETING[0])
        await client.expect_nothing_more()
        answer(pings)
        agent.send(GREETING[1])
        await client.expect(*GREETING[:2])
        assert trio.current_time() == pytest.approx(0.005)


async def test_data_long_after_the_answer(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        agent.send(dial_ok(1, 1))
        await client.expect(dial_ok(1, 1))
        await trio.sleep(1)
        agent.send(*GREETING)
        await client.expect(*GREETING)
        assert trio.current_time() == 1


@pytest.mark.parametrize("packet", [Data(1, data=b"hello"), CloseRequest(1)])
async def test_until_the_client_sends(
    packet: Data | CloseRequest, autojump_clock: MockClock
) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        hold_pings(server)
        agent.send(dial_ok(1, 1), *GREETING)
        await client.expect(dial_ok(1, 1))
        client.send(packet)
        await client.expect(*GREETING)
        assert trio.current_time() == 0


async def test_a_target_that_says_one_thing_and_closes(autojump_clock: MockClock) -> None:
    """The close waits with the data: a Go client that hears of it too early waits for ever."""
    async with serving() as server:
        agent, client = await dialled(server)
        pings = hold_pings(server)
        agent.send(dial_ok(1, 1), *GREETING, CloseResponse("", 1))
        await client.expect(dial_ok(1, 1))
        await client.expect_nothing_more()
        assert server.established == 0
        answer(pings)
        await client.expect(*GREETING, CloseResponse("", 1))
        assert trio.current_time() == pytest.approx(0.005)
        assert not server.state.budget.used


async def test_a_target_that_only_closes(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        pings = hold_pings(server)
        agent.send(dial_ok(1, 1), CloseResponse("", 1))
        await client.expect(dial_ok(1, 1))
        await client.expect_nothing_more()
        answer(pings)
        await client.expect(CloseResponse("", 1))
        assert trio.current_time() == pytest.approx(0.005)


async def test_a_close_after_the_answer(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        agent.send(dial_ok(1, 1))
        await client.expect(dial_ok(1, 1))
        await trio.sleep(1)
        agent.send(CloseResponse("", 1))
        await client.expect(CloseResponse("", 1))
        assert trio.current_time() == 1


@pytest.mark.parametrize("way", ["reset", "hang_up", "half_close"])
async def test_client_goes_while_held(way: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        hold_pings(server)
        agent.send(dial_ok(1, 1), *GREETING)
        if way == "half_close":
            agent.send(CloseResponse("", 1))
        await client.expect(dial_ok(1, 1))
        await settle()
        assert server.state.budget.used
        getattr(client, way)()
        await settle()
        assert not server.state.budget.used
        assert server.established == 0
        if way == "half_close":
            assert await client.status() == ("OK", "")


async def test_agent_goes_while_held(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await dialled(server)
        hold_pings(server)
        agent.send(dial_ok(1, 1), GREETING[0])
        await client.expect(dial_ok(1, 1))
        agent.hang_up()
        await client.expect_nothing_more()
        client.send(CloseRequest(1))
        await client.expect_nothing_more()


async def test_a_greeting_over_the_budget(autojump_clock: MockClock) -> None:
    async with serving(connection_buffer_bytes=128 * 1024) as server:
        agent, client = await dialled(server)
        sent = [Data(1, data=b"%6d" % n * 5_000) for n in range(100)]
        agent.send(dial_ok(1, 1), *sent)
        await client.expect(dial_ok(1, 1), *sent)
        assert trio.current_time() < 1


async def test_several_connections(autojump_clock: MockClock) -> None:
    """What came first goes first."""
    async with serving() as server:
        agent, client = await dialled(server)
        client.send(DialRequest("tcp", "target:22", 2))
        await agent.next()
        agent.send(dial_ok(1, 1), dial_ok(2, 2), Data(2, data=b"two"), Data(1, data=b"one"))
        await client.expect(dial_ok(1, 1), dial_ok(2, 2))
        await client.expect_nothing_more()
        await client.expect(Data(2, data=b"two"), Data(1, data=b"one"))
        assert trio.current_time() == pytest.approx(0.005)
