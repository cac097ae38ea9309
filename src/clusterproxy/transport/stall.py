"""Waits for a consumer over its budget, and gives it up when it makes no progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from clusterproxy.tunnel.budget import Guard, StallClock

if TYPE_CHECKING:
    from collections.abc import Callable


async def watch_stall(guard: Guard, timeout_s: float, give_up: Callable[[], None]) -> None:
    """Return when *guard* is within its budget again, or call *give_up* after a stall.

    Cancellation: at any time, nothing is lost.
    """
    clock = StallClock(timeout_s, trio.current_time(), guard.taken)
    while guard.watch():
        await trio.sleep(clock.interval)
        if guard.over and clock.stalled(trio.current_time(), guard.taken):
            give_up()
            return
