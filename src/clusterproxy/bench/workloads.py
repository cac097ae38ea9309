"""The loads. Each takes a way to connect, so that the direct path and a tunnel are used by the same code.

A load ends by itself, and never fails because connections do: their errors are in its sample.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import trio

from clusterproxy.errors import ClusterProxyError

from .services import ACK_SIZE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from .processes import Usage, Watch

    #: Opens a connection; the stream is closed with the block, at once if that was cancelled.
    Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[trio.abc.Stream]]
    Move: TypeAlias = Callable[[trio.abc.Stream, "Moved", int], Awaitable[None]]

#: Of a round trip, there and back.
PING_SIZE: Final = 64

# A read returns what is there; this is what a tunnel's stream has at most.
_READ: Final = 512 * 1024
# Errors in a row should be few lines of a report and no load of their own.
_AFTER_ERROR_S: Final = 0.1
_ERROR_LENGTH: Final = 200
# How long an answer may be out at the end.
_PATIENCE_S: Final = 5.0
# So many idle tunnels are opened at once, and memory is looked at when nothing has happened for so long.
_OPENERS: Final = 20
_SETTLE_S: Final = 0.5

_FAILURES: Final = (ClusterProxyError, trio.BrokenResourceError, trio.TooSlowError, OSError)


@attrs.frozen(kw_only=True)
class Load:
    """How much.

    Attributes:
      connections: at once.
      size: bytes of one write.
      warmup_s: from the moment in which all connections are open until anything counts.
      duration_s: what counts.
    """

    connections: int = 1
    size: int = 256 * 1024
    warmup_s: float
    duration_s: float


@attrs.define(kw_only=True)
class Sample:
    """What one run of a load has measured.

    Attributes:
      value: in the unit of the workload (:data:`clusterproxy.bench.plan.UNITS`); None if no connection worked.
      seconds: how long it took.
      bytes: that arrived in this time.
      operations: dials or round trips in this time.
      round_trips: seconds of each, sorted.
      bulk_mbit_s: what went beside.
      memory: bytes that each process has gained for each tunnel.
      spent: CPU seconds of each process in this time, and its memory at the end.
      errors: how often each text.
    """

    value: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    operations: int = 0
    round_trips: list[float] = attrs.field(factory=list[float])
    bulk_mbit_s: float | None = None
    memory: dict[str, float] = attrs.field(factory=dict[str, float])
    spent: Mapping[str, Usage] = attrs.field(factory=dict[str, "Usage"])
    errors: Counter[str] = attrs.field(factory=Counter[str])


@attrs.define
class Moved:
    """Bytes that have arrived, of all connections of a load."""

    bytes: int = 0


class _Opening:
    """Tells when each of so many connections is open, or never will be."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.opened = 0
        self.done = trio.Event()

    @contextlib.contextmanager
    def one(self) -> Generator[Callable[[], None]]:
        left = True

        def leave(*, opened: int = 1) -> None:
            nonlocal left
            if left:
                left = False
                self.opened += opened
                self._left -= 1
                if not self._left:
                    self.done.set()

        try:
            yield leave
        finally:
            leave(opened=0)


def _texts(error: BaseException) -> Iterator[str]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _texts(inner)  # pyright: ignore[reportUnknownArgumentType]
    else:
        text = "no answer in time" if isinstance(error, trio.TooSlowError) else str(error)
        yield (text or type(error).__name__)[:_ERROR_LENGTH]


@contextlib.contextmanager
def _counting(errors: Counter[str]) -> Generator[None]:
    try:
        yield
    except* _FAILURES as group:
        errors.update(_texts(group))


def mbit_s(size: int, seconds: float) -> float:
    """Return a rate in Mbit/s."""
    return size * 8 / 1e6 / seconds


# -- throughput ------------------------------------------------------------------------------------


def _ended() -> trio.BrokenResourceError:
    return trio.BrokenResourceError("the service ended the connection")


async def _fill(stream: trio.abc.Stream, size: int) -> None:
    block = os.urandom(size)
    while True:
        await stream.send_all(block)


async def read(stream: trio.abc.Stream, moved: Moved, _size: int) -> None:
    """Read from a source."""
    await stream.send_all(b"\0")
    receive = stream.receive_some
    while data := await receive(_READ):
        moved.bytes += len(data)
    raise _ended()


async def write(stream: trio.abc.Stream, moved: Moved, size: int) -> None:
    """Write to a sink; what it has acknowledged has arrived."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fill, stream, size)
        total, waiting = 0, b""
        while data := await stream.receive_some():
            waiting += data
            end = len(waiting) // ACK_SIZE * ACK_SIZE
            newest, waiting = waiting[max(0, end - ACK_SIZE) : end], waiting[end:]
            if newest:
                moved.bytes += int.from_bytes(newest, "big") - total
                total = int.from_bytes(newest, "big")
        raise _ended()


async def both(stream: trio.abc.Stream, moved: Moved, size: int) -> None:
    """Write to an echo and read from it: what comes back has arrived twice."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fill, stream, size)
        while data := await stream.receive_some(_READ):
            moved.bytes += 2 * len(data)
        raise _ended()


async def throughput(connect: Connect, move: Move, load: Load, watch: Watch) -> Sample:
    """Move bytes over all connections at once; the value is in Mbit/s."""
    sample = Sample()
    moved = Moved()
    opening = _Opening(load.connections)

    async def one() -> None:
        with _counting(sample.errors), opening.one() as opened:
            async with connect() as stream:
                opened()
                await move(stream, moved, load.size)

    async with trio.open_nursery() as nursery:
        for _ in range(load.connections):
            nursery.start_soon(one)
        await opening.done.wait()
        if opening.opened:
            await trio.sleep(load.warmup_s)
            used, before, start = watch.look(), moved.bytes, trio.current_time()
            await trio.sleep(load.duration_s)
            sample.bytes = moved.bytes - before
            sample.seconds = trio.current_time() - start
            sample.spent = watch.since(used)
            sample.value = mbit_s(sample.bytes, sample.seconds) if sample.bytes else None
            if not sample.bytes and not sample.errors:
                sample.errors[f"nothing arrived within {load.duration_s:g} s"] += 1
        # What closing them says is no error of what was measured.
        errors = sample.errors.copy()
        nursery.cancel_scope.cancel()
    sample.errors = errors
    return sample


# -- round trips -----------------------------------------------------------------------------------


async def _ping(stream: trio.abc.Stream, message: bytes) -> None:
    await stream.send_all(message)
    left = len(message)
    while left:
        data = await stream.receive_some(left)
        if not data:
            raise _ended()
        left -= len(data)


async def round_trips(connect: Connect, load: Load, watch: Watch) -> Sample:
    """Send to an echo and wait for it, again and again; the value is the median in microseconds."""
    sample = Sample()
    message = os.urandom(PING_SIZE)
    now = trio.current_time
    times = sample.round_trips
    with _counting(sample.errors):
        async with connect() as stream:
            with trio.fail_after(load.warmup_s + load.duration_s + _PATIENCE_S):
                end = now() + load.warmup_s
                while now() < end:
                    await _ping(stream, message)
                used, start = watch.look(), now()
                end = start + load.duration_s
                while (begin := now()) < end:
                    await _ping(stream, message)
                    times.append(now() - begin)
                sample.seconds, sample.spent = now() - start, watch.since(used)
    times.sort()
    sample.operations = len(times)
    sample.value = quantile(times, 0.5) * 1e6 if times else None
    return sample


def quantile(ordered: list[float], part: float) -> float:
    """Return the smallest of some *ordered* values that the given part of them does not exceed."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


async def beside(connect: Connect, connect_bulk: Connect, load: Load, watch: Watch) -> Sample:
    """As :func:`round_trips`, while another connection reads as fast as it can from a source."""
    bulk = Sample()
    moved = Moved()
    opening = _Opening(1)

    async def read_bulk() -> None:
        with _counting(bulk.errors), opening.one() as opened:
            async with connect_bulk() as stream:
                opened()
                await read(stream, moved, load.size)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_bulk)
        await opening.done.wait()
        start = trio.current_time()
        sample = await round_trips(connect, load, watch) if opening.opened else Sample()
        errors = bulk.errors.copy()
        elapsed = trio.current_time() - start
        nursery.cancel_scope.cancel()
    sample.errors += errors
    sample.bulk_mbit_s = mbit_s(moved.bytes, elapsed) if moved.bytes else None
    if sample.bulk_mbit_s is None:
        # Round trips beside nothing are those of another workload.
        sample.value = None
    return sample


# -- dials, and idle tunnels -----------------------------------------------------------------------


async def dials(connect: Connect, load: Load, watch: Watch) -> Sample:
    """Connect to an echo, have a byte back, close; as many at once as there are connections. Value: per second."""
    sample = Sample()
    done = 0

    async def one_after_the_other() -> None:
        nonlocal done
        while True:
            failed = sample.errors.total()
            with _counting(sample.errors):
                async with connect() as stream:
                    await _ping(stream, b"\0")
                done += 1
            if sample.errors.total() > failed:
                await trio.sleep(_AFTER_ERROR_S)

    async with trio.open_nursery() as nursery:
        for _ in range(load.connections):
            nursery.start_soon(one_after_the_other)
        await trio.sleep(load.warmup_s)
        used, before, start = watch.look(), done, trio.current_time()
        await trio.sleep(load.duration_s)
        sample.operations = done - before
        sample.seconds = trio.current_time() - start
        sample.spent = watch.since(used)
        errors = sample.errors.copy()
        nursery.cancel_scope.cancel()
    sample.errors = errors
    sample.value = sample.operations / sample.seconds if sample.operations else None
    if sample.value is None and not errors:
        errors[f"no dial was answered within {load.duration_s:g} s"] += 1
    return sample


async def idle(connect: Connect, load: Load, watch: Watch, *, own: str) -> Sample:
    """Open connections that do nothing; the value is the memory of each, in KiB, in all processes but *own*."""
    sample = Sample()
    openers = trio.CapacityLimiter(_OPENERS)
    opening = _Opening(load.connections)

    async def one() -> None:
        with _counting(sample.errors), opening.one() as opened:
            async with contextlib.AsyncExitStack() as stack:
                async with openers:
                    stream = await stack.enter_async_context(connect())
                    await _ping(stream, b"\0")
                opened()
                await trio.sleep_forever()

    with _counting(sample.errors):
        # What the first one loads belongs to none.
        async with connect() as stream:
            await _ping(stream, b"\0")
    await trio.sleep(_SETTLE_S)
    before = watch.look()
    async with trio.open_nursery() as nursery:
        for _ in range(load.connections):
            nursery.start_soon(one)
        await opening.done.wait()
        await trio.sleep(_SETTLE_S)
        sample.spent = watch.since(before)
        errors = sample.errors.copy()
        nursery.cancel_scope.cancel()
    sample.errors = errors
    if opening.opened:
        sample.operations = opening.opened
        sample.memory = {
            name: (now.resident - before[name].resident) / opening.opened
            for name, now in sample.spent.items()
        }
        sample.value = sum(size for name, size in sample.memory.items() if name != own) / 1024
    return sample
