"""The reflector, in made-up time."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import trio
from memory_apiserver import MemoryApiserver

from clusterproxy.errors import Forbidden, Gone, Invalid, KubeUnavailable
from clusterproxy.kube.api import Change, WatchEvent
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import CONFIG_MAPS, SECRETS

if TYPE_CHECKING:
    from trio.testing import MockClock


@pytest.fixture
def server() -> MemoryApiserver:
    server = MemoryApiserver()
    server.put(SECRETS, "x", "n")
    server.put(CONFIG_MAPS, "a", "n", data="1")
    server.put(CONFIG_MAPS, "b", "n", data="1")
    return server


class Followed:
    """A reflector that runs, and what it told."""

    def __init__(self, server: MemoryApiserver, nursery: trio.Nursery, **options: Any) -> None:
        self.told: list[tuple[str, str]] = []
        self.reflector = Reflector(server.api(), CONFIG_MAPS, **options)
        self.reflector.subscribe(self._note)
        nursery.start_soon(self.reflector.run)

    def _note(self, event: WatchEvent) -> None:
        name = event.object["metadata"]["name"]
        present = (event.object["metadata"].get("namespace", ""), name) in self.reflector.items
        assert present is (event.change is not Change.DELETED)
        self.told.append((event.change, name))

    def take(self) -> list[tuple[str, str]]:
        told, self.told = self.told, []
        return told


@pytest.fixture
async def followed(server: MemoryApiserver, nursery: trio.Nursery) -> Followed:
    followed = Followed(server, nursery)
    await followed.reflector.synced.wait()
    await trio.sleep(2)
    assert followed.take() == [("ADDED", "a"), ("ADDED", "b")]
    return followed


def lists(server: MemoryApiserver) -> int:
    return sum(verb == "list" for _, verb, _ in server.calls)


async def test_changes(
    autojump_clock: MockClock, server: MemoryApiserver, followed: Followed
) -> None:
    server.put(CONFIG_MAPS, "a", "n", data="2")
    server.put(CONFIG_MAPS, "c", "m")
    server.remove(CONFIG_MAPS, "b", "n")
    await trio.sleep(1)
    assert followed.take() == [("MODIFIED", "a"), ("ADDED", "c"), ("DELETED", "b")]
    items = followed.reflector.items
    assert sorted(items) == [("m", "c"), ("n", "a")]
    assert items["n", "a"]["data"] == "2"


async def test_who_comes_later_is_told_what_is_there(
    autojump_clock: MockClock, followed: Followed
) -> None:
    told: list[WatchEvent] = []
    followed.reflector.subscribe(told.append)
    assert [(event.change, event.object["metadata"]["name"]) for event in told] == [
        (Change.ADDED, "a"),
        (Change.ADDED, "b"),
    ]


async def test_a_watch_that_ends_goes_on_where_it_was(
    autojump_clock: MockClock, server: MemoryApiserver, followed: Followed
) -> None:
    server.put(CONFIG_MAPS, "a", "n", data="2")
    # Somebody else's change, of which a bookmark tells.
    server.put(SECRETS, "y", "n")
    version = str(server.version)
    server.tell(WatchEvent(Change.BOOKMARK, {"metadata": {"resourceVersion": version}}))
    await trio.sleep(1)
    server.end_watches()
    await trio.sleep(1)
    assert server.calls[-1][1:] == ("watch", version)
    assert lists(server) == 1
    # What was told already is not told again.
    assert followed.take() == [("MODIFIED", "a")]
    server.tell(WatchEvent(Change.MODIFIED, server.objects["ConfigMap", "n", "a"]))
    await trio.sleep(1)
    assert followed.take() == []


async def test_what_happened_meanwhile_is_told(
    autojump_clock: MockClock, server: MemoryApiserver, followed: Followed
) -> None:
    server.failures["watch"] = Gone("too old", status=410)
    server.end_watches()
    await trio.sleep(0.1)
    server.put(CONFIG_MAPS, "a", "n", data="2")
    server.put(CONFIG_MAPS, "c", "n")
    server.remove(CONFIG_MAPS, "b", "n")
    assert followed.take() == []
    server.failures["watch"] = None
    await trio.sleep(10)
    assert sorted(followed.take()) == [("ADDED", "c"), ("DELETED", "b"), ("MODIFIED", "a")]
    assert lists(server) == 2


async def test_gone_in_the_middle_of_a_watch(
    autojump_clock: MockClock, server: MemoryApiserver, followed: Followed
) -> None:
    server.failures["event"] = Gone("too old", status=410)
    server.put(CONFIG_MAPS, "a", "n", data="2")
    await trio.sleep(0.1)
    server.failures["event"] = None
    await trio.sleep(10)
    assert followed.take() == [("MODIFIED", "a")]
    assert lists(server) == 2


async def test_the_last_state_stays_while_nothing_can_be_told(
    autojump_clock: MockClock,
    server: MemoryApiserver,
    followed: Followed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    began = trio.current_time()
    server.failures["watch"] = KubeUnavailable("gone")
    server.failures["list"] = KubeUnavailable("gone")
    server.end_watches()
    await trio.sleep(300)
    assert len(followed.reflector.items) == 2
    times = [time for time, verb, _ in server.calls if verb == "watch" and time >= began]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert 0.8 <= pauses[0] <= 1.6
    assert all(30 <= pause <= 60 for pause in pauses[6:])
    # RBAC is lost, too.
    server.failures["watch"] = Forbidden("may not")
    await trio.sleep(300)
    server.put(CONFIG_MAPS, "a", "n", data="2")
    server.failures.clear()
    server.version += 1
    await trio.sleep(60)
    assert [record.getMessage() for record in caplog.records] == [
        "configmaps not up to date, trying again: gone",
        "configmaps not up to date, trying again: may not",
        "configmaps up to date again",
    ]
    # Success begins anew.
    server.put(CONFIG_MAPS, "b", "n", data="2")
    await trio.sleep(1)
    server.failures["watch"] = KubeUnavailable("gone")
    server.end_watches()
    await trio.sleep(0.1)
    failed = trio.current_time()
    server.failures.clear()
    await trio.sleep(10)
    again = min(time for time, verb, _ in server.calls if verb == "watch" and time > failed)
    assert again - failed <= 1.6


async def test_the_first_list_fails(
    autojump_clock: MockClock, server: MemoryApiserver, nursery: trio.Nursery
) -> None:
    server.failures["list"] = Forbidden("may not")
    followed = Followed(server, nursery)
    await trio.sleep(100)
    assert not followed.reflector.synced.is_set()
    server.failures.clear()
    await trio.sleep(100)
    assert followed.reflector.synced.is_set()
    assert len(followed.take()) == 2


async def test_watches_that_end_at_once_are_no_busy_loop(
    autojump_clock: MockClock, server: MemoryApiserver, followed: Followed
) -> None:
    began = len(server.calls)
    for _ in range(1000):
        server.end_watches()
        await trio.sleep(0.1)
    assert len(server.calls) - began < 20


async def test_only_what_is_needed_is_kept(
    autojump_clock: MockClock, server: MemoryApiserver, nursery: trio.Nursery
) -> None:
    def keep(obj: dict[str, Any]) -> dict[str, Any]:
        return {"metadata": {"name": obj["metadata"]["name"], "namespace": "n"}}

    followed = Followed(server, nursery, keep=keep)
    await trio.sleep(1)
    server.put(CONFIG_MAPS, "a", "n", data="2")
    server.put(CONFIG_MAPS, "c", "n", data="2")
    await trio.sleep(1)
    assert followed.reflector.items["n", "a"] == {"metadata": {"name": "a", "namespace": "n"}}
    assert followed.reflector.items["n", "c"] == {"metadata": {"name": "c", "namespace": "n"}}
    assert followed.take()[2:] == [("MODIFIED", "a"), ("ADDED", "c")]


async def test_bugs_of_others_are_logged(
    autojump_clock: MockClock,
    server: MemoryApiserver,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def keep(obj: dict[str, Any]) -> dict[str, Any]:
        if obj["metadata"]["name"] == "a":
            raise LookupError("keep")
        return obj

    def handler(event: WatchEvent) -> None:
        raise LookupError("handler")

    followed = Followed(server, nursery, keep=keep)
    followed.reflector.subscribe(handler)
    await trio.sleep(1)
    assert len(followed.take()) == 2
    assert [record.getMessage() for record in caplog.records].count(
        "bug in a handler of watch events"
    ) == 2
    assert "bug: nothing left out of configmaps a" in caplog.text


@pytest.mark.parametrize(
    "obj",
    [{}, {"metadata": 5}, {"metadata": {"resourceVersion": "9"}}, {"metadata": {"name": "a"}}],
)
async def test_events_of_any_shape(
    autojump_clock: MockClock, server: MemoryApiserver, followed: Followed, obj: dict[str, Any]
) -> None:
    server.tell(WatchEvent(Change.ADDED, obj))
    await trio.sleep(10)
    assert followed.take() == []
    server.put(CONFIG_MAPS, "c", "n")
    await trio.sleep(10)
    assert followed.take() == [("ADDED", "c")]


async def test_what_makes_no_sense_is_said(
    autojump_clock: MockClock,
    server: MemoryApiserver,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.failures["list"] = Invalid("unable to parse the selector", status=400)
    Followed(server, nursery)
    await trio.sleep(100)
    assert caplog.text.count("unable to parse the selector") == 1


async def test_a_list_of_any_shape(
    autojump_clock: MockClock, server: MemoryApiserver, nursery: trio.Nursery
) -> None:
    server.objects["ConfigMap", "n", "z"] = {"metadata": None}
    followed = Followed(server, nursery)
    await trio.sleep(10)
    assert not followed.reflector.synced.is_set()
    del server.objects["ConfigMap", "n", "z"]
    await trio.sleep(100)
    assert sorted(name for _, name in followed.reflector.items) == ["a", "b"]
