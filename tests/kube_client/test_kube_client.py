"""The client against an apiserver that misbehaves."""

from __future__ import annotations

import json
import socket
import ssl
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme
from certificates import write_ca, write_pair
from scripted_apiserver import (
    Conversation,
    ScriptedApiserver,
    answer,
    kube_threads,
    refusal,
    scripted_apiserver,
    sockets,
    status_object,
    until,
    write_kubeconfig,
)

from clusterproxy.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubeError,
    KubeUnavailable,
    NotFound,
    Unauthorized,
)
from clusterproxy.kube import body as body_module
from clusterproxy.kube.api import Change, Patch
from clusterproxy.kube.client import KubeClient, open_kube_api
from clusterproxy.kube.resource import CONFIG_MAPS, LEASES, NAMESPACES, SECRETS, SERVICE_ACCOUNTS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from scripted_apiserver import Script

    from clusterproxy.kube.resource import Resource

THING = {"kind": "ConfigMap", "metadata": {"name": "a", "namespace": "n", "resourceVersion": "7"}}


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    return tmp_path / "kubeconfig"


@asynccontextmanager
async def opened(
    kubeconfig: Path, *scripts: Script, **options: Any
) -> AsyncGenerator[tuple[ScriptedApiserver, KubeClient], None]:
    async with scripted_apiserver(*scripts) as server:
        config = write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.port}")
        async with open_kube_api(config, **({"qps": -1} | options)) as api:
            yield server, api


# -- what is asked -----------------------------------------------------------------------------------


async def test_what_the_calls_ask_for(kubeconfig: Path) -> None:
    async with opened(kubeconfig, answer(200, THING), user_agent="me/1") as (server, api):
        await api.get(CONFIG_MAPS, "a", "n")
        await api.create(CONFIG_MAPS, {"metadata": {"namespace": "n", "name": "a"}})
        await api.create(
            SERVICE_ACCOUNTS,
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenRequest",
                "metadata": {"namespace": "n", "name": "a"},
            },
            subresource="token",
        )
        await api.replace(NAMESPACES, {"metadata": {"name": "a"}}, subresource="status")
        await api.patch(CONFIG_MAPS, "a", {"data": None}, "n")
        await api.patch(CONFIG_MAPS, "a", [{"op": "remove"}], "n", kind=Patch.JSON)
        await api.apply(LEASES, THING, field_manager="me", force=True)
        await api.delete(CONFIG_MAPS, "a", "n", uid="u", resource_version="7")
        await api.delete(CONFIG_MAPS, "a", "n")
    assert [f"{asked.method} {asked.target}" for asked in server.asked] == [
        "GET /api/v1/namespaces/n/configmaps/a",
        "POST /api/v1/namespaces/n/configmaps",
        "POST /api/v1/namespaces/n/serviceaccounts/a/token",
        "PUT /api/v1/namespaces/a/status",
        "PATCH /api/v1/namespaces/n/configmaps/a",
        "PATCH /api/v1/namespaces/n/configmaps/a",
        "PATCH /apis/coordination.k8s.io/v1/namespaces/n/leases/a?fieldManager=me&force=true",
        "DELETE /api/v1/namespaces/n/configmaps/a",
        "DELETE /api/v1/namespaces/n/configmaps/a",
    ]
    assert server.connections == 1
    get, create, token, replace, merge, patch, apply, delete, plain = server.asked
    assert get.headers["user-agent"] == "me/1"
    assert "content-type" not in get.headers
    assert create.json["kind"] == "ConfigMap"
    assert create.json["apiVersion"] == "v1"
    assert token.json["kind"] == "TokenRequest"
    assert replace.json["kind"] == "Namespace"
    assert merge.headers["content-type"] == "application/merge-patch+json"
    assert merge.json == {"data": None}
    assert patch.headers["content-type"] == "application/json-patch+json"
    assert apply.headers["content-type"] == "application/apply-patch+yaml"
    assert apply.json["apiVersion"] == "coordination.k8s.io/v1"
    assert delete.json["preconditions"] == {"uid": "u", "resourceVersion": "7"}
    assert "preconditions" not in plain.json


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
async def test_what_is_no_name_is_not_asked_for(kubeconfig: Path, name: str) -> None:
    async with opened(kubeconfig, answer(200, {})) as (server, api):
        with pytest.raises(Invalid, match="no name"):
            await api.delete(CONFIG_MAPS, name, "n")
        with pytest.raises(Invalid, match="no namespace"):
            await api.get(CONFIG_MAPS, "a", name)
    assert not server.asked


async def test_unusual_characters_of_names_are_quoted(kubeconfig: Path) -> None:
    async with opened(kubeconfig, answer(200, {})) as (server, api):
        await api.get(CONFIG_MAPS, "system:x?y#z%41", "n")
    assert server.asked[0].target.endswith("/configmaps/system%3Ax%3Fy%23z%2541")


# -- what is answered --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (400, "BadRequest", Invalid),
        (401, "Unauthorized", Unauthorized),
        (403, "Forbidden", Forbidden),
        (404, "NotFound", NotFound),
        (405, "MethodNotAllowed", KubeError),
        (409, "Conflict", Conflict),
        (409, "AlreadyExists", AlreadyExists),
        (410, "Expired", Gone),
        (413, "RequestEntityTooLarge", Invalid),
        (422, "Invalid", Invalid),
        (429, "TooManyRequests", KubeUnavailable),
        (500, "InternalError", KubeUnavailable),
        (503, "ServiceUnavailable", KubeUnavailable),
        (504, "Timeout", KubeUnavailable),
    ],
)
async def test_errors(kubeconfig: Path, code: int, reason: str, kind: type[KubeError]) -> None:
    async with opened(kubeconfig, refusal(code, reason, "because")) as (_, api):
        with pytest.raises(KubeError) as caught:
            await api.get(CONFIG_MAPS, "a", "n")
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.reason) == (code, reason)
    assert caught.value.message == "get /api/v1/namespaces/n/configmaps/a: because"


@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        (answer(404, b"404 page not found\n"), NotFound, "404 page not found"),
        # Somebody before the apiserver: nothing can be told from it.
        (answer(404, b"<html>no such site"), KubeUnavailable, "<html>no such site"),
        (answer(502, b"<html>bad"), KubeUnavailable, "status 502: <html>bad"),
        (answer(302, b"", "Location: http://127.0.0.1:1/"), KubeUnavailable, "status 302"),
        (answer(200, b"<html>hello"), KubeUnavailable, "no JSON object: <html>hello"),
        (answer(200, b"[]"), KubeUnavailable, "no JSON object"),
        (answer(200, b"[" * 100_000), KubeUnavailable, "no JSON object"),
        (answer(200, b'{"metadata": {"na'), KubeUnavailable, "no JSON object"),
        (answer(200, b"\xff\xfe"), KubeUnavailable, "no JSON object"),
        (answer(409, {"kind": "Status", "message": 5, "reason": []}), Conflict, "status 409"),
        (answer(403, b"x" * 1000), Forbidden, "x" * 200 + "…"),
    ],
)
async def test_answers_that_make_no_sense(
    kubeconfig: Path, script: Script, kind: type[KubeError], text: str
) -> None:
    async with opened(kubeconfig, script) as (_, api):
        with pytest.raises(KubeError) as caught:
            await api.get(CONFIG_MAPS, "a", "n")
    assert type(caught.value) is kind
    assert text in caught.value.message
    assert caught.value.message.startswith("get /api/v1/namespaces/n/configmaps/a: ")


async def truncated(talk: Conversation) -> None:
    await talk.send(200, b'{"metadata":', length=100)
    await talk.stream.aclose()


async def reset(talk: Conversation) -> None:
    stream = talk.stream
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await stream.aclose()


async def not_http(talk: Conversation) -> None:
    await talk.stream.send_all(b"220 mail.example.org ESMTP\r\n")
    await talk.stream.aclose()


async def broken_chunks(talk: Conversation) -> None:
    await talk.begin_chunks()
    await talk.stream.send_all(b"zz\r\n")
    await talk.stream.aclose()


@pytest.mark.parametrize("script", [truncated, reset, not_http, broken_chunks])
async def test_broken_connections(kubeconfig: Path, script: Script) -> None:
    async with opened(kubeconfig, script, answer(200, THING)) as (_, api):
        with pytest.raises(KubeUnavailable, match=r"^get /api/v1/namespaces/n/configmaps/a: "):
            await api.get(CONFIG_MAPS, "a", "n")
        # The next call has a connection of its own.
        assert await api.get(CONFIG_MAPS, "a", "n") == THING


async def test_an_answer_may_be_too_big(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_LIMIT", 100_000)

    async def endless(talk: Conversation) -> None:
        await talk.begin_chunks()
        while True:
            await talk.chunk(b" " * 10_000)

    async with opened(kubeconfig, endless, answer(200, THING)) as (_server, api):
        with pytest.raises(KubeUnavailable, match="an answer of more than 100000 bytes"):
            await api.get(CONFIG_MAPS, "a", "n")
        assert await api.get(CONFIG_MAPS, "a", "n") == THING


async def test_nobody_listens(kubeconfig: Path) -> None:
    async with opened(kubeconfig, answer(200, THING)) as (server, _):
        port = server.port
    config = write_kubeconfig(kubeconfig, f"http://127.0.0.1:{port}")
    async with open_kube_api(config) as api:
        with pytest.raises(KubeUnavailable, match="refused"):
            await api.get(CONFIG_MAPS, "a", "n")
    config = write_kubeconfig(kubeconfig, "https://apiserver.invalid.")
    async with open_kube_api(config) as api:
        with pytest.raises(KubeUnavailable, match=r"cannot look up apiserver\.invalid"):
            await api.get(CONFIG_MAPS, "a", "n")


# -- trying again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [429, 503])
async def test_retry_after(kubeconfig: Path, code: int) -> None:
    busy = refusal(code, "TooManyRequests", "busy", "Retry-After: 0")
    async with opened(kubeconfig, busy, busy, busy, answer(200, THING)) as (server, api):
        assert await api.get(CONFIG_MAPS, "a", "n") == THING
        assert len(server.asked) == 4
        server.scripts.clear()
        server.scripts.append(busy)
        with pytest.raises(KubeUnavailable, match="busy"):
            await api.get(CONFIG_MAPS, "a", "n")
        assert len(server.asked) == 8


@pytest.mark.parametrize("header", [(), ("Retry-After: Wed, 21 Oct 2026 07:28:00 GMT",)])
async def test_without_a_time_to_wait_it_is_not_tried_again(
    kubeconfig: Path, header: tuple[str, ...]
) -> None:
    async with opened(kubeconfig, refusal(503, "", "no", *header)) as (server, api):
        with pytest.raises(KubeUnavailable):
            await api.get(CONFIG_MAPS, "a", "n")
    assert len(server.asked) == 1


async def test_the_time_to_wait_is_kept_to(kubeconfig: Path) -> None:
    busy = refusal(429, "TooManyRequests", "busy", "Retry-After: 1")
    async with opened(kubeconfig, busy, answer(200, THING)) as (_, api):
        began = trio.current_time()
        await api.get(CONFIG_MAPS, "a", "n")
        assert trio.current_time() - began >= 1


async def test_requests_are_told_of(kubeconfig: Path) -> None:
    told: list[tuple[str, Resource, int]] = []

    def note(verb: str, resource: Resource, status: int, seconds: float) -> None:
        assert 0 <= seconds < 10
        told.append((verb, resource, status))

    async with opened(
        kubeconfig, answer(200, {}), refusal(409, "Conflict", "x"), reset, on_request=note
    ) as (_, api):
        await api.list(LEASES, "n")
        with pytest.raises(Conflict):
            await api.delete(LEASES, "a", "n")
        with pytest.raises(KubeUnavailable):
            async with api.watch(LEASES):
                pass
    assert told == [("list", LEASES, 200), ("delete", LEASES, 409), ("watch", LEASES, 0)]


# -- lists -------------------------------------------------------------------------------------------


def page(version: str, *names: str, more: str = "") -> Script:
    items = [{"metadata": {"name": name, "labels": {"x": "y"}}} for name in names]
    metadata = {"resourceVersion": version} | ({"continue": more} if more else {})
    return answer(200, {"kind": "ConfigMapList", "metadata": metadata, "items": items})


async def test_pages(kubeconfig: Path) -> None:
    async with opened(kubeconfig, page("5", "a", "b", more="c&d"), page("5", "c")) as (server, api):
        listing = await api.list(
            CONFIG_MAPS,
            label_selector="x=y",
            field_selector="metadata.name!=q",
            keep=lambda obj: {"n": obj["metadata"]["name"], "k": obj["kind"]},
        )
    assert listing.resource_version == "5"
    assert listing.items == [{"n": name, "k": "ConfigMap"} for name in "abc"]
    first, second = (asked.target for asked in server.asked)
    assert first == (
        "/api/v1/configmaps?labelSelector=x%3Dy&fieldSelector=metadata.name%21%3Dq&limit=500"
    )
    assert second == first + "&continue=c%26d"


async def test_a_list_that_expires_between_pages_is_begun_anew_once(kubeconfig: Path) -> None:
    gone = refusal(410, "Expired", "too old")
    async with opened(
        kubeconfig, page("5", "a", more="x"), gone, page("9", "b", more="x"), page("9", "c")
    ) as (server, api):
        listing = await api.list(CONFIG_MAPS)
        assert [item["metadata"]["name"] for item in listing.items] == ["b", "c"]
        assert listing.resource_version == "9"
        assert "continue" not in server.asked[2].target
        server.scripts.clear()
        server.scripts.extend([page("5", "a", more="x"), gone, page("9", "b", more="x"), gone])
        with pytest.raises(Gone):
            await api.list(CONFIG_MAPS)


async def test_lists_that_make_no_sense(kubeconfig: Path) -> None:
    async with opened(
        kubeconfig,
        answer(200, {"items": [5]}),
        answer(200, {"items": {"a": 1}}),
        page("1", more="x"),
    ) as (server, api):
        for _ in range(2):
            with pytest.raises(KubeUnavailable, match="no objects"):
                await api.list(CONFIG_MAPS)
        with pytest.raises(KubeUnavailable, match="circle"):
            await api.list(CONFIG_MAPS)
        server.scripts.clear()
        server.scripts.append(answer(200, {"metadata": None, "items": None}))
        assert (await api.list(CONFIG_MAPS)).items == []


# -- watches -----------------------------------------------------------------------------------------


def line(change: str, version: str, **more: Any) -> bytes:
    obj = {"metadata": {"name": "a", "resourceVersion": version}, **more}
    return json.dumps({"type": change, "object": obj}).encode() + b"\n"


async def test_a_watch(kubeconfig: Path) -> None:
    async def script(talk: Conversation) -> None:
        await talk.begin_chunks()
        both = line("ADDED", "1") + line("MODIFIED", "2", text="ä" * 200_000)
        for at in range(0, len(both), 70_001):
            await talk.chunk(both[at : at + 70_001])
        await talk.chunk(b"\n" + line("BOOKMARK", "3"))
        await talk.chunk(line("DELETED", "4"))
        await talk.stream.send_all(b"0\r\n\r\n")

    async with (
        opened(kubeconfig, script) as (server, api),
        api.watch(
            LEASES, "n", label_selector="a=b", field_selector="c=d", resource_version="17"
        ) as events,
    ):
        found = [event async for event in events]
    assert [event.change for event in found] == [
        Change.ADDED,
        Change.MODIFIED,
        Change.BOOKMARK,
        Change.DELETED,
    ]
    assert found[1].object["text"] == "ä" * 200_000
    path, _, query = server.asked[0].target.partition("?")
    assert path == "/apis/coordination.k8s.io/v1/namespaces/n/leases"
    fields = dict(field.split("=", 1) for field in query.split("&"))
    assert 300 <= int(fields.pop("timeoutSeconds")) <= 600
    assert fields == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "17",
        "labelSelector": "a%3Db",
        "fieldSelector": "c%3Dd",
    }


async def test_a_watch_may_be_too_old_at_once(kubeconfig: Path) -> None:
    async with opened(kubeconfig, refusal(410, "Expired", "too old")) as (_, api):
        with pytest.raises(Gone, match="too old"):
            async with api.watch(LEASES, resource_version="1"):
                pytest.fail("the watch has begun")


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (
            json.dumps({"type": "ERROR", "object": status_object(410, "Expired", "old")}),
            Gone,
            "old",
        ),
        (
            json.dumps({"type": "ERROR", "object": status_object(500, "", "ouch")}),
            KubeUnavailable,
            "ouch",
        ),
        (json.dumps({"type": "ERROR", "object": {}}), KubeUnavailable, "500"),
        ("garbage", KubeUnavailable, "no event: garbage"),
        ('{"type": "ADDED", "object": [', KubeUnavailable, "no event"),
        ('{"type": "ADDED", "object": 5}', KubeUnavailable, "no event"),
        ('{"type": "RENAMED", "object": {}}', KubeUnavailable, "RENAMED"),
        ('{"object": {}}', KubeUnavailable, "unknown change"),
    ],
)
async def test_a_watch_that_fails_in_the_middle(
    kubeconfig: Path, data: str, kind: type[KubeError], text: str
) -> None:
    async def script(talk: Conversation) -> None:
        await talk.begin_chunks()
        await talk.chunk(line("ADDED", "1") + data.encode() + b"\n")
        await talk.until_closed()

    async with opened(kubeconfig, script) as (_, api):
        async with api.watch(LEASES) as events:
            assert (await anext(events)).change is Change.ADDED
            with pytest.raises(KubeError, match=text) as caught:
                await anext(events)
        assert type(caught.value) is kind


async def test_a_watch_that_is_cut(kubeconfig: Path) -> None:
    async def in_a_chunk(talk: Conversation) -> None:
        await talk.begin_chunks()
        await talk.stream.send_all(b"ff\r\n{")
        await talk.stream.aclose()

    async def in_an_event(talk: Conversation) -> None:
        await talk.begin_chunks()
        await talk.chunk(line("ADDED", "1")[:-5])
        await talk.stream.send_all(b"0\r\n\r\n")

    async with opened(kubeconfig, in_a_chunk, in_an_event) as (_, api):
        for _ in range(2):
            with pytest.raises(KubeUnavailable, match=r"^watch "):
                async with api.watch(LEASES) as events:
                    await anext(events)


async def test_an_event_may_be_too_big(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_LIMIT", 100_000)

    async def script(talk: Conversation) -> None:
        await talk.begin_chunks()
        while True:
            await talk.chunk(b" " * 10_000)

    async with opened(kubeconfig, script) as (_, api):
        with pytest.raises(KubeUnavailable, match="an event of more than 100000 bytes"):
            async with api.watch(LEASES) as events:
                await anext(events)


async def test_the_body_of_a_watch_raises_what_it_raises(kubeconfig: Path) -> None:
    async with opened(kubeconfig, broken_watch) as (server, api):
        with pytest.raises(LookupError, match="mine"):  # noqa: PT012
            async with api.watch(LEASES) as events:
                await anext(events)
                raise LookupError("mine")
        await until(lambda: not server.open)


async def broken_watch(talk: Conversation) -> None:
    await talk.begin_chunks()
    await talk.chunk(line("ADDED", "1"))
    await talk.until_closed()


# -- cancellation and time ---------------------------------------------------------------------------


async def silence(talk: Conversation) -> None:
    await talk.until_closed()


async def headers_only(talk: Conversation) -> None:
    await talk.stream.send_all(b"HTTP/1.1 200 OK\r\nContent-")
    await talk.until_closed()


async def half_a_body(talk: Conversation) -> None:
    await talk.send(200, b'{"a":', length=1000)
    await talk.until_closed()


async def drip(talk: Conversation) -> None:
    await talk.begin_chunks()
    while True:
        await talk.chunk(b" ")
        await trio.sleep(0.01)


async def no_handshake(stream: trio.SocketStream) -> None:
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass


async def half_a_handshake(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    # The header of a record that never comes.
    await stream.send_all(b"\x16\x03\x03\x40\x00")
    await no_handshake(stream)


async def get(api: KubeClient) -> None:
    await api.get(SECRETS, "a", "n")


async def watch(api: KubeClient) -> None:
    async with api.watch(SECRETS) as events:
        async for _ in events:
            pass


async def until_gone(server: ScriptedApiserver, before: int) -> None:
    """Wait until the client's sockets are closed; its threads must have ended already."""
    assert kube_threads() == []
    await until(lambda: not server.open and sockets() <= before)


STAGES: list[tuple[str, Script]] = [
    ("http", silence),
    ("http", headers_only),
    ("http", half_a_body),
    ("http", drip),
    ("https", silence),
    ("https", half_a_body),
]


CASES = [
    (stage, call, how)
    for stage in STAGES
    for call in (get, watch)
    for how in ("cancelled", "timeout")
    # A watch has begun then, and may wait for long.
    if not (call is watch and how == "timeout" and stage[1] in (half_a_body, drip))
]


@pytest.mark.parametrize(("scheme_and_script", "call", "how"), CASES)
async def test_no_thread_or_socket_is_left(
    kubeconfig: Path,
    tmp_path: Path,
    scheme_and_script: tuple[str, Script],
    call: Callable[[KubeClient], Awaitable[None]],
    how: str,
) -> None:
    scheme, script = scheme_and_script
    context, cluster = _tls(tmp_path) if scheme == "https" else (None, None)
    async with scripted_apiserver(script, context=context) as server:
        before = sockets()
        config = write_kubeconfig(
            kubeconfig, f"{scheme}://127.0.0.1:{server.port}", cluster=cluster
        )
        timeout_s = 0.1 if how == "timeout" else 30
        async with open_kube_api(config, timeout_s=timeout_s) as api:
            await _end(server, partial(call, api), how)
            await until_gone(server, before)


@pytest.mark.parametrize("call", [get, watch])
@pytest.mark.parametrize("handshake", [no_handshake, half_a_handshake])
@pytest.mark.parametrize("how", ["cancelled", "timeout"])
async def test_no_thread_or_socket_is_left_by_a_handshake(
    kubeconfig: Path,
    tmp_path: Path,
    handshake: Callable[[trio.SocketStream], Awaitable[None]],
    call: Callable[[KubeClient], Awaitable[None]],
    how: str,
) -> None:
    _, cluster = _tls(tmp_path)
    async with scripted_apiserver(silence) as server:
        server.on_accept = handshake
        before = sockets()
        config = write_kubeconfig(kubeconfig, f"https://127.0.0.1:{server.port}", cluster=cluster)
        timeout_s = 0.1 if how == "timeout" else 30
        async with open_kube_api(config, timeout_s=timeout_s) as api:
            await _end(server, partial(call, api), how)
            await until_gone(server, before)


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
async def test_no_thread_or_socket_is_left_by_a_connect(kubeconfig: Path, how: str) -> None:
    # A listener whose queue is full does not answer.
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(address)
        config = write_kubeconfig(kubeconfig, f"http://127.0.0.1:{address[1]}")
        before = sockets()
        async with open_kube_api(config, timeout_s=0.1 if how == "timeout" else 30) as api:
            if how == "timeout":
                with pytest.raises(KubeUnavailable, match=r"no answer within 0\.1 s"):
                    await get(api)
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(get, api)
                    await until(lambda: sockets() >= before + 2)
                    began = trio.current_time()
                    nursery.cancel_scope.cancel()
                assert trio.current_time() - began < 2
            assert kube_threads() == []
            assert sockets() == before


async def _end(server: ScriptedApiserver, call: Callable[[], Awaitable[None]], how: str) -> None:
    if how == "timeout":
        with pytest.raises(KubeUnavailable, match=r"no answer within 0\.1 s"):
            await call()
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        with trio.fail_after(5):
            await server.reached.wait()
        # Let the answer begin to arrive.
        await trio.sleep(0.05)
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 2


def _tls(directory: Path, host: str = "127.0.0.1") -> tuple[ssl.SSLContext, dict[str, Any]]:
    authority = trustme.CA()
    certificate, key = write_pair(authority, directory, "server", host)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context, {"certificate-authority": write_ca(authority, directory)}


async def test_many_calls_at_once_use_some_threads_and_are_all_cancelled(kubeconfig: Path) -> None:
    async with opened(kubeconfig, silence) as (server, api):
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(get, api)
            await until(lambda: len(server.asked) >= 16)
            assert len(kube_threads()) == 16
            # Watches do not wait for calls.
            nursery.start_soon(watch, api)
            nursery.cancel_scope.cancel()
        assert kube_threads() == []
        assert len(server.asked) == 16


async def test_a_cancelled_call_does_no_harm_to_others(kubeconfig: Path) -> None:
    async with opened(kubeconfig, silence, answer(200, THING)) as (server, api):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, api)
            with trio.fail_after(5):
                await server.reached.wait()
            assert await api.get(CONFIG_MAPS, "a", "n") == THING
            nursery.cancel_scope.cancel()
        assert await api.get(CONFIG_MAPS, "a", "n") == THING


async def test_an_apiserver_that_went_away_while_nobody_asked(kubeconfig: Path) -> None:
    async def once(talk: Conversation) -> None:
        await talk.send(200, json.dumps(THING).encode())
        await talk.stream.aclose()

    async with opened(kubeconfig, once) as (server, api):
        for _ in range(5):
            assert await api.get(CONFIG_MAPS, "a", "n") == THING
            await until(lambda: not server.open)
