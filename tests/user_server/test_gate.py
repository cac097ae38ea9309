"""What becomes of requests."""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
import trio.testing

from clusterproxy.errors import DialCause, DialError, DialReason, Hop
from clusterproxy.reverse_proxy.exchange import Answer, Forward, Request
from clusterproxy.reverse_proxy.origin import Pool
from clusterproxy.user_server import metrics as metrics_module
from clusterproxy.user_server.exposed_services import ExposedServices, parse_exposed_services
from clusterproxy.user_server.gate import Gate
from clusterproxy.user_server.metrics import UserServerMetrics

if TYPE_CHECKING:
    from clusterproxy.reverse_proxy.exchange import Headers
    from clusterproxy.user_server.allowlist import Allowlist
    from clusterproxy.user_server.target import Target

SERVICE = "/c1/api/v1/namespaces/ns/services/{}/proxy-service/{}"


@attrs.define
class FixedList:
    """Plays the list of services."""

    services: ExposedServices = attrs.field(factory=ExposedServices)
    known: bool = True
    where: str = "home/exposed"

    def allows(self, target: Target) -> bool:
        return self.services.allows(target)


class World:
    def __init__(self, text: str = "", *, denies: bool = True, known: bool = True) -> None:
        self.metrics = UserServerMetrics()
        self.dialled: list[str] = []
        self.error: DialError | None = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.allowlist = FixedList(parse_exposed_services({"data": {"a": text}}), known)
        self.gate = Gate(
            allowlist=cast("Allowlist", self.allowlist),
            dial=self.dial,
            context=lambda: self.context,
            pool=Pool(),
            metrics=self.metrics,
            denies=denies,
        )

    async def dial(self, address: str) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.dialled.append(address)
        if self.error is not None:
            raise self.error
        return trio.testing.memory_stream_pair()[0]

    async def ask(self, target: str, headers: Headers | None = None) -> Answer | Forward:
        return await self.gate.decide(
            Request(method="GET", target=target.encode(), headers=headers or [], peer="::1")
        )

    async def refused(self, target: str) -> Answer:
        answer = await self.ask(target)
        assert isinstance(answer, Answer)
        return answer

    async def forwarded(self, target: str, headers: Headers | None = None) -> Forward:
        forward = await self.ask(target, headers)
        assert isinstance(forward, Forward)
        return forward


async def test_an_apiserver_is_never_filtered() -> None:
    world = World()
    forward = await world.forwarded(
        "/c1/api/v1/pods?watch=1", [(b"host", b"hub"), (b"cluster-proxy-service", b"evil")]
    )
    assert forward.target == b"/api/v1/pods?watch=1"
    assert forward.headers == [
        (b"host", b"hub"),
        (b"cluster-proxy-proto", b"https"),
        (b"cluster-proxy-namespace", b"default"),
        (b"cluster-proxy-service", b"kubernetes"),
        (b"cluster-proxy-port", b"443"),
    ]
    origin = forward.origin
    assert (origin.scheme, origin.port, origin.label) == ("https", 7443, "cluster c1")
    assert origin.host.startswith("cluster-")
    assert origin.host.endswith(".open-cluster-management.proxy")
    assert origin.context is not None
    assert origin.context() is world.context
    # Clusters do not share connections.
    assert origin.key == (await world.forwarded("/c1/x")).origin.key
    assert origin.key != (await world.forwarded("/c2/x")).origin.key


async def test_bad_urls() -> None:
    world = World()
    assert (await world.refused("/c1")).status == 400
    answer = await world.refused(SERVICE.format("ftp:a:1", ""))
    assert answer.status == 400
    assert answer.text.startswith("invalid service name")
    assert not world.dialled


async def test_what_is_not_exposed_is_denied(caplog: pytest.LogCaptureFixture) -> None:
    """A21: no tunnel is opened."""
    caplog.set_level(logging.DEBUG, "clusterproxy")
    world = World("- {namespace: ns, service: x, port: 80, protocol: http}")
    asked = SERVICE.format("x:80", "path?token=secret")
    for answer in (await world.refused(asked), await world.refused(asked)):
        assert answer.status == 403
        assert answer.text.splitlines() == [
            "service ns/x is not in the exposed services allowlist",
            "to expose it, add to ConfigMap home/exposed:",
            '- {namespace: "ns", service: "x", port: "80", protocol: "https"}',
        ]
    assert not world.dialled
    assert world.metrics.denied_total.children.keys() == {("enforce",)}
    assert world.metrics.denied_total.labels("enforce").value == 2
    records = [record for record in caplog.records if "denied" in record.getMessage()]
    # Whoever repeats it fills no log.
    assert [record.levelno for record in records] == [logging.INFO, logging.DEBUG]
    assert "secret" not in caplog.text
    # What the answer says helps.
    entry = (await world.refused(asked)).text.splitlines()[-1]
    world.allowlist.services = parse_exposed_services({"data": {"a": entry}})
    forward = await world.forwarded(SERVICE.format("x:80", "p%2Fq?r=/s"))
    assert forward.target == b"/p%2Fq?r=/s"
    assert forward.headers[0] == (b"cluster-proxy-proto", b"https")
    assert (await world.refused(SERVICE.format("http:x:80", ""))).status == 403


async def test_before_the_list_is_known() -> None:
    world = World(known=False)
    answer = await world.refused(SERVICE.format("x:80", ""))
    assert answer.status == 503
    assert "not known yet: ConfigMap home/exposed cannot be read" in answer.text
    assert not world.metrics.denied_total.children
    await world.forwarded("/c1/api")


@pytest.mark.parametrize("known", [True, False])
async def test_mode_warn(known: bool, caplog: pytest.LogCaptureFixture) -> None:
    world = World(denies=False, known=known)
    for _ in range(2):
        await world.forwarded(SERVICE.format("x:80", ""))
    assert world.metrics.denied_total.labels("warn").value == 2
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.getMessage() == (
        "service ns/x is not in the exposed services allowlist. It was passed on, for the mode is warn; what keeps "
        "it working when it is enforce, in ConfigMap home/exposed: "
        '- {namespace: "ns", service: "x", port: "80", protocol: "https"}'
    )


async def test_made_up_services_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = World()
    for number in range(1, 1200):
        assert (await world.refused(SERVICE.format(f"x:{number}", ""))).status == 403
    assert len(caplog.records) == 1000


async def test_connections_go_through_the_tunnel() -> None:
    world = World()
    forward = await world.forwarded("/c1/api")
    assert not world.dialled
    connect = forward.origin.connect
    assert connect is not None
    assert isinstance(await connect(), trio.abc.Stream)
    assert world.dialled == [f"{forward.origin.host}:7443"]
    # From now on the cluster is known to be one.
    await world.forwarded("/c1/api")
    await world.forwarded("/c2/api")
    assert {
        key: cell.value for key, cell in world.metrics.cluster_requests_total.children.items()
    } == {("c1",): 1}
    assert world.metrics.connections_total.labels("c1").value == 1


async def test_an_unknown_cluster() -> None:
    world = World()
    world.error = DialError(
        DialReason.ENDPOINT,
        "No agent available",
        hop=Hop.SERVER,
        cause=DialCause.NO_AGENT,
        address="cluster-abc:7443",
        advice="is it connected?",
    )
    connect = (await world.forwarded("/nobody/api")).origin.connect
    assert connect is not None
    with pytest.raises(DialError) as caught:
        await connect()
    assert str(caught.value) == (
        "cluster nobody: failed at the server: No agent available (is it connected?)"
    )
    assert world.metrics.tunnel_errors_total.labels("server", "no_agent").value == 1
    assert not world.metrics.connections_total.children


def test_metrics_have_room_for_so_many_clusters(monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics_module, "_MAX_CLUSTERS", 2)
    metrics = UserServerMetrics()
    for cluster in ("a", "b", "c", "a"):
        metrics.note_reached(cluster)
        metrics.note_forwarded(cluster)
    assert {key[0]: cell.value for key, cell in metrics.connections_total.children.items()} == {
        "a": 2,
        "b": 1,
    }
    assert metrics.cluster_requests_total.children.keys() == {("a",), ("b",)}
