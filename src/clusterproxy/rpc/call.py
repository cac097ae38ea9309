"""What the two ends of a gRPC call have in common.

Everything here is synchronous: messages are handed to the call's receiver by the connection's reader,
sending never waits. Tasks that belong to a call live in its nursery.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from clusterproxy.errors import RPCError
from clusterproxy.grpc import PREFIX_SIZE, FramingError, MessageAssembler, Status, prefix

if TYPE_CHECKING:
    import trio

    from clusterproxy.http2.connection import Http2Connection
    from clusterproxy.http2.flow import Buffer, Flow
    from clusterproxy.http2.stream import Stream

_log = logging.getLogger("clusterproxy.rpc")

#: Takes a message as ``(size, head, rest)``, all with the five-byte prefix; the buffers are lent.
#: May raise RPCError, which ends the call with its status.
Receiver = Callable[[int, memoryview, tuple[memoryview, ...]], None]

#: Takes messages of the same size, one behind the other, as ``(size, view)``.
RunReceiver = Callable[[int, memoryview], None]


def _nothing(*_: object) -> None:
    """The call is over."""


def _refuse_early(*_: object) -> None:
    raise RPCError(Status.INTERNAL, "message before the call was accepted")


class Call(ABC):
    """One gRPC call: a stream of messages each way.

    Attributes:
      receive: set by the owner, called for each message.
      receive_run: set by an owner that takes bulk data: called for several messages at once.
      on_half_close: set by the owner, called when the peer will send no more.
      on_close: set by the owner, called once when the call is over, for whatever reason, with the
        status that the peer sent or that says what happened.
    """

    def __init__(self, connection: Http2Connection) -> None:
        self.connection = connection
        self.receive: Receiver = _refuse_early
        self.receive_run: RunReceiver = self._receive_each
        self.on_half_close: Callable[[], None] = lambda: None
        self.on_close: Callable[[Status, str], None] = lambda _status, _message: None
        self.closed = False
        self._assembler = MessageAssembler(
            self._dispatch, connection.limits.max_message_size, self._dispatch_run
        )
        self._stream: Stream | None = None
        self._nursery: trio.Nursery | None = None
        self._deferred: list[tuple[Callable[..., Awaitable[None]], tuple[object, ...]]] = []

    @property
    def stream(self) -> Stream:
        """The stream that carries the call."""
        assert self._stream is not None  # noqa: S101  set before anybody gets the call
        return self._stream

    def bind(self, stream: Stream) -> None:
        """Set the stream that carries the call, once."""
        self._stream = stream

    def _dispatch(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        # One batch may bring several messages, and any of them may end the call.
        if not self.closed:
            self.receive(size, head, rest)

    def _dispatch_run(self, size: int, view: memoryview) -> None:
        if not self.closed:
            self.receive_run(size, view)

    def _receive_each(self, size: int, view: memoryview) -> None:
        for start in range(0, len(view), size):
            self._dispatch(size, view[start : start + size], ())

    # -- sending -----------------------------------------------------------------------------------

    def send(self, message: bytes) -> None:
        """Send a small message ahead of everything that waits. Dropped if the call is over."""
        self.forward(None, PREFIX_SIZE + len(message), prefix(len(message)) + message)

    def send_behind(self, flow: Flow, message: bytes) -> None:
        """Send a message behind those that its flow has queued."""
        framed = prefix(len(message)) + message
        self.forward(flow if flow.queued else None, len(framed), framed)

    def forward(
        self, flow: Flow | None, size: int, head: Buffer, rest: tuple[Buffer, ...] = ()
    ) -> None:
        """Send a message that has its prefix; the buffers are lent for this batch."""
        if not self.closed:
            self.stream.send(flow, size, head, rest)

    # -- tasks -------------------------------------------------------------------------------------

    def start_soon(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start a task in the call's nursery; it is cancelled when the call is over."""
        if self.closed:
            return
        if self._nursery is None:
            self._deferred.append((function, args))
        else:
            self._nursery.start_soon(function, *args)

    def attach(self, nursery: trio.Nursery) -> None:
        """Let *nursery* run the call's tasks; it is cancelled when the call is over."""
        if self.closed:
            nursery.cancel_scope.cancel()
            return
        self._nursery = nursery
        for function, args in self._deferred:
            nursery.start_soon(function, *args)
        self._deferred.clear()

    def _close(self, status: Status, message: str) -> None:
        """Note that the call is over."""
        if self.closed:
            return
        self.closed = True
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            self._nursery = None
        try:
            self.on_close(status, message)
        except Exception:
            _log.exception("bug at the end of a call")
        # Who answers the call refers to it: without this only the garbage collector would free them.
        self.receive, self.receive_run = _refuse_early, _nothing
        self.on_half_close, self.on_close = _nothing, _nothing
        self._assembler.stop()
        self._deferred.clear()

    # -- http2.stream.StreamHandler ----------------------------------------------------------------

    def on_data(self, view: memoryview) -> bool:
        if self.closed:
            return False
        try:
            return self._assembler.feed(view) and not self.closed
        except FramingError as error:
            if error.status is Status.RESOURCE_EXHAUSTED:
                self.connection.note_limit("message_size")
            self.abort(error.status, str(error))
        except RPCError as error:
            self.abort(Status(error.status), error.message)
        except Exception:
            self._fail_by_bug("bug while handling a message")
        return False

    def settle(self) -> None:
        self._assembler.settle()

    def _fail_by_bug(self, what: str) -> None:
        """Log the exception that is being handled; it ends this call and nothing else."""
        _log.exception(what)
        self.abort(Status.INTERNAL, "internal error")

    @abstractmethod
    def abort(self, status: Status, message: str) -> None:
        """End the call because of what the peer sent."""
