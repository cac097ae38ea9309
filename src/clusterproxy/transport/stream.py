"""A connected socket, plain or TLS, that is read in batches and written without waiting.

``trio.SSLStream`` hands out one TLS record per await. Here everything that the kernel has is read and
decrypted at once into a buffer that all connections of the process share, and what is sent goes out
within the call as far as the socket takes it. See "The data path" in docs/architecture.md.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import ssl
import sys
import termios
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from .pace import READ_SIZE, current_pace
from .records import RECORD, Buffer, decrypt, encrypt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")

# Enough for any flight of a handshake; the BIO keeps the size of the largest write.
_HANDSHAKE_READ: Final = 16 * 1024

# A read of less has emptied the socket, and more has hardly come since.
_SMALL_READ: Final = 16 * 1024

# What TLS itself may have to say to a peer that does not read.
_ANSWERS: Final = 16 * 1024

# RFC 5482. Covers a cut line; a peer that lives but does not read keeps its window open here, for an
# HTTP/2 reader never stops reading its socket.
_USER_TIMEOUT_MS: Final = 15_000
_KEEPALIVE_S: Final = 15

_GONE: Final = frozenset(
    (errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.ESHUTDOWN)
)


class _Buffers(threading.local):
    """The read buffers of this thread's event loop.

    One pair serves all connections: whoever reads consumes or copies everything before its next
    checkpoint, so an idle connection costs no buffer.
    """

    def __init__(self) -> None:
        self.cipher = memoryview(bytearray(READ_SIZE))
        self.plain = memoryview(bytearray(READ_SIZE + RECORD))


_buffers: Final = _Buffers()
_NO_BIO: Final = ssl.MemoryBIO()


def tune(sock: socket.socket, *, user_timeout: bool) -> None:
    """Set the options of a TCP socket as Go does; on others this does nothing.

    *user_timeout* is for HTTP/2 sockets only: it also ends a live peer that does not read.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return
    # A connection that is gone already fails here with EINVAL on some kernels; its reader will tell.
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
        if user_timeout:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


class Transport:
    """One connected socket. It has one reader; writes are synchronous.

    Attributes:
      secure: whether it speaks TLS.
      tls: while it is open and speaks TLS.
      close_notified: whether the peer has ended its side by TLS' own means; an end without it may be
        somebody's who cut the connection (RFC 8446 §6.1).

    Args:
      sock: connected and non-blocking; the transport owns it from now on.
      context: with it the transport speaks TLS, see :meth:`handshake`.
      server_side, server_hostname: as in :meth:`ssl.SSLContext.wrap_bio`.
    """

    __slots__ = (
        "_cipher",
        "_closed",
        "_eof",
        "_eof_sent",
        "_error",
        "_in",
        "_last",
        "_more",
        "_out",
        "_pace",
        "_plain",
        "_unsent",
        "close_notified",
        "secure",
        "sock",
        "tls",
    )

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None = None,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> None:
        self.sock = sock
        self.tls: ssl.SSLObject | None = None
        self.secure = context is not None
        self._unsent: bytes | memoryview = b""
        self._closed = False
        self._eof = False
        self.close_notified = False
        self._eof_sent = False
        self._error = ""
        self._more = False
        self._cipher = _buffers.cipher
        self._plain = _buffers.plain
        self._pace = current_pace()
        # Bytes of the last read, 0 if there was a checkpoint since.
        self._last = 0
        if context is not None:
            self._in = ssl.MemoryBIO()
            self._out = ssl.MemoryBIO()
            self.tls = context.wrap_bio(
                self._in, self._out, server_side=server_side, server_hostname=server_hostname
            )

    @property
    def blocked(self) -> bool:
        """Whether the socket was full, so that :meth:`drain` has something to send."""
        return bool(self._unsent)

    @property
    def unsent(self) -> int:
        """Bytes that :meth:`drain` has to send, as they go on the wire."""
        return len(self._unsent)

    def outstanding(self) -> int:
        """Return the bytes that were sent and that the peer's kernel has not taken (tcp(7), SIOCOUTQ)."""
        try:
            return int.from_bytes(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):
            return 0

    @property
    def gone(self) -> bool:
        """Whether the kernel knows that the peer has reset the connection, or vanished.

        For those who do not read it now, and may not for long. What had come before can be read.
        """
        return bool(self._poll() & select.POLLERR)

    @property
    def unread(self) -> int:
        """Bytes that have come and were not read."""
        try:
            return int.from_bytes(fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4)), sys.byteorder)
        except (OSError, ValueError):
            return 0

    def _poll(self) -> int:
        """Return what poll(2) says unasked: POLLERR and POLLHUP. Unlike SO_ERROR it forgets nothing."""
        if self._closed:
            return 0
        poll = select.poll()
        poll.register(self.sock, 0)
        return sum(events for _, events in poll.poll(0))

    @property
    def hung_up(self) -> bool:
        """Whether the peer of a Unix socket has closed it: what it sent can be read, it reads no more."""
        # The kernel says the same if both sides have shut down.
        return not self._eof_sent and self.both_ended

    @property
    def both_ended(self) -> bool:
        """Whether nothing more can be said on a Unix socket, either way; what the peer sent can be read."""
        return self.sock.family == socket.AF_UNIX and bool(self._poll() & select.POLLHUP)

    @property
    def closed(self) -> bool:
        return self._closed

    async def handshake(self) -> None:
        """Shake hands; without TLS this does nothing.

        Raises:
          ssl.SSLError: the peer's certificate or its TLS is not acceptable. The alert was sent.
          trio.BrokenResourceError: the connection ended.
        Cancellation: leaves the transport unusable; close it.
        """
        tls = self.tls
        if tls is None:
            return
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    self._send_now(self._out.read())
                raise
            else:
                break
            await self._send_all(self._out.read())
            received = await self._receive(self.sock.recv_into, self._cipher[:_HANDSHAKE_READ])
            if not received:
                raise trio.BrokenResourceError("connection closed during the TLS handshake")
            self._in.write(self._cipher[:received])
        await self._send_all(self._out.read())
        # The first bytes of the protocol may have come with the last ones of the handshake.
        self._more = True

    async def receive_into(self, places: Sequence[memoryview]) -> int:
        """Put what has arrived into *places*, without TLS; return how much, 0 at the end of the stream.

        As :meth:`receive` otherwise.
        """
        if len(places) == 1:
            return await self._receive(self.sock.recv_into, places[0])
        return await self._receive(self._receive_message, places)

    def _receive_message(self, places: Sequence[memoryview]) -> int:
        return self.sock.recvmsg_into(places)[0]

    def receive_early(self) -> memoryview:
        """Return what came with the last bytes of the handshake, mostly nothing; never waits.

        The result is valid until the caller's next checkpoint.
        """
        if not self._more:
            return self._plain[:0]
        self._more = False
        return self._plain[: self._decrypt(0)]

    async def receive(self, most: int = READ_SIZE) -> memoryview:
        """Return what has arrived, empty at the end of the stream, about *most* bytes of it.

        The result is valid until the caller's next checkpoint. Returns without a checkpoint if the
        kernel has data, but not twice in a row.

        Raises:
          trio.BrokenResourceError: the connection broke, or its TLS did.
          trio.ClosedResourceError: closed by another task meanwhile.
        """
        if self.tls is None:
            places = self._plain[: min(most, self._pace.read_size)]
            received = await self._receive(self.sock.recv_into, places)
            return self._plain[:received]
        while not self._eof:
            received = 0
            if not self._more:
                places = self._cipher[: min(most, self._pace.read_size)]
                received = await self._receive(self.sock.recv_into, places)
                self._eof = not received
            self._more = False
            plain = self._decrypt(received)
            if plain:
                return self._plain[:plain]
        if self._error:
            raise trio.BrokenResourceError(self._error)
        return self._plain[:0]

    def _decrypt(self, received: int) -> int:
        """Decrypt *received* bytes of ciphertext, and what came before them, into the plain buffer."""
        tls, plain = self.tls, self._plain
        assert tls is not None  # noqa: S101
        # All of it: nothing tells a reader of what is left in the BIO.
        filled, end = decrypt(tls, self._in, self._cipher[:received], plain, len(plain))
        if end is not None:
            # What came before a broken record still counts.
            self._eof = True
            self._error, self.close_notified = end, not end
        self._flush_out()
        return filled

    def _flush_out(self) -> None:
        # A key update or an alert: reading can produce output. While the socket is full it stays in
        # the BIO, in front of what is sent next; if this is what fills it, the next send says so.
        pending = self._out.pending
        if pending > _ANSWERS:
            raise trio.BrokenResourceError("TLS: the peer does not read its answers")
        if pending and not self._unsent:
            # A reader learns from the socket that it is broken, after what was received.
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._send_now(self._out.read())

    async def _receive(self, receive: Callable[[_T], int], buffer: _T) -> int:
        last, self._last = self._last, 0
        if last and not self._closed:
            if last < _SMALL_READ:
                # Asking the kernel now would nearly always be in vain.
                await trio.lowlevel.wait_readable(self.sock)
            else:
                # A busy connection lets the others run.
                await trio.lowlevel.checkpoint()
        while True:
            try:
                received = receive(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
            except OSError as error:
                raise self._broken(error) from error
            else:
                self._last = received
                return received

    def send(self, parts: Sequence[Buffer]) -> bool:
        """Send as much as the socket takes; return whether all went out.

        What is left is kept (copied, so the parts may be reused) and goes out with :meth:`drain`;
        what is sent before that is put behind it. Never waits and is no checkpoint.

        Raises:
          trio.BrokenResourceError, trio.ClosedResourceError
        """
        tls = self.tls
        if tls is None:
            return self._send_parts(parts)
        try:
            return self._send_parts(encrypt(tls, self._out, parts))
        except ssl.SSLError as error:
            raise self._broken(error) from error

    def _send_parts(self, parts: Sequence[Buffer]) -> bool:
        if len(parts) == 1:
            return self._send_now(parts[0])
        if self._unsent or len(parts) > 512:  # IOV_MAX is 1,024
            return self._send_now(b"".join(parts))
        total = sum(map(len, parts))
        try:
            sent = self.sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._broken(error) from error
        if sent == total:
            return True
        self._unsent = memoryview(b"".join(parts))[sent:]
        return False

    def _send_now(self, data: Buffer) -> bool:
        if self._unsent:
            self._unsent = bytes(self._unsent) + bytes(data)
            return False
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._broken(error) from error
        if sent == len(data):
            return True
        self._unsent = bytes(memoryview(data)[sent:])
        return False

    async def drain(self) -> None:
        """Wait until what :meth:`send` kept is gone.

        Raises:
          trio.BrokenResourceError, trio.ClosedResourceError
        Cancellation: what is unsent stays; drain again.
        """
        while self._unsent:
            await self.drain_some()

    async def drain_some(self) -> None:
        """Wait until the socket takes some of what :meth:`send` kept; as :meth:`drain` otherwise."""
        if self._closed:
            raise trio.ClosedResourceError("closed by another task")
        await trio.lowlevel.wait_writable(self.sock)
        try:
            sent = self.sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._broken(error) from error
        self._unsent = memoryview(self._unsent)[sent:] if sent < len(self._unsent) else b""

    async def _send_all(self, data: bytes) -> None:
        if data and not self._send_now(data):
            await self.drain()

    def _broken(self, error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
        if self._closed:
            return trio.ClosedResourceError("closed by another task")
        if isinstance(error, ssl.SSLError):
            return trio.BrokenResourceError(f"TLS: {error.reason or error}")
        if error.errno in _GONE:
            return trio.BrokenResourceError(str(error.strerror))
        return trio.BrokenResourceError(str(error))

    def send_eof(self) -> None:
        """Send FIN (and a TLS closure alert before it); no more may be sent. Ignores a dead peer."""
        self._eof_sent = True
        with suppress(OSError, ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError):
            if self.tls is not None:
                with suppress(ssl.SSLError):
                    self.tls.unwrap()
                self._flush_out()
            self.sock.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool = False) -> None:
        """Close at once; waiting tasks get ``trio.ClosedResourceError``. Idempotent, never waits.

        With *reset* the peer sees a reset (RST) and not an orderly end.
        """
        if self._closed:
            return
        self._closed = True
        if reset:
            with suppress(OSError):
                self.sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                )
        elif self.tls is not None and not self._unsent:
            with suppress(ssl.SSLError, OSError, ValueError):
                self.tls.unwrap()
            if self._out.pending:
                with suppress(OSError):
                    self.sock.send(self._out.read())
        trio.lowlevel.notify_closing(self.sock)
        self.sock.close()
        # OpenSSL's state is the largest part of a connection: whoever still refers to this needs it no more.
        self.tls = None
        self._more = False
        self._in = self._out = _NO_BIO
