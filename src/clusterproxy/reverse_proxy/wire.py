"""Byte streams to origins: sockets, and streams that something else carries, with or without TLS."""

from __future__ import annotations

import select
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

import trio

from clusterproxy.transport.records import RECORD, Buffer, decrypt, encrypt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.transport.stream import Transport

# What a handshake reads at once: every connection keeps a BIO of that size.
_HANDSHAKE_READ: Final = 16 * 1024

# What is decrypted at once; what came beyond it waits in the BIO.
_PLAIN: Final = 512 * 1024

# Records that wait while somebody sends: his own, which are a few dozens, and answers to the other end.
_MOST_UNSENT: Final = 1000

# How long the other end may take to confirm a close.
_CLOSE_S: Final = 10.0


class _Plain(threading.local):
    """The one buffer of this thread's event loop into which all of its wires decrypt (see transport.stream)."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_PLAIN + RECORD))


_plain: Final = _Plain()


class Wire(Protocol):
    """One connected byte stream. One task at a time receives, and one sends."""

    @property
    def readable(self) -> bool:
        """Whether there is something to receive now, be it the end, without waiting."""
        ...

    @property
    def leaving(self) -> bool:
        """Whether what carries it is about to end, and waits for it."""
        ...

    @property
    def half_closeable(self) -> bool:
        """Whether one direction can end while the other goes on."""
        ...

    async def receive(self, most: int) -> Buffer:
        """Return what has come, about *most* bytes, until the next checkpoint; empty at an orderly end.

        Raises:
          trio.BrokenResourceError: the end was not an orderly one.
        """
        ...

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send; returns when there is room for more. The parts are lent until the first checkpoint."""

    async def send_eof(self) -> None:
        """End our direction."""

    async def aclose(self) -> None:
        """Close in order."""

    def abort(self) -> None:
        """Close at once, without waiting."""


class SocketWire:
    """A socket of our own."""

    __slots__ = ("_ended", "_transport")

    half_closeable = True
    leaving = False

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._ended = False

    @property
    def readable(self) -> bool:
        if self._ended or self._transport.closed:
            return True
        poll = select.poll()
        poll.register(self._transport.sock, select.POLLIN)
        return bool(poll.poll(0))

    async def receive(self, most: int) -> Buffer:
        transport = self._transport
        view = await transport.receive(most)
        if not view:
            self._ended = True
            if transport.secure and not transport.close_notified:
                # Somebody may have cut the connection (RFC 8446 §6.1).
                raise trio.BrokenResourceError("unexpected EOF")
        return view

    async def send(self, parts: Sequence[Buffer]) -> None:
        if not self._transport.send(parts):
            await self._transport.drain()

    async def send_eof(self) -> None:
        await self._transport.drain()
        self._transport.send_eof()

    async def aclose(self) -> None:
        self._transport.close()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self._transport.close(reset=True)


class StreamWire:
    """A stream of a tunnel, or any other that keeps to trio's rules."""

    __slots__ = ("_stream",)

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    @property
    def readable(self) -> bool:
        # Those of tunnels know; of others only the attempt tells.
        return bool(getattr(self._stream, "readable", False))

    @property
    def leaving(self) -> bool:
        return bool(getattr(self._stream, "leaving", False))

    @property
    def half_closeable(self) -> bool:
        return isinstance(self._stream, trio.abc.HalfCloseableStream)

    async def receive(self, most: int) -> Buffer:
        return await self._stream.receive_some(most)

    async def send(self, parts: Sequence[Buffer]) -> None:
        # The parts are lent, and sending is a checkpoint.
        whole = parts[0] if len(parts) == 1 else b""
        await self._stream.send_all(
            whole if isinstance(whole, bytes) and whole else b"".join(parts)
        )

    async def send_eof(self) -> None:
        assert isinstance(self._stream, trio.abc.HalfCloseableStream)  # noqa: S101
        await self._stream.send_eof()

    async def aclose(self) -> None:
        with trio.move_on_after(_CLOSE_S), suppress(trio.BrokenResourceError):
            await self._stream.aclose()

    def abort(self) -> None:
        # Streams of tunnels are aborted, those of trio's memory closed.
        end = getattr(self._stream, "abort", None) or getattr(self._stream, "close", None)
        if end is not None:
            end()
        else:
            trio.lowlevel.spawn_system_task(_close_forcefully, self._stream)


async def _close_forcefully(stream: trio.abc.Stream) -> None:
    with suppress(Exception):
        await trio.aclose_forcefully(stream)


class TlsWire:
    """TLS over another wire. What has come is decrypted at once, however many records it is."""

    __slots__ = (
        "_close_notified",
        "_error",
        "_in",
        "_out",
        "_sending",
        "_tls",
        "_unsent",
        "_wire",
    )

    def __init__(self, wire: Wire, context: ssl.SSLContext, server_hostname: str) -> None:
        self._wire = wire
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=server_hostname)
        self._close_notified = False
        self._error = ""
        self._unsent: list[Buffer] = []
        # Records go in the order in which they were made.
        self._sending = trio.Lock()

    async def handshake(self) -> None:
        """Shake hands.

        Raises:
          ssl.SSLError: the certificate or the TLS of the other end is not acceptable.
          trio.BrokenResourceError: the connection ended.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._flush()
                raise
            else:
                break
            await self._flush()
            data = await self._wire.receive(_HANDSHAKE_READ)
            if not data:
                raise trio.BrokenResourceError("EOF")
            self._in.write(data)
        await self._flush()

    async def _flush(self) -> None:
        """Send the records that were made, in their order."""
        if self._out.pending:
            self._unsent.append(self._out.read())
        if not self._unsent:
            return
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            while self._unsent:
                records, self._unsent = self._unsent, []
                await self._wire.send(records)
        finally:
            self._sending.release()

    @property
    def readable(self) -> bool:
        ended = self._close_notified or bool(self._error)
        return ended or bool(self._in.pending or self._tls.pending()) or self._wire.readable

    @property
    def leaving(self) -> bool:
        return self._wire.leaving

    @property
    def half_closeable(self) -> bool:
        return self._wire.half_closeable

    async def receive(self, most: int) -> Buffer:
        if self._in.pending or self._tls.pending():
            await trio.lowlevel.checkpoint()
            if plain := self._decrypt(b""):
                return plain
        while not self._close_notified and not self._error:
            data = await self._wire.receive(min(most, _PLAIN))
            if not data:
                self._error = "unexpected EOF"
                break
            plain = self._decrypt(data)
            if self._out.pending:
                # The answer to a key update. Who sends just now sends that as well: the other end may take nothing
                # before we have received.
                self._unsent.append(self._out.read())
                if not self._sending.locked():
                    plain = memoryview(bytes(plain))
                    await self._flush()
                elif len(self._unsent) > _MOST_UNSENT:
                    raise trio.BrokenResourceError("TLS: the peer does not read its answers")
            if plain:
                return plain
        if self._error:
            raise trio.BrokenResourceError(self._error)
        return b""

    def _decrypt(self, data: Buffer) -> memoryview:
        """Decrypt what has come, and what came before it; the result is lent until the next checkpoint."""
        plain = _plain.view
        filled, end = decrypt(self._tls, self._in, memoryview(data), plain, _PLAIN)
        if end is not None:
            self._error, self._close_notified = end, not end
        return plain[:filled]

    async def send(self, parts: Sequence[Buffer]) -> None:
        try:
            self._unsent += encrypt(self._tls, self._out, parts)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError(f"TLS: {error.reason or error}") from error
        await self._flush()

    async def send_eof(self) -> None:
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()
        await self._wire.send_eof()

    async def aclose(self) -> None:
        with suppress(ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._tls.unwrap()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            with trio.move_on_after(_CLOSE_S):
                await self._flush()
        await self._wire.aclose()

    def abort(self) -> None:
        self._wire.abort()
