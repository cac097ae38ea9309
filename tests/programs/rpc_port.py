"""A server for grpc-go's interop client and for h2spec: our RPC layer on plain-text HTTP/2, on loopback.

``python tests/programs/rpc_port.py --port 28200`` serves ``grpc.testing.TestService`` until it is told
to end; with port 0 it takes a free one. It prints the port when it listens. With ``--http`` it is no
gRPC server but one that greets whoever asks, for those cases of h2spec that need a page.
Source: grpc/proto/grpc/testing/messages.proto, grpc/doc/interop-test-descriptions.md
"""

from __future__ import annotations

import argparse
import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from clusterproxy.errors import RPCError
from clusterproxy.grpc import PREFIX_SIZE, Metadata, Status, prefix
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import Flow
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.keepalive import keep_alive
from clusterproxy.rpc.server import Opener, RpcServer, ServerCall
from clusterproxy.transport.listener import accept_forever, listen_tcp
from clusterproxy.transport.stream import Transport, tune

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable

    from clusterproxy.http2.stream import Header, Stream

_Field = descriptor_pb2.FieldDescriptorProto
_INT32, _BYTES, _STRING = _Field.TYPE_INT32, _Field.TYPE_BYTES, _Field.TYPE_STRING

# (name, number, type or message, repeated)
_MESSAGES: Final[dict[str, list[tuple[str, int, Any, bool]]]] = {
    "Empty": [],
    "Payload": [("type", 1, _INT32, False), ("body", 2, _BYTES, False)],
    "EchoStatus": [("code", 1, _INT32, False), ("message", 2, _STRING, False)],
    "SimpleRequest": [
        ("response_size", 2, _INT32, False),
        ("payload", 3, "Payload", False),
        ("response_status", 7, "EchoStatus", False),
    ],
    "SimpleResponse": [("payload", 1, "Payload", False)],
    "StreamingInputCallRequest": [("payload", 1, "Payload", False)],
    "StreamingInputCallResponse": [("aggregated_payload_size", 1, _INT32, False)],
    "ResponseParameters": [("size", 1, _INT32, False), ("interval_us", 2, _INT32, False)],
    "StreamingOutputCallRequest": [
        ("response_parameters", 2, "ResponseParameters", True),
        ("payload", 3, "Payload", False),
        ("response_status", 7, "EchoStatus", False),
    ],
    "StreamingOutputCallResponse": [("payload", 1, "Payload", False)],
}


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="messages.proto", package="grpc.testing", syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            added = message.field.add(name=field, number=number)
            added.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            if isinstance(kind, str):
                added.type, added.type_name = _Field.TYPE_MESSAGE, f".grpc.testing.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"grpc.testing.{name}"))
        for name in _MESSAGES
    }


_pb = _build()

_ECHO_INITIAL: Final = "x-grpc-test-echo-initial"
_ECHO_TRAILING: Final = "x-grpc-test-echo-trailing-bin"

# Bytes of answers that may wait for the client.
_HIGH_WATER: Final = 256 * 1024


class Conversation:
    """A call as an async handler likes it: messages to iterate over, and sending that waits.

    What is not consumed is held against the window of its stream.
    """

    def __init__(self, call: ServerCall) -> None:
        self.call = call
        self._flow = Flow(self._drained)
        self._room = trio.lowlevel.ParkingLot()
        self._put, self._taken = trio.open_memory_channel[bytes](math.inf)
        call.receive = self._receive
        call.on_half_close = self._put.close

    def _drained(self, _size: int) -> None:
        self._room.unpark_all()

    def _receive(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        self.call.stream.hold(size)
        self._put.send_nowait(b"".join((head[PREFIX_SIZE:], *rest)))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for message in self._taken:
            self.call.stream.release(PREFIX_SIZE + len(message))
            yield message

    async def one(self) -> bytes:
        """Return the only message that the client sends.

        Raises:
          RPCError: it sent none.
        """
        async for message in self:
            return message
        raise RPCError(Status.INTERNAL, "no request message")

    async def send(self, message: bytes) -> None:
        """Send a message; wait while too much of them waits."""
        framed = prefix(len(message)) + message
        self.call.forward(self._flow, len(framed), framed)
        while self._flow.queued > _HIGH_WATER:
            await self._room.park()


def _echo_metadata(call: ServerCall) -> Metadata:
    """Send back what was asked to be echoed; return the trailers to send."""
    if _ECHO_INITIAL in call.metadata:
        call.send_initial_metadata({_ECHO_INITIAL: call.metadata[_ECHO_INITIAL][:1]})
    if _ECHO_TRAILING in call.metadata:
        return {_ECHO_TRAILING: call.metadata[_ECHO_TRAILING][:1]}
    return {}


def _echo_status(request: Any) -> None:
    if request.response_status.code:
        raise RPCError(request.response_status.code, request.response_status.message)


async def _empty_call(talk: Conversation) -> None:
    _pb["Empty"].FromString(await talk.one())
    await talk.send(b"")


async def _unary_call(talk: Conversation) -> None:
    request = _pb["SimpleRequest"].FromString(await talk.one())
    trailers = _echo_metadata(talk.call)
    _echo_status(request)
    response = _pb["SimpleResponse"]()
    response.payload.body = bytes(request.response_size)
    await talk.send(response.SerializeToString())
    talk.call.finish(trailers=trailers)


async def _stream_output(talk: Conversation, request: Any) -> None:
    for wanted in request.response_parameters:
        await trio.sleep(wanted.interval_us / 1e6)
        response = _pb["StreamingOutputCallResponse"]()
        response.payload.body = bytes(wanted.size)
        await talk.send(response.SerializeToString())


async def _streaming_output_call(talk: Conversation) -> None:
    await _stream_output(talk, _pb["StreamingOutputCallRequest"].FromString(await talk.one()))


async def _streaming_input_call(talk: Conversation) -> None:
    response = _pb["StreamingInputCallResponse"]()
    async for message in talk:
        request = _pb["StreamingInputCallRequest"].FromString(message)
        response.aggregated_payload_size += len(request.payload.body)
    await talk.send(response.SerializeToString())


async def _full_duplex_call(talk: Conversation) -> None:
    trailers = _echo_metadata(talk.call)
    async for message in talk:
        request = _pb["StreamingOutputCallRequest"].FromString(message)
        _echo_status(request)
        await _stream_output(talk, request)
    talk.call.finish(trailers=trailers)


def _opener(handler: Callable[[Conversation], Awaitable[None]]) -> Opener:
    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        talk = Conversation(call)
        return lambda: handler(talk)

    return open_call


SERVICE: Final = "/grpc.testing.TestService"
METHODS: Final = {
    f"{SERVICE}/EmptyCall": _opener(_empty_call),
    f"{SERVICE}/UnaryCall": _opener(_unary_call),
    f"{SERVICE}/StreamingOutputCall": _opener(_streaming_output_call),
    f"{SERVICE}/StreamingInputCall": _opener(_streaming_input_call),
    f"{SERVICE}/FullDuplexCall": _opener(_full_duplex_call),
}


class Greeter:
    """Answers a request with a page when it is complete (an ``http2.stream.StreamHandler``)."""

    def __init__(self, connection: Http2Connection, stream: Stream) -> None:
        self._connection = connection
        self._stream = stream

    def on_headers(self, headers: list[Header]) -> None:
        pass

    def on_data(self, view: memoryview) -> bool:
        return False

    def settle(self) -> None:
        pass

    def on_end(self) -> None:
        self._connection.start_soon(self._greet)

    def on_reset(self, code: int, reason: str) -> None:
        pass

    async def _greet(self) -> None:
        # Long enough for requests to be open together.
        await trio.sleep(0.05)
        self._connection.send_headers(self._stream, [(b":status", b"200")])
        self._stream.send(Flow(), 5, b"hello")
        self._stream.when_sent(lambda: self._connection.end_stream(self._stream))


async def greet(transport: Transport) -> str:
    """Serve one connection until it ends; return why it did."""
    connection = Http2Connection(
        transport,
        client=False,
        # h2spec takes the largest frame to be the smallest one that may be allowed.
        limits=Http2Limits(max_streams=100, max_frame_size=16384),
        on_request=lambda stream, _headers: Greeter(connection, stream),
    )
    await connection.run()
    return connection.lost or ""


async def serve(port: int, *, http: bool) -> None:
    server = RpcServer(METHODS, limits=Http2Limits(max_streams=100))
    serve_connection = greet if http else server.serve

    async def serve_one(sock: socket.socket) -> None:
        tune(sock, user_timeout=True)
        reason = await serve_connection(Transport(sock))
        logging.info("connection ended: %s", reason)

    listener = listen_tcp("127.0.0.1", port, "port")
    print(listener.getsockname()[1], flush=True)  # noqa: T201
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_alive, server.connections, 60.0)
        nursery.start_soon(accept_forever, listener, serve_one, nursery)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--http", action="store_true", help="greet instead of serving gRPC")
    parser.add_argument("--verbose", action="store_true", help="say why connections ended")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING)
    trio.run(partial(serve, arguments.port, http=arguments.http))


if __name__ == "__main__":
    main()
