from __future__ import annotations

import contextlib
import errno
import os
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from clusterproxy.agent import dial as dial_module
from clusterproxy.agent.dial import EndpointDialError, Target, dial, dial_addresses
from clusterproxy.agent.dialtext import parse_ip
from clusterproxy.agent.resolver import Resolver
from clusterproxy.errors import DialFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio.testing import MockClock

V4 = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"]
V6 = ["2001:db8::1", "2001:db8::2"]


def target(address: str, port: int = 80) -> Target:
    return Target(ip=parse_ip(address), port=port)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resolver_of(*answers: str) -> Resolver:
    """A resolver whose every name has these addresses."""
    return Resolver(
        getaddrinfo=lambda _host, _port, /, *, type: [  # noqa: A006
            (0, type, 0, "", (answer, 0)) for answer in answers
        ]
    )


def dead_resolver() -> Resolver:
    """A resolver that never answers."""
    return Resolver(start_thread=lambda _fn, _deliver, _name, /: None)


class Network:
    """Plays the addresses: after so many seconds each one connects, or fails."""

    def __init__(self) -> None:
        self.plan: dict[str, tuple[float, str | None]] = {}
        self.tried: list[tuple[float, str]] = []
        self.made: list[socket.socket] = []
        # If there is one, all addresses connect when it is set.
        self.gate: trio.Event | None = None
        self._start = trio.current_time()

    async def dial_single(self, network: str, to: Target, deadline: float) -> socket.socket:
        self.tried.append((round(trio.current_time() - self._start, 3), str(to.ip)))
        after, failure = self.plan.get(str(to.ip), (float("inf"), None))
        with trio.move_on_at(deadline) as scope:
            if self.gate is not None:
                await self.gate.wait()
            else:
                await trio.sleep(after)
        if scope.cancelled_caught:
            raise EndpointDialError(f"dial {network} {to}: i/o timeout", timed_out=True)
        if failure is not None:
            raise EndpointDialError(f"dial {network} {to}: {failure}")
        sock = socket.socket()
        self.made.append(sock)
        return sock

    async def dial(
        self, addresses: Sequence[str], network: str = "tcp", timeout_s: float = 5
    ) -> socket.socket:
        return await dial_addresses(
            network, [target(one) for one in addresses], deadline=self._start + timeout_s
        )

    def elapsed(self) -> float:
        return round(trio.current_time() - self._start, 3)


@pytest.fixture
async def net(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(dial_module, "_dial_single", network.dial_single)
    return network


async def _set_after(
    seconds: float, event: trio.Event, scope: trio.CancelScope | None = None
) -> None:
    await trio.sleep(seconds)
    event.set()
    if scope is not None:
        scope.cancel()


async def failure_of(net: Network, addresses: Sequence[str], network: str = "tcp") -> str:
    with pytest.raises(EndpointDialError) as caught:
        await net.dial(addresses, network)
    assert all(sock.fileno() < 0 for sock in net.made)
    return caught.value.text


class TestAddresses:
    async def test_the_first_that_answers(self, net: Network, autojump_clock: MockClock) -> None:
        net.plan = {V4[0]: (0.1, "refused"), V4[1]: (0.1, None)}
        with await net.dial(V4) as sock:
            assert sock is net.made[0]
        assert net.tried == [(0, V4[0]), (0.1, V4[1])]

    async def test_the_first_error_is_told(self, net: Network, autojump_clock: MockClock) -> None:
        net.plan = {address: (0.1, f"no {address}") for address in V4}
        assert await failure_of(net, V4) == f"dial tcp {V4[0]}:80: no {V4[0]}"

    async def test_time_is_shared(self, net: Network, autojump_clock: MockClock) -> None:
        assert await failure_of(net, V4[:2]) == f"dial tcp {V4[0]}:80: i/o timeout"
        assert net.tried == [(0, V4[0]), (2.5, V4[1])]
        assert net.elapsed() == 5

    async def test_but_two_seconds_are_the_least(
        self, net: Network, autojump_clock: MockClock
    ) -> None:
        # Which address the error names is what Go 1.26 was seen to do.
        assert await failure_of(net, V4) == f"dial tcp {V4[3]}:80: i/o timeout"
        assert net.tried == [(0, V4[0]), (2, V4[1]), (4, V4[2])]
        assert net.elapsed() == 5

    async def test_the_other_family_after_300_ms(
        self, net: Network, autojump_clock: MockClock
    ) -> None:
        net.plan = {V4[0]: (0.2, None)}
        with await net.dial([V6[0], V6[1], V4[0]]):
            assert net.tried == [(0, V6[0]), (0.3, V4[0])]
        assert net.elapsed() == 0.5

    async def test_the_other_family_at_once_after_a_failure(
        self, net: Network, autojump_clock: MockClock
    ) -> None:
        net.plan = {V6[0]: (0.1, "refused"), V6[1]: (0.1, "refused"), V4[0]: (0.1, None)}
        with await net.dial([V6[0], V4[0], V6[1]]):
            assert net.tried == [(0, V6[0]), (0.1, V6[1]), (0.2, V4[0])]
        assert net.elapsed() == 0.3

    async def test_the_first_family_in_time(self, net: Network, autojump_clock: MockClock) -> None:
        net.plan = {V4[0]: (0.2, None)}
        with await net.dial([V4[0], V6[0]]):
            assert net.tried == [(0, V4[0])]
        assert net.elapsed() == 0.2

    async def test_the_first_family_may_still_win(
        self, net: Network, autojump_clock: MockClock
    ) -> None:
        net.plan = {V6[0]: (0.4, None), V4[0]: (0.2, None)}
        with await net.dial([V6[0], V4[0]]) as sock:
            assert sock is net.made[0]
        assert net.elapsed() == 0.4

    async def test_the_error_of_the_first_family_is_told(
        self, net: Network, autojump_clock: MockClock
    ) -> None:
        net.plan = {V6[0]: (1, "first"), V4[0]: (0.1, "second")}
        assert await failure_of(net, [V6[0], V4[0]]) == "dial tcp [2001:db8::1]:80: first"
        assert net.elapsed() == 1

    async def test_both_in_the_same_instant(
        self, net: Network, autojump_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        net.gate = trio.Event()
        nursery.start_soon(_set_after, 1, net.gate)
        sock = await net.dial([V6[0], V4[0]])
        assert len(net.made) == 2
        assert [one for one in net.made if one.fileno() >= 0] == [sock]
        sock.close()

    async def test_cancelled_in_the_instant_of_success(
        self, net: Network, autojump_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        net.gate = trio.Event()
        with trio.CancelScope() as scope:
            nursery.start_soon(_set_after, 0.1, net.gate, scope)
            await net.dial([V6[0], V4[0]])
        assert scope.cancelled_caught
        assert len(net.made) == 1
        assert all(sock.fileno() < 0 for sock in net.made)

    async def test_one_family_at_a_time_where_no_race_is_wanted(
        self, net: Network, autojump_clock: MockClock
    ) -> None:
        net.plan = {V6[0]: (1, "a"), V4[0]: (1, "b")}
        assert await failure_of(net, [V6[0], V4[0]], "udp") == "dial udp [2001:db8::1]:80: a"
        assert net.tried == [(0, V6[0]), (1, V4[0])]

    async def test_none(self, net: Network, autojump_clock: MockClock) -> None:
        assert await failure_of(net, []) == "dial tcp: missing address"


@pytest.mark.parametrize(
    ("protocol", "address", "text"),
    [
        ("tcp", "", "dial tcp: missing address"),
        ("tcp", "127.0.0.1", "dial tcp: address 127.0.0.1: missing port in address"),
        ("tcp", "::1:80", "dial tcp: address ::1:80: too many colons in address"),
        ("tcp", "127.0.0.1:99999", "dial tcp: address 99999: invalid port"),
        ("tcp6", "[::1]:nosuchport", "dial tcp6: lookup tcp/nosuchport: unknown port"),
        ("tcp", "a..b:80", "dial tcp: lookup a..b: no such host"),
        ("tcp6", "127.0.0.1:1", "dial tcp6: address 127.0.0.1: no suitable address found"),
        ("udp4", "[::1]:1", "dial udp4: address ::1: no suitable address found"),
        ("tcp6", "v4only:1", "dial tcp6: address v4only: no suitable address found"),
        ("foo", "127.0.0.1:1", "dial foo: unknown network foo"),
        ("foo", "", "dial foo: unknown network foo"),
        ("", "127.0.0.1:1", "dial: unknown network "),
        ("TCP", "127.0.0.1:1", "dial TCP: unknown network TCP"),
        ("unix", "/run/x", "dial unix: unknown network unix"),
        ("ip:6", "127.0.0.1", "dial ip:6: unknown network ip:6"),
    ],
)
async def test_what_is_not_dialled(protocol: str, address: str, text: str) -> None:
    with pytest.raises(EndpointDialError) as caught:
        await dial(protocol, address, resolver=resolver_of("127.0.0.1"))
    assert (caught.value.text, caught.value.timed_out) == (text, False)
    assert str(caught.value) == text
    assert caught.value.reason is DialFailure.UNKNOWN


async def test_the_look_up_counts_too(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    with pytest.raises(EndpointDialError) as caught:
        await dial("tcp", "x.example:80", resolver=dead_resolver())
    assert caught.value.text == "dial tcp: lookup x.example: i/o timeout"
    assert caught.value.timed_out
    assert caught.value.reason is DialFailure.TIMEOUT
    assert trio.current_time() - start == 5


class FakeSocket:
    """A socket whose system calls end as the test says."""

    made: list[FakeSocket]
    ends: Iterator[int | None]

    def __init__(self, family: int, kind: int) -> None:
        end = next(self.ends)
        if end is None:
            raise OSError(errno.EMFILE, "Too many open files")
        self.family, self.type, self.end, self.closed = family, kind, end, False
        self.made.append(self)

    def setblocking(self, _flag: object) -> None: ...

    def setsockopt(self, *_args: int) -> None: ...

    def connect_ex(self, address: tuple[object, ...]) -> int:
        self.address = address
        return max(0, self.end)

    def getsockname(self) -> str:
        return "here"

    def getpeername(self) -> str:
        if self.end == GONE:
            raise OSError(errno.ENOTCONN, "not connected")
        return "here" if self.end == ITSELF else "there"

    def close(self) -> None:
        self.closed = True


ITSELF, GONE = -1, -2


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakeSocket]]:
    def ends(*ends: int | None) -> list[FakeSocket]:
        FakeSocket.made = []
        FakeSocket.ends = iter(ends)
        return FakeSocket.made

    # trio has the same module.
    names = SimpleNamespace(**(vars(socket) | {"socket": FakeSocket}))
    monkeypatch.setattr(dial_module, "socket", names)
    return ends


@pytest.mark.parametrize("unfit", [ITSELF, GONE, errno.EADDRNOTAVAIL])
async def test_another_port_when_the_kernel_chose_badly(
    fake: Callable[..., list[FakeSocket]], unfit: int
) -> None:
    made = fake(unfit, unfit, 0)
    sock = await dial("tcp", "127.0.0.1:40000", resolver=dead_resolver())
    assert [one.closed for one in made] == [True, True, False]
    assert made[2] is sock  # type: ignore[comparison-overlap]


async def test_in_the_end_the_port_is_taken_as_it_is(
    fake: Callable[..., list[FakeSocket]],
) -> None:
    made = fake(ITSELF, ITSELF, ITSELF)
    await dial("tcp", "127.0.0.1:40000", resolver=dead_resolver())
    assert [one.closed for one in made] == [True, True, False]


@pytest.mark.parametrize(
    ("protocol", "address", "ends", "text", "timed_out"),
    [
        (
            "tcp",
            "192.0.2.1:80",
            [errno.EADDRNOTAVAIL] * 3,
            "192.0.2.1:80: connect: cannot assign requested address",
            False,
        ),
        ("tcp", "192.0.2.1:80", [None], "192.0.2.1:80: socket: too many open files", False),
        (
            "udp",
            "192.0.2.1:80",
            [errno.EADDRNOTAVAIL],
            "192.0.2.1:80: connect: cannot assign requested address",
            False,
        ),
        (
            "tcp",
            "[2001:db8::1]:80",
            [errno.EHOSTUNREACH],
            "[2001:db8::1]:80: connect: no route to host",
            False,
        ),
        (
            "tcp",
            "[fe80::1%nosuch]:http",
            [errno.EINVAL],
            "[fe80::1%nosuch]:80: connect: invalid argument",
            False,
        ),
        ("tcp", ":80", [errno.ECONNREFUSED], ":80: connect: connection refused", False),
        (
            "tcp4",
            "192.0.2.1:80",
            [errno.ETIMEDOUT],
            "192.0.2.1:80: connect: connection timed out",
            True,
        ),
    ],
)
async def test_errors_of_the_system(
    fake: Callable[..., list[FakeSocket]],
    protocol: str,
    address: str,
    ends: list[int | None],
    text: str,
    *,
    timed_out: bool,
) -> None:
    made = fake(*ends)
    with pytest.raises(EndpointDialError) as caught:
        await dial(protocol, address, resolver=dead_resolver())
    assert (caught.value.text, caught.value.timed_out) == (f"dial {protocol} {text}", timed_out)
    assert all(one.closed for one in made)
    assert len(made) == len([end for end in ends if end is not None])


@pytest.mark.parametrize(
    ("protocol", "address", "family", "connected"),
    [
        ("tcp", "192.0.2.1:80", socket.AF_INET, ("192.0.2.1", 80)),
        ("tcp", "[::ffff:192.0.2.1]:80", socket.AF_INET, ("192.0.2.1", 80)),
        ("tcp", ":80", socket.AF_INET, ("0.0.0.0", 80)),
        ("tcp6", ":80", socket.AF_INET6, ("::", 80, 0, 0)),
        ("udp", "[2001:DB8::1]:80", socket.AF_INET6, ("2001:db8::1", 80, 0, 0)),
        ("tcp", "[fe80::1%lo]:80", socket.AF_INET6, ("fe80::1", 80, 0, 1)),
        ("tcp", "[fe80::1%7]:80", socket.AF_INET6, ("fe80::1", 80, 0, 7)),
        ("tcp", "[fe80::1%no\0such]:80", socket.AF_INET6, ("fe80::1", 80, 0, 0)),
    ],
)
async def test_what_is_connected_to(
    fake: Callable[..., list[FakeSocket]],
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    address: str,
    family: int,
    connected: tuple[object, ...],
) -> None:
    def if_nametoindex(name: str) -> int:
        if "\0" in name:
            raise ValueError("embedded null character")
        if name != "lo":
            raise OSError(errno.ENODEV, "no interface with this name")
        return 1

    made = fake(0)
    monkeypatch.setattr("clusterproxy.agent.dial.socket.if_nametoindex", if_nametoindex)
    await dial(protocol, address, resolver=dead_resolver())
    assert (made[0].family, made[0].address) == (family, connected)


async def test_half_of_ipv6(fake: Callable[..., list[FakeSocket]]) -> None:
    """golang.org/issue/18806: where :: cannot be connected to, 0.0.0.0 is meant."""
    made = fake(errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, 0)
    await dial("tcp", "[::]:80", resolver=dead_resolver())
    assert made[-1].address == ("0.0.0.0", 80)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.programs
class TestLoopback:
    async def test_connected(self, listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        before = open_files()
        sock = await dial("tcp", f"127.0.0.1:{port}", resolver=dead_resolver())
        peer, _ = listener.accept()
        with sock, peer:
            assert not sock.getblocking()
            assert sock.getpeername() == ("127.0.0.1", port)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
            sock.send(b"hello")
            assert peer.recv(5) == b"hello"
        assert open_files() == before

    async def test_a_name(self, listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        with await dial("tcp4", f"localhost:{port}", resolver=Resolver()) as sock:
            assert sock.getpeername() == ("127.0.0.1", port)

    async def test_datagrams(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{server.getsockname()[1]}"
            with await dial("udp", address, resolver=dead_resolver()) as sock:
                assert sock.type == socket.SOCK_DGRAM
                assert not sock.getblocking()
                sock.send(b"hello")
                assert server.recv(100) == b"hello"

    async def test_refused(self) -> None:
        before = open_files()
        with socket.socket() as placeholder:
            placeholder.bind(("127.0.0.1", 0))
            port = placeholder.getsockname()[1]
            with pytest.raises(EndpointDialError) as caught:
                await dial("tcp", f"127.0.0.1:{port}", resolver=dead_resolver())
        assert caught.value.text == f"dial tcp 127.0.0.1:{port}: connect: connection refused"
        assert not caught.value.timed_out
        assert open_files() == before

    async def test_timeout(self, black_hole: str) -> None:
        before = open_files()
        with pytest.raises(EndpointDialError) as caught:
            await dial("tcp", black_hole, timeout_s=0.05, resolver=dead_resolver())
        assert caught.value.text == f"dial tcp {black_hole}: i/o timeout"
        assert caught.value.timed_out
        assert open_files() == before

    async def test_cancelled(self, black_hole: str, nursery: trio.Nursery) -> None:
        before = open_files()
        async with trio.open_nursery() as inner:
            for _ in range(10):
                inner.start_soon(_dial, black_hole)
            await wait_all_tasks_blocked()
            assert open_files() == before + 10
            inner.cancel_scope.cancel()
        assert open_files() == before


async def _dial(address: str) -> None:
    (await dial("tcp", address, resolver=dead_resolver())).close()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """An address that never answers: its listener's queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        host, port = server.getsockname()
        with contextlib.ExitStack() as stack:
            for _ in range(16):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex((host, port))
            yield f"{host}:{port}"
