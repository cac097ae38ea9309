"""Names to addresses, in threads that dead names cannot use up.

``getaddrinfo`` blocks for as long as the name servers stay silent, much longer than a dial may
last, and nothing can stop it. So it runs in a pool of its own, the same name is looked up once
however many ask (as in Go's ``Resolver.lookupGroup``), one source gets a part of the pool only,
and the queue has an end.
"""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from clusterproxy.agent.dialtext import IP, errno_text, is_domain_name, join_host_port, parse_ip

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from outcome import Outcome

log = logging.getLogger("clusterproxy.agent")

_NO_SUCH_HOST: Final = "no such host"
# Go's word for a name server that answers with a failure (SERVFAIL) or not at all.
_MISBEHAVING: Final = "server misbehaving"
_NOT_FOUND: Final = frozenset(
    number
    for number in (
        socket.EAI_NONAME,
        getattr(socket, "EAI_NODATA", None),
        getattr(socket, "EAI_ADDRFAMILY", None),
    )
    if number is not None
)


class LookupFailed(Exception):
    """A name has no address. The text is that of Go's ``DNSError``."""

    def __init__(self, text: str, *, timed_out: bool = False) -> None:
        super().__init__(text)
        self.timed_out = timed_out


class GetAddrInfo(Protocol):
    """The part of ``socket.getaddrinfo`` that is used."""

    def __call__(
        self,
        host: bytes,
        port: None,
        /,
        *,
        type: int,  # noqa: A002 (its name)
    ) -> Sequence[tuple[object, object, object, object, tuple[object, ...]]]: ...


class StartThread(Protocol):
    """``trio.lowlevel.start_thread_soon``."""

    def __call__(
        self,
        fn: Callable[[], tuple[IP, ...]],
        deliver: Callable[[Outcome[tuple[IP, ...]]], object],
        name: str,
        /,
    ) -> None: ...


@attrs.define(eq=False)
class _Source:
    """What is looked up on behalf of one source."""

    running: int = 0
    # By name, oldest first.
    waiting: dict[str, _Flight] = attrs.field(factory=lambda: dict[str, _Flight]())


@attrs.define(eq=False)
class _Flight:
    """One look-up of one name and all who wait for it."""

    host: str
    source: Hashable
    done: trio.Event = attrs.field(factory=trio.Event)
    waiters: int = 0
    addresses: tuple[IP, ...] = ()
    failure: str = ""


class Resolver:
    """Looks names up, each in a thread, within limits.

    Threads that are left behind by their callers stay in the count until they end, which is what
    protects the process from them.
    """

    def __init__(
        self,
        *,
        max_threads: int = 64,
        max_threads_per_source: int = 16,
        max_waiting_per_source: int = 256,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
        start_thread: StartThread = trio.lowlevel.start_thread_soon,
        resolv_conf: str = "/etc/resolv.conf",
    ) -> None:
        self._max_threads = max_threads
        self._max_threads_per_source = max_threads_per_source
        self._max_waiting_per_source = max_waiting_per_source
        self._getaddrinfo = getaddrinfo
        self._start_thread = start_thread
        self._resolv_conf = resolv_conf
        self._threads = 0
        self._flights: dict[str, _Flight] = {}
        # The one whose turn is next comes first.
        self._sources: dict[Hashable, _Source] = {}

    @property
    def threads(self) -> int:
        """How many threads look names up, those included that nobody waits for any more."""
        return self._threads

    async def resolve(self, host: str, *, source: Hashable = None) -> tuple[IP, ...]:
        """Return the addresses of *host*, at least one, best first (RFC 6724).

        *source* is on whose behalf; without one it is the domain that the name is in, for names
        that never answer usually have their name server in common.

        Raises:
            LookupFailed: with Go's words.

        Cancellation: the thread goes on, its answer goes to whoever asks for that name meanwhile.
        """
        literal = parse_ip(host)
        if literal is not None:
            await trio.lowlevel.checkpoint()
            return (literal,)
        if not is_domain_name(host):
            await trio.lowlevel.checkpoint()
            raise LookupFailed(f"lookup {host}: {_NO_SUCH_HOST}")
        flight = self._flights.get(host)
        if flight is None:
            flight = self._enqueue(host, host.partition(".")[2] if source is None else source)
            self._start_waiting()
        flight.waiters += 1
        try:
            await flight.done.wait()
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                self._forget(flight)
        if flight.failure:
            raise LookupFailed(flight.failure)
        return flight.addresses

    def _enqueue(self, host: str, key: Hashable) -> _Flight:
        source = self._sources.setdefault(key, _Source())
        if len(source.waiting) >= self._max_waiting_per_source:
            raise LookupFailed(f"lookup {host}: too many lookups in progress")
        flight = _Flight(host, key)
        self._flights[host] = source.waiting[host] = flight
        return flight

    def _forget(self, flight: _Flight) -> None:
        """Drop a look-up that nobody waits for, unless it has a thread."""
        source = self._sources.get(flight.source)
        if source is not None and source.waiting.get(flight.host) is flight:
            del source.waiting[flight.host], self._flights[flight.host]
            self._drop_if_idle(flight.source)

    def _drop_if_idle(self, key: Hashable) -> None:
        source = self._sources[key]
        if not source.running and not source.waiting:
            del self._sources[key]

    def _start_waiting(self) -> None:
        for key, source in tuple(self._sources.items()):
            if self._threads >= self._max_threads:
                return
            if source.waiting and source.running < self._max_threads_per_source:
                self._sources[key] = self._sources.pop(key)
                flight = source.waiting.pop(next(iter(source.waiting)))
                source.running += 1
                self._threads += 1
                self._start(flight)

    def _start(self, flight: _Flight) -> None:
        token = trio.lowlevel.current_trio_token()

        def look_up() -> tuple[IP, ...]:
            return self._look_up(flight.host)

        def deliver(result: Outcome[tuple[IP, ...]]) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._finish, flight, result.unwrap)

        try:
            self._start_thread(look_up, deliver, f"lookup {flight.host}")
        except RuntimeError as error:  # the system has no thread for us
            failed = partial(_raise, LookupFailed(f"lookup {flight.host}: {error}"))
            token.run_sync_soon(self._finish, flight, failed)

    def _finish(self, flight: _Flight, result: Callable[[], tuple[IP, ...]]) -> None:
        self._threads -= 1
        self._sources[flight.source].running -= 1
        self._drop_if_idle(flight.source)
        del self._flights[flight.host]
        try:
            flight.addresses = result()
        except LookupFailed as error:
            flight.failure = str(error)
        except Exception:  # an error here would end the process
            log.exception("looking up %s failed", flight.host)
            flight.failure = f"lookup {flight.host}: {_MISBEHAVING}"
        flight.done.set()
        self._start_waiting()

    def _look_up(self, host: str) -> tuple[IP, ...]:
        """Ask the system (in a thread), always for both families: the dial has its own filter."""
        if _is_legacy_number(host):
            raise self._failed(host, _NO_SUCH_HOST)
        try:
            found = self._getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            missing = error.errno in _NOT_FOUND
            raise self._failed(host, _NO_SUCH_HOST if missing else _MISBEHAVING) from error
        except OSError as error:
            raise self._failed(host, errno_text(error.errno or 0)) from error
        parsed = (parse_ip(str(entry[4][0])) for entry in found)
        return tuple(dict.fromkeys(ip for ip in parsed if ip is not None))

    def _failed(self, host: str, reason: str) -> LookupFailed:
        server = first_nameserver(self._resolv_conf)
        return LookupFailed(f"lookup {host}{f' on {server}' if server else ''}: {reason}")


def _raise(error: LookupFailed) -> tuple[IP, ...]:
    raise error


def first_nameserver(resolv_conf: str) -> str | None:
    """Return ``address:53`` of the first name server, as Go names it in its errors."""
    try:
        lines = Path(resolv_conf).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        match line.split():
            case ["nameserver", address, *_] if parse_ip(address) is not None:
                return join_host_port(address, 53)
            case _:
                pass
    return None


def _is_legacy_number(host: str) -> bool:
    """Tell whether libc takes *host* for an IPv4 address though Go does not, such as ``0x7f.1``.

    A rule on names that is applied in front of us must not be passed by with such a spelling.
    """
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    return True
