"""Token reviews that are slow, lost or nonsense; what a real apiserver says is in tests/kube (row B13)."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from harness import CONNECT, ClientPeer, ServerWorld, dial_ok, serving, settle, values
from kube_script import ScriptedApi

from clusterproxy.errors import KubeUnavailable
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.server import RpcServer
from clusterproxy.server import token_authentication
from clusterproxy.server.token_authentication import TokenReviews, authenticated_opener
from clusterproxy_proto import DialRequest, Drain

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from trio.testing import MockClock

    from clusterproxy.kube.api import KubeApi

FAILED = "Failed to validate authentication token, err:"
SECRET = "the.secret.token.of.somebody"  # noqa: S105


def review(**status: Any) -> dict[str, Any]:
    user = {"username": "system:serviceaccount:ns:agent"}
    return {"status": {"authenticated": True, "user": user, "audiences": ["us"], **status}}


@contextlib.asynccontextmanager
async def authenticating(
    answer: Callable[[str, Any], Any],
) -> AsyncGenerator[tuple[ServerWorld, ScriptedApi]]:
    api = ScriptedApi(answer)
    async with serving(
        agent_namespace="ns", agent_service_account="agent", authentication_audience="us"
    ) as server:
        reviews = TokenReviews(cast("KubeApi", api), server.state.config)
        opener = authenticated_opener(server.state, reviews)
        server.agents = RpcServer({CONNECT: opener}, limits=Http2Limits())
        yield server, api
    assert not api.open


async def agent(server: ServerWorld, *authorization: str, **options: Any) -> ClientPeer:
    metadata: dict[str, Any] = {"agentid": ["a"]}
    if authorization:
        metadata["authorization"] = list(authorization)
    return await server.call(server.agents, CONNECT, metadata, **options)


async def test_the_right_one(autojump_clock: MockClock) -> None:
    async with authenticating(lambda *_: review()) as (server, api):
        peer = await agent(server, f"Bearer {SECRET}")
        assert (await peer.response())["serverid"] == ["server"]
        (asked,) = api.called("create")
        assert asked["kind"] == "TokenReview"
        assert asked["spec"] == {"token": SECRET, "audiences": ["us"]}
        client = await server.client()
        client.send(DialRequest("tcp", "target:80", 1))
        await peer.expect(DialRequest("tcp", "target:80", 1))
        peer.send(dial_ok(1, 1))
        await client.expect(dial_ok(1, 1))


@pytest.mark.parametrize(
    ("authorization", "text"),
    [
        ([], "Authentication context was not found in metadata"),
        (["Bearer a", "Bearer b"], "too many (2) tokens are received"),
        (["Basic a"], 'received token does not have "Bearer " prefix'),
        (["bearer a"], 'received token does not have "Bearer " prefix'),
    ],
)
async def test_no_token(
    authorization: list[str],
    text: str,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with authenticating(lambda *_: review()) as (server, api):
        peer = await agent(server, *authorization)
        assert await peer.status() == ("Unknown", text)
        assert not api.calls
        assert not server.state.pool.backends
    assert f"agent refused: {text}" in caplog.text


async def test_who_it_says_it_is_comes_first(autojump_clock: MockClock) -> None:
    async with authenticating(lambda *_: review()) as (server, api):
        peer = await server.call(server.agents, CONNECT, {"authorization": ["Bearer x"]})
        assert await peer.status() == ("Unknown", "expected one agent ID in the context, got []")
        metadata: dict[str, Any] = {"agentid": ["a"], "agentidentifiers": ["a", "b"]}
        peer = await server.call(server.agents, CONNECT, metadata)
        assert (await peer.status())[1].startswith("expected at most one set of agent identifiers")
        assert not api.calls


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"status": {"error": "x", "authenticated": True}}, "lookup failed: x"),
        (review(authenticated=False), "lookup failed: service account jwt not valid"),
        (review(authenticated="yes"), "lookup failed: service account jwt not valid"),
        ({}, "lookup failed: service account jwt not valid"),
        ({"status": []}, "lookup failed: service account jwt not valid"),
        (review(user=None), "lookup failed: unexpected username format"),
        (review(user={"username": 7}), "lookup failed: unexpected username format"),
        (review(user={"username": "admin"}), "lookup failed: unexpected username format"),
        (
            review(user={"username": "system:node:ns:agent"}),
            "lookup failed: username returned is not a service account",
        ),
        (
            review(user={"username": "system:serviceaccount:other:agent"}),
            'lookup failed: incoming request from "other" namespace. Expected "ns"',
        ),
        (
            review(user={"username": "system:serviceaccount:ns:other"}),
            'lookup failed: incoming request from "other" service account. Expected "agent"',
        ),
        (review(audiences=None), 'lookup failed: token was not reviewed for audience "us"'),
        (review(audiences=["them"]), 'lookup failed: token was not reviewed for audience "us"'),
        (review(audiences="usual"), 'lookup failed: token was not reviewed for audience "us"'),
        (
            KubeUnavailable("connection refused"),
            "Failed to authenticate request. err:connection refused",
        ),
        ({"status": {"error": f"bad {SECRET}!"}}, "lookup failed: bad [token]!"),
        ({"status": {"error": "x" * 9999}}, f"lookup failed: {'x' * 1009}"),
    ],
)
async def test_what_a_review_may_say(
    answer: Any, text: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="clusterproxy")
    async with authenticating(lambda *_: answer) as (server, _):
        peer = await agent(server, f"Bearer {SECRET}")
        assert await peer.status() == ("Unknown", FAILED + text)
        assert not server.state.pool.backends
        assert not values(server.metrics.grpc_connections)
    assert "agent refused" in caplog.text
    assert SECRET not in caplog.text


async def test_an_empty_token(autojump_clock: MockClock) -> None:
    async with authenticating(lambda *_: review(authenticated=False)) as (server, api):
        peer = await agent(server, "Bearer ")
        # HTTP/2 takes the blank off, or an apiserver says what it thinks of it: either is a no.
        assert (await peer.status())[0] == "Unknown"
        assert all(asked["spec"]["token"] == "" for asked in api.called("create"))


async def test_a_dead_apiserver_hurts_nobody_else(autojump_clock: MockClock) -> None:
    async with authenticating(
        lambda _, obj: review() if obj["spec"]["token"] == SECRET else None
    ) as (
        server,
        api,
    ):
        good = await agent(server, f"Bearer {SECRET}")
        waiting = await agent(server, "Bearer x", beside=good)
        assert api.open == 1
        # What is there already goes on, on the same connection.
        client = await server.client()
        client.send(DialRequest("tcp", "target:80", 1))
        await good.expect(DialRequest("tcp", "target:80", 1))
        assert trio.current_time() == 0
        await trio.sleep(30.1)
        text = "Failed to authenticate request. err:context deadline exceeded"
        assert await waiting.status() == ("Unknown", FAILED + text)
        assert good.closed_with is None
        assert len(server.state.pool.backends) == 1


@pytest.mark.parametrize("end", ["reset", "hang_up", "half_close"])
async def test_the_agent_leaves_meanwhile(end: str, autojump_clock: MockClock) -> None:
    async with authenticating(lambda *_: None) as (server, api):
        peer = await agent(server, "Bearer x")
        assert api.open == 1
        getattr(peer, end)()
        await settle()
        assert api.open == 0
        assert trio.current_time() == 0
        if end == "half_close":
            assert await peer.status() == ("OK", "")


async def test_the_agent_leaves_in_the_moment_of_the_answer(autojump_clock: MockClock) -> None:
    calls: list[Any] = []

    def answer(*_: Any) -> Any:
        # Here, right before the task goes on with what is returned.
        (connection,) = server.agents.connections
        for stream in list(connection.streams.values()):
            calls.append(stream.handler)
            stream.handler.finish()  # type: ignore[union-attr]
        return review()

    async with authenticating(answer) as (server, _):
        peer = await agent(server, "Bearer x")
        assert await peer.status() == ("OK", "")
        assert len(calls) == 1
        assert not server.state.pool.backends
        assert not values(server.metrics.grpc_connections)


async def test_nothing_is_taken_before_the_review(autojump_clock: MockClock) -> None:
    async with authenticating(lambda *_: None) as (server, api):
        peer = await agent(server, "Bearer x")
        peer.send(Drain())
        assert await peer.status() == ("Internal", "message before the call was accepted")
        await settle()
        assert api.open == 0


async def test_reviews_in_flight_are_limited(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_authentication, "_IN_FLIGHT", 2)
    monkeypatch.setattr(token_authentication, "_WAITING", 1)
    async with authenticating(lambda *_: None) as (server, api):
        peers = [await agent(server, f"Bearer {n}") for n in range(4)]
        assert api.open == 2
        text = "Failed to authenticate request. err:too many agents wait for reviews"
        assert await peers[3].status() == ("Unknown", FAILED + text)
        peers[0].hang_up()
        await settle()
        # The next one has its turn.
        assert [asked["spec"]["token"] for asked in api.called("create")] == ["0", "1", "2"]
        assert api.open == 2
