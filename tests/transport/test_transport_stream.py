from __future__ import annotations

import errno
import os
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_pairs import (
    NAME,
    TLS_1_2,
    TLS_1_3,
    client_tls,
    ends_of,
    hand_made,
    narrow_pair,
    no_leak,
    read,
    read_all,
    reset_error,
    server_tls,
    shake,
    small_buffers,
    socket_pair,
    tls_ends,
)

from clusterproxy.transport.pace import READ_SIZE
from clusterproxy.transport.stream import Transport, tune

if TYPE_CHECKING:
    from pathlib import Path

every_version = pytest.mark.parametrize("version", [None, TLS_1_2, TLS_1_3])
every_tls = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])

PATTERN = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))


def pieces(size: int, step: int) -> list[bytes]:
    return [PATTERN[start : start + step] for start in range(0, size, step)]


# -- bytes either way ------------------------------------------------------------------------------


@every_version
async def test_large_transfers_both_ways(version: ssl.TLSVersion | None) -> None:
    with no_leak():
        a, b = socket_pair()
        small_buffers(a, b)
        ends = await ends_of(a, b, version)
        size = 1 << 20
        received: list[bytes] = []

        async def send(transport: Transport) -> None:
            waits = 0
            for step in (333, 20_000, size):
                # 333 makes more parts than one system call takes.
                if not transport.send(pieces(size, step)):
                    assert transport.blocked
                    assert transport.unsent > 0
                    await transport.drain()
                    waits += 1
                assert not transport.blocked
                assert transport.unsent == 0
            assert waits
            transport.send_eof()

        async def receive(transport: Transport) -> None:
            received.append(await read_all(transport))
            assert not await transport.receive()

        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(send, end)
                nursery.start_soon(receive, end)
        assert received == [PATTERN[:size] * 3] * 2
        for end in ends:
            end.close()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3000), max_size=4), max_size=8),
    st.integers(1, 5000),
    st.sampled_from([None, TLS_1_2, TLS_1_3]),
)
def test_partial_sends_keep_the_order(
    batches: list[list[int]], width: int, version: ssl.TLSVersion | None
) -> None:
    async def main() -> None:
        a, b = narrow_pair(width)
        sender, receiver = await ends_of(a, b, version)
        sent = b""

        async def send() -> None:
            nonlocal sent
            for batch in batches:
                parts = [PATTERN[size : 2 * size] for size in batch]
                buffers = [bytearray(part) for part in parts]
                complete = sender.send(buffers)
                assert complete == (not sender.blocked)
                for buffer in buffers:
                    buffer[:] = b"\xff" * len(buffer)
                await sender.drain()
                sent += b"".join(parts)
            sender.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await read_all(receiver) == sent
        for end in (sender, receiver):
            end.close()

    trio.run(main)


@every_version
async def test_what_is_sent_while_the_socket_is_full_goes_behind(
    version: ssl.TLSVersion | None,
) -> None:
    a, b = narrow_pair(100)
    sender, receiver = await ends_of(a, b, version)
    assert not sender.send([b"a" * 200])
    assert not sender.send([b"b"])
    assert not sender.send([b"c", b"d"])
    await sender.drain()
    assert await read(receiver, 203) == b"a" * 200 + b"bcd"
    sender.close()
    receiver.close()


@every_version
async def test_nothing_to_send(version: ssl.TLSVersion | None) -> None:
    sender, receiver = await ends_of(*socket_pair(), version)
    assert sender.send([])
    assert sender.send([b""])
    assert sender.send([b"", b""])
    assert sender.send([b"x"])
    assert bytes(await receiver.receive()) == b"x"
    sender.close()
    receiver.close()


async def test_drain_goes_on_after_its_cancellation() -> None:
    a, b = socket_pair()
    sender, receiver = Transport(a), Transport(b)
    assert not sender.send([PATTERN])
    with trio.CancelScope() as scope:
        scope.cancel()
        await sender.drain()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.drain)
        assert await read(receiver, len(PATTERN)) == PATTERN
    sender.close()
    receiver.close()


async def test_drain_some_returns_with_the_first_progress() -> None:
    a, b = narrow_pair(10)
    sender, receiver = Transport(a), Transport(b)
    assert not sender.send([b"x" * 25])
    left = [sender.unsent]
    while sender.blocked:
        await sender.drain_some()
        left.append(sender.unsent)
    assert left == [15, 15, 5, 5, 0]
    sender.close()
    receiver.close()


@every_version
async def test_the_read_buffers_are_shared(version: ssl.TLSVersion | None) -> None:
    pairs = [await ends_of(*socket_pair(), version) for _ in range(2)]
    for (sender, _), byte in zip(pairs, b"ab", strict=True):
        assert sender.send([bytes((byte,)) * 100])
    first = await pairs[0][1].receive()
    assert bytes(first) == b"a" * 100
    await pairs[1][1].receive()
    # This is the contract: a view is good until the next checkpoint.
    assert bytes(first) == b"b" * 100
    for end in (*pairs[0], *pairs[1]):
        end.close()


async def test_each_thread_has_its_own_buffers() -> None:
    a, b = socket_pair()
    buffers: list[memoryview] = []

    async def elsewhere() -> None:
        buffers.append(Transport(a)._plain)

    await trio.to_thread.run_sync(trio.run, elsewhere)
    assert buffers[0] is not Transport(b)._plain
    a.close()
    b.close()


@every_tls
async def test_a_full_batch_with_the_rest_of_a_record_before_it(version: ssl.TLSVersion) -> None:
    """The most plaintext that one call can give: all of it fits the buffer."""
    ends = tls_ends(*socket_pair(), version)
    await shake(*ends)
    sender, receiver = ends
    assert sender.tls is not None
    sender.tls.write(PATTERN[: 1 << 14])
    stream = sender._out.read()
    records = READ_SIZE // (1 << 14) + 4
    for start in range(1 << 14, records << 14, 1 << 14):
        sender.tls.write(PATTERN[start : start + (1 << 14)])
        stream += sender._out.read()
    # All but the last byte of the first record is there when a whole batch arrives.
    record = len(stream) // records
    receiver._cipher[: record - 1] = stream[: record - 1]
    assert receiver._decrypt(record - 1) == 0
    batch = stream[record - 1 : record - 1 + READ_SIZE]
    receiver._cipher[:READ_SIZE] = batch
    size = receiver._decrypt(READ_SIZE)
    assert receiver._in.pending == 0
    assert bytes(receiver._plain[:size]) == PATTERN[:size]
    assert size == (record - 1 + READ_SIZE) // record << 14
    for end in ends:
        end.close()


# -- the end ---------------------------------------------------------------------------------------


@every_version
async def test_half_close(version: ssl.TLSVersion | None) -> None:
    a, b = await ends_of(*socket_pair(), version)
    a.send([b"first"])
    a.send_eof()
    assert await read_all(b) == b"first"
    b.send([b"late"])
    assert bytes(await a.receive()) == b"late"
    b.send_eof()
    assert await read_all(a) == b""
    # Nothing more may be sent.
    with pytest.raises(trio.BrokenResourceError):
        a.send([b"x"])
    with pytest.raises(trio.BrokenResourceError):
        a.send([bytes(100_000)])
    a.close()
    b.close()


@every_tls
async def test_close_sends_a_closure_alert(version: ssl.TLSVersion) -> None:
    a, b = await ends_of(*socket_pair(), version)
    a.send([b"data"])
    a.close()
    sock = b.sock
    while b._in.pending == 0:
        b._in.write(sock.recv(1000))
    assert b.tls is not None
    assert b.tls.read(10) == b"data"
    assert b.tls.read(10) == b""
    b.close()


@every_tls
async def test_a_cut_without_a_closure_alert_is_an_end(version: ssl.TLSVersion) -> None:
    a, b = await ends_of(*socket_pair(), version)
    a.send([b"data"])
    a.close(reset=True)
    assert await read_all(b) == b"data"
    assert await read_all(b) == b""
    b.close()


@every_tls
async def test_a_record_cut_short_is_an_end(version: ssl.TLSVersion) -> None:
    a, b = await ends_of(*socket_pair(), version)
    assert a.tls is not None
    a.tls.write(b"data")
    a.sock.send(a._out.read()[:-1])
    a.sock.shutdown(socket.SHUT_WR)
    assert await read_all(b) == b""
    a.close()
    b.close()


@every_tls
async def test_nothing_counts_behind_a_closure_alert(version: ssl.TLSVersion) -> None:
    a, b = await ends_of(*socket_pair(), version)
    a.send([b"data"])
    assert a.tls is not None
    with pytest.raises(ssl.SSLWantReadError):
        a.tls.unwrap()
    a.sock.send(a._out.read() + b"garbage")
    assert await read_all(b) == b"data"
    a.close()
    b.close()


@every_tls
@pytest.mark.parametrize("size", [0, 5, 150_000])
async def test_garbage_after_data(version: ssl.TLSVersion, size: int) -> None:
    a, b = await ends_of(*socket_pair(), version)
    garbage = b"\x17\x03\x03\x00\x20" + bytes(32)
    a.send([PATTERN[:size]] * bool(size))
    a.sock.send(garbage)
    received = b""
    with pytest.raises(trio.BrokenResourceError, match="TLS: "):  # noqa: PT012
        while True:
            received += await b.receive()
    assert received == PATTERN[:size]
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="TLS: "):
            await b.receive()
    # The peer is told.
    with pytest.raises(trio.BrokenResourceError, match=r"TLS: .*ALERT_BAD_RECORD_MAC"):
        await a.receive()
    a.close()
    b.close()


async def test_garbage_from_a_peer_that_has_gone() -> None:
    a, b = await ends_of(*socket_pair(), TLS_1_3)
    b.send([b"data"])
    b.sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    b.sock.close()
    assert bytes(await a.receive()) == b"data"
    with pytest.raises(trio.BrokenResourceError, match="TLS: "):
        await a.receive()
    a.close()


@every_version
@pytest.mark.parametrize("size", [5, 300_000])
async def test_sending_to_a_peer_that_has_gone(version: ssl.TLSVersion | None, size: int) -> None:
    a, b = await ends_of(*socket_pair(), version)
    b.sock.close()
    for parts in ([bytes(size)], [bytes(size)] * 2):
        with pytest.raises(trio.BrokenResourceError, match=r"^Broken pipe$"):
            a.send(parts)
    a.send_eof()
    a.close()


async def test_a_peer_that_goes_while_the_socket_is_full() -> None:
    a, b = socket_pair()
    transport = Transport(a)
    assert not transport.send([PATTERN])
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            with pytest.raises(
                trio.BrokenResourceError, match=r"^(Broken pipe|Connection reset.*)$"
            ):
                await transport.drain()

        await trio.testing.wait_all_tasks_blocked()
        b.close()
    transport.close()


async def test_a_reset_while_reading() -> None:
    a, b = socket_pair()
    transport = Transport(a)
    transport.send([b"unread"])
    b.close()
    with pytest.raises(trio.BrokenResourceError, match=r"^Connection reset by peer$"):
        await transport.receive()
    transport.close()


async def test_other_errors_are_told_with_their_number() -> None:
    a, b = narrow_pair(10)
    transport = Transport(a)
    a.failure = OSError(errno.EIO, "Input/output error")
    with pytest.raises(trio.BrokenResourceError, match=r"^\[Errno 5\] Input/output error$"):
        transport.send([b"x"])
    transport.close()
    b.close()


# -- closed here -----------------------------------------------------------------------------------


@every_version
async def test_close_while_others_wait(version: ssl.TLSVersion | None) -> None:
    with no_leak():
        a, b = await ends_of(*socket_pair(), version)
        assert not a.send([PATTERN])
        async with trio.open_nursery() as nursery:
            for wait in (a.receive, a.drain):

                @nursery.start_soon
                async def _(wait: object = wait) -> None:
                    assert callable(wait)
                    with pytest.raises(trio.ClosedResourceError):
                        await wait()

            await trio.testing.wait_all_tasks_blocked()
            closed = [a.closed]
            a.close()
            a.close()
            closed.append(a.closed)
        assert closed == [False, True]
        for again in (a.receive, a.drain, a.drain_some):
            with pytest.raises(trio.ClosedResourceError):
                await again()
        a.send_eof()
        b.close()
        with pytest.raises(trio.ClosedResourceError):
            b.send([b"x"])
        with pytest.raises(trio.ClosedResourceError):
            b.send([b"x"] * 2)


@pytest.mark.parametrize("version", [None, TLS_1_3])
async def test_reset(version: ssl.TLSVersion | None) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    a = socket.create_connection(listener.getsockname())
    b, _ = listener.accept()
    listener.close()
    for sock in (a, b):
        sock.setblocking(False)
    server, client = await ends_of(a, b, version)
    server.close(reset=True)
    with pytest.raises(trio.BrokenResourceError, match=r"^Connection reset by peer$"):
        await client.receive()
    client.close()


async def test_close_before_the_handshake() -> None:
    with no_leak():
        a, b = tls_ends(*socket_pair())
        a.close()
        with pytest.raises(trio.BrokenResourceError):
            await b.handshake()
        b.close()


async def test_close_sends_nothing_into_the_middle_of_a_record() -> None:
    a, b = narrow_pair(100)
    sender, receiver = await ends_of(a, b, TLS_1_3)
    assert not sender.send([bytes(1000)])
    before = a.accepted
    sender.close()
    assert a.accepted == before
    receiver.close()


# -- handshakes ------------------------------------------------------------------------------------


async def test_no_handshake_without_tls() -> None:
    a, b = socket_pair()
    transport = Transport(a)
    with trio.CancelScope() as scope:
        scope.cancel()
        await transport.handshake()
    assert transport.tls is None
    transport.close()
    b.close()


@every_tls
async def test_a_handshake_in_pieces(version: ssl.TLSVersion) -> None:
    a, b = narrow_pair(50)
    server, client = await ends_of(a, b, version)
    assert not server.blocked
    server.send([b"x"])
    await server.drain()
    assert bytes(await client.receive()) == b"x"
    server.close()
    client.close()


@every_tls
async def test_data_that_comes_with_the_end_of_the_handshake(version: ssl.TLSVersion) -> None:
    a, b = socket_pair()
    server = Transport(a, server_tls(version), server_side=True)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = client_tls(version).wrap_bio(incoming, outgoing, server_hostname=NAME)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handshake)
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                b.send(outgoing.read())
                await trio.testing.wait_all_tasks_blocked()
                incoming.write(b.recv(10_000))
            else:
                break
        if version is TLS_1_2:
            # Here the server has the last word, so it has finished already.
            b.send(outgoing.read())
        tls.write(b"early")
        b.send(outgoing.read())
    assert bytes(await server.receive()) == b"early"
    tls.write(b"later")
    b.send(outgoing.read())
    assert bytes(await server.receive()) == b"later"
    server.close()
    b.close()


async def failed_handshakes(server: Transport, client: Transport) -> tuple[str, str]:
    """Return how the handshakes of both ends fail; a client may learn of it only when it reads."""
    results: dict[Transport, str] = {}

    async def attempt(end: Transport) -> None:
        try:
            await end.handshake()
            await end.receive()
        except (ssl.SSLError, trio.BrokenResourceError) as error:
            results[end] = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
        finally:
            end.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, server)
        nursery.start_soon(attempt, client)
    return results[server], results[client]


@every_tls
async def test_a_server_of_another_authority(version: ssl.TLSVersion) -> None:
    a, b = socket_pair()
    server = Transport(a, server_tls(version), server_side=True)
    client = Transport(b, client_tls(version, ca=trustme.CA()), server_hostname=NAME)
    seen_by_server, seen_by_client = await failed_handshakes(server, client)
    assert seen_by_client == "SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED"
    # The alert was sent.
    assert seen_by_server.startswith("SSLError: ")
    assert seen_by_server.endswith("ALERT_UNKNOWN_CA")


@every_tls
async def test_a_client_without_a_certificate(version: ssl.TLSVersion) -> None:
    a, b = socket_pair()
    server = Transport(a, server_tls(version, client_ca=True), server_side=True)
    client = Transport(b, client_tls(version), server_hostname=NAME)
    seen_by_server, seen_by_client = await failed_handshakes(server, client)
    assert seen_by_server == "SSLError: PEER_DID_NOT_RETURN_A_CERTIFICATE"
    if version is TLS_1_3:
        # The client has finished by then.
        assert seen_by_client.startswith("BrokenResourceError: TLS: ")
        assert seen_by_client.endswith("ALERT_CERTIFICATE_REQUIRED")
    else:
        assert seen_by_client.startswith("SSLError: ")
        assert seen_by_client.endswith("ALERT_HANDSHAKE_FAILURE")


@pytest.mark.parametrize("gone", [False, True])
async def test_plain_text_on_a_tls_port(gone: bool) -> None:
    a, b = socket_pair()
    server = Transport(a, server_tls(), server_side=True)
    b.send(b"GET / HTTP/1.1\r\n\r\n")
    if gone:
        # The alert cannot be sent, which must not hide the reason.
        b.close()
    with pytest.raises(ssl.SSLError) as caught:
        await server.handshake()
    assert caught.value.reason == "HTTP_REQUEST"
    server.close()
    b.close()


@pytest.mark.parametrize("server_side", [True, False])
async def test_an_end_during_the_handshake(server_side: bool) -> None:
    a, b = socket_pair()
    context = server_tls() if server_side else client_tls()
    name = None if server_side else NAME
    transport = Transport(a, context, server_side=server_side, server_hostname=name)
    b.shutdown(socket.SHUT_WR)
    with pytest.raises(trio.BrokenResourceError, match="closed during the TLS handshake"):
        await transport.handshake()
    transport.close()
    b.close()


async def test_a_reset_during_the_handshake() -> None:
    a, b = narrow_pair(100)
    server = Transport(a, server_tls(), server_side=True)
    client = Transport(b, client_tls(), server_hostname=NAME)
    a.failure = reset_error()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            with pytest.raises(trio.BrokenResourceError, match="closed during"):
                await client.handshake()

        with pytest.raises(trio.BrokenResourceError, match=r"^Connection reset by peer$"):
            await server.handshake()
        server.close()
    client.close()


# -- key updates -----------------------------------------------------------------------------------


async def test_a_key_update_is_answered(tmp_path: Path) -> None:
    peer = await hand_made(*socket_pair(), tmp_path)
    update = peer.outgoing.key_update()
    peer.sock.send(update + peer.outgoing.data(b"behind"))
    assert bytes(await peer.server.receive()) == b"behind"
    assert peer.server.send([b"answer"])
    records = peer.incoming.decrypt(peer.sock.recv(1000))
    assert records == [(22, b"\x18\0\0\x01\0"), (23, b"answer")]
    peer.sock.send(
        peer.outgoing.key_update() + peer.outgoing.key_update() + peer.outgoing.data(b"x")
    )
    assert bytes(await peer.server.receive()) == b"x"
    # What reading produces is sent at once.
    assert peer.incoming.decrypt(peer.sock.recv(1000))[0][0] == 22
    peer.server.close()
    peer.sock.close()


async def test_an_answer_that_fills_the_socket_is_no_obstacle(tmp_path: Path) -> None:
    a, b = narrow_pair(10_000)
    peer = await hand_made(a, b, tmp_path)
    a.width = 10
    for _ in range(4):
        peer.sock.send(peer.outgoing.key_update() + peer.outgoing.key_update())
        peer.sock.send(peer.outgoing.data(b"x"))
        assert bytes(await peer.server.receive()) == b"x"
    assert peer.server.blocked
    # Nobody has sent anything, so nobody drains: the next who sends does.
    assert not peer.server.send([b"data"])
    await peer.server.drain()
    records = peer.incoming.decrypt(peer.sock.recv(10_000))
    assert {kind for kind, _ in records[:-1]} == {22}
    assert records[-1] == (23, b"data")
    peer.server.close()
    peer.sock.close()


async def test_a_flood_of_key_updates_is_cut_off(tmp_path: Path) -> None:
    a, b = narrow_pair(10_000)
    peer = await hand_made(a, b, tmp_path)
    a.width = 0
    largest = 0
    with pytest.raises(trio.BrokenResourceError, match="does not read its answers"):  # noqa: PT012
        for _ in range(2000):
            peer.sock.send(peer.outgoing.key_update() + peer.outgoing.key_update())
            peer.sock.send(peer.outgoing.data(b"x"))
            assert bytes(await peer.server.receive()) == b"x"
            largest = max(largest, peer.server.unsent + peer.server._out.pending)
    assert largest < 20_000
    peer.server.close()
    peer.sock.close()


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("user_timeout", [True, False])
def test_tune(family: socket.AddressFamily, user_timeout: bool) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        tune(sock, user_timeout=user_timeout)
        options = [
            sock.getsockopt(level, option)
            for level, option in (
                (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            )
        ]
    assert options == [1, 1, 15, 15, 15_000 if user_timeout else 0]


def test_tune_leaves_other_sockets_alone() -> None:
    a, b = socket_pair()
    tune(a, user_timeout=True)
    assert a.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        tune(datagrams, user_timeout=True)
        assert datagrams.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    a.close()
    b.close()


def test_tune_does_not_mind_a_connection_that_is_gone() -> None:
    sock = socket.socket()
    os.close(sock.detach())
    tune(sock, user_timeout=True)


async def test_what_the_peer_has_not_taken() -> None:
    a, b = socket_pair()
    transport = Transport(a)
    assert transport.outstanding() == 0
    transport.send([bytes(5000)])
    # A Unix socket also counts what holds the bytes.
    assert 5000 <= transport.outstanding() < 20_000
    assert len(b.recv(10_000)) == 5000
    assert transport.outstanding() == 0
    transport.send([b"x"])
    transport.close()
    assert transport.outstanding() == 0
    b.close()
