from __future__ import annotations

import pytest

from clusterproxy.addon.turns import Turns


def test_some_at_once_then_one_after_the_other() -> None:
    now = 100.0
    turns = Turns(3, 0.5, lambda: now)
    assert [turns.take("a") for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    # Others have theirs.
    assert turns.take("b") == 0
    now += 0.25
    assert turns.take("a") == 0.25
    now += 0.25
    assert [turns.take("a") for _ in range(2)] == [0, 0.5]
    # After a rest there are as many as in the beginning, however long it was.
    now += 1000
    assert [turns.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    turns.forget("a")
    turns.forget("nobody")
    assert turns.take("a") == 0


@pytest.mark.parametrize("asked_s", [0.01, 0.3, 2.0])
def test_who_comes_again_when_told_gets_a_turn(asked_s: float) -> None:
    now = 0.0
    turns = Turns(2, 1.0, lambda: now)
    had = 0
    while now < 100:
        wait = turns.take("a")
        had += wait == 0
        now += wait or asked_s
    assert had == pytest.approx(100 / max(asked_s, 1.0), abs=2)
