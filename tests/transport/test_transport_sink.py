from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NoReturn

import pytest
import trio
import trio.testing
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_pairs import (
    TLS_1_2,
    TLS_1_3,
    NarrowSocket,
    ends_of,
    narrow_pair,
    read,
    reset_error,
    socket_pair,
)

from clusterproxy.transport.outbox import current_outbox
from clusterproxy.transport.sink import ByteSink
from clusterproxy.transport.stream import Transport

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from clusterproxy.transport.records import Buffer

PATTERN = b"".join(number.to_bytes(4, "big") for number in range(1 << 17))


class Counted(Transport):
    """A transport whose peer takes at once what the kernel does, but for so many bytes."""

    waiting = 0

    def outstanding(self) -> int:
        return self.waiting


class Stage:
    """A sink, its transport and what it has called."""

    def __init__(self, transport: Transport, nursery: trio.Nursery) -> None:
        self.transport = transport
        self.sink = ByteSink(transport, nursery.start_soon, self.on_broken)
        self.sink.on_drain = self.on_drain
        self.reasons: list[str] = []
        self.finishes = 0
        self.seen: list[tuple[int, int]] = []

    def on_broken(self, reason: str) -> None:
        assert self.sink.broken
        self.reasons.append(reason)

    def on_drain(self) -> None:
        self.seen.append((self.sink.queued, self.sink.taken))

    def finished(self) -> None:
        self.finishes += 1


class NarrowStage(Stage):
    """A stage with a plain socket that takes 100 bytes at a time, at most every second time."""

    def __init__(self, nursery: trio.Nursery, width: int = 100) -> None:
        self.sock, self.peer = narrow_pair(width)
        self.counted = Counted(self.sock)
        super().__init__(self.counted, nursery)

    def close(self) -> None:
        self.transport.close()
        self.peer.close()


def received(peer: socket.socket) -> bytes:
    data = b""
    try:
        while piece := peer.recv(100_000):
            data += piece
    except BlockingIOError:
        pass
    return data


steps: st.SearchStrategy[tuple[str, list[int]]] = st.one_of(
    st.tuples(st.just("send"), st.lists(st.integers(0, 3000), max_size=3)),
    st.tuples(st.just("batch"), st.lists(st.integers(0, 3000), max_size=3)),
    st.tuples(st.just("wait"), st.just([])),
    st.tuples(st.just("step"), st.just([])),
)


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(steps, max_size=20), st.integers(1, 4000))
def test_nothing_is_lost_miscounted_or_out_of_order(
    program: list[tuple[str, list[int]]], width: int
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            stage = NarrowStage(nursery, width)
            sink = stage.sink
            sent = b""

            def send(size: int) -> None:
                nonlocal sent
                data = PATTERN[size : 2 * size]
                buffer = bytearray(data)
                sent += data
                # Lent: outside of a batch it is used again at once.
                sink.send((memoryview(buffer)[: size // 3], memoryview(buffer)[size // 3 :]))
                if not batch:
                    buffer[:] = b"\xff" * size

            for action, sizes in program:
                batch = action == "batch"
                if batch:
                    with current_outbox():
                        for size in sizes:
                            send(size)
                for size in sizes if action == "send" else ():
                    send(size)
                if action == "wait":
                    await trio.testing.wait_all_tasks_blocked()
                if action == "step":
                    await trio.lowlevel.checkpoint()
                assert sink.taken == stage.sock.accepted
                assert sink.taken + sink.queued == len(sent)
            sink.finish(stage.finished)
            data = b""
            while len(data) < len(sent):
                await trio.testing.wait_all_tasks_blocked()
                data += received(stage.peer)
            assert data == sent
            assert stage.finishes == 1
            assert (sink.queued, sink.taken) == (0, len(sent))
            assert not stage.reasons
            stage.close()

    trio.run(main)


@pytest.mark.parametrize("version", [None, TLS_1_2, TLS_1_3])
async def test_more_than_the_socket_takes(version: ssl.TLSVersion | None) -> None:
    async with trio.open_nursery() as nursery:
        a, b = await ends_of(*socket_pair(), version)
        stage = Stage(a, nursery)
        sink = stage.sink
        for start in range(0, len(PATTERN), 10_000):
            with current_outbox():
                sink.send((PATTERN[start : start + 3], PATTERN[start + 3 : start + 10_000]))
        assert sink.queued > 0
        sink.finish(stage.finished)
        assert await read(b, len(PATTERN)) == PATTERN
        await trio.testing.wait_all_tasks_blocked()
        assert sink.queued == 0
        # TLS adds some bytes of its own while the socket is full.
        assert len(PATTERN) <= sink.taken <= len(PATTERN) + version_overhead(version)
        assert stage.finishes == 1
        # Free again: the next goes out within the call.
        taken = sink.taken
        sink.send((b"end",))
        assert sink.queued == 0
        assert (await read(b, 3)) == b"end"
        assert sink.taken == taken + 3
        a.close()
        b.close()


def version_overhead(version: ssl.TLSVersion | None) -> int:
    return 0 if version is None else 10_000


async def test_lent_buffers_are_written_once_at_the_end_of_the_batch() -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        with current_outbox():
            stage.sink.send((b"a", b"b"))
            stage.sink.send((b"c",))
            assert stage.sock.accepted == 0
            stage.sink.finish(stage.finished)
            assert stage.finishes == 0
        assert stage.finishes == 1
        assert received(stage.peer) == b"abc"
        assert stage.seen == []
        stage.close()


async def test_every_change_of_the_queue_is_told() -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        stage.sink.send((bytes(350),))
        assert stage.seen == [(250, 100)]
        await trio.testing.wait_all_tasks_blocked()
        stage.sink.finish(stage.finished)
        # A slow consumer makes progress with all that the socket takes, not only at the end.
        assert list(dict.fromkeys(stage.seen)) == [(250, 100), (150, 200), (50, 300), (0, 350)]
        assert stage.finishes == 1
        stage.close()


async def test_small_parts_share_a_buffer() -> None:
    class Recording(Counted):
        sizes: list[int]

        def send(self, parts: Sequence[Buffer]) -> bool:
            self.sizes += map(len, parts)
            return super().send(parts)

    async with trio.open_nursery() as nursery:
        sock, peer = narrow_pair(1000)
        transport = Recording(sock)
        transport.sizes = []
        sink = Stage(transport, nursery).sink
        sink.send((bytes(2000),))
        assert sink.queued
        transport.sizes.clear()
        sent = bytes(2000)
        # Nothing that is lent is kept, also if it begins a buffer or fills one up.
        lent = bytearray(b"first")
        sink.send((lent, memoryview(lent)[:2]))
        sent += b"firstfi"
        lent[:] = b"XXXXX"
        for start in range(0, 80_000, 10):
            sink.send((PATTERN[start : start + 3], PATTERN[start + 3 : start + 10]))
        sent += PATTERN[:80_000]
        large = PATTERN[:100_000]
        sink.send((large, b"!", b"?"))
        sent += large + b"!?"
        sock.width = 1 << 20
        data = b""
        while len(data) < len(sent):
            await trio.testing.wait_all_tasks_blocked()
            data += received(peer)
        assert data == sent
        assert sum(transport.sizes) == len(sent) - 2000
        # 80,007 bytes in thousands of parts are three buffers; the large part went to the last.
        whole, also_whole, rest, small = transport.sizes
        assert 32 * 1024 <= whole <= 32 * 1024 + 10
        assert 32 * 1024 <= also_whole <= 32 * 1024 + 10
        assert rest == 80_007 - whole - also_whole + 100_000
        assert small == 2
        transport.close()
        peer.close()


async def test_taken_is_what_the_peer_has_taken() -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        stage.counted.waiting = 70
        stage.sink.send((bytes(350),))
        assert (stage.sink.queued, stage.sink.taken) == (250, 30)
        stage.counted.waiting = 20
        assert (stage.sink.queued, stage.sink.taken) == (250, 80)
        await trio.testing.wait_all_tasks_blocked()
        assert (stage.sink.queued, stage.sink.taken) == (0, 330)
        stage.counted.waiting = 0
        assert stage.sink.taken == 350
        stage.close()


async def test_the_buffer_of_the_kernel_is_no_progress() -> None:
    async with trio.open_nursery() as nursery:
        with socket.socket() as listener:
            # Little room at the peer, much on our side.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            ours = socket.create_connection(listener.getsockname())
            peer, _ = listener.accept()
        ours.setblocking(False)
        peer.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        stage = Stage(Transport(ours), nursery)
        sink = stage.sink
        sink.send((PATTERN,))
        await trio.testing.wait_all_tasks_blocked()
        assert sink.queued < len(PATTERN) - 80_000
        assert sink.taken < 40_000
        data = b""
        with trio.fail_after(10):
            while len(data) < len(PATTERN):
                await trio.lowlevel.wait_readable(peer)
                data += received(peer)
                assert sink.taken <= len(PATTERN) - sink.queued
            # The last acknowledgement may be late.
            while sink.taken < len(PATTERN):  # noqa: ASYNC110  nothing tells
                await trio.sleep(0.01)
        assert data == PATTERN
        assert (sink.queued, sink.taken) == (0, len(PATTERN))
        stage.transport.close()
        peer.close()


@pytest.mark.parametrize("where", ["send", "on_drain"])
async def test_a_bug_while_writing_is_not_that_of_the_batch(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> NoReturn:
        raise ValueError("oops")

    class Faulty(Counted):
        def send(self, parts: Sequence[Buffer]) -> bool:
            return fail() if where == "send" else super().send(parts)

    async with trio.open_nursery() as nursery:
        sock, peer = narrow_pair(100)
        stage, neighbour = Stage(Faulty(sock), nursery), NarrowStage(nursery)
        if where == "on_drain":
            stage.sink.on_drain = fail
        with current_outbox():
            stage.sink.send((bytes(200),))
            neighbour.sink.send((b"hello",))
        assert received(neighbour.peer) == b"hello"
        assert stage.sink.broken
        assert (stage.reasons, stage.sink.queued) == (["internal error"], 0)
        assert [record.getMessage() for record in caplog.records] == ["bug while writing"]
        stage.transport.close()
        neighbour.close()
        peer.close()


async def test_finish_without_anything_to_send() -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        stage.sink.finish(stage.finished)
        assert stage.finishes == 1
        stage.sink.send((b"more",))
        assert stage.finishes == 1
        stage.close()


async def test_a_peer_that_has_gone() -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        stage.peer.close()
        with current_outbox():
            stage.sink.send((b"x",))
            stage.sink.finish(stage.finished)
        assert stage.reasons == ["Broken pipe"]
        assert stage.finishes == 1
        stage.sink.send((b"dropped",))
        stage.sink.finish(stage.finished)
        assert stage.finishes == 2
        assert (stage.sink.queued, stage.sink.taken) == (0, 0)
        assert len(stage.reasons) == 1
        stage.close()


@pytest.mark.parametrize("size", [150, 1000])
async def test_a_peer_that_goes_while_something_waits(size: int) -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        stage.sink.send((bytes(size),))
        stage.sink.send((bytes(size),))
        stage.sink.finish(stage.finished)
        assert stage.finishes == 0
        stage.sock.failure = reset_error()
        await trio.testing.wait_all_tasks_blocked()
        assert stage.reasons == ["Connection reset by peer"]
        assert stage.finishes == 1
        assert stage.sink.queued == 0
        assert stage.seen[-1] == (0, 100)
        stage.close()


async def test_a_failure_while_the_queue_is_written() -> None:
    class Failing(NarrowSocket):
        def sendmsg(self, *_: object) -> int:
            raise reset_error()

    async with trio.open_nursery() as nursery:
        a, b = socket_pair()
        sock = Failing(fileno=a.detach())
        sock.setblocking(False)
        stage = Stage(Counted(sock), nursery)
        stage.sink.send((bytes(1500),))
        # Too large to share a buffer, so there are two parts to send.
        stage.sink.send((bytes(40_000), bytes(40_000)))
        await trio.testing.wait_all_tasks_blocked()
        assert stage.reasons == ["Connection reset by peer"]
        assert (stage.sink.queued, stage.sink.taken) == (0, 1500)
        stage.transport.close()
        b.close()


async def test_discard() -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        stage.sink.send((bytes(1000),))
        stage.sink.send((bytes(1000),))
        await trio.lowlevel.checkpoint()
        stage.sink.finish(stage.finished)
        stage.sink.discard()
        assert stage.finishes == 1
        assert stage.sink.queued == 0
        with current_outbox():
            stage.sink.send((b"dropped",))
        # What the transport has taken over goes out all the same.
        await trio.testing.wait_all_tasks_blocked()
        assert received(stage.peer) == bytes(1000)
        assert not stage.reasons
        assert stage.finishes == 1
        stage.close()


async def test_discard_in_the_middle_of_a_batch() -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        with current_outbox():
            stage.sink.send((b"x",))
            stage.sink.discard()
        assert stage.sock.accepted == 0
        stage.close()


@pytest.mark.parametrize("discarded", [True, False])
async def test_a_transport_that_is_closed_before_its_writer_starts(discarded: bool) -> None:
    async with trio.open_nursery() as nursery:
        stage = NarrowStage(nursery)
        stage.sink.send((bytes(1000),))
        stage.close()
        if discarded:
            stage.sink.discard()
        await trio.testing.wait_all_tasks_blocked()
        # Whoever discards it knows.
        assert stage.reasons == ([] if discarded else ["closed by another task"])


async def test_output_of_tls_that_fills_the_socket_is_no_obstacle() -> None:
    async with trio.open_nursery() as nursery:
        a, b = narrow_pair(10_000)
        transport, peer = await ends_of(a, b, TLS_1_3)
        stage = Stage(transport, nursery)
        # As if a key update had been answered.
        assert transport.tls is not None
        transport.tls.write(b"before")
        a.width = 0
        transport._flush_out()
        assert transport.blocked
        a.width = 10_000
        stage.sink.send((b"behind",))
        assert await read(peer, 12) == b"beforebehind"
        await trio.testing.wait_all_tasks_blocked()
        assert stage.sink.queued == 0
        transport.close()
        peer.close()
