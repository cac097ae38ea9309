"""The recorder of Events."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import trio
from memory_apiserver import MemoryApiserver

from clusterproxy.errors import Forbidden, KubeUnavailable
from clusterproxy.kube.events import EventRecorder
from clusterproxy.kube.resource import EVENTS

if TYPE_CHECKING:
    from trio.testing import MockClock

OBJ = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": "7"},
    "data": {"x": "secret"},
}


@pytest.fixture
def server() -> MemoryApiserver:
    return MemoryApiserver()


@pytest.fixture
def recorder(server: MemoryApiserver, nursery: trio.Nursery) -> EventRecorder:
    recorder = EventRecorder(server.api(), component="me", host="pod")
    nursery.start_soon(recorder.run)
    return recorder


def events(server: MemoryApiserver) -> list[dict[str, Any]]:
    return [obj for (kind, *_), obj in server.objects.items() if kind == "Event"]


async def test_an_event(
    autojump_clock: MockClock, server: MemoryApiserver, recorder: EventRecorder
) -> None:
    recorder.note(OBJ, "Warning", "Broken", "it is broken")
    await trio.sleep(1)
    (event,) = events(server)
    assert event["metadata"]["namespace"] == "n"
    assert re.fullmatch(r"a\.[0-9a-f]{16}", event["metadata"].pop("name"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["firstTimestamp"])
    assert event.pop("firstTimestamp") == event.pop("lastTimestamp")
    del event["metadata"]
    assert event == {
        "apiVersion": "v1",
        "kind": "Event",
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Secret",
            "namespace": "n",
            "name": "a",
            "uid": "u",
            "resourceVersion": "7",
        },
        "type": "Warning",
        "reason": "Broken",
        "message": "it is broken",
        "source": {"component": "me", "host": "pod"},
        "reportingComponent": "me",
        "count": 1,
    }


async def test_without_a_namespace(
    autojump_clock: MockClock, server: MemoryApiserver, recorder: EventRecorder
) -> None:
    recorder.note({"kind": "Namespace", "metadata": {"name": "x"}}, "Normal", "A", "b")
    await trio.sleep(1)
    (event,) = events(server)
    assert event["metadata"]["namespace"] == "default"
    assert "namespace" not in event["involvedObject"]


async def test_the_same_again_is_counted(
    autojump_clock: MockClock, server: MemoryApiserver, recorder: EventRecorder
) -> None:
    for _ in range(30):
        recorder.note(OBJ, "Warning", "Broken", "it is broken")
        await trio.sleep(1)
    recorder.note(OBJ, "Warning", "Broken", "otherwise")
    recorder.note(OBJ, "Normal", "Broken", "it is broken")
    await trio.sleep(100)
    assert [event["count"] for event in events(server)] == [30, 1, 1]
    # At most every ten seconds.
    patches = [time for time, verb, _ in server.calls if verb == "patch"]
    assert len(patches) == 3
    # After ten minutes it is another one.
    await trio.sleep(600)
    recorder.note(OBJ, "Warning", "Broken", "it is broken")
    await trio.sleep(1)
    assert len(events(server)) == 4


async def test_the_apiserver_is_gone_for_a_while(
    autojump_clock: MockClock, server: MemoryApiserver, recorder: EventRecorder
) -> None:
    server.failures["create"] = KubeUnavailable("gone")
    recorder.note(OBJ, "Warning", "Broken", "it is broken")
    await trio.sleep(60)
    assert len(server.calls) <= 7
    server.failures["create"] = None
    await trio.sleep(20)
    assert len(events(server)) == 1


async def test_the_event_is_gone(
    autojump_clock: MockClock, server: MemoryApiserver, recorder: EventRecorder
) -> None:
    recorder.note(OBJ, "Warning", "Broken", "it is broken")
    await trio.sleep(20)
    name = events(server)[0]["metadata"]["name"]
    server.remove(EVENTS, name, "n")
    recorder.note(OBJ, "Warning", "Broken", "it is broken")
    await trio.sleep(20)
    (event,) = events(server)
    assert event["metadata"]["name"] != name
    assert event["count"] == 2


async def test_what_may_not_be_written_is_given_up(
    autojump_clock: MockClock,
    server: MemoryApiserver,
    recorder: EventRecorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.failures["create"] = Forbidden("may not")
    for number in range(5):
        recorder.note(OBJ, "Warning", "Broken", str(number))
    await trio.sleep(1000)
    assert len(server.calls) == 5
    assert [record.getMessage() for record in caplog.records] == ["event not written: may not"]


async def test_the_oldest_are_forgotten(
    autojump_clock: MockClock, server: MemoryApiserver, recorder: EventRecorder
) -> None:
    for number in range(1000):
        recorder.note(OBJ, "Normal", "Many", str(number))
    await trio.sleep(100)
    assert [event["message"] for event in events(server)] == [str(n) for n in range(900, 1000)]


@pytest.mark.parametrize("obj", [{}, {"metadata": 5}, {"metadata": {"name": ["x"]}}])
async def test_objects_of_any_shape(
    autojump_clock: MockClock, server: MemoryApiserver, recorder: EventRecorder, obj: dict[str, Any]
) -> None:
    recorder.note(obj, "Normal", "r" * 1000, "m" * 10_000)
    await trio.sleep(1)
    (event,) = events(server)
    assert (len(event["reason"]), len(event["message"])) == (128, 1024)
