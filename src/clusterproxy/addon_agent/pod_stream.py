"""A stream to a port of a pod, through its cluster's apiserver: what ``kubectl port-forward`` makes.

SPDY/3.1 in messages of a WebSocket where the apiserver has that (by default since Kubernetes 1.31), which proxies and load
balancers understand; else the upgrade to SPDY that every release has. Both keep the two directions apart, which the older
WebSocket protocol (``v4.channel.k8s.io``) does not: there an end is the end of both.

Sources: k8s.io/client-go ``tools/portforward/portforward.go``, k8s.io/kubelet ``portforward/httpstream.go``.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.errors import ClusterProxyError, KubeUnavailable, ProtocolError
from clusterproxy.kube.resource import PODS

from .carriers import Bare, WebSocket
from .spdy import Data, Ended, Replied, Reset, SpdyClient
from .upgrade import RefusedError, open_transport, upgrade, upgrade_to_spdy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from clusterproxy.kube.client import KubeClient
    from clusterproxy.kube.session import Target
    from clusterproxy.transport.stream import Transport

    from .carriers import Carrier
    from .spdy import Event

_log = logging.getLogger("clusterproxy.addon_agent")

_PROTOCOL: Final = "portforward.k8s.io"
_TUNNELLED: Final = f"SPDY/3.1+{_PROTOCOL}"

_OPEN_S: Final = 30.0
# Silence so long is broken by a PING, and three times in a row without an answer is the end.
_SILENCE_S: Final = 15.0
_SILENCES: Final = 3

# What a kubelet says about a failure is a sentence.
_LONGEST_COMPLAINT: Final = 4096
_COMPLAINT_S: Final = 0.5

_PIECE: Final = 64 * 1024

# A peer that asks but does not read shall not fill our memory with answers.
_MOST_ANSWERS: Final = 256 * 1024


class PodStreamError(ClusterProxyError):
    """A port of a pod was not reached, or is reached no more."""


@attrs.frozen
class PodPort:
    """A port of a pod."""

    namespace: str
    pod: str
    port: int

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}:{self.port}"


@contextlib.asynccontextmanager
async def open_pod_stream(api: KubeClient, where: PodPort) -> AsyncGenerator[PodStream]:
    """Open a stream to a port of a pod, for as long as the block runs.

    Raises:
      PodStreamError: the apiserver or the pod's kubelet refuses, or nobody answers within 30 s. That nobody
        listens at the port is told here or, if the kubelet hears of it later, by ``trio.BrokenResourceError``.

    Cancellation: nothing is left.
    """
    stream = None
    with trio.move_on_after(_OPEN_S):
        try:
            stream = await _open(api, where)
        except (OSError, RefusedError, trio.BrokenResourceError, KubeUnavailable) as error:
            raise PodStreamError(f"{where}: {error}") from error
    if stream is None:
        raise PodStreamError(f"{where}: nobody has answered within {_OPEN_S:g} s")
    try:
        yield stream
    finally:
        stream.close()


async def _open(api: KubeClient, where: PodPort) -> PodStream:
    target = await api.target()
    try:
        return await _open_either(target, where)
    except RefusedError as error:
        if error.status != 401:
            raise
    # A certificate or a token may have been replaced.
    return await _open_either(await api.target(target), where)


async def _open_either(target: Target, where: PodPort) -> PodStream:
    path = target.path + PODS.path(where.namespace, where.pod, "portforward")
    try:
        with _closed_on_failure(await open_transport(target)) as transport:
            # The apiserver wants to know the port, although the streams say it.
            address = f"{path}?ports={where.port}"
            rest = await upgrade(transport, target, address, [_TUNNELLED])
            return await _start(PodStream(transport, WebSocket(), where), rest)
    except RefusedError as error:
        if error.status == 401:
            raise
        # Whatever its reason was: an old apiserver, no right to "get", something between that knows no WebSocket.
        _log.debug("%s: no WebSocket (%s), so SPDY", where, error)
    with _closed_on_failure(await open_transport(target)) as transport:
        rest = await upgrade_to_spdy(transport, target, path, _PROTOCOL)
        return await _start(PodStream(transport, Bare(), where), rest)


@contextlib.contextmanager
def _closed_on_failure(transport: Transport) -> Generator[Transport]:
    try:
        yield transport
    except BaseException:
        transport.close()
        raise


async def _start(stream: PodStream, rest: bytes) -> PodStream:
    await stream.start(rest)
    return stream


class PodStream(trio.abc.HalfCloseableStream):
    """A stream to a port of a pod; made by :func:`open_pod_stream`.

    It is read, PINGs are answered, and a dead apiserver is noticed, while somebody receives.

    Attributes:
      over: whether the kubelet has ended the forwarding, so that what is sent goes nowhere.
    """

    def __init__(self, transport: Transport, carrier: Carrier, where: PodPort) -> None:
        self.over = False
        self._transport = transport
        self._carrier = carrier
        self._where = where
        self._spdy = SpdyClient()
        # A header for both, as Go's client has it. Of the error stream nothing but its end is sent.
        headers = {"port": str(where.port), "requestid": "0"}
        self._errors = self._spdy.open_stream({**headers, "streamtype": "error"}, end=True)
        self._data = self._spdy.open_stream({**headers, "streamtype": "data"})
        self._open = {self._errors, self._data}
        self._awaited = set(self._open)
        self._received: deque[bytes] = deque()
        self._complaint = bytearray()
        self._writing = trio.Lock()
        self._sending = self._receiving = False
        self._end_sent = self._closed = False
        self._failure = self._reset = ""

    async def start(self, rest: bytes) -> None:
        """Wait until the kubelet has taken both streams; *rest* is what has come from it already.

        Raises:
          trio.BrokenResourceError: it has not.
        """
        await self._flush()
        if rest:
            self._take(rest)
        while self._awaited and not self._failure:
            await self._read()
        self._check()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; as :meth:`trio.abc.SendStream.send_all`."""
        with self._alone("_sending"):
            self._check()
            if self._end_sent:
                raise trio.ClosedResourceError("the end was sent")
            view = memoryview(data)
            for begin in range(0, len(view), _PIECE):
                self._spdy.send(self._data, view[begin : begin + _PIECE])
                await self._flush()
            await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the connection takes something."""
        with self._alone("_sending"):
            self._check()
            await self._flush()
            await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """Send the end, after which there may be an answer yet."""
        with self._alone("_sending"):
            self._check()
            if not self._end_sent:
                self._end_sent = True
                self._spdy.send(self._data, b"", end=True)
            await self._flush()
            await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has come, empty at the end.

        Raises:
          trio.BrokenResourceError: the connection has ended, the kubelet has said what is wrong, or nobody
            answers any more.
        """
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._alone("_receiving"):
            while not self._received and not self._failure and self._data in self._open:
                await self._read()
            if not self._received and not self._failure:
                # What is wrong, if something is, comes about now.
                with trio.move_on_after(_COMPLAINT_S):
                    while self._errors in self._open and not self._failure:
                        await self._read()
                if self._reset:
                    self._fail(self._reset)
            await trio.lowlevel.checkpoint()
        if not self._received:
            # Not before what had come until then was received.
            if self._closed or self._data in self._open or self._complaint or self._reset:
                self._check()
            return b""
        data = self._received.popleft()
        if max_bytes is not None and len(data) > max_bytes:
            self._received.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        return data

    async def aclose(self) -> None:
        """Close at once."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._received.clear()
        if not self._failure and not self._transport.blocked:
            self._spdy.go_away()
            with contextlib.suppress(trio.BrokenResourceError):
                self._transport.send([self._packed() + self._carrier.farewell()])
        # Whoever waits in another task is told by _check.
        self._failure = self._failure or "closed"
        self._transport.close()

    @contextlib.contextmanager
    def _alone(self, what: str) -> Generator[None]:
        if self._closed:
            self._check()
        if getattr(self, what):
            raise trio.BusyResourceError("another task is at it")
        setattr(self, what, True)
        try:
            yield
        finally:
            setattr(self, what, False)

    def _packed(self) -> bytes:
        data = self._spdy.data_to_send()
        return self._carrier.pack(data) if data else b""

    async def _flush(self) -> None:
        """Send what is to be sent, and wait until it is gone."""
        try:
            if data := self._packed():
                self._transport.send([data])
            if self._transport.blocked:
                async with self._writing:
                    await self._transport.drain()
        except trio.ClosedResourceError:
            self._check()
            raise  # pragma: no cover  who has closed it has said why

    async def _read(self) -> None:
        """Take what the peer has sent, and answer it if it wants that."""
        for silence in range(_SILENCES):
            with trio.move_on_after(_SILENCE_S):
                await self._receive()
                return
            if silence < _SILENCES - 1:
                self._spdy.ping()
                self._answer()
        self._fail(f"nothing has come for {_SILENCE_S * _SILENCES:g} s")

    async def _receive(self) -> None:
        # Taken before there is a checkpoint: a cancelled call loses nothing.
        if not self._transport.blocked:
            self._take(await self._received_now())
            return
        # An answer waits for room, and nobody may be sending.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain)
            self._take(await self._received_now())
            nursery.cancel_scope.cancel()

    async def _received_now(self) -> bytes | memoryview:
        try:
            return await self._transport.receive()
        except trio.BrokenResourceError as error:
            self._fail(str(error))
        except trio.ClosedResourceError:
            # By another task, whose reason counts.
            assert self._failure  # noqa: S101
        return b""

    async def _drain(self) -> None:
        async with self._writing:
            # Whoever reads or sends hears of it.
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._transport.drain()

    def _take(self, data: bytes | memoryview) -> None:
        if not data:
            self._fail("the connection to the apiserver has ended")
            return
        try:
            for piece in self._carrier.unpack(data):
                for event in self._spdy.receive(piece):
                    self._on_event(event)
        except ProtocolError as error:
            self._fail(str(error))
        if self._carrier.ended and (self._open or self._awaited):
            self._fail(self._carrier.ended)
        self._answer()

    def _answer(self) -> None:
        """Send what protocols want to be answered, without waiting."""
        data = self._packed() + self._carrier.answers()
        if not data or self._failure or self._transport.send([data]):
            return
        if self._transport.unsent > _MOST_ANSWERS:
            self._fail("it asks, and takes no answers")

    def _on_event(self, event: Event) -> None:
        match event:
            case Replied(stream):
                self._awaited.discard(stream)
            case Data(stream, data) if stream == self._data:
                self._received.append(data)
            case Data(stream, data) if stream == self._errors:
                self._complaint += data[: _LONGEST_COMPLAINT - len(self._complaint)]
            case Ended(stream):
                self._on_end(stream)
            case Reset(stream, status):
                self._on_end(stream, f"the kubelet has reset the stream (status {status})")
            case _:
                # GOAWAY: what is open goes on, and nothing else is to be opened.
                return

    def _on_end(self, stream: int, reset: str = "") -> None:
        if stream not in self._open:
            return
        self._open.discard(stream)
        self.over = not self._open
        self._reset = reset or self._reset
        # A reset of the one is explained by what the other has brought until its own end or reset.
        if self._errors not in self._open and (self._complaint or self._reset):
            self._fail(self._complaint.decode("utf-8", "replace").strip() or self._reset)

    def _fail(self, why: str) -> None:
        if not self._failure:
            _log.info("%s: %s", self._where, why)
            self._failure = why
            self._transport.close()

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("closed")
        if self._failure:
            raise trio.BrokenResourceError(self._failure)
