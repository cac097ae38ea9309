"""What needs no apiserver: paths, the throttle."""

from __future__ import annotations

import json

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.errors import KubeError
from clusterproxy.kube.answer import Answer, watch_event
from clusterproxy.kube.resource import DEPLOYMENTS, NAMESPACES, SECRETS, text_at, value_at
from clusterproxy.kube.throttle import Throttle


def test_paths() -> None:
    assert SECRETS.path() == "/api/v1/secrets"
    assert SECRETS.path("n", "a b/c") == "/api/v1/namespaces/n/secrets/a%20b%2Fc"
    assert DEPLOYMENTS.path("n", "a", "scale") == "/apis/apps/v1/namespaces/n/deployments/a/scale"
    assert NAMESPACES.path(None, "a") == "/api/v1/namespaces/a"
    assert (DEPLOYMENTS.qualified, SECRETS.qualified) == ("deployments.apps", "secrets")
    assert (DEPLOYMENTS.api_version, SECRETS.api_version) == ("apps/v1", "v1")


def test_values() -> None:
    obj = {"a": {"b": "text", "c": 5}, "d": [1]}
    assert text_at(obj, "a", "b") == "text"
    assert text_at(obj, "a", "c") == text_at(obj, "x", "y") == text_at(obj, "d", "e") == ""
    assert value_at(obj, "a", "c") == 5
    assert value_at(obj, "a", "b", "c") is None


@given(st.binary(), st.integers(100, 599))
def test_any_answer(body: bytes, status: int) -> None:
    try:
        found: object = Answer("get /x", status, body).object()
    except KubeError as error:
        found = error
    assert isinstance(found, dict) or str(found).startswith("get /x: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(st.dictionaries(st.sampled_from(["type", "object", "kind"]), JSON))
def test_any_event(document: dict[str, object]) -> None:
    with pytest.raises(KubeError, match=r"^watch /x: "):
        watch_event("watch /x", json.dumps(document).encode())


async def test_the_throttle(autojump_clock: trio.testing.MockClock) -> None:
    throttle = Throttle(2, 3)
    times = []
    for _ in range(6):
        await throttle.wait()
        times.append(trio.current_time())
    began = times[0]
    assert [time - began for time in times] == [0, 0, 0, 0.5, 1, 1.5]
    await trio.sleep(100)
    began = trio.current_time()
    for _ in range(3):
        await throttle.wait()
    assert trio.current_time() == began


async def test_who_gives_up_gives_back(autojump_clock: trio.testing.MockClock) -> None:
    throttle = Throttle(1, 1)
    await throttle.wait()
    began = trio.current_time()
    for _ in range(10):
        with trio.move_on_after(0.01):
            await throttle.wait()
    await throttle.wait()
    assert trio.current_time() - began == pytest.approx(1)


@pytest.mark.parametrize(("qps", "burst", "seconds"), [(-1, 0, 0), (0, 0, 2), (0, 15, 1)])
async def test_the_meaning_of_zero_and_less(
    autojump_clock: trio.testing.MockClock, qps: float, burst: int, seconds: float
) -> None:
    throttle = Throttle(qps, burst)
    began = trio.current_time()
    for _ in range(20):
        await throttle.wait()
    assert trio.current_time() - began == pytest.approx(seconds)
