"""An apiserver that is played, with pods whose ports can be forwarded, for what a real one cannot be made to do."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any

import h11
import trio
from spdy_peer import Frame, SpdyPeer
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    Script = Callable[["PodSide"], Awaitable[None]]

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class PodSide:
    """A kubelet's end of a connection that was upgraded.

    Attributes:
      heard: WebSocket's own events that have come.
      data, errors: numbers of the streams.
    """

    def __init__(
        self, stream: trio.SocketStream, websocket: bool, rest: bytes, target: str
    ) -> None:
        self.stream = stream
        self.target = target
        self.peer = SpdyPeer()
        self.websocket = Connection(ConnectionType.SERVER) if websocket else None
        self.heard: list[Event] = []
        self.data = self.errors = 0
        self.opened: list[Frame] = []
        self._rest = rest
        self._frames: list[Frame] = []

    async def accept(self) -> None:
        """Take both streams."""
        for _ in range(2):
            frame = await self.next()
            assert frame.kind == 1
            self.opened.append(frame)
            if frame.headers["streamtype"] == "error":
                self.errors = frame.stream
            else:
                self.data = frame.stream
            await self.send(self.peer.reply(frame.stream, {}))

    async def begin(self) -> None:
        """Take both streams, and wait until the client says something: so it has opened them for sure."""
        await self.accept()
        await self.next()

    async def next(self) -> Frame:
        """Return the next frame; ends with EndOfChannel."""
        while not self._frames:
            data = self._rest or await self.stream.receive_some()
            self._rest = b""
            if not data:
                raise trio.EndOfChannel
            if self.websocket is None:
                self._frames += self.peer.read(bytes(data))
                continue
            self.websocket.receive_data(bytes(data))
            for event in self.websocket.events():
                if isinstance(event, BytesMessage):
                    self._frames += self.peer.read(bytes(event.data))
                else:
                    self.heard.append(event)
        return self._frames.pop(0)

    async def read_data(self) -> bytes:
        """Return all that is sent on the data stream until its end."""
        received = b""
        while True:
            frame = await self.next()
            if (frame.kind, frame.stream) == (0, self.data):
                received += frame.data
                if frame.end:
                    return received

    async def until_closed(self) -> None:
        with contextlib.suppress(trio.EndOfChannel, trio.BrokenResourceError):
            while True:
                await self.next()

    async def send(self, data: bytes) -> None:
        if self.websocket is not None and self.websocket.state is ConnectionState.OPEN:
            data = self.websocket.send(BytesMessage(data=data))
        await self.stream.send_all(data)

    async def close_websocket(self, code: int = 1000) -> None:
        assert self.websocket is not None
        await self.stream.send_all(self.websocket.send(CloseConnection(code=code)))

    async def say(self, data: bytes, *, end: bool = False) -> None:
        await self.send(self.peer.data(self.data, data, end=end))

    async def complain(self, text: bytes, *, end: bool = True) -> None:
        await self.send(self.peer.data(self.errors, text, end=end))


async def echo(pod: PodSide) -> None:
    """Say what is said, and "bye" at the end."""
    await pod.accept()
    while True:
        frame = await pod.next()
        if (frame.kind, frame.stream) == (0, pod.data):
            if frame.data:
                await pod.say(frame.data)
            if frame.end:
                break
    await pod.say(b"bye", end=True)
    await pod.complain(b"")
    await pod.until_closed()


class PlayedHub:
    """Answers requests for pods and leases, and upgrades.

    Attributes:
      refusals: of upgrades, by ``websocket`` and ``spdy``: status and body.
      script: what a kubelet does with a connection.
      asked: methods, targets and headers of all requests.
      open: connections that are upgraded now.
      headers: put over those of the answer to an upgrade.
    """

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.leases: dict[str, dict[str, Any]] = {}
        self.refusals: dict[str, tuple[int, bytes]] = {}
        self.script: Script = echo
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.open = 0
        self.headers: dict[str, str] = {}
        #: Said instead of HTTP.
        self.raw: bytes | None = None
        #: Said right behind the answer to an upgrade.
        self.at_once = b""
        #: And then waited.
        self.stays = False
        #: The only credentials that it takes.
        self.known = ""
        self.port = 0

    def kubeconfig(self, directory: Path, name: str = "kubeconfig", **cluster: str) -> str:
        path = directory / name
        config = {
            "current-context": "a",
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "clusters": [
                {"name": "a", "cluster": {"server": f"http://127.0.0.1:{self.port}", **cluster}}
            ],
            "users": [{"name": "a", "user": {"token": "secret"}}],
        }
        path.write_text(json.dumps(config))
        return str(path)

    def add_pod(
        self, name: str, *, phase: str = "Running", ready: bool = True, **meta: Any
    ) -> None:
        condition = {"type": "Ready", "status": str(ready)}
        self.pods.append(
            {
                "metadata": {"name": name, **meta},
                "status": {"phase": phase, "conditions": [condition]},
            }
        )

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError, trio.EndOfChannel):
                await self._converse(stream)

    async def _converse(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            body = b""
            head: h11.Request | None = None
            while True:
                event = connection.next_event()
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some()))
                elif event is h11.PAUSED:
                    break
                else:
                    return
            assert head is not None
            headers = {key.decode(): value.decode() for key, value in head.headers}
            method, target = head.method.decode(), head.target.decode()
            self.asked.append((method, target, headers))
            if self.raw is not None:
                await stream.send_all(self.raw)
                if self.stays:
                    await stream.receive_some()
                return
            if "portforward" in target:
                way = "spdy" if headers["upgrade"] == "SPDY/3.1" else "websocket"
                refusal = self.refusals.get(way)
                if self.known not in ("", headers.get("authorization")):
                    refusal = 401, b"who?"
                if refusal is None:
                    await self._upgrade(stream, connection, way, target, headers)
                    return
                status, answer = refusal
                # What it says without a length ends with the connection.
                await stream.send_all(b"HTTP/1.1 %d Whatever\r\n\r\n" % status + answer)
                return
            status, answer = self._answer(method, target, body)
            response = h11.Response(
                status_code=status, headers=[("Content-Length", str(len(answer)))]
            )
            data = connection.send(response) or b""
            data += connection.send(h11.Data(data=answer)) or b""
            data += connection.send(h11.EndOfMessage()) or b""
            await stream.send_all(data)
            connection.start_next_cycle()

    def _answer(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        if "/leases" not in target:
            return 200, json.dumps({"items": self.pods, "metadata": {}}).encode()
        namespace = target.split("/")[5]
        if method == "POST":
            self.leases[namespace] = json.loads(body)
            return 201, body
        if namespace not in self.leases:
            return 404, b'{"kind": "Status", "reason": "NotFound", "message": "no lease"}'
        self.leases[namespace]["spec"] |= json.loads(body)["spec"]
        return 200, json.dumps(self.leases[namespace]).encode()

    async def _upgrade(
        self,
        stream: trio.SocketStream,
        connection: h11.Connection,
        way: str,
        target: str,
        headers: dict[str, str],
    ) -> None:
        answer = {"Connection": "Upgrade", "Upgrade": headers["upgrade"]}
        if way == "websocket":
            key = headers["sec-websocket-key"].encode()
            digest = hashlib.sha1(key + _GUID, usedforsecurity=False).digest()
            answer |= {
                "Sec-WebSocket-Accept": base64.b64encode(digest).decode(),
                "Sec-WebSocket-Protocol": headers["sec-websocket-protocol"],
            }
        answer |= self.headers
        switch = h11.InformationalResponse(
            status_code=101, headers=list(answer.items()), reason=b"Switching Protocols"
        )
        await stream.send_all((connection.send(switch) or b"") + self.at_once)
        rest = bytes(connection.trailing_data[0])
        self.open += 1
        try:
            await self.script(PodSide(stream, way == "websocket", rest, target))
        finally:
            self.open -= 1


@contextlib.asynccontextmanager
async def played_hub() -> AsyncGenerator[PlayedHub]:
    """Have one listen."""
    hub = PlayedHub()
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        hub.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, hub.serve, [listener])
        yield hub
        nursery.cancel_scope.cancel()


async def until(probe: Callable[[], object]) -> None:
    """Wait until it is so, for a few seconds."""
    with trio.fail_after(10):
        while not probe():  # noqa: ASYNC110
            await trio.sleep(0.01)
