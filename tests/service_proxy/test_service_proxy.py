"""Rows H3 to H11: what becomes of requests, with apiservers that are played; real ones are in tests/kube."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from kube_script import ScriptedApi
from trio.testing import wait_all_tasks_blocked

from clusterproxy.errors import Forbidden, KubeUnavailable
from clusterproxy.reverse_proxy.exchange import Answer, Forward, Request
from clusterproxy.reverse_proxy.origin import Origin, Pool
from clusterproxy.service_proxy.authentication import Chain, NobodyKnows, Provider, Reviewer
from clusterproxy.service_proxy.identity import GroupMapping, Identity
from clusterproxy.service_proxy.metrics import ServiceProxyMetrics
from clusterproxy.service_proxy.proxy import ServiceProxy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trio.testing import MockClock

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.reverse_proxy.exchange import Headers
    from clusterproxy.service_proxy.target import Target

TOKEN = "the.token.of.somebody"  # noqa: S105
BEARER = (b"authorization", f"Bearer {TOKEN}".encode())
OWN = "own-token"


def known(username: str, *groups: str) -> dict[str, Any]:
    user = {"username": username, "groups": list(groups), "uid": "1", "extra": {"a": ["b"]}}
    return {"status": {"authenticated": True, "user": user}}


UNKNOWN = {"status": {"authenticated": False}}


class Cluster:
    """An apiserver that answers all reviews alike."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.api = ScriptedApi(lambda *_: self.answer)

    @property
    def reviews(self) -> int:
        return len(self.api.called("create"))

    def reviewer(self, name: str, target: str, **options: Any) -> Reviewer:
        options = {"ttl_s": 10.0, **options}
        return Reviewer(name, target, cast("KubeApi", self.api), **options)


class Oidc:
    name = "oidc"
    target = "the configured OIDC issuer"

    def __init__(self, answer: Identity | Exception | None) -> None:
        self.answer = answer
        self.asked = 0

    async def identify(self, token: str, source: str) -> Identity | None:
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def here(self, user: Identity) -> Identity | None:
        return user


@attrs.define(eq=False)
class World:
    proxy: ServiceProxy
    managed: Cluster
    hub: Cluster
    token_file: Path
    metrics: ServiceProxyMetrics

    async def ask(
        self, *headers: tuple[bytes, bytes], peer: str = "127.0.0.1", **target: str
    ) -> Answer | Forward:
        said = {"proto": "https", "namespace": "default", "service": "kubernetes", "port": "443"}
        sent = [
            (f"cluster-proxy-{name}".encode(), value.encode())
            for name, value in (said | target).items()
        ]
        request = Request(method="GET", target=b"/api?x=%2F", headers=[*sent, *headers], peer=peer)
        return await self.proxy.decide(request)

    async def forwarded(self, *headers: tuple[bytes, bytes], **target: str) -> Headers:
        found = await self.ask(*headers, **target)
        assert isinstance(found, Forward), found
        assert found.target == b"/api?x=%2F"
        return found.headers

    async def refused(self, *headers: tuple[bytes, bytes], **target: str) -> str:
        found = await self.ask(*headers, **target)
        assert isinstance(found, Answer), found
        assert found.status == 401
        return found.text


def world(
    tmp_path: Path,
    managed: Any = UNKNOWN,
    hub: Any = None,
    oidc: Oidc | None = None,
    *,
    rules: tuple[tuple[str, str], ...] = (),
    services: bool = False,
    **options: Any,
) -> World:
    local, other = Cluster(managed), Cluster(hub)
    token_file = tmp_path / "token"
    token_file.write_text(f"{OWN}\n")
    providers: list[Provider] = [local.reviewer("managed cluster", "managed cluster", **options)]
    if hub is not None:
        mapping = GroupMapping(rules)
        providers.append(other.reviewer("hub", "hub cluster", hub_groups=mapping, **options))
    if oidc is not None:
        providers.append(oidc)
    metrics = ServiceProxyMetrics()
    chain = Chain(providers, metrics)
    pool = Pool()

    def origin(target: Target) -> Origin:
        return Origin(scheme=target.scheme, host=target.host, port=target.port, pool=pool)

    proxy = ServiceProxy(
        apiserver=chain if len(providers) > 1 else None,
        services=chain if services else None,
        origin=origin,
        token_file=str(token_file),
        metrics=metrics,
    )
    return World(proxy, local, other, token_file, metrics)


async def test_a_bad_target(tmp_path: Path) -> None:
    it = world(tmp_path, hub=UNKNOWN)
    assert await it.ask(service="") == Answer(400, "invalid request headers")
    assert it.managed.reviews == it.hub.reviews == 0


@pytest.mark.parametrize(("proto", "port"), [("https", "443"), ("http", "80"), ("https", "0443")])
async def test_the_apiserver_is_reached_by_its_own_name(
    tmp_path: Path, proto: str, port: str
) -> None:
    it = world(tmp_path)
    found = await it.ask(proto=proto, port=port)
    assert isinstance(found, Forward)
    assert (found.origin.scheme, found.origin.host, found.origin.port) == (
        "https",
        "kubernetes.default.svc",
        443,
    )


async def test_services_get_the_request_as_it_is(tmp_path: Path) -> None:
    it = world(tmp_path, hub=known("u"))
    sent = [(b"host", b"h"), BEARER, BEARER, (b"impersonate-user", b"x")]
    found = await it.ask(*sent, namespace="other", proto="http", port="0080")
    assert isinstance(found, Forward)
    assert found.headers == sent
    assert (found.origin.scheme, found.origin.host, found.origin.port) == (
        "http",
        "kubernetes.other.svc",
        80,
    )
    assert it.managed.reviews == it.hub.reviews == 0


@pytest.mark.parametrize("header", [b"impersonate-user", b"impersonate-uid", b"impersonate-new"])
async def test_who_wants_to_be_somebody_else_is_for_the_apiserver(
    tmp_path: Path, header: bytes
) -> None:
    it = world(tmp_path, hub=known("u"), oidc=Oidc(Identity("u")))
    sent = [BEARER, (header, b"")]
    assert await it.forwarded(*sent) == sent
    assert it.managed.reviews == it.hub.reviews == 0


async def test_what_is_called_alike_does_not_count(tmp_path: Path) -> None:
    it = world(tmp_path, hub=known("u"))
    assert await it.forwarded(BEARER, (b"impersonator", b"x"), (b"impersonate_user", b"y")) == [
        (b"impersonator", b"x"),
        (b"impersonate-user", b"u"),
        (b"authorization", b"Bearer own-token"),
    ]


async def test_without_other_providers_nobody_is_asked(tmp_path: Path) -> None:
    """Row H9."""
    it = world(tmp_path)
    assert await it.forwarded(BEARER) == [BEARER]
    assert await it.forwarded() == []
    assert it.managed.reviews == 0


async def test_a_user_of_the_cluster(tmp_path: Path) -> None:
    """Row H5."""
    it = world(tmp_path, known("m", "g"), hub=known("h"))
    assert await it.forwarded((b"host", b"h"), BEARER) == [(b"host", b"h"), BEARER]
    assert (it.managed.reviews, it.hub.reviews) == (1, 0)
    (asked,) = it.managed.api.called("create")
    assert asked["kind"] == "TokenReview"
    assert asked["spec"] == {"token": TOKEN}


async def test_a_user_of_the_hub(tmp_path: Path) -> None:
    """Row H6."""
    it = world(tmp_path, hub=known("system:serviceaccount:a:b", "system:masters", "g"))
    expected = [
        (b"impersonate-user", b"cluster:hub:system:serviceaccount:a:b"),
        (b"impersonate-group", b"system:masters"),
        (b"impersonate-group", b"g"),
        (b"authorization", b"Bearer own-token"),
    ]
    assert await it.forwarded(BEARER) == expected
    # The proxy's own token is read each time.
    it.token_file.write_text("newer")
    assert (await it.forwarded(BEARER))[-1] == (b"authorization", b"Bearer newer")
    assert (it.managed.reviews, it.hub.reviews) == (1, 1)
    assert it.metrics.requests_total.children.keys() == {("impersonated",)}


async def test_groups_of_the_hub_by_other_names(tmp_path: Path) -> None:
    rules = (("system:masters", ""), ("*", "hub:*"))
    it = world(tmp_path, hub=known("u", "system:masters", "g"), rules=rules)
    assert await it.forwarded(BEARER) == [
        (b"impersonate-user", b"u"),
        (b"impersonate-group", b"hub:g"),
        (b"authorization", b"Bearer own-token"),
    ]


async def test_a_user_of_the_issuer(tmp_path: Path) -> None:
    oidc = Oidc(Identity("oidc:u", ("system:authenticated",)))
    it = world(tmp_path, hub=UNKNOWN, oidc=oidc)
    assert await it.forwarded(BEARER) == [
        (b"impersonate-user", b"oidc:u"),
        (b"impersonate-group", b"system:authenticated"),
        (b"authorization", b"Bearer own-token"),
    ]
    assert (it.managed.reviews, it.hub.reviews, oidc.asked) == (1, 1, 1)


@pytest.mark.parametrize(
    ("hub", "oidc", "text"),
    [
        (UNKNOWN, None, "neither valid for managed cluster nor hub cluster"),
        (None, Oidc(None), "neither valid for managed cluster nor the configured OIDC issuer"),
        (
            UNKNOWN,
            Oidc(None),
            "not valid for managed cluster, hub cluster, or the configured OIDC issuer",
        ),
    ],
)
async def test_a_token_that_nobody_knows(
    tmp_path: Path, hub: Any, oidc: Oidc | None, text: str
) -> None:
    """Row H7."""
    it = world(tmp_path, hub=hub, oidc=oidc)
    assert await it.refused(BEARER) == f"authentication failed: token is {text}"
    # That nobody knows it is known for a while, too.
    assert await it.refused(BEARER) == f"authentication failed: token is {text}"
    assert it.managed.reviews == 1


@pytest.mark.parametrize(
    "headers",
    [[], [(b"authorization", b"Basic eDp5")], [(b"authorization", b"Bearer " + b"x" * 1_000_000)]],
)
async def test_no_token_at_all(tmp_path: Path, headers: Sequence[tuple[bytes, bytes]]) -> None:
    it = world(tmp_path, hub=known("u"))
    assert (
        await it.refused(*headers)
        == "managed cluster authentication failed: token is required for TokenReview in authentication"
    )
    assert it.managed.reviews == it.hub.reviews == 0


async def test_two_tokens(tmp_path: Path) -> None:
    it = world(tmp_path, hub=known("u"))
    assert "more than one Authorization header" in await it.refused(BEARER, BEARER)


@pytest.mark.parametrize(
    "said",
    ["invalid bearer token", "[Invalid Bearer Token, token lookup failed]"],
)
async def test_words_that_mean_an_unknown_token(tmp_path: Path, said: str) -> None:
    """Row H8."""
    it = world(tmp_path, {"status": {"error": said, "authenticated": True}}, hub=known("u"))
    assert (b"impersonate-user", b"u") in await it.forwarded(BEARER)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (KubeUnavailable("gone"), "gone"),
        (Forbidden("tokenreviews is forbidden", status=403), "tokenreviews is forbidden"),
        ({"status": {"error": "webhook down"}}, "managed cluster TokenReview: webhook down"),
        ({"status": {"error": 7}}, "managed cluster TokenReview: 7"),
        (known(""), "managed cluster TokenReview: a user without a name, or groups without"),
        (
            {"status": {"authenticated": True, "user": {"username": "u", "groups": [1]}}},
            "managed cluster TokenReview: a user without a name, or groups without",
        ),
        ({"status": {"error": f"x {TOKEN}"}}, "managed cluster TokenReview: x [token]"),
        (KubeUnavailable(f"x {TOKEN}"), "x [token]"),
    ],
)
async def test_who_cannot_tell_ends_it(
    tmp_path: Path, answer: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    it = world(tmp_path, answer, hub=known("u"))
    expected = f"managed cluster authentication failed: {text}"
    assert await it.refused(BEARER) == expected
    # An error is nothing to keep, and no news the second time.
    assert await it.refused(BEARER) == expected
    assert (it.managed.reviews, it.hub.reviews) == (2, 0)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in told] == [expected]


@pytest.mark.parametrize("answer", [{}, {"status": []}, {"status": {"authenticated": "true"}}])
async def test_less_than_yes_is_no(tmp_path: Path, answer: Any) -> None:
    it = world(tmp_path, answer, hub=answer)
    assert await it.refused(BEARER) == (
        "authentication failed: token is neither valid for managed cluster nor hub cluster"
    )


async def test_an_issuer_that_cannot_tell(tmp_path: Path) -> None:
    it = world(tmp_path, hub=UNKNOWN, oidc=Oidc(NobodyKnows("not initialized")))
    assert await it.refused(BEARER) == "oidc authentication failed: not initialized"


async def test_an_apiserver_that_says_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    it = world(tmp_path, None, hub=known("u"))
    it.managed.answer = None
    began = trio.current_time()
    assert await it.refused(BEARER) == (
        "managed cluster authentication failed: context deadline exceeded"
    )
    assert trio.current_time() - began <= 30


async def test_one_review_for_all_who_come_at_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Row H10."""
    it = world(tmp_path, hub=known("u"))
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(it.forwarded, BEARER)
    assert (it.managed.reviews, it.hub.reviews) == (1, 1)
    await trio.sleep(9.9)
    await it.forwarded(BEARER)
    assert (it.managed.reviews, it.hub.reviews) == (1, 1)
    await trio.sleep(0.2)
    await it.forwarded(BEARER)
    assert (it.managed.reviews, it.hub.reviews) == (2, 2)
    await it.forwarded((b"authorization", b"Bearer other"))
    assert (it.managed.reviews, it.hub.reviews) == (3, 3)


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "10.0.0.7"])
async def test_one_who_sends_many_tokens_keeps_nobody_waiting(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, peer: str
) -> None:
    """Through the tunnel all come from this pod; the user server says who they are. Nobody else is believed in that."""
    it = world(tmp_path, hub=known("u"))
    reviewed: list[str] = []

    async def review(_resource: object, obj: Any) -> Any:
        reviewed.append(obj["spec"]["token"])
        await trio.sleep(1)
        return UNKNOWN

    monkeypatch.setattr(it.managed.api, "create", review)

    async def ask(token: str, *forwarded_for: bytes) -> None:
        said = [(b"x-forwarded-for", value) for value in forwarded_for]
        await it.ask(*said, (b"authorization", f"Bearer {token}".encode()), peer=peer)

    async with trio.open_nursery() as nursery:
        for number in range(40):
            if number == 20:
                nursery.start_soon(ask, "honest", b"192.0.2.9, 192.0.2.1")
                await wait_all_tasks_blocked()
            # What a client says of itself stands in front.
            nursery.start_soon(ask, str(number), b"192.0.2.%d" % number, b"198.51.100.1")
            await wait_all_tasks_blocked()
    assert (reviewed.index("honest") < 16) is (peer != "10.0.0.7")


async def test_nothing_is_kept_if_that_is_wanted(tmp_path: Path) -> None:
    it = world(tmp_path, known("m"), hub=UNKNOWN, ttl_s=0.0)
    await it.forwarded(BEARER)
    await it.forwarded(BEARER)
    assert it.managed.reviews == 2


async def test_a_client_that_goes_takes_its_review_along(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    it = world(tmp_path, None, hub=UNKNOWN)
    it.managed.answer = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.ask, BEARER)
        await wait_all_tasks_blocked()
        assert it.managed.api.open == 1
        nursery.cancel_scope.cancel()
    assert it.managed.api.open == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "open {}: no such file or directory"),
        ("", "{}: not a token"),
        (" \n", "{}: not a token"),
        ("a\nb", "{}: not a token"),
        ("tök", "open {}: not a token"),
    ],
)
async def test_without_a_token_of_its_own(tmp_path: Path, content: str | None, text: str) -> None:
    """Row H11."""
    it = world(tmp_path, hub=known("u"))
    if content is None:
        it.token_file.unlink()
    else:
        it.token_file.write_text(content)
    assert await it.refused(BEARER) == (
        "failed to apply hub identity: failed to get impersonate token: "
        + text.format(it.token_file)
    )


async def test_a_name_that_is_no_header(tmp_path: Path) -> None:
    it = world(tmp_path, hub=known("a\r\nImpersonate-Group: system:masters"))
    text = await it.refused(BEARER)
    assert text.startswith("failed to apply hub identity: a header cannot carry the user name")


async def test_services_that_ask_for_a_token(tmp_path: Path) -> None:
    it = world(tmp_path, known("m"), hub=known("h"), services=True)
    service = {"namespace": "shop", "service": "web", "port": "80"}
    assert "token is required" in await it.refused(**service)
    # To be somebody else is nothing that lets anybody in here.
    assert "token is required" in await it.refused((b"impersonate-user", b"x"), **service)
    assert await it.forwarded(BEARER, (b"x", b"y"), **service) == [BEARER, (b"x", b"y")]
    it = world(tmp_path, UNKNOWN, hub=known("h"), services=True)
    # The hub's token is nothing to leave with a service.
    assert await it.forwarded(BEARER, (b"x", b"y"), **service) == [(b"x", b"y")]
    it = world(tmp_path, UNKNOWN, hub=known("cluster:hub:x"), services=True)
    assert (await it.refused(BEARER, **service)).startswith("failed to apply hub identity: ")


async def test_services_that_ask_for_a_token_of_the_cluster_alone(tmp_path: Path) -> None:
    it = world(tmp_path, UNKNOWN, services=True)
    assert (
        await it.refused(BEARER, namespace="shop")
        == "authentication failed: token is not valid for the managed cluster"
    )
    # The apiserver looks for itself.
    assert await it.forwarded(BEARER) == [BEARER]
