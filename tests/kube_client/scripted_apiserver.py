"""An apiserver that does as it is told, in the same trio loop as the client's tasks (its threads are elsewhere)."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    Script = Callable[["Conversation"], Awaitable[None]]


@attrs.frozen
class Asked:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Conversation:
    """One request, and the way to answer it."""

    def __init__(self, stream: trio.abc.Stream, asked: Asked) -> None:
        self.stream = stream
        self.asked = asked

    async def send(
        self, status: int, body: bytes, *headers: str, length: int | None = None
    ) -> None:
        lines = [
            f"HTTP/1.1 {status} Whatever",
            f"Content-Length: {len(body) if length is None else length}",
            *headers,
        ]
        await self.stream.send_all("\r\n".join([*lines, "", ""]).encode() + body)

    async def begin_chunks(self) -> None:
        await self.stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.stream.send_all(b"%x\r\n%b\r\n" % (len(data), data))

    async def until_closed(self) -> None:
        """Wait until the client is gone."""
        try:
            while await self.stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            pass


class ScriptedApiserver:
    """Answers with the next script; the last one stays."""

    def __init__(self) -> None:
        self.scripts: deque[Script] = deque()
        self.asked: list[Asked] = []
        self.connections = 0
        self.open = 0
        self.port = 0
        #: Set when the next request (or connection, if the script is one for those) has come.
        self.reached = trio.Event()
        #: Run instead of TLS and HTTP.
        self.on_accept: Callable[[trio.SocketStream], Awaitable[None]] | None = None
        self.context: ssl.SSLContext | None = None

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.open += 1
        try:
            async with stream:
                if self.on_accept is not None:
                    self.reached.set()
                    await self.on_accept(stream)
                elif self.context is None:
                    await self._converse(stream)
                else:
                    tls = trio.SSLStream(
                        stream, self.context, server_side=True, https_compatible=True
                    )
                    await self._converse(tls)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.open -= 1

    async def _converse(self, stream: trio.abc.Stream) -> None:
        rest = b""
        while True:
            while b"\r\n\r\n" not in rest:
                data = await stream.receive_some(65536)
                if not data:
                    return
                rest += data
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            method, target, _ = first.split(" ")
            headers = {
                name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
            }
            length = int(headers.get("content-length", "0"))
            while len(rest) < length:
                rest += await stream.receive_some(65536)
            asked = Asked(method, target, headers, rest[:length])
            rest = rest[length:]
            self.asked.append(asked)
            self.reached.set()
            script = self.scripts.popleft() if len(self.scripts) > 1 else self.scripts[0]
            await script(Conversation(stream, asked))


def answer(status: int, body: object = None, *headers: str) -> Script:
    """Return the script that answers so, for ever."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def script(talk: Conversation) -> None:
        await talk.send(status, data, *headers)

    return script


def status_object(code: int, reason: str, message: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


def refusal(code: int, reason: str, message: str, *headers: str) -> Script:
    return answer(code, status_object(code, reason, message), *headers)


@asynccontextmanager
async def scripted_apiserver(
    *scripts: Script, context: ssl.SSLContext | None = None
) -> AsyncGenerator[ScriptedApiserver, None]:
    server = ScriptedApiserver()
    server.scripts.extend(scripts)
    server.context = context
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server.port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        yield server
        nursery.cancel_scope.cancel()


def write_kubeconfig(
    path: Path,
    server: str,
    *,
    user: dict[str, Any] | None = None,
    cluster: dict[str, Any] | None = None,
) -> str:
    """Write a kubeconfig, and return its path."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return str(path)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what sockets or threads do, which nobody tells of."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def kube_threads() -> list[str]:
    """Return the names of the threads in which requests run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kube ")]


def sockets() -> int:
    """Return how many sockets this process has."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return count
