"""Token reviews that are slow, lost or nonsense; what a real apiserver says is in tests/kube (row B13)."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from harness import CONNECT, ClientPeer, ServerWorld, dial_ok, serving, settle, values
from kube_script import ScriptedApi

from clusterproxy.errors import KubeUnavailable, RPCError
from clusterproxy.grpc import Status
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.kube import review_queue
from clusterproxy.rpc.server import RpcServer
from clusterproxy.server.refusals import Refusals
from clusterproxy.server.token_authentication import (
    TokenReviews,
    authenticated_opener,
    end_strangers,
)
from clusterproxy.telemetry.server_metrics import ServerMetrics
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
        await trio.sleep(10.1)
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
    monkeypatch.setattr(review_queue, "_IN_FLIGHT", 2)
    monkeypatch.setattr(review_queue, "_WAITING", 1)
    async with authenticating(lambda *_: None) as (server, api):
        peers = [await agent(server, f"Bearer {n}") for n in range(4)]
        assert api.open == 2
        text = "Failed to authenticate request. err:too many agents wait for reviews"
        assert await peers[2].status() == ("Unknown", FAILED + text)
        peers[0].hang_up()
        await settle()
        # The next one has its turn.
        assert [asked["spec"]["token"] for asked in api.called("create")] == ["0", "1", "3"]
        assert api.open == 2


async def test_one_review_for_each_connection(autojump_clock: MockClock) -> None:
    async with authenticating(lambda *_: None) as (server, api):
        first = await agent(server, "Bearer 0")
        others = [await agent(server, f"Bearer {n}", beside=first) for n in (1, 2)]
        for other in others:
            text = "another stream here waits for its token's review"
            assert await other.status() == ("Unknown", text)
        assert len(api.calls) == 1
        first.reset()
        await settle()
        again = await agent(server, "Bearer 3", beside=first)
        assert again.closed_with is None
        assert [asked["spec"]["token"] for asked in api.called("create")] == ["0", "3"]


async def test_refusals_do_not_fill_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[str]:
        found = [r for r in caplog.records if r.levelno >= logging.WARNING]
        caplog.clear()
        return [record.getMessage() for record in found if "refused" in record.getMessage()]

    text = "agent refused: Authentication context was not found in metadata"
    async with authenticating(lambda *_: review()) as (server, _):
        for _ in range(50):
            await agent(server)
        assert lines() == [text]
        await trio.sleep(5)
        await agent(server)
        await agent(server)
        assert lines() == [f"{text} (and 49 more)"]


async def test_refusals_of_many_sources_do_not_fill_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = ServerMetrics()
    refusals = Refusals(metrics)
    error = RPCError(Status.UNKNOWN, "x" * 9999)
    for number in range(1000):
        refusals.note("token", f"192.0.2.{number}", "a" * 9999, error)
    assert values(metrics.rejected_agents_total) == {"token": 1000}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 100
    assert {len(record.getMessage()) for record in warnings} == {len("agent refused: ") + 1024}
    assert {len(record.agent_id) for record in warnings} == {256}  # type: ignore[attr-defined]


async def test_a_connection_without_an_agent_ends(autojump_clock: MockClock) -> None:
    def answer(_: str, obj: Any) -> Any:
        return review() if obj["spec"]["token"] == SECRET else review(authenticated=False)

    async with authenticating(answer) as (server, _):
        server.nursery.start_soon(end_strangers, server.agents.connections, server.state.pool)
        good = await agent(server, f"Bearer {SECRET}")
        refused, silent = await agent(server, "Bearer x"), await agent(server, "Bearer x")
        later = await agent(server, "Bearer x")
        await trio.sleep(15)
        # It goes on asking, which makes no difference.
        await agent(server, "Bearer x", beside=refused)
        # This one had its token renewed.
        await agent(server, f"Bearer {SECRET}", beside=later)
        await trio.sleep(9)
        assert len(server.agents.connections) == 4
        await trio.sleep(3)
        assert refused.connection.lost == silent.connection.lost == "connection closed by the peer"
        await trio.sleep(600)
        assert good.connection.lost is later.connection.lost is None
        assert good.closed_with is None
        assert len(server.state.pool.backends) == 2
        # An agent that has gone and does not hang up.
        good.reset()
        await trio.sleep(30)
        assert good.connection.lost == "connection closed by the peer"
