"""Names of services that nobody answers for keep nobody else's waiting."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio

from clusterproxy.errors import ConfigError
from clusterproxy.service_proxy.config import ServiceProxyConfig
from clusterproxy.service_proxy.names import Names
from clusterproxy.service_proxy.program import run_service_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 443))]


class Silence:
    """Nobody answers for names of the namespace ``evil`` until the end.

    Attributes:
      asked: the names that are asked for.
      full: set when so many are as may at one time.
    """

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.full = trio.Event()
        self.end = threading.Event()
        self._token = trio.lowlevel.current_trio_token()

    def getaddrinfo(self, host: bytes | str, *_: object) -> Any:
        if isinstance(host, str):
            # Trio tries whether it is an address.
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        if host.endswith(b".evil.svc"):
            self.asked.append(host)
            if len(self.asked) == 32:
                self._token.run_sync_soon(self.full.set)
            self.end.wait(60)
        return FOUND


@pytest.fixture
async def silence(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Silence]:
    found = Silence()
    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    yield found
    found.end.set()


@pytest.mark.parametrize("name", ["kubernetes.default.svc", "issuer.example"])
async def test_the_apiserver_is_found_all_the_same(silence: Silence, name: str) -> None:
    trio.socket.set_custom_hostname_resolver(Names())
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(trio.socket.getaddrinfo, f"s{number}.evil.svc", 443)
        with trio.fail_after(20):
            await silence.full.wait()
            assert await trio.socket.getaddrinfo(name, 443) == FOUND
        assert len(silence.asked) == 32
        nursery.cancel_scope.cancel()


async def test_names_of_services_are_found(silence: Silence) -> None:
    trio.socket.set_custom_hostname_resolver(Names())
    assert await trio.socket.getaddrinfo("web.shop.svc", 443) == FOUND
    assert not silence.asked


async def test_the_other_way_round() -> None:
    found = await Names().getnameinfo(
        ("127.0.0.1", 80), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    )
    assert found == ("127.0.0.1", "80")


async def test_the_program_looks_names_up_so() -> None:
    config = ServiceProxyConfig(kubeconfig="/nowhere")
    with pytest.raises(ConfigError, match="/nowhere"):
        await run_service_proxy(config)
    assert isinstance(trio.socket.set_custom_hostname_resolver(None), Names)
