"""What carries SPDY between us and a kubelet: the bare connection, or messages of a WebSocket. No IO.

Source: KEP 4006; k8s.io/client-go ``tools/portforward/tunneling_connection.go``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.utilities import LocalProtocolError

from clusterproxy.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Carrier(Protocol):
    """Bytes of the protocol above to bytes of the connection, and back.

    Attributes:
      ended: how the peer has ended it, empty while it has not.
    """

    ended: str

    def pack(self, data: bytes) -> bytes:
        """Return what is to be sent for *data*; nothing once the peer has ended it."""
        ...

    def unpack(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield what has come in *data*; what is to be answered is in :meth:`answers` then.

        Raises:
          ProtocolError: it makes no sense.
        """
        ...

    def answers(self) -> bytes:
        """Return what is to be sent by the carrier's own rules, and forget it."""
        ...

    def farewell(self) -> bytes:
        """Return what is to be sent last."""
        ...


class Bare:
    """Nothing between: what an upgrade to SPDY/3.1 makes of a connection."""

    def __init__(self) -> None:
        self.ended = ""

    def pack(self, data: bytes) -> bytes:
        return data

    def unpack(self, data: bytes | memoryview) -> Iterator[bytes]:
        yield bytes(data)

    def answers(self) -> bytes:
        return b""

    def farewell(self) -> bytes:
        return b""


class WebSocket:
    """Binary messages, wherever they are cut, one behind the other (RFC 6455)."""

    def __init__(self) -> None:
        self.ended = ""
        self._connection = Connection(ConnectionType.CLIENT)
        self._answers = bytearray()

    def pack(self, data: bytes) -> bytes:
        # Nothing may follow what closes it.
        return b"" if self.ended else self._connection.send(BytesMessage(data=data))

    def unpack(self, data: bytes | memoryview) -> Iterator[bytes]:
        if self.ended:
            return
        self._connection.receive_data(bytes(data))
        for event in self._connection.events():
            match event:
                case BytesMessage(data=message):
                    yield bytes(message)
                case TextMessage():
                    raise ProtocolError("WebSocket: a message of text")
                case Ping():
                    self._answers += self._connection.send(event.response())
                case CloseConnection(code=code, reason=reason):
                    # Also where a frame makes no sense.
                    self.ended = f"the WebSocket is closed: {code} {reason or ''}".rstrip()
                    self._answer_close(event)
                    return
                case _:
                    pass

    def _answer_close(self, event: CloseConnection) -> None:
        try:
            self._answers += self._connection.send(event.response())
        except LocalProtocolError:
            # It answers ours.
            return

    def answers(self) -> bytes:
        data = bytes(self._answers)
        self._answers.clear()
        return data

    def farewell(self) -> bytes:
        try:
            return self._connection.send(CloseConnection(code=1000))
        except LocalProtocolError:
            # It was closed by the peer.
            return b""
