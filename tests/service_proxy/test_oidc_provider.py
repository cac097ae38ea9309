"""Row H13: by which authorities an issuer is believed, from a ConfigMap that comes, changes and goes."""

from __future__ import annotations

import contextlib
import ssl
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme
from oidc_world import CLIENT, ISSUER, NOW, Documents, claims, signed
from played_config_maps import ConfigMaps
from trio.testing import wait_all_tasks_blocked

from clusterproxy.errors import Forbidden
from clusterproxy.service_proxy import oidc
from clusterproxy.service_proxy.authentication import NobodyKnows
from clusterproxy.service_proxy.https_get import FetchError
from clusterproxy.service_proxy.identity import Identity, Refused
from clusterproxy.service_proxy.oidc import CaConfigMap, OidcProvider
from clusterproxy.service_proxy.oidc_claims import OidcConfig

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock

CONFIG = OidcConfig(issuer_url=ISSUER, client_id=CLIENT, username_prefix="-")
RIGHT, WRONG = trustme.CA(), trustme.CA()


def pem(*authorities: trustme.CA) -> str:
    return "".join(authority.cert_pem.bytes().decode() for authority in authorities)


class World:
    """A provider whose documents are had by whoever trusts the right authority."""

    def __init__(self, *, with_config_map: bool = True) -> None:
        self.config_maps = ConfigMaps()
        self.documents = Documents()
        ca = CaConfigMap(self.config_maps.api(), "ns", "oidc-ca") if with_config_map else None
        self.provider = OidcProvider(CONFIG, ca, clock=lambda: NOW)

    async def fetch(self, url: str, context: ssl.SSLContext) -> dict[str, Any]:
        right = ssl.PEM_cert_to_DER_cert(pem(RIGHT))
        if right not in context.get_ca_certs(binary_form=True):
            raise FetchError("certificate signed by unknown authority")
        return await self.documents.fetch(url)

    async def settled(self) -> None:
        await wait_all_tasks_blocked(0.01)

    async def name(self) -> str:
        found = await self.provider.identify(signed(claims()), "")
        assert found is not None
        return found.username

    async def trouble(self) -> str:
        with pytest.raises(NobodyKnows) as caught:
            await self.provider.identify(signed(claims()), "")
        return str(caught.value)


@contextlib.asynccontextmanager
async def running(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[None]:
    monkeypatch.setattr(oidc, "fetch_object", world.fetch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.provider.run)
        await world.settled()
        yield
        nursery.cancel_scope.cancel()


async def test_it_is_there(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.config_maps.put("oidc-ca", data={"ca.crt": pem(RIGHT)})
    async with running(world, monkeypatch):
        assert await world.name() == "test-user"
        assert world.config_maps.asked == [("ns", "metadata.name=oidc-ca")]
    assert await world.trouble()


async def test_it_comes_later(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row A23."""
    world = World()
    assert await world.trouble() == "oidc authenticator is not initialized"
    async with running(world, monkeypatch):
        assert await world.trouble() == "OIDC CA ConfigMap ns/oidc-ca is not available"
        # Nobody else's token is looked at, either.
        with pytest.raises(NobodyKnows):
            await world.provider.identify("garbage", "")
        world.config_maps.put("oidc-ca", data={"ca.crt": pem(RIGHT)})
        await world.settled()
        assert await world.name() == "test-user"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "does not contain ca.crt"),
        ({"data": {"other": "x"}}, "does not contain ca.crt"),
        ({"data": {"ca.crt": None}}, "does not contain ca.crt"),
        ({"data": {"ca.crt": ""}}, "has an empty ca.crt entry"),
        ({"data": {"ca.crt": "", "x": "y"}, "binaryData": {"ca.crt": "eA=="}}, "has an empty ca.crt entry"),
        ({"data": {"ca.crt": "garbage"}}, "has a ca.crt entry that cannot be used: no certificate"),
        ({"data": {"ca.crt": pem(RIGHT)[:-30]}}, "cannot be used: a certificate in it has no end"),
        ({"data": {"ca.crt": pem(WRONG) + pem(RIGHT)[:-30]}}, "a certificate in it has no end"),
        ({"data": {"ca.crt": pem(RIGHT).replace("MII", "AAA", 1)}}, "certificate 1 of 1 cannot be parsed"),
        ({"data": {"ca.crt": pem(WRONG) + pem(RIGHT).replace("MII", "AAA", 1)}}, "certificate 2 of 2 cannot be parsed"),
        ({"data": {"ca.crt": "\ud800"}}, "cannot be decoded"),
        ({"binaryData": {"ca.crt": "???"}}, "cannot be decoded"),
        ({"binaryData": {"ca.crt": b64encode(b"x").decode()}}, "no certificate"),
    ],
)  # fmt: skip
async def test_what_cannot_be_used_is_not_used(
    fields: dict[str, Any],
    text: str,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.config_maps.put("oidc-ca", data={"ca.crt": pem(RIGHT)})
    async with running(world, monkeypatch):
        world.config_maps.put("oidc-ca", **fields)
        await world.settled()
        assert text in await world.trouble()
        world.config_maps.put(
            "oidc-ca", binaryData={"ca.crt": b64encode(pem(WRONG, RIGHT).encode()).decode()}
        )
        await world.settled()
        assert await world.name() == "test-user"


async def test_it_changes_and_goes(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    world.config_maps.put("oidc-ca", data={"ca.crt": pem(RIGHT)})
    async with running(world, monkeypatch):
        before = world.provider._issuer
        # Another word in its metadata is no change.
        world.config_maps.put("oidc-ca", data={"ca.crt": pem(RIGHT)}, x="y")
        await world.settled()
        assert world.provider._issuer is before
        # What was found out by an authority that is trusted no more counts no more.
        world.config_maps.put("oidc-ca", data={"ca.crt": pem(WRONG)})
        await world.settled()
        assert "unknown authority" in await world.trouble()
        world.config_maps.put("oidc-ca", data={"ca.crt": pem(RIGHT)})
        await world.settled()
        assert await world.name() == "test-user"
        world.config_maps.remove("oidc-ca")
        await world.settled()
        assert "is not available" in await world.trouble()


async def test_it_may_not_be_read(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    world.config_maps.failure = Forbidden("configmaps is forbidden", status=403)
    async with running(world, monkeypatch):
        assert await world.trouble() == "oidc authenticator is not initialized"
        world.config_maps.failure = None
        world.config_maps.put("oidc-ca", data={"ca.crt": pem(RIGHT)})
        await trio.sleep(5)
        assert await world.name() == "test-user"


async def test_the_authorities_of_the_system(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(with_config_map=False)
    assert await world.trouble() == "oidc authenticator is not initialized"
    async with running(world, monkeypatch):
        assert "unknown authority" in await world.trouble()
        assert not world.config_maps.asked


def test_nobody_is_a_service_account_of_the_hub() -> None:
    provider = World().provider
    assert provider.here(Identity("a")) == Identity("a")
    with pytest.raises(Refused):
        provider.here(Identity("cluster:hub:system:serviceaccount:a:b"))
