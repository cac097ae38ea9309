"""Row H12: an issuer that is slow, gone, or has other keys than before. Documents are played, time is trio's."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from oidc_world import CLIENT, ISSUER, NOW, Documents, claims, public_jwk, rsa_key, signed
from trio.testing import wait_all_tasks_blocked

from clusterproxy.service_proxy.authentication import NobodyKnows
from clusterproxy.service_proxy.https_get import FetchError
from clusterproxy.service_proxy.oidc_claims import OidcConfig
from clusterproxy.service_proxy.oidc_issuer import Issuer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock

CONFIG = OidcConfig(issuer_url=ISSUER, client_id=CLIENT)


@contextlib.asynccontextmanager
async def running(documents: Documents, **config: Any) -> AsyncGenerator[Issuer]:
    issuer = Issuer(attrs.evolve(CONFIG, **config), documents.fetch, lambda: NOW)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(issuer.run)
        await wait_all_tasks_blocked()
        yield issuer
        nursery.cancel_scope.cancel()


async def name(issuer: Issuer, token: str) -> str | None:
    found = await issuer.identify(token)
    return None if found is None else found.username


async def test_tokens_good_and_bad(autojump_clock: MockClock) -> None:
    async with running(Documents()) as issuer:
        assert await name(issuer, signed(claims())) == f"{ISSUER}#test-user"
        assert await name(issuer, signed(claims(aud="x"))) is None
        assert await name(issuer, signed(claims(), rsa_key("two"))) is None
        assert await name(issuer, signed(claims(), alg="PS256")) is None
        assert await name(issuer, signed(claims(iss="https://foreign.example"))) is None
        for token in ("", "garbage", "a.b", "a.!!!.c"):
            assert await name(issuer, token) is None


async def test_until_the_issuer_has_answered(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    documents = Documents(error=FetchError("connection refused"))
    async with running(documents) as issuer:
        with pytest.raises(NobodyKnows, match="does not tell its keys: connection refused"):
            await issuer.identify(signed(claims()))
        # It is nothing to others' tokens, and to what is none.
        assert await name(issuer, signed(claims(iss="https://foreign.example"))) is None
        assert await name(issuer, "garbage") is None
        await trio.sleep(25)
        documents.error = None
        assert len(documents.fetched) == 3
        await trio.sleep(4.9)
        with pytest.raises(NobodyKnows):
            await issuer.identify(signed(claims()))
        await trio.sleep(0.2)
        assert await name(issuer, signed(claims())) == f"{ISSUER}#test-user"
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1


async def test_before_there_was_time_to_ask(autojump_clock: MockClock) -> None:
    issuer = Issuer(CONFIG, Documents().fetch, lambda: NOW)
    with pytest.raises(NobodyKnows, match="not initialized"):
        await issuer.identify(signed(claims()))


@pytest.mark.parametrize(
    ("discovery", "why"),
    [
        ({"issuer": f"{ISSUER}/", "jwks_uri": "https://issuer.example/keys"}, "did not match"),
        ({"issuer": "https://other.example"}, "did not match"),
        ({}, "did not match"),
        ({"issuer": [ISSUER]}, "did not match"),
        ({"issuer": ISSUER}, "404"),
        ({"issuer": ISSUER, "jwks_uri": 7}, "404"),
        ({"issuer": ISSUER, "jwks_uri": "https://issuer.example/others"}, "404"),
    ],
)
async def test_a_document_that_does_not_say_it(
    discovery: dict[str, Any], why: str, autojump_clock: MockClock
) -> None:
    async with running(Documents(discovery=discovery)) as issuer:
        with pytest.raises(NobodyKnows, match=why):
            await issuer.identify(signed(claims()))


async def test_an_issuer_without_keys(autojump_clock: MockClock) -> None:
    async with running(Documents(keys=[{"kty": "oct", "k": "AAAA"}])) as issuer:
        with pytest.raises(NobodyKnows, match="no key that can be used"):
            await issuer.identify(signed(claims()))


async def test_a_slash_at_the_end(autojump_clock: MockClock) -> None:
    slashed = f"{ISSUER}/"
    documents = Documents(issuer=slashed)
    async with running(documents, issuer_url=slashed) as issuer:
        assert documents.fetched[0] == f"{ISSUER}/.well-known/openid-configuration"
        assert await name(issuer, signed(claims(iss=slashed))) == f"{slashed}#test-user"
        assert await name(issuer, signed(claims())) is None


async def test_new_keys(autojump_clock: MockClock) -> None:
    documents = Documents()
    newer = signed(claims(), rsa_key("two"), kid="two")
    async with running(documents) as issuer:
        documents.keys = [public_jwk(rsa_key("two"), kid="two")]
        # Asked just now: whoever invents keys does not have the issuer asked each time.
        assert await name(issuer, newer) is None
        assert len(documents.fetched) == 2
        await trio.sleep(10)
        assert await name(issuer, newer) == f"{ISSUER}#test-user"
        assert await name(issuer, signed(claims())) is None
        assert len(documents.fetched) == 4


async def test_another_key_by_the_same_name(autojump_clock: MockClock) -> None:
    documents = Documents()
    async with running(documents) as issuer:
        await trio.sleep(10)
        documents.keys = [public_jwk(rsa_key("two"), kid="one")]
        assert await name(issuer, signed(claims(), rsa_key("two"))) == f"{ISSUER}#test-user"


async def test_all_who_have_a_new_key_wait_for_one_look(autojump_clock: MockClock) -> None:
    documents = Documents()
    found: list[str | None] = []
    async with running(documents) as issuer:
        await trio.sleep(10)
        documents.keys = [public_jwk(rsa_key("two"), kid="two")]
        may = trio.Event()
        documents.gate = may.wait

        async def ask(key: str) -> None:
            found.append(await name(issuer, signed(claims(), rsa_key(key), kid=key)))

        async with trio.open_nursery() as nursery:
            for key in ("two", "two", "three"):
                nursery.start_soon(ask, key)
            await wait_all_tasks_blocked()
            nursery.start_soon(ask, "two")
            await wait_all_tasks_blocked()
            may.set()
    assert sorted(map(str, found)) == ["None", *[f"{ISSUER}#test-user"] * 3]
    assert len(documents.fetched) == 4


async def test_new_keys_of_an_issuer_that_is_gone(autojump_clock: MockClock) -> None:
    documents = Documents()
    async with running(documents) as issuer:
        await trio.sleep(10)
        documents.error = FetchError("gone")
        with pytest.raises(NobodyKnows, match="gone"):
            await issuer.identify(signed(claims(), rsa_key("two"), kid="two"))
        # What was known is known.
        assert await name(issuer, signed(claims())) == f"{ISSUER}#test-user"
        documents.error = None
        documents.keys = [public_jwk(rsa_key("two"), kid="two")]
        await trio.sleep(10.1)
        assert await name(issuer, signed(claims(), rsa_key("two"), kid="two")) is not None


async def test_withdrawn_keys_are_forgotten(autojump_clock: MockClock) -> None:
    documents = Documents()
    async with running(documents) as issuer:
        documents.keys = [public_jwk(rsa_key("two"), kid="two")]
        await trio.sleep(599)
        assert await name(issuer, signed(claims())) is not None
        await trio.sleep(2)
        assert await name(issuer, signed(claims())) is None


async def test_who_waits_when_it_ends_is_told(autojump_clock: MockClock) -> None:
    documents = Documents()
    found: list[str | None] = []
    async with trio.open_nursery() as outer:
        async with running(documents) as issuer:
            await trio.sleep(10)
            documents.gate = trio.sleep_forever

            async def ask() -> None:
                found.append(await name(issuer, signed(claims(), rsa_key("two"), kid="two")))

            outer.start_soon(ask)
            await wait_all_tasks_blocked()
            assert not found
        with trio.fail_after(1):
            await wait_all_tasks_blocked()
    assert found == [None]
