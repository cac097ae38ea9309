"""Row H10: one question for all who ask, and its answer for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from clusterproxy.errors import KubeUnavailable
from clusterproxy.service_proxy import lookups
from clusterproxy.service_proxy.lookups import Lookups

if TYPE_CHECKING:
    from trio.testing import MockClock


class Oracle:
    """Counts what it is asked, and answers with the number of the question when it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.may = trio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.asked += 1
        number = self.asked
        await self.may.wait()
        if self.error is not None:
            raise self.error
        return number


async def test_an_answer_holds_for_a_while(autojump_clock: MockClock) -> None:
    oracle = Oracle()
    oracle.may.set()
    found = Lookups[str, int](10.0)
    assert await found.find("a", oracle) == 1
    await trio.sleep(9.9)
    assert await found.find("a", oracle) == 1
    assert await found.find("b", oracle) == 2
    await trio.sleep(0.2)
    assert await found.find("a", oracle) == 3
    assert await found.find("b", oracle) == 2


async def test_those_who_ask_at_once_share_the_answer(autojump_clock: MockClock) -> None:
    oracle = Oracle()
    found = Lookups[str, int](0.0)
    answers: list[int] = []

    async def ask() -> None:
        answers.append(await found.find("a", oracle))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        oracle.may.set()
    assert answers == [1] * 5
    # Nothing is kept.
    assert await found.find("a", oracle) == 2


async def test_an_error_is_for_all_who_wait_and_nobody_else(autojump_clock: MockClock) -> None:
    oracle = Oracle()
    oracle.error = KubeUnavailable("no")
    found = Lookups[str, int](10.0)
    errors: list[KubeUnavailable] = []

    async def ask() -> None:
        with pytest.raises(KubeUnavailable, match=r"^no$") as caught:
            await found.find("a", oracle)
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        oracle.may.set()
    assert oracle.asked == 1
    assert len({id(error) for error in errors}) == 3
    oracle.error = None
    assert await found.find("a", oracle) == 2


async def test_who_asked_has_gone(autojump_clock: MockClock) -> None:
    oracle = Oracle()
    found = Lookups[str, int](10.0)
    answers: list[int] = []

    async def ask() -> None:
        answers.append(await found.find("a", oracle))

    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()

        async def asks_and_goes() -> None:
            with first:
                await ask()

        nursery.start_soon(asks_and_goes)
        await wait_all_tasks_blocked()
        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        first.cancel()
        await wait_all_tasks_blocked()
        assert oracle.asked == 2
        oracle.may.set()
    assert answers == [2, 2]


async def test_no_more_are_kept_than_there_is_room_for(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "_MOST", 2)
    oracle = Oracle()
    oracle.may.set()
    found = Lookups[str, int](10.0)
    for key in "abc":
        await found.find(key, oracle)
    assert await found.find("c", oracle) == 3
    assert await found.find("b", oracle) == 2
    assert await found.find("a", oracle) == 4
    await trio.sleep(11)
    await found.find("d", oracle)
    assert list(found._kept) == ["d"]
