"""Connected transports over socket pairs, and the means to disturb them."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
import trustme
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from clusterproxy.transport.stream import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NAME: Final = "proxy.example"
TLS_1_2: Final = ssl.TLSVersion.TLSv1_2
TLS_1_3: Final = ssl.TLSVersion.TLSv1_3


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(version: ssl.TLSVersion = TLS_1_3, *, client_ca: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    context.num_tickets = 0
    authority().issue_cert(NAME).configure_cert(context)
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        authority().configure_trust(context)
    return context


def client_tls(
    version: ssl.TLSVersion = TLS_1_3, *, ca: trustme.CA | None = None
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = version
    (ca or authority()).configure_trust(context)
    return context


class NarrowSocket(socket.socket):
    """Takes at most ``width`` bytes of a send, and nothing of every second one.

    ``accepted`` counts what it took, ``failure`` is raised instead of sending.
    """

    width = 1000
    accepted = 0
    failure: OSError | None = None
    _full = False

    def _limit(self, data: bytes) -> bytes:
        if self.failure is not None:
            raise self.failure
        self._full = not self._full
        if not self._full:
            raise BlockingIOError
        return data[: self.width]

    def send(self, data: Any, flags: int = 0, /) -> int:
        sent = super().send(self._limit(bytes(data)), flags)
        self.accepted += sent
        return sent

    def sendmsg(self, parts: Any, *_: Any) -> int:
        return self.send(b"".join(parts))


def socket_pair() -> tuple[socket.socket, socket.socket]:
    a, b = socket.socketpair()
    for sock in (a, b):
        sock.setblocking(False)
    return a, b


def narrow_pair(width: int) -> tuple[NarrowSocket, socket.socket]:
    a, b = socket_pair()
    narrow = NarrowSocket(fileno=a.detach())
    narrow.setblocking(False)
    narrow.width = width
    return narrow, b


def small_buffers(*socks: socket.socket) -> None:
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)


def tls_ends(
    a: socket.socket, b: socket.socket, version: ssl.TLSVersion = TLS_1_3
) -> tuple[Transport, Transport]:
    """Return the transports of a server and a client that have not shaken hands yet."""
    return (
        Transport(a, server_tls(version), server_side=True),
        Transport(b, client_tls(version), server_hostname=NAME),
    )


async def shake(*ends: Transport) -> None:
    async with trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(end.handshake)


async def ends_of(
    a: socket.socket, b: socket.socket, version: ssl.TLSVersion | None
) -> tuple[Transport, Transport]:
    """Return connected transports over *a* and *b*: plain, or with TLS after the handshake."""
    if version is None:
        return Transport(a), Transport(b)
    ends = tls_ends(a, b, version)
    await shake(*ends)
    return ends


async def read_all(transport: Transport) -> bytes:
    data = bytearray()
    while view := await transport.receive():
        data += view
    return bytes(data)


async def read(transport: Transport, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        view = await transport.receive()
        assert view
        data += view
    return bytes(data)


async def write(transport: Transport, parts: Sequence[bytes]) -> None:
    if not transport.send(parts):
        await transport.drain()


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def no_leak() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def reset_error() -> OSError:
    return OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class Records:
    """One direction of a TLS 1.3 connection, encrypted or decrypted by hand (RFC 8446 section 5)."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._set_keys()

    def _set_keys(self) -> None:
        self._key = AESGCM(self._expand(b"key", 32))
        self._iv = int.from_bytes(self._expand(b"iv", 12), "big")
        self._sequence = 0

    def _expand(self, label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack(">HB", size, len(label)) + label + b"\0"
        return HKDFExpand(SHA384(), size, info).derive(self._secret)

    def _nonce(self) -> bytes:
        nonce = self._iv ^ self._sequence
        self._sequence += 1
        return nonce.to_bytes(12, "big")

    def update(self) -> None:
        self._secret = self._expand(b"traffic upd", 48)
        self._set_keys()

    def encrypt(self, kind: int, data: bytes) -> bytes:
        head = b"\x17\x03\x03" + struct.pack(">H", len(data) + 17)
        return head + self._key.encrypt(self._nonce(), data + bytes((kind,)), head)

    def data(self, data: bytes) -> bytes:
        return self.encrypt(23, data)

    def key_update(self) -> bytes:
        """Return the record that changes our keys and asks the peer to change its own."""
        record = self.encrypt(22, b"\x18\0\0\x01\x01")
        self.update()
        return record

    def decrypt(self, stream: bytes) -> list[tuple[int, bytes]]:
        """Return kind and content of each record; a key update is followed."""
        records = []
        while stream:
            size = 5 + int.from_bytes(stream[3:5], "big")
            record, stream = stream[:size], stream[size:]
            content = self._key.decrypt(self._nonce(), record[5:], record[:5])
            records.append((content[-1], content[:-1]))
            if content[-1] == 22:
                self.update()
        return records


@attrs.frozen
class HandMade:
    """A server's transport, and a client whose records are made by hand."""

    server: Transport
    sock: socket.socket
    outgoing: Records
    incoming: Records


async def hand_made(a: socket.socket, b: socket.socket, directory: Path) -> HandMade:
    log = directory / "keys"
    context = client_tls()
    context.keylog_filename = str(log)
    server = Transport(a, server_tls(), server_side=True)
    client = Transport(b, context, server_hostname=NAME)
    await shake(server, client)
    assert client.tls is not None
    assert client.tls.cipher() == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
    lines = (line.split() for line in log.read_text().splitlines() if line[0] != "#")
    secrets = {words[0]: bytes.fromhex(words[2]) for words in lines}
    return HandMade(
        server,
        b,
        Records(secrets["CLIENT_TRAFFIC_SECRET_0"]),
        Records(secrets["SERVER_TRAFFIC_SECRET_0"]),
    )
