"""What ``/status`` tells of agents and connections, between scripted peers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from harness import ServerWorld, dial_ok, serving, settle

from clusterproxy.http1 import Request
from clusterproxy.server.status import snapshot, status_route
from clusterproxy_proto import Data, DialRequest


def ask(world: ServerWorld, target: str = "/status") -> tuple[int, Any]:
    route = status_route(world.state, lambda: (world.state.pool.ready, "no agent"))
    answer = route(Request.parse("GET", target))
    if answer.status != 200:
        return answer.status, answer.body.decode()
    assert answer.content_type == "application/json"
    return answer.status, json.loads(answer.body)


async def test_an_empty_server() -> None:
    async with serving() as world:
        status, document = ask(world)
        assert status == 200
        assert document["server"].pop("uptime_s") >= 0
        assert document["server"].pop("version")
        assert document == {
            "server": {"id": "server", "mode": "grpc", "ready": False, "reason": "no agent"},
            "totals": {
                "agents": 0,
                "connections": 0,
                "pending_dials": 0,
                "bytes_to_agent": 0,
                "bytes_to_client": 0,
                "queued_to_agent": 0,
                "queued_to_client": 0,
                "buffered_bytes": 0,
            },
            "agents": [],
            "connections": [],
        }


async def test_bytes_of_each_connection_and_sums(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as world:
        agent = await world.agent("cluster1", "host=cluster1&ipv4=10.0.0.1&default-route=true")
        client = await world.client()
        await world.connect(client, agent, connect_id=7)
        await trio.sleep(3)
        client.send(Data(7, data=b"x" * 1000))
        agent.send(Data(7, data=b"y" * 5000))
        await settle()
        client.send(DialRequest("tcp", "elsewhere:1", 2))
        await settle()

        _, document = ask(world)
        (row,) = document["agents"]
        assert row["id"] == "cluster1"
        assert row["identifiers"] == ["10.0.0.1", "cluster1", "default-route"]
        assert row["age_s"] == pytest.approx(3)
        assert (row["connections"], row["pending_dials"], row["draining"]) == (1, 1, False)
        (one,) = document["connections"]
        assert (one["agent"], one["id"], one["destination"]) == ("cluster1", 7, "target:80")
        assert one["age_s"] == pytest.approx(3)
        # Packets, of which the payload is nearly all.
        assert 1000 < one["bytes_to_agent"] < 1020
        assert 5000 < one["bytes_to_client"] < 5020
        for total in (row, document["totals"]):
            assert total["bytes_to_agent"] == one["bytes_to_agent"]
            assert total["bytes_to_client"] == one["bytes_to_client"]
        assert document["server"]["ready"]


async def test_what_waits_for_a_client_that_does_not_read() -> None:
    async with serving() as world:
        agent = await world.agent("cluster1")
        client = await world.client()
        await world.connect(client, agent)
        client.pause()
        for _ in range(8):
            agent.send(Data(1, data=bytes(32_000)))
        await settle()
        _, document = ask(world)
        (one,) = document["connections"]
        assert one["queued_to_client"] > 100_000
        assert one["queued_to_client"] + one["bytes_to_client"] > 8 * 32_000
        assert document["totals"]["queued_to_client"] == one["queued_to_client"]
        client.resume()
        await settle()


async def test_connect_clients_count_as_well() -> None:
    async with serving(mode="http-connect") as world:
        agent = await world.agent("cluster1")
        stream = await world.http()
        await stream.send_all(b"CONNECT target:443 HTTP/1.1\r\n\r\n")
        dial = await agent.next()
        assert isinstance(dial, DialRequest)
        agent.send(dial_ok(1, dial.random))
        agent.send(Data(1, data=b"hello"))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        await settle()
        (one,) = ask(world)[1]["connections"]
        assert one["destination"] == "target:443"
        assert one["bytes_to_client"] >= 5


async def test_top_lists_those_with_most_and_counts_all() -> None:
    async with serving() as world:
        agent = await world.agent("cluster1")
        client = await world.client()
        for number in (1, 2, 3):
            await world.connect(client, agent, connect_id=number, random=number)
        client.send(Data(2, data=bytes(900)), Data(3, data=bytes(500)))
        await settle()
        _, document = ask(world, "/status?top=2")
        assert [one["id"] for one in document["connections"]] == [2, 3]
        assert document["totals"]["connections"] == 3
        assert ask(world, "/status?top=0")[1]["connections"] == []
        assert len(snapshot(world.state)["connections"]) == 3


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "²"])
async def test_a_wrong_top_is_refused(value: str) -> None:
    async with serving() as world:
        status, text = ask(world, f"/status?top={value}")
        assert status == 400
        assert "top must be a number" in text
