"""The SOCKS requests of clients, byte for byte (RFC 1928; SOCKS4a)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from clusterproxy.client.socks import Reply, SocksError, receive_socks_request, reply_to
from clusterproxy.errors import DialCause, DialError, DialReason

HELLO = b"\x05\x01\x00"
WELCOME = b"\x05\x00"
PORT_443 = b"\x01\xbb"
FAR_AWAY = b"\0" * 6


def named(name: bytes, command: int = 1) -> bytes:
    return bytes((5, command, 0, 3, len(name))) + name + PORT_443


async def answers(data: bytes) -> bytes:
    """What a client that says *data* hears from us until we are done with it."""
    client, server = memory_stream_pair()
    await client.send_all(data)
    await client.send_eof()
    with pytest.raises(SocksError):
        await receive_socks_request(server)
    await server.aclose()
    heard = b""
    while more := await client.receive_some():
        heard += more
    return heard


@pytest.mark.parametrize(
    ("request_bytes", "address"),
    [
        (named(b"cluster1"), "cluster1:443"),
        (named(b"a-b_c.example."), "a-b_c.example.:443"),
        (named(b"10.0.0.1"), "10.0.0.1:443"),
        (named(b"fd00::1"), "[fd00::1]:443"),
        (b"\x05\x01\x00\x01\x0a\x00\x00\x01" + PORT_443, "10.0.0.1:443"),
        (b"\x05\x01\x00\x04\xfd" + bytes(14) + b"\x01" + PORT_443, "[fd00::1]:443"),
    ],
)
async def test_version_5(request_bytes: bytes, address: str) -> None:
    client, server = memory_stream_pair()
    # Clients of all kinds: some send everything at once, and what they have for the service as well.
    await client.send_all(HELLO + request_bytes + b"early")
    request = await receive_socks_request(server)
    assert request.address == address
    await request.answer(Reply.SUCCEEDED)
    assert await server.receive_some() == b"early"
    assert await client.receive_some() == WELCOME + b"\x05\x00\x00\x01" + FAR_AWAY


@pytest.mark.parametrize(
    ("request_bytes", "address"),
    [
        (b"\x04\x01\x01\xbb\x0a\x00\x00\x01user\0", "10.0.0.1:443"),
        (b"\x04\x01\x01\xbb\x00\x00\x00\x01\0cluster1\0", "cluster1:443"),
    ],
)
async def test_version_4(request_bytes: bytes, address: str) -> None:
    client, server = memory_stream_pair()
    await client.send_all(request_bytes + b"early")
    request = await receive_socks_request(server)
    assert request.address == address
    await request.answer(Reply.SUCCEEDED)
    assert await server.receive_some() == b"early"
    assert await client.receive_some() == b"\x00\x5a" + FAR_AWAY
    await request.answer(Reply.CONNECTION_REFUSED)
    assert await client.receive_some() == b"\x00\x5b" + FAR_AWAY


async def test_byte_by_byte() -> None:
    client, server = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_socks_request, server)
        for octet in HELLO + named(b"cluster1"):
            await client.send_all(bytes((octet,)))
            await wait_all_tasks_blocked()


async def test_one_method_of_several_is_enough() -> None:
    client, server = memory_stream_pair()
    await client.send_all(b"\x05\x03\x02\x00\x01" + named(b"cluster1"))
    assert (await receive_socks_request(server)).address == "cluster1:443"


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (b"\x05\x01\x02", b"\x05\xff"),  # a password or nothing
        (b"\x05\x00", b"\x05\xff"),
        (HELLO + named(b"x", command=2), WELCOME + b"\x05\x07\x00\x01" + FAR_AWAY),  # BIND
        (HELLO + named(b"x", command=3), WELCOME + b"\x05\x07\x00\x01" + FAR_AWAY),  # UDP
        (HELLO + b"\x05\x01\x00\x05", WELCOME + b"\x05\x08\x00\x01" + FAR_AWAY),
        (HELLO + named(b""), WELCOME + b"\x05\x01\x00\x01" + FAR_AWAY),
        (HELLO + named(b"a b"), WELCOME + b"\x05\x01\x00\x01" + FAR_AWAY),
        (HELLO + named(b"a\r\nb"), WELCOME + b"\x05\x01\x00\x01" + FAR_AWAY),
        (HELLO + named("ü".encode()), WELCOME + b"\x05\x01\x00\x01" + FAR_AWAY),
        (b"\x04\x02\x01\xbb\x0a\x00\x00\x01\0", b"\x00\x5b" + FAR_AWAY),
        (b"\x04\x01\x01\xbb\x00\x00\x00\x01\0\0", b"\x00\x5b" + FAR_AWAY),
        (b"GET / HTTP/1.1\r\n\r\n", b""),
        (b"\x04\x01\x01\xbb\x0a\x00\x00\x01" + b"u" * 300, b""),
    ],
)
async def test_what_is_not_served(said: bytes, heard: bytes) -> None:
    assert await answers(said) == heard


@pytest.mark.parametrize(
    "whole", [HELLO + named(b"cluster1"), b"\x04\x01\x01\xbb\0\0\0\x01u\0name\0"]
)
async def test_a_client_that_goes_away_in_the_middle(whole: bytes) -> None:
    for size in range(len(whole)):
        assert await answers(whole[:size]) in (b"", WELCOME)


@pytest.mark.parametrize(
    ("cause", "reply"),
    [
        (DialCause.REFUSED, Reply.CONNECTION_REFUSED),
        (DialCause.DNS, Reply.HOST_UNREACHABLE),
        (DialCause.UNREACHABLE, Reply.HOST_UNREACHABLE),
        (DialCause.NO_AGENT, Reply.NETWORK_UNREACHABLE),
        (DialCause.TIMEOUT, Reply.TTL_EXPIRED),
        (DialCause.POLICY, Reply.NOT_ALLOWED),
        (DialCause.CLOSED, Reply.GENERAL_FAILURE),
        (DialCause.OTHER, Reply.GENERAL_FAILURE),
    ],
)
def test_replies_to_failed_dials(cause: DialCause, reply: Reply) -> None:
    assert reply_to(DialError(DialReason.ENDPOINT, "no", cause=cause)) is reply
