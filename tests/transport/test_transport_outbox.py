from __future__ import annotations

import pytest
import trio

from clusterproxy.transport.outbox import Outbox, current_outbox


class Writer:
    def __init__(self, outbox: Outbox, then: Writer | None = None) -> None:
        self.outbox = outbox
        self.then = then
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        if self.then is not None:
            self.outbox.post(self.then)


def test_outside_of_a_batch_a_post_is_written_at_once() -> None:
    outbox = Outbox()
    writer = Writer(outbox)
    outbox.post(writer)
    outbox.post(writer)
    assert writer.flushes == 2


def test_a_batch_is_written_once_at_its_end() -> None:
    outbox = Outbox()
    last = Writer(outbox)
    # What a flush makes others write goes out in the same batch.
    first = Writer(outbox, then=last)
    with outbox:
        outbox.post(first)
        with outbox:
            outbox.post(first)
        assert first.flushes == 0
    assert (first.flushes, last.flushes) == (1, 1)
    outbox.post(last)
    assert last.flushes == 2


def test_an_exception_ends_the_batch_as_well() -> None:
    outbox = Outbox()
    writer = Writer(outbox)

    def fail() -> None:
        with outbox:
            outbox.post(writer)
            raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        fail()
    assert writer.flushes == 1
    outbox.post(writer)
    assert writer.flushes == 2, "written at once again"


def test_a_writer_that_breaks_its_promise_leaves_no_batch_open() -> None:
    class Broken(Writer):
        def flush(self) -> None:
            raise ValueError("oops")

    outbox = Outbox()
    with pytest.raises(ValueError, match="oops"), outbox:
        outbox.post(Broken(outbox))
    writer = Writer(outbox)
    outbox.post(writer)
    assert writer.flushes == 1


def test_each_event_loop_has_its_own() -> None:
    async def main() -> Outbox:
        outboxes: set[Outbox] = set()

        async def task() -> None:
            outboxes.add(current_outbox())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            nursery.start_soon(task)
        (outbox,) = outboxes
        assert current_outbox() is outbox
        return outbox

    assert trio.run(main) is not trio.run(main)
