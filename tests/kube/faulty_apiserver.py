"""An apiserver that does not work well: it stands before the real one, and lets what it is told to go wrong."""

from __future__ import annotations

import json
import random
import socket
import ssl
import struct
from collections import Counter
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import attrs
import h11
import trio
import trustme

from kube.background import Background

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kube.control_plane import ControlPlane

    Plan = Callable[["Asked"], "Fault | Refusal | None"]
    Stream = trio.SSLStream[trio.SocketStream]

_LOOPBACK: Final = "127.0.0.1"
_CHUNK: Final = 65536
_SLOW_S: Final = 0.3
# A connection that is gone, of either side.
_GONE: Final = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    h11.RemoteProtocolError,
)


@attrs.frozen
class Asked:
    """A request: the place in the order of all, what is asked, and of whom."""

    number: int
    method: str
    path: str
    watch: bool

    @property
    def writes(self) -> bool:
        return self.method != "GET"

    @property
    def lists(self) -> bool:
        """Whether it is for a collection: its path ends in the name of a kind, ``/api/v1/namespaces/NAME/KIND``."""
        parts = self.path.strip("/").split("/")
        after = parts[2:] if parts[0] == "api" else parts[3:]
        return not self.writes and (
            len(after) == 1 or (len(after) == 3 and after[0] == "namespaces")
        )

    @property
    def of_reflector(self) -> bool:
        return self.watch or self.lists


class Fault(Enum):
    """What goes wrong with a connection."""

    RESET_BEFORE = "the connection is reset, and nothing was done"
    RESET_WITHIN = "it was done, and the connection is reset within the answer"
    LOST = "it was done, and the connection is reset instead of an answer"
    LATE = "it was done, and there is no answer until the client gives up"
    SLOW_EVENTS = "what a watch tells comes late"
    TWICE = "a watch tells all twice"
    CUT = "a watch ends in the middle of its first event"


@attrs.frozen
class Refusal:
    """An answer without anything done."""

    status: int
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> bytes:
        if not self.reason:
            # Of something that stands before the apiserver.
            return b"<html>Bad Gateway</html>"
        status = {
            "apiVersion": "v1",
            "kind": "Status",
            "status": "Failure",
            "code": self.status,
            "reason": self.reason,
            "message": f"the test says {self.reason}",
        }
        return json.dumps(status).encode()


CONFLICT: Final = Refusal(409, "Conflict")
EXPIRED: Final = Refusal(410, "Expired")
BUSY: Final = Refusal(429, "TooManyRequests", (("Retry-After", "1"),))
BROKEN: Final = Refusal(500, "InternalError")
OVERLOADED: Final = Refusal(503, "ServiceUnavailable")
BAD_GATEWAY: Final = Refusal(502)
UNKNOWN_IDENTITY: Final = Refusal(401, "Unauthorized")

_OF_ALL: Final = (
    BUSY,
    BROKEN,
    OVERLOADED,
    BAD_GATEWAY,
    UNKNOWN_IDENTITY,
    Fault.RESET_BEFORE,
    Fault.RESET_WITHIN,
    Fault.LOST,
)
_OF_WATCHES: Final = (EXPIRED, BROKEN, BUSY, Fault.CUT, Fault.SLOW_EVENTS, Fault.TWICE)


def at_random(seed: int, share: float) -> Plan:
    """Return a plan by which this share of the requests goes wrong, but no request more than twice in a row."""
    chance = random.Random(seed)  # noqa: S311
    in_a_row: Counter[tuple[str, str, bool]] = Counter()

    def plan(asked: Asked) -> Fault | Refusal | None:
        same = (asked.method, asked.path, asked.watch)
        if in_a_row[same] == 2 or chance.random() >= share:
            in_a_row[same] = 0
            return None
        in_a_row[same] += 1
        if asked.watch:
            return chance.choice(_OF_WATCHES)
        own: tuple[Fault | Refusal, ...] = ()
        if asked.writes:
            own = (CONFLICT, CONFLICT, Fault.LOST, Fault.LOST)
        elif asked.lists:
            own = (EXPIRED,)
        return chance.choice((*_OF_ALL, *own))

    return plan


class FaultyApiserver(Background):
    """Passes requests on to the apiserver of *plane*, with the identity of whoever asks (by its token).

    Attributes:
      plan: what goes wrong with a request; may be set at any time. To begin with, nothing does.
      asked: all requests.
      faults: what went wrong, and how often.
      watched: the paths of collections of which there is a watch now.
    """

    def __init__(self, plane: ControlPlane) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self.asked: list[Asked] = []
        self.faults: Counter[Fault | Refusal] = Counter()
        self.watched: Counter[str] = Counter()
        self._upstream = urlsplit(plane.server)
        self._trust = ssl.create_default_context(cafile=plane.ca)
        self._authority = trustme.CA()
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._authority.issue_cert(_LOOPBACK).configure_cert(self._tls)
        self._port = 0

    def kubeconfig(self, original: Path) -> Path:
        """Write a kubeconfig with the same identity for this apiserver, beside *original*; return its path."""
        config: Any = json.loads(original.read_text())
        cluster = config["clusters"][0]["cluster"]
        cluster["server"] = f"https://{_LOOPBACK}:{self._port}"
        del cluster["certificate-authority-data"]
        authority = original.with_suffix(".faulty.crt")
        self._authority.cert_pem.write_to_path(authority)
        cluster["certificate-authority"] = str(authority)
        path = original.with_suffix(".faulty.kubeconfig")
        path.write_text(json.dumps(config))
        return path

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve for ever."""
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(
                partial(trio.serve_tcp, host=_LOOPBACK), self._serve, 0
            )
            self._port = listener.socket.getsockname()[1]
            task_status.started()

    async def _serve(self, transport: trio.SocketStream) -> None:
        client = trio.SSLStream(transport, self._tls, server_side=True, https_compatible=True)
        async with client:
            try:
                await _Relay(self, client).run()
            except _GONE:
                pass
            except _Reset:
                option = struct.pack("ii", 1, 0)
                transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
                await trio.aclose_forcefully(client)

    def note(self, method: str, target: str) -> tuple[Asked, Fault | Refusal | None]:
        """Note a request, and return what is to go wrong with it."""
        parts = urlsplit(target)
        watch = "watch" in parse_qs(parts.query)
        asked = Asked(len(self.asked), method, parts.path, watch)
        self.asked.append(asked)
        fault = None if self.plan is None else self.plan(asked)
        if fault is not None:
            self.faults[fault] += 1
        return asked, fault

    async def connect(self) -> Stream:
        """Connect to the real one."""
        host, port = str(self._upstream.hostname), self._upstream.port or 443
        stream = await trio.open_tcp_stream(host, port)
        return trio.SSLStream(stream, self._trust, server_hostname=host, https_compatible=True)


class _Reset(Exception):
    """The client's connection is to be reset."""


class _Side:
    """A connection with HTTP on it, of which we are one end."""

    def __init__(self, stream: Stream, role: type[h11.CLIENT | h11.SERVER]) -> None:
        self.stream = stream
        self.http = h11.Connection(role)

    async def next(self) -> object:
        while True:
            event = self.http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self.http.receive_data(bytes(await self.stream.receive_some(_CHUNK)))

    async def body(self) -> bytes:
        """Read on to the end of a message."""
        body = b""
        while not isinstance(event := await self.next(), h11.EndOfMessage):
            assert isinstance(event, h11.Data)
            body += event.data
        return body

    async def send(self, *events: h11.Event) -> None:
        for event in events:
            if data := self.http.send(event):
                await self.stream.send_all(data)

    def again(self) -> bool:
        """Whether another request and answer may follow, and be ready for them."""
        if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
            return False
        self.http.start_next_cycle()
        return True


class _Relay:
    """A client's connection, and the one that it has to the real apiserver by it."""

    def __init__(self, faulty: FaultyApiserver, client: Stream) -> None:
        self._faulty = faulty
        self._client = _Side(client, h11.SERVER)
        self._upstream: _Side | None = None

    async def run(self) -> None:
        try:
            while isinstance(request := await self._client.next(), h11.Request):
                body = await self._client.body()
                target = request.target.decode()
                asked, fault = self._faulty.note(request.method.decode(), target)
                if isinstance(fault, Refusal):
                    await self._refuse(fault)
                elif fault is Fault.RESET_BEFORE:
                    raise _Reset
                elif asked.watch:
                    self._faulty.watched[asked.path] += 1
                    try:
                        await self._watch(request, fault)
                    finally:
                        self._faulty.watched[asked.path] -= 1
                    return
                else:
                    await self._answer(request, body, fault)
                if not self._client.again():
                    return
        finally:
            if self._upstream is not None:
                await trio.aclose_forcefully(self._upstream.stream)

    async def _refuse(self, refusal: Refusal) -> None:
        body = refusal.body()
        kind = "application/json" if refusal.reason else "text/html"
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *refusal.headers]
        await self._client.send(
            h11.Response(status_code=refusal.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )

    async def _ask(self, request: h11.Request, body: bytes) -> tuple[_Side, h11.Response]:
        """Have the real apiserver begin its answer."""
        if self._upstream is None or not self._upstream.again():
            if self._upstream is not None:
                await trio.aclose_forcefully(self._upstream.stream)
            self._upstream = _Side(await self._faulty.connect(), h11.CLIENT)
        upstream = self._upstream
        await upstream.send(request, h11.Data(data=body), h11.EndOfMessage())
        response = await upstream.next()
        assert isinstance(response, h11.Response), response
        return upstream, response

    async def _answer(self, request: h11.Request, body: bytes, fault: Fault | None) -> None:
        upstream, response = await self._ask(request, body)
        answer = await upstream.body()
        if fault is Fault.LOST:
            raise _Reset
        if fault is Fault.LATE:
            await self._until_closed()
            raise _Reset
        await self._client.send(response)
        if fault is Fault.RESET_WITHIN:
            await self._client.send(h11.Data(data=answer[: len(answer) // 2]))
            raise _Reset
        await self._client.send(h11.Data(data=answer), h11.EndOfMessage())

    async def _watch(self, request: h11.Request, fault: Fault | None) -> None:
        upstream, response = await self._ask(request, b"")
        await self._client.send(response)
        reset = False
        async with trio.open_nursery() as nursery:

            async def leave() -> None:
                await self._until_closed()
                nursery.cancel_scope.cancel()

            nursery.start_soon(leave)
            try:
                reset = await self._tell(upstream, fault)
            except _GONE:
                reset = True
            nursery.cancel_scope.cancel()
        if reset:
            raise _Reset

    async def _tell(self, upstream: _Side, fault: Fault | None) -> bool:
        """Pass on what a watch tells; return whether the connection is to be reset then."""
        while isinstance(event := await upstream.next(), h11.Data):
            data = bytes(event.data)
            if fault is Fault.SLOW_EVENTS:
                await trio.sleep(_SLOW_S)
            if fault is Fault.CUT:
                await self._client.send(h11.Data(data=data[: len(data) // 2]))
                return True
            await self._client.send(h11.Data(data=data))
            if fault is Fault.TWICE and data.startswith(b"{") and data.endswith(b"\n"):
                await self._client.send(h11.Data(data=data))
        await self._client.send(h11.EndOfMessage())
        return False

    async def _until_closed(self) -> None:
        try:
            while await self._client.stream.receive_some(_CHUNK):
                pass
        except _GONE:
            pass
