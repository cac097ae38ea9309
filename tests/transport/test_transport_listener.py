from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from transport_pairs import (
    NAME,
    client_tls,
    no_leak,
    server_tls,
    socket_pair,
)

from clusterproxy.errors import ConfigError
from clusterproxy.transport.listener import Handshakes, accept_forever, listen_tcp, listen_unix
from clusterproxy.transport.stream import Transport

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from trio.testing import MockClock


def connect(address: object, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family)
    sock.connect(address)  # type: ignore[arg-type]
    return sock


# -- TCP -------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("127.0.0.1", socket.AF_INET),
        pytest.param("::1", socket.AF_INET6, marks=needs_ipv6),
    ],
)
def test_listen_on_an_address(host: str, family: socket.AddressFamily) -> None:
    with listen_tcp(host, 0, "server-port") as listener:
        assert listener.family == family
        assert not listener.getblocking()
        with connect(listener.getsockname(), family):
            listener.accept()[0].close()


def test_listen_on_a_name() -> None:
    with listen_tcp("localhost", 0, "server-port") as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")


@needs_ipv6
def test_a_name_with_addresses_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Go's net.Listen: kubectl's port-forward and the like know 127.0.0.1."""

    def getaddrinfo(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with listen_tcp("localhost", 0, "admin-port") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@needs_ipv6
def test_no_host_is_all_addresses() -> None:
    with listen_tcp("", 0, "server-port") as listener:
        port = listener.getsockname()[1]
        for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
            with connect((host, port), family):
                listener.accept()[0].close()


def test_no_host_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = socket.socket

    def without_ipv6(family: int, *args: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return whole(family, *args)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with listen_tcp("", 0, "server-port") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("host", ["", "127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_a_port_that_is_taken(host: str) -> None:
    with no_leak(), listen_tcp(host, 0, "first") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listen_tcp(host, port, "health-port")
    shown = f"[{host}]" if ":" in host else host
    assert caught.value.field == "health-port"
    assert caught.value.message == (
        f"--health-port: cannot listen on tcp {shown}:{port}: Address already in use"
    )


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("a" * 64 + ".example", 0, "too long"),
        ("", 65536, "port must be 0-65535"),
        ("192.0.2.1", 0, "Cannot assign requested address"),
    ],
)
def test_addresses_that_cannot_be_used(host: str, port: int, reason: str) -> None:
    with no_leak(), pytest.raises(ConfigError) as caught:
        listen_tcp(host, port, "server-port")
    assert caught.value.field == "server-port"
    assert f"--server-port: cannot listen on tcp {host}:{port}: " in caught.value.message
    assert reason in caught.value.message


def test_a_name_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ConfigError) as caught:
        listen_tcp("nowhere.example", 80, "bind-address")
    assert caught.value.message == (
        "--bind-address: cannot listen on tcp nowhere.example:80: Name or service not known"
    )


# -- Unix ------------------------------------------------------------------------------------------


def test_a_unix_socket_is_for_its_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    before = os.umask(0o022)
    try:
        with listen_unix(str(path), delete_existing=True) as listener:
            assert not listener.getblocking()
            # As upstream's umask of 0007 gives it.
            assert stat.S_IMODE(path.stat().st_mode) == 0o770
            with connect(str(path), socket.AF_UNIX):
                listener.accept()[0].close()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_an_existing_socket_is_replaced_if_that_is_wanted(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with no_leak():
        listen_unix(path, delete_existing=False).close()
        with pytest.raises(ConfigError) as caught:
            listen_unix(path, delete_existing=False)
        assert caught.value.field == "uds-name"
        assert caught.value.message == (
            f"--uds-name: cannot listen on unix {path}: Address already in use"
        )
        with listen_unix(path, delete_existing=True), connect(path, socket.AF_UNIX):
            pass


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "Is a directory"),
        ("missing/socket", "No such file or directory"),
        ("x" * 200, "AF_UNIX path too long"),
    ],
)
def test_paths_that_cannot_be_used(tmp_path: Path, name: str, reason: str) -> None:
    with no_leak(), pytest.raises(ConfigError, match=reason) as caught:
        listen_unix(str(tmp_path / name), delete_existing=True)
    assert caught.value.field == "uds-name"


# -- accepting -------------------------------------------------------------------------------------


class FailingListener(socket.socket):
    """Fails so often before it accepts."""

    failures: list[int]

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            number = self.failures.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


def failing_listener(path: Path, *failures: int) -> FailingListener:
    listener = FailingListener(fileno=listen_unix(str(path), delete_existing=True).detach())
    listener.setblocking(False)
    listener.failures = list(failures)
    return listener


class Accepting:
    """A listener whose connections are kept open until they are told to end."""

    def __init__(self, path: Path, listener: socket.socket | None = None) -> None:
        self.path = str(path)
        self.listener = listener or listen_unix(self.path, delete_existing=True)
        self.served: list[socket.socket] = []
        self.some = trio.Event()
        self.end = trio.Event()

    async def serve(self, sock: socket.socket) -> None:
        self.served.append(sock)
        self.some.set()
        await self.end.wait()

    async def run(
        self,
        connections: trio.Nursery,
        task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await accept_forever(self.listener, self.serve, connections)

    def connect(self) -> socket.socket:
        return connect(self.path, socket.AF_UNIX)


async def test_what_was_accepted_goes_on_when_accepting_ends(tmp_path: Path) -> None:
    with no_leak():
        accepting = Accepting(tmp_path / "socket")
        async with trio.open_nursery() as connections:
            scope = await connections.start(accepting.run, connections)
            # More than one batch.
            clients = [accepting.connect() for _ in range(50)]
            await trio.testing.wait_all_tasks_blocked()
            assert len(accepting.served) == 50
            assert not any(sock.getblocking() for sock in accepting.served)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert accepting.listener.fileno() == -1
            for client in clients:
                client.send(b"x")
            assert {sock.recv(1) for sock in accepting.served} == {b"x"}
            accepting.end.set()
        # However serving ends, the socket is closed.
        assert {sock.fileno() for sock in accepting.served} == {-1}
        for client in clients:
            client.close()


async def test_without_descriptors_it_waits_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    path = tmp_path / "socket"
    listener = failing_listener(path, errno.EMFILE, errno.ENFILE, errno.EMFILE, errno.ECONNABORTED)
    accepting = Accepting(path, listener)
    start = trio.current_time()
    async with trio.open_nursery() as connections:
        scope = await connections.start(accepting.run, connections)
        first = accepting.connect()
        await trio.testing.wait_all_tasks_blocked()
        # One line however long it lasts, and at once.
        assert [record.getMessage() for record in caplog.records] == [
            "cannot accept: Too many open files"
        ]
        await accepting.some.wait()
        # Of these only a lack of descriptors is waited for.
        assert trio.current_time() - start == pytest.approx(0.3)
        # The next time is told again.
        listener.failures.append(errno.ENOBUFS)
        second = accepting.connect()
        await trio.sleep(1)
        assert len(accepting.served) == 2
        scope.cancel()
        accepting.end.set()
    first.close()
    second.close()
    assert [record.getMessage() for record in caplog.records] == [
        "cannot accept: Too many open files",
        "cannot accept: No buffer space available",
    ]


async def test_a_bug_ends_one_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accepting = Accepting(tmp_path / "socket")
    served: list[socket.socket] = []

    async def serve(sock: socket.socket) -> None:
        served.append(sock)
        raise ValueError(len(served))

    accepting.serve = serve  # type: ignore[method-assign]
    async with trio.open_nursery() as connections:
        scope = await connections.start(accepting.run, connections)
        for _ in range(2):
            with accepting.connect():
                await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
    assert [sock.fileno() for sock in served] == [-1, -1]
    assert [record.getMessage() for record in caplog.records] == [
        "bug while serving a connection"
    ] * 2


# -- handshakes ------------------------------------------------------------------------------------


class Handshaking:
    """Handshakes of a server, and what they tell."""

    def __init__(self, limit: int = 10) -> None:
        self.counts: list[int] = []
        self.failures: list[str] = []
        self.results: list[Transport | None] = []
        self.handshakes = Handshakes(limit, self.counts.append, self.failures.append)
        self.context: ssl.SSLContext | None = server_tls()

    async def shake(self, sock: socket.socket) -> None:
        self.results.append(await self.handshakes.shake(sock, self.context))


async def shake_client(sock: socket.socket) -> Transport:
    client = Transport(sock, client_tls(), server_hostname=NAME)
    await client.handshake()
    return client


async def test_a_handshake() -> None:
    shaking = Handshaking()
    a, b = socket_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shaking.shake, a)
        client = await shake_client(b)
    (transport,) = shaking.results
    assert transport is not None
    transport.send([b"hello"])
    assert bytes(await client.receive()) == b"hello"
    assert (shaking.counts, shaking.failures) == ([1, 0], [])
    transport.close()
    client.close()


async def test_there_is_none_without_tls() -> None:
    shaking = Handshaking()
    shaking.context = None
    a, b = socket_pair()
    await shaking.shake(a)
    (transport,) = shaking.results
    assert transport is not None
    assert (transport.tls, shaking.counts, shaking.failures) == (None, [], [])
    transport.close()
    b.close()


def speak_plain(sock: socket.socket) -> None:
    sock.send(b"GET / HTTP/1.1\r\n\r\n")


def say_nothing(_sock: socket.socket) -> None:
    pass


@pytest.mark.parametrize(
    ("client", "reason", "log", "seconds"),
    [
        (socket.socket.close, "closed", [], 0),
        (speak_plain, "tls", ["TLS handshake failed: HTTP_REQUEST"], 0),
        (say_nothing, "timeout", [], 20),
    ],
)
async def test_handshakes_that_fail(
    client: Callable[[socket.socket], None],
    reason: str,
    log: list[str],
    seconds: float,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    caplog.set_level(logging.INFO)
    start = trio.current_time()
    shaking = Handshaking()
    with no_leak():
        a, b = socket_pair()
        client(b)
        await shaking.shake(a)
        b.close()
    assert shaking.results == [None]
    assert (shaking.counts, shaking.failures) == ([1, 0], [reason])
    assert trio.current_time() - start == pytest.approx(seconds)
    assert [record.getMessage() for record in caplog.records] == log


async def test_others_wait_for_a_place_in_their_order(autojump_clock: MockClock) -> None:
    """A burst of honest clients loses none."""
    with no_leak():
        shaking = Handshaking(limit=2)
        pairs = [socket_pair() for _ in range(5)]
        clients: list[Transport] = []
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for a, _ in pairs:
                nursery.start_soon(shaking.shake, a)
                await trio.testing.wait_all_tasks_blocked()
            assert shaking.counts == [1, 2]
            # In flight are the first two; one that is done makes room for the third, and so on.
            for n in (1, 2, 0, 3, 4):
                await trio.sleep(0.1)
                clients.append(await shake_client(pairs[n][1]))
        assert trio.current_time() - start == pytest.approx(0.5)
        assert max(shaking.counts) == 2
        assert shaking.counts[-1] == 0
        assert shaking.failures == []
        for end in (*shaking.results, *clients):
            assert end is not None
            end.close()


async def test_the_oldest_is_displaced_after_a_second(autojump_clock: MockClock) -> None:
    with no_leak():
        shaking = Handshaking(limit=2)
        pairs = [socket_pair() for _ in range(4)]
        async with trio.open_nursery() as nursery:
            for a, _ in pairs[:2]:
                nursery.start_soon(shaking.shake, a)
                await trio.testing.wait_all_tasks_blocked()
                await trio.sleep(0.4)
            # At 0.8 s: the first has 0.2 s left, the second 0.6 s.
            for a, _ in pairs[2:]:
                nursery.start_soon(shaking.shake, a)
                await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.19)
            assert shaking.failures == []
            await trio.sleep(0.02)
            assert shaking.failures == ["displaced"]
            assert pairs[0][1].recv(1) == b""
            with pytest.raises(BlockingIOError):
                pairs[1][1].recv(1)
            await trio.sleep(0.38)
            assert shaking.failures == ["displaced"]
            await trio.sleep(0.02)
            assert shaking.failures == ["displaced", "displaced"]
            assert pairs[1][1].recv(1) == b""
            assert max(shaking.counts) == 2
            # Those that waited are served.
            clients = [await shake_client(b) for _, b in pairs[2:]]
        assert shaking.counts[-1] == 0
        assert shaking.results[:2] == [None, None]
        for end in (*shaking.results[2:], *clients):
            assert end is not None
            end.close()
        for _, b in pairs[:2]:
            b.close()


async def test_one_that_has_had_its_second_makes_room_at_once(autojump_clock: MockClock) -> None:
    shaking = Handshaking(limit=1)
    (a, mute), (other, b) = socket_pair(), socket_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shaking.shake, a)
        await trio.sleep(5)
        start = trio.current_time()
        nursery.start_soon(shaking.shake, other)
        client = await shake_client(b)
        assert trio.current_time() == start
    assert shaking.failures == ["displaced"]
    # Which of the two tasks that wake together ends first is chance.
    assert None in shaking.results
    (transport,) = [result for result in shaking.results if result is not None]
    for end in (transport, client, mute):
        end.close()


async def test_one_that_is_displaced_as_it_ends(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has all it needs, but has not run again when its place is given away."""

    class Late(Transport):
        async def handshake(self) -> None:
            await super().handshake()
            with trio.CancelScope(shield=True):
                await trio.sleep(3)

    monkeypatch.setattr("clusterproxy.transport.listener.Transport", Late)
    with no_leak():
        shaking = Handshaking(limit=1)
        (a, b), (other, mute) = socket_pair(), socket_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shaking.shake, a)
            client = await shake_client(b)
            with trio.move_on_after(2):
                await shaking.shake(other)
        # The second one was displaced by nobody: it was cancelled.
        assert shaking.results == [None]
        assert shaking.failures == ["displaced"]
        assert mute.recv(1) == b""
        client.close()
        mute.close()


async def test_cancellation_while_it_waits_for_a_place(autojump_clock: MockClock) -> None:
    with no_leak():
        shaking = Handshaking(limit=1)
        (a, mute), (other, b) = socket_pair(), socket_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shaking.shake, a)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.5):
                await shaking.shake(other)
            assert b.recv(1) == b""
            # The one in flight keeps its place.
            client = await shake_client(mute)
        assert (shaking.counts, shaking.failures) == ([1, 0], [])
        (transport,) = shaking.results
        assert transport is not None
        for end in (transport, client, b):
            end.close()


async def test_cancellation_closes_the_socket(autojump_clock: MockClock) -> None:
    with no_leak():
        shaking = Handshaking()
        a, b = socket_pair()
        with trio.move_on_after(1):
            await shaking.shake(a)
        assert b.recv(1) == b""
        assert (shaking.results, shaking.counts, shaking.failures) == ([], [1, 0], [])
        b.close()
