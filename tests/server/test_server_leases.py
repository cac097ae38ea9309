"""The server's lease against an apiserver that refuses, hangs and conflicts; a real one is in tests/kube."""

from __future__ import annotations

import contextlib
import itertools
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from harness import observations, settle, value, values
from kube_script import ScriptedApi

from clusterproxy.errors import AlreadyExists, Conflict, Forbidden, KubeUnavailable, NotFound
from clusterproxy.kube.api import Listing
from clusterproxy.kube.lease import is_valid, micro_time
from clusterproxy.server.config import ServerConfig
from clusterproxy.server.leases import ServerLease
from clusterproxy.telemetry.server_metrics import ServerMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock

    from clusterproxy.kube.api import KubeApi

NAME = "konnectivity-proxy-server-s1"
NOON = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()


def clock() -> float:
    return NOON + trio.current_time()


def lease(name: str, age: float, **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "resourceVersion": "7", **metadata},
        "spec": {"renewTime": micro_time(NOON - age), "leaseDurationSeconds": 30},
    }


class Played:
    """An apiserver with one lease, this server's own; *others* are those that it lists."""

    def __init__(self) -> None:
        self.stored: dict[str, Any] | None = None
        self.others: list[dict[str, Any]] = []
        self.version = 0
        self.trouble: dict[str, Any] = {}

    def answer(self, verb: str, what: Any) -> Any:
        if verb in self.trouble:
            return self.trouble[verb]
        match verb:
            case "list":
                return Listing([*self.others, *([self.stored] if self.stored else [])], "1")
            case "get" if self.stored is not None:
                return self.stored
            case "create" if self.stored is not None:
                return AlreadyExists("exists", status=409)
            case "replace" if self.stored is not None:
                if (
                    what["metadata"]["resourceVersion"]
                    != self.stored["metadata"]["resourceVersion"]
                ):
                    return Conflict("conflict", status=409)
            case "delete":
                self.others = [one for one in self.others if one["metadata"]["name"] != what[0]]
                return {}
            case "create":
                pass
            case _:
                return NotFound("not found", status=404, reason="NotFound")
        self.version += 1
        metadata = {**what["metadata"], "resourceVersion": str(self.version)}
        self.stored = {**what, "metadata": metadata}
        return dict(self.stored)


@contextlib.asynccontextmanager
async def leasing(
    played: Played, **config: Any
) -> AsyncGenerator[tuple[ScriptedApi, ServerLease, ServerMetrics]]:
    api, metrics = ScriptedApi(played.answer), ServerMetrics()
    settings = ServerConfig(server_id="s1", lease_namespace="ns", lease_label="a=b,c=d", **config)
    keeper = ServerLease(cast("KubeApi", api), settings, metrics, clock=clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await settle()
        yield api, keeper, metrics
        nursery.cancel_scope.cancel()
    assert not api.open


def times(api: ScriptedApi, verb: str) -> list[float]:
    return [time for time, name, _ in api.calls if name == verb]


async def test_it_is_created_and_renewed(autojump_clock: MockClock) -> None:
    async with leasing(played := Played()) as (api, _, __):
        (created,) = api.called("create")
        assert created == {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": NAME, "namespace": "ns", "labels": {"a": "b", "c": "d"}},
            "spec": {
                "holderIdentity": "s1",
                "leaseDurationSeconds": 30,
                "renewTime": "2026-11-26T12:00:00.000000Z",
            },
        }
        await trio.sleep(31)
        assert times(api, "replace") == pytest.approx([15, 30], abs=0.01)
        # It is read once, and then what the apiserver has answered is built on.
        assert times(api, "get") == [0]
        assert played.stored is not None
        assert played.stored["spec"]["renewTime"] == "2026-11-26T12:00:30.000000Z"


async def test_one_that_is_left_over_is_taken_up(autojump_clock: MockClock) -> None:
    played = Played()
    played.stored = lease(NAME, 500, labels={"mine": "1", "a": "x"}, annotations={"n": "1"})
    played.stored["spec"]["acquireTime"] = "2026-01-01T00:00:00Z"
    async with leasing(played) as (api, _, __):
        (replaced,) = api.called("replace")
        assert replaced["metadata"]["labels"] == {"mine": "1", "a": "b", "c": "d"}
        assert replaced["metadata"]["annotations"] == {"n": "1"}
        assert replaced["spec"]["acquireTime"] == "2026-01-01T00:00:00Z"
        assert replaced["spec"]["holderIdentity"] == "s1"
        # Though it had expired it was not for the garbage collection.
        assert not api.called("delete")


@pytest.mark.parametrize(
    "answered",
    [{"metadata": "x"}, {"metadata": ["x"], "spec": 5}, {"metadata": {"labels": [1]}, "spec": "x"}],
)
async def test_an_answer_of_any_shape_ends_nothing(
    autojump_clock: MockClock, answered: dict[str, Any]
) -> None:
    played = Played()
    played.stored = lease(NAME, 500)
    # A version is missing then, too.
    played.trouble = {"get": answered, "replace": Conflict("which version?", status=409)}
    async with leasing(played) as (api, _, __):
        played.trouble.clear()
        await trio.sleep(31)
        assert played.stored["spec"]["holderIdentity"] == "s1"
        assert api.called("replace")


async def test_somebody_else_writes(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with leasing(played := Played()) as (api, _, __):
        assert played.stored is not None
        played.stored["metadata"] = {**played.stored["metadata"], "resourceVersion": "other"}
        await trio.sleep(16)
        # Read anew, and written at once; not worth a word.
        assert times(api, "replace") == pytest.approx([15, 15.4], abs=0.01)
        assert len(api.called("get")) == 2
        assert played.stored["spec"]["renewTime"].startswith("2026-11-26T12:00:15.4")
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_somebody_deletes_it(autojump_clock: MockClock) -> None:
    async with leasing(played := Played()) as (api, _, __):
        played.stored = None
        await trio.sleep(16)
        assert times(api, "create") == pytest.approx([0, 15], abs=0.01)
        assert "resourceVersion" not in api.called("create")[1]["metadata"]


@pytest.mark.parametrize(
    "trouble", [KubeUnavailable("refused"), Forbidden("no", status=403), None], ids=str
)
async def test_an_apiserver_in_trouble(
    trouble: Exception | None, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, and the lease is there as soon as it can be."""
    caplog.set_level(logging.INFO)
    played = Played()
    played.trouble = {"get": trouble, "list": trouble}
    async with leasing(played) as (api, _, __):
        await trio.sleep(100)
        assert not api.called("create")
        attempts = times(api, "get")
        gaps = [b - a for a, b in itertools.pairwise(attempts)]
        # Oftener than the lease lives, but not without a pause.
        assert min(gaps) > 0.3
        assert max(gaps) < 14
        played.trouble.clear()
        await trio.sleep(14)
        assert played.stored is not None
    assert caplog.text.count("cannot renew this server's lease") == 1
    assert caplog.text.count("cannot delete expired leases") == 1
    assert "can renew this server's lease again" in caplog.text
    assert ("no answer" in caplog.text) == (trouble is None)


# -- garbage collection ----------------------------------------------------------------------------


async def test_expired_ones_are_deleted(autojump_clock: MockClock) -> None:
    played = Played()
    played.others = [lease("old", 31), lease("fresh", 5), {"metadata": {"name": "odd"}}]
    async with leasing(played) as (api, _, metrics):
        assert api.called("list") == ["a=b,c=d"]
        # Only in the version in which it was seen to have expired.
        assert api.called("delete") == [("old", "7"), ("odd", "")]
        assert value(metrics.culled_leases_count) == 2
        assert values(metrics.lease_list_total) == {"200,": 1}
        assert values(metrics.lease_delete_total) == {"200,": 2}
        assert observations(metrics.lease_list_latency_seconds) == 1
        assert observations(metrics.lease_delete_latency_seconds) == 2
        await trio.sleep(31)
        assert times(api, "list") == pytest.approx([0, 15, 30], abs=0.01)
        # 5 s old at the start.
        assert api.called("delete")[2:] == [("fresh", "7")]


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (NotFound("gone", status=404, reason="NotFound"), {"404,NotFound": 1.0}),
        (Conflict("renewed", status=409, reason="Conflict"), {"409,Conflict": 1.0}),
        (KubeUnavailable("no answer"), {}),
    ],
)
async def test_one_that_cannot_be_deleted(
    error: Exception, counted: dict[str, float], autojump_clock: MockClock
) -> None:
    played = Played()
    played.others = [lease("old", 31)]
    played.trouble = {"delete": error}
    async with leasing(played) as (_, __, metrics):
        assert values(metrics.lease_delete_total) == counted
        assert value(metrics.culled_leases_count) == 0


async def test_a_list_that_fails(autojump_clock: MockClock) -> None:
    played = Played()
    played.trouble = {"list": Forbidden("no", status=403, reason="Forbidden")}
    async with leasing(played) as (_, __, metrics):
        assert values(metrics.lease_list_total) == {"403,Forbidden": 1}
        assert set(metrics.lease_list_latency_seconds.children) == {("403",)}


# -- the end ---------------------------------------------------------------------------------------


async def test_release(autojump_clock: MockClock) -> None:
    async with leasing(Played()) as (api, keeper, _):
        keeper.release()
        await keeper.over.wait()
        assert api.called("delete") == [(NAME, None)]
        await trio.sleep(60)
        assert len(api.called("replace")) == 0


@pytest.mark.parametrize("trouble", [KubeUnavailable("refused"), None], ids=str)
async def test_a_release_that_does_not_work(
    trouble: Exception | None, autojump_clock: MockClock
) -> None:
    async with leasing(played := Played()) as (_, keeper, __):
        played.trouble = {"delete": trouble}
        keeper.release()
        await keeper.over.wait()
        assert trio.current_time() == pytest.approx(2 if trouble is None else 0)


# -- row A23 ---------------------------------------------------------------------------------------


def valid(**spec: Any) -> bool:
    return is_valid({"spec": spec}, NOON)


def at(age: float) -> str:
    return micro_time(NOON - age)


def test_validity() -> None:
    assert valid(leaseDurationSeconds=1000, acquireTime=at(1))
    assert valid(leaseDurationSeconds=1000, acquireTime=at(10_000), renewTime=at(1))
    assert not valid(leaseDurationSeconds=1000)
    assert not valid(leaseDurationSeconds=1000, acquireTime=at(10_000))
    assert not valid(leaseDurationSeconds=1000, acquireTime=at(10_000), renewTime=at(9_000))
    # A renewal holds, also where it says less.
    assert not valid(leaseDurationSeconds=1000, acquireTime=at(1), renewTime=at(9_000))
    assert not valid(leaseDurationSeconds=30, renewTime=at(30))
    assert valid(leaseDurationSeconds=30, renewTime=at(29.9))
    # No apiserver stores such a number; but one that is read ends no program.
    assert valid(leaseDurationSeconds=10**400, renewTime=at(1))


@pytest.mark.parametrize(
    "obj",
    [
        {},
        {"spec": None},
        {"spec": "x"},
        {"spec": {"leaseDurationSeconds": 30, "renewTime": "soon"}},
        {"spec": {"leaseDurationSeconds": 30, "renewTime": 5}},
        # Without a zone it says nothing.
        {"spec": {"leaseDurationSeconds": 10**9, "renewTime": "2026-11-26T12:00:00"}},
        {"spec": {"leaseDurationSeconds": "30", "renewTime": "2026-11-26T12:00:00Z"}},
        {"spec": {"renewTime": "2026-11-26T12:00:00Z"}},
    ],
    ids=str,
)
def test_what_is_no_lease_is_not_valid(obj: dict[str, Any]) -> None:
    assert not is_valid(obj, NOON)
