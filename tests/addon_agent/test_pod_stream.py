"""Streams to pods against an apiserver and a kubelet that are played; real ones are in tests/kube/test_port_forward.py."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from played_hub import PlayedHub, PodSide, played_hub, until
from spdy_peer import SpdyPeer
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from clusterproxy.addon_agent.carriers import WebSocket
from clusterproxy.addon_agent.pod_stream import PodPort, PodStreamError, open_pod_stream
from clusterproxy.errors import KubeUnavailable
from clusterproxy.kube.client import open_kube_api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spdy_peer import Frame

    from clusterproxy.kube.client import KubeClient

WHERE = PodPort("proxies", "server-1", 8091)
PATH = "/api/v1/namespaces/proxies/pods/server-1/portforward"
MODULE = "clusterproxy.addon_agent.pod_stream"


@pytest.fixture(params=["websocket", "spdy"])
async def hub(request: pytest.FixtureRequest) -> AsyncIterator[PlayedHub]:
    async with played_hub() as found:
        if request.param == "spdy":
            found.refusals["websocket"] = (400, b"what is that?")
        yield found


@pytest.fixture
async def api(hub: PlayedHub, tmp_path: Path) -> AsyncIterator[KubeClient]:
    async with open_kube_api(hub.kubeconfig(tmp_path), user_agent="tests") as client:
        yield client


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    with trio.fail_after(10):
        return b"".join([bytes(data) async for data in stream])


def add_to_user(kubeconfig: str, fields: dict[str, Any]) -> None:
    path = Path(kubeconfig)
    config = json.loads(path.read_text())
    config["users"][0]["user"] |= fields
    path.write_text(json.dumps(config))


async def test_what_an_apiserver_is_asked(hub: PlayedHub, api: KubeClient) -> None:
    opened: list[Frame] = []

    async def script(pod: PodSide) -> None:
        await pod.accept()
        opened.extend(pod.opened)
        await pod.until_closed()

    hub.script = script
    async with open_pod_stream(api, WHERE):
        await until(lambda: len(opened) == 2)
    method, target, headers = hub.asked[-1]
    assert headers["authorization"] == "Bearer secret"
    assert headers["user-agent"] == "tests"
    assert headers["host"] == f"127.0.0.1:{hub.port}"
    if "websocket" in hub.refusals:
        assert (method, target, headers["upgrade"]) == ("POST", PATH, "SPDY/3.1")
        assert headers["x-stream-protocol-version"] == "portforward.k8s.io"
    else:
        assert (method, target) == ("GET", f"{PATH}?ports=8091")
        assert headers["sec-websocket-protocol"] == "SPDY/3.1+portforward.k8s.io"
    common = {"port": "8091", "requestid": "0"}
    assert [(frame.end, frame.headers) for frame in opened] == [
        (True, {"streamtype": "error", **common}),
        (False, {"streamtype": "data", **common}),
    ]


async def test_as_whom_an_apiserver_is_asked(hub: PlayedHub, tmp_path: Path) -> None:
    path = hub.kubeconfig(tmp_path)
    add_to_user(path, {"as": "somebody", "as-groups": ["a"]})
    async with open_kube_api(path) as api, open_pod_stream(api, WHERE):
        _, _, headers = hub.asked[-1]
    assert headers["authorization"] == "Bearer secret"
    assert (headers["impersonate-user"], headers["impersonate-group"]) == ("somebody", "a")


async def test_both_directions_end_by_themselves(hub: PlayedHub, api: KubeClient) -> None:
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"")
        await stream.send_all(b"hello")
        assert await stream.receive_some(2) == b"he"
        assert await stream.receive_some() == b"llo"
        await stream.wait_send_all_might_not_block()
        await stream.send_eof()
        await stream.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"more")
        assert await receive_all(stream) == b"bye"
        assert stream.over
        assert await stream.receive_some() == b""
        with pytest.raises(ValueError, match="max_bytes"):
            await stream.receive_some(0)


async def test_a_pod_may_end_its_side_first(
    hub: PlayedHub, api: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._COMPLAINT_S", 0.05)
    heard: list[bytes] = []

    async def script(pod: PodSide) -> None:
        await pod.accept()
        await pod.say(b"first", end=True)
        heard.append(await pod.read_data())

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        assert await receive_all(stream) == b"first"
        assert not stream.over
        await stream.send_all(b"x" * 200_000)
        await stream.send_eof()
        await until(lambda: heard == [b"x" * 200_000])


@pytest.mark.parametrize("reset", [False, True])
async def test_what_a_kubelet_complains_of(hub: PlayedHub, api: KubeClient, reset: bool) -> None:
    async def script(pod: PodSide) -> None:
        await pod.begin()
        await pod.say(b"before")
        if reset:
            # As Kubernetes does: the data first, and no orderly end of the other.
            await pod.send(pod.peer.control(3, struct.pack(">II", pod.data, 5)))
            await pod.complain(b"connection refu", end=False)
            await pod.complain(b"sed\n", end=False)
            await pod.send(pod.peer.control(3, struct.pack(">II", pod.errors, 5)))
        else:
            await pod.say(b"", end=True)
            await pod.complain(b"connection ", end=False)
            await pod.complain(b"refused\n")
        await pod.until_closed()

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"go")
        # Nothing of what it has said before is lost by that.
        assert await stream.receive_some() == b"before"
        with pytest.raises(trio.BrokenResourceError, match=r"^connection refused$"):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError, match="connection refused"):
            await stream.send_all(b"hello")


@pytest.mark.parametrize("which", ["data", "errors"])
async def test_a_reset_without_a_word(
    hub: PlayedHub, api: KubeClient, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._COMPLAINT_S", 0.05)

    async def script(pod: PodSide) -> None:
        await pod.begin()
        await pod.send(pod.peer.control(3, struct.pack(">II", getattr(pod, which), 2)))
        await pod.until_closed()

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"go")
        with pytest.raises(trio.BrokenResourceError, match=r"has reset the stream \(status 2\)"):
            await stream.receive_some()


async def test_complaints_without_end_are_not_gathered(hub: PlayedHub, api: KubeClient) -> None:
    async def script(pod: PodSide) -> None:
        await pod.begin()
        for _ in range(20):
            await pod.complain(b"a" * 1000, end=False)
        await pod.complain(b"a")
        await pod.until_closed()

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"go")
        with pytest.raises(trio.BrokenResourceError) as found:
            await stream.receive_some()
    assert str(found.value) == "a" * 4096


async def test_what_else_may_come_changes_nothing(hub: PlayedHub, api: KubeClient) -> None:
    async def script(pod: PodSide) -> None:
        await pod.accept()
        await pod.send(
            pod.peer.control(7, bytes(8))
            + pod.peer.control(4, struct.pack(">III", 1, 4, 1))
            + pod.peer.data(99, b"nobody's", end=True)
            + pod.peer.headers(pod.data, {"a": "b"})
        )
        await pod.say(b"hello", end=True)
        await pod.complain(b"")
        await pod.until_closed()

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        assert await receive_all(stream) == b"hello"


async def test_the_connection_ends(hub: PlayedHub, api: KubeClient) -> None:
    async def script(pod: PodSide) -> None:
        await pod.begin()
        await pod.say(b"last words")

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"go")
        assert await stream.receive_some() == b"last words"
        for _ in range(2):
            with pytest.raises(
                trio.BrokenResourceError, match=r"apiserver has ended|reset by peer"
            ):
                await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_eof()


async def test_nonsense_ends_it(hub: PlayedHub, api: KubeClient) -> None:
    async def script(pod: PodSide) -> None:
        await pod.begin()
        await pod.send(pod.peer.control(1, bytes(10)))
        await pod.until_closed()

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"go")
        with pytest.raises(trio.BrokenResourceError, match="the server opens a stream"):
            await stream.receive_some()


@pytest.mark.parametrize("lives", [True, False])
async def test_silence_is_broken(
    hub: PlayedHub, api: KubeClient, lives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._SILENCE_S", 0.2)
    pings: list[int] = []

    async def script(pod: PodSide) -> None:
        await pod.accept()
        while True:
            frame = await pod.next()
            if frame.kind == 6:
                pings.append(frame.stream)
                if lives:
                    await pod.send(pod.peer.control(6, struct.pack(">I", frame.stream)))

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        if lives:
            with trio.move_on_after(1.5):
                await stream.receive_some()
            assert len(pings) > 3
            assert pings == list(range(1, 2 * len(pings), 2))
        else:
            with (
                trio.fail_after(5),
                pytest.raises(trio.BrokenResourceError, match="nothing has come"),
            ):
                await stream.receive_some()
            assert pings == [1, 3]


async def test_questions_are_answered_while_the_way_is_full(
    hub: PlayedHub, api: KubeClient
) -> None:
    answered = trio.Event()

    async def script(pod: PodSide) -> None:
        await pod.accept()
        # Nothing is read while the client sends, until it has been asked much.
        await trio.sleep(0.3)
        for number in range(2, 200, 2):
            await pod.send(pod.peer.control(6, struct.pack(">I", number)))
        await trio.sleep(0.3)
        last = 0
        while last != 198:
            frame = await pod.next()
            if frame.kind == 6:
                assert frame.stream == last + 2
                last = frame.stream
        answered.set()
        await pod.say(b"enough", end=True)
        await pod.complain(b"")
        await pod.until_closed()

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            # Given up in the middle: the rest of a frame that was begun has to go out all the same.
            with trio.move_on_after(0.2):
                await stream.send_all(bytes(16 << 20))

        nursery.start_soon(send)
        assert await receive_all(stream) == b"enough"
        assert answered.is_set()


async def test_who_asks_must_take_answers(
    hub: PlayedHub, api: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._MOST_ANSWERS", 1000)

    async def script(pod: PodSide) -> None:
        await pod.begin()
        questions = pod.peer.control(6, struct.pack(">I", 2)) * 1000
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await pod.send(questions)

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"go")
        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError, match="takes no answers"):
            await stream.receive_some()


async def test_one_task_for_each_direction(hub: PlayedHub, api: KubeClient) -> None:
    async with open_pod_stream(api, WHERE) as stream, trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked(0.1)
        with pytest.raises(trio.BusyResourceError):
            await stream.receive_some()
        await stream.aclose()
        await stream.aclose()
        for call in (stream.receive_some, stream.send_eof, stream.wait_send_all_might_not_block):
            with pytest.raises(trio.ClosedResourceError):
                await call()


async def test_closed_while_it_sends(hub: PlayedHub, api: KubeClient) -> None:
    async def script(pod: PodSide) -> None:
        await pod.accept()
        await trio.sleep_forever()

    hub.script = script
    async with open_pod_stream(api, WHERE) as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(bytes(64 << 20))

        nursery.start_soon(send)
        await trio.sleep(0.3)
        stream.close()


async def test_a_cancelled_receive_loses_nothing(hub: PlayedHub, api: KubeClient) -> None:
    async with open_pod_stream(api, WHERE) as stream:
        with trio.move_on_after(0.05):
            await stream.receive_some()
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"


# -- opening ---------------------------------------------------------------------------------------

STATUS = b'{"kind": "Status", "message": "pods \\"server-1\\" not found", "code": 404}'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (STATUS, 'pods "server-1" not found'),
        (b"<html>" + b"a" * 100_000, "<html>aaa"),
        (b"upstream connect error\n", "upstream connect error$"),
        (b"", "404 Whatever"),
        (b'{"a": 1}', '{"a": 1}'),
        (b"[1]", r"\[1\]"),
    ],
)
async def test_a_refusal_is_told_in_its_words(
    hub: PlayedHub, api: KubeClient, body: bytes, message: str
) -> None:
    hub.refusals = {"websocket": (404, body), "spdy": (404, body)}
    with pytest.raises(PodStreamError, match=f"^proxies/server-1:8091: {message}") as found:
        async with open_pod_stream(api, WHERE):
            raise AssertionError
    assert len(str(found.value)) < 5000


async def test_new_credentials_are_tried_once(
    hub: PlayedHub, api: KubeClient, tmp_path: Path
) -> None:
    hub.refusals = {"websocket": (401, b"who?"), "spdy": (401, b"who?")}
    with pytest.raises(PodStreamError, match=r"who\?"):
        async with open_pod_stream(api, WHERE):
            raise AssertionError
    assert [method for method, _, _ in hub.asked] == ["GET", "GET"]
    # A new token is in the file by now.
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace("secret", "fresh"))
    hub.known = "Bearer fresh"
    hub.refusals = {}
    async with open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"a")
        assert await stream.receive_some() == b"a"
    assert hub.asked[-1][2]["authorization"] == "Bearer fresh"


async def test_a_refusal_that_never_ends(
    hub: PlayedHub, api: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clusterproxy.addon_agent.upgrade._REFUSAL_S", 0.1)
    hub.raw = b"HTTP/1.1 403 No\r\nContent-Length: 100\r\n\r\nnot you"
    hub.stays = True
    with pytest.raises(PodStreamError, match=r"not you$"):
        async with open_pod_stream(api, WHERE):
            raise AssertionError


async def test_nothing_is_left_of_a_cancelled_opening(hub: PlayedHub, api: KubeClient) -> None:
    async def script(pod: PodSide) -> None:
        await pod.until_closed()

    hub.script = script
    with trio.move_on_after(0.3) as scope:
        async with open_pod_stream(api, WHERE):
            raise AssertionError
    assert scope.cancelled_caught
    await until(lambda: hub.open == 0)


async def test_an_apiserver_that_answers_in_pieces(hub: PlayedHub, api: KubeClient) -> None:
    hub.raw = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno"
    with pytest.raises(PodStreamError, match=r"no$"):
        async with open_pod_stream(api, WHERE):
            raise AssertionError


async def test_a_kubelet_that_speaks_at_once(hub: PlayedHub, tmp_path: Path) -> None:
    settings = SpdyPeer().control(4, struct.pack(">III", 1, 4, 100))
    if "websocket" not in hub.refusals:
        settings = Connection(ConnectionType.SERVER).send(BytesMessage(data=settings))
    hub.at_once = settings
    # Nobody asks who this is.
    path = hub.kubeconfig(tmp_path).replace("kubeconfig", "anonymous")
    config = json.loads((tmp_path / "kubeconfig").read_text())
    config["users"][0]["user"] = {}
    (tmp_path / "anonymous").write_text(json.dumps(config))
    async with open_kube_api(path) as api, open_pod_stream(api, WHERE) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
    assert "authorization" not in hub.asked[-1][2]


async def test_an_apiserver_that_answers_no_http(hub: PlayedHub, api: KubeClient) -> None:
    hub.raw = b"SSH-2.0-OpenSSH_9.6\r\n"
    with pytest.raises(PodStreamError, match="answer is no HTTP"):
        async with open_pod_stream(api, WHERE):
            raise AssertionError


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({}, True),
        ({"Sec-WebSocket-Protocol": "v4.channel.k8s.io"}, False),
        ({"Sec-WebSocket-Accept": "other"}, False),
    ],
)
async def test_another_websocket_than_wanted_is_none(
    tmp_path: Path, headers: dict[str, str], fine: bool
) -> None:
    async with played_hub() as hub, open_kube_api(hub.kubeconfig(tmp_path)) as api:
        hub.headers = headers
        async with open_pod_stream(api, WHERE) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
        assert [method for method, _, _ in hub.asked] == ["GET"] + ["POST"] * (not fine)


async def test_another_upgrade_than_spdy_is_none(tmp_path: Path) -> None:
    async with played_hub() as hub, open_kube_api(hub.kubeconfig(tmp_path)) as api:
        hub.refusals["websocket"] = (403, b"")
        hub.headers = {"Upgrade": "h2c"}
        with pytest.raises(PodStreamError, match=r"something else than SPDY/3\.1"):
            async with open_pod_stream(api, WHERE):
                raise AssertionError


async def test_nobody_is_waited_for_without_end(
    hub: PlayedHub, api: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._OPEN_S", 0.3)

    async def script(pod: PodSide) -> None:
        await pod.until_closed()

    hub.script = script
    with pytest.raises(PodStreamError, match=r"nobody has answered within 0\.3 s"):
        async with open_pod_stream(api, WHERE):
            raise AssertionError
    await until(lambda: hub.open == 0)


async def test_an_apiserver_that_is_not_there(hub: PlayedHub, api: KubeClient) -> None:
    target = await api.target()

    class Gone:
        async def target(self, _refused: object = None) -> Any:
            import attrs

            return attrs.evolve(target, port=9)

    gone: Any = Gone()
    with pytest.raises(PodStreamError, match="all attempts to connect"):
        async with open_pod_stream(gone, WHERE):
            raise AssertionError


async def test_no_credentials(hub: PlayedHub) -> None:
    class Broken:
        async def target(self) -> Any:
            await trio.lowlevel.checkpoint()
            raise KubeUnavailable("no credentials: the plugin has failed")

    broken: Any = Broken()
    with pytest.raises(PodStreamError, match="no credentials: the plugin has failed"):
        async with open_pod_stream(broken, WHERE):
            raise AssertionError
    assert not hub.asked


# -- WebSockets ------------------------------------------------------------------------------------


async def test_what_websockets_say_themselves(tmp_path: Path) -> None:
    heard: list[Any] = []

    async def script(pod: PodSide) -> None:
        await pod.accept()
        assert pod.websocket is not None
        await pod.stream.send_all(pod.websocket.send(Ping(payload=b"alive?")))
        await pod.stream.send_all(pod.websocket.send(Pong()))
        await pod.say(b"hello")
        await pod.until_closed()
        heard.extend(pod.heard)

    async with played_hub() as hub, open_kube_api(hub.kubeconfig(tmp_path)) as api:
        hub.script = script
        async with open_pod_stream(api, WHERE) as stream:
            assert await stream.receive_some() == b"hello"
        await until(lambda: bool(heard))
    assert [type(each) for each in heard] == [Pong, CloseConnection]
    assert heard[0].payload == b"alive?"
    assert heard[1].code == 1000


async def test_a_websocket_is_closed(tmp_path: Path) -> None:
    async def script(pod: PodSide) -> None:
        await pod.begin()
        await pod.say(b"before")
        await pod.close_websocket(1011)
        await pod.until_closed()

    async with played_hub() as hub, open_kube_api(hub.kubeconfig(tmp_path)) as api:
        hub.script = script
        async with open_pod_stream(api, WHERE) as stream:
            await stream.send_all(b"go")
            assert await stream.receive_some() == b"before"
            with pytest.raises(trio.BrokenResourceError, match=r"the WebSocket is closed: 1011$"):
                await stream.receive_some()


@pytest.mark.parametrize("behind", [b"", b"\x89\x00", b"\x82\x01x"])
async def test_a_websocket_is_closed_with_the_last_of_it(tmp_path: Path, behind: bytes) -> None:
    async def script(pod: PodSide) -> None:
        await pod.begin()
        assert pod.websocket is not None
        frames = [
            pod.peer.data(pod.data, b"last", end=True),
            pod.peer.data(pod.errors, b"", end=True),
            # A question, to which there is no answer any more.
            pod.peer.control(6, struct.pack(">I", 2)),
        ]
        said = b"".join(pod.websocket.send(BytesMessage(data=frame)) for frame in frames)
        await pod.stream.send_all(said + pod.websocket.send(CloseConnection(code=1000)) + behind)
        await pod.until_closed()

    async with played_hub() as hub, open_kube_api(hub.kubeconfig(tmp_path)) as api:
        hub.script = script
        async with open_pod_stream(api, WHERE) as stream:
            await stream.send_all(b"go")
            assert await receive_all(stream) == b"last"
            assert stream.over
            # It goes nowhere, as the kubelet has said.
            await stream.send_all(b"more")
        await until(lambda: not hub.open)


async def test_a_websocket_is_closed_instead_of_an_answer(tmp_path: Path) -> None:
    async def script(pod: PodSide) -> None:
        data, errors = [(await pod.next()).stream for _ in range(2)]
        assert pod.websocket is not None
        ends = pod.peer.data(data, b"", end=True) + pod.peer.data(errors, b"", end=True)
        said = pod.websocket.send(BytesMessage(data=ends))
        await pod.stream.send_all(said + pod.websocket.send(CloseConnection(code=1001)))
        await pod.until_closed()

    async with played_hub() as hub, open_kube_api(hub.kubeconfig(tmp_path)) as api:
        hub.script = script
        with pytest.raises(PodStreamError, match=r"8091: the WebSocket is closed: 1001$"):
            async with open_pod_stream(api, WHERE):
                pytest.fail("it is open")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (None, "WebSocket: a message of text"),
        (b"\xff\xff\xff\xff", "the WebSocket is closed: 1002 "),
    ],
)
async def test_a_websocket_that_says_something_else(
    tmp_path: Path, frame: bytes | None, message: str
) -> None:
    async def script(pod: PodSide) -> None:
        await pod.begin()
        assert pod.websocket is not None
        await pod.stream.send_all(frame or pod.websocket.send(TextMessage(data="hello")))
        await pod.until_closed()

    async with played_hub() as hub, open_kube_api(hub.kubeconfig(tmp_path)) as api:
        hub.script = script
        async with open_pod_stream(api, WHERE) as stream:
            await stream.send_all(b"go")
            with pytest.raises(trio.BrokenResourceError, match=message):
                await stream.receive_some()


def test_a_closed_websocket_says_nothing_more() -> None:
    carrier, peer = WebSocket(), Connection(ConnectionType.SERVER)
    bye = carrier.farewell()
    assert bye
    peer.receive_data(bye)
    [asked] = peer.events()
    assert isinstance(asked, CloseConnection)
    # The answer to ours is not answered.
    assert list(carrier.unpack(peer.send(asked.response()))) == []
    assert carrier.ended
    assert (carrier.answers(), carrier.farewell()) == (b"", b"")


# -- proxies ---------------------------------------------------------------------------------------


async def through_proxy(tmp_path: Path, answer: bytes) -> tuple[bytes, bytes]:
    """Talk with an echo through an HTTP proxy that answers so; return what it was asked, and the echo."""
    asked = b""

    async with played_hub() as hub, trio.open_nursery() as nursery:

        async def proxy(stream: trio.SocketStream) -> None:
            nonlocal asked
            async with stream:
                asked = bytes(await stream.receive_some())
                await stream.send_all(answer)
                if b" 200 " not in answer:
                    return
                async with (
                    await trio.open_tcp_stream("127.0.0.1", hub.port) as onwards,
                    trio.open_nursery() as both,
                ):
                    both.start_soon(copy, stream, onwards)
                    both.start_soon(copy, onwards, stream)

        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, proxy, [listener])
        address = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        path = hub.kubeconfig(tmp_path, server="http://hub.example:6443", **{"proxy-url": address})
        try:
            async with open_kube_api(path) as api, open_pod_stream(api, WHERE) as stream:
                await stream.send_all(b"hello")
                return asked, await stream.receive_some()
        finally:
            nursery.cancel_scope.cancel()
    raise AssertionError


async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()


async def test_through_an_http_proxy(tmp_path: Path) -> None:
    asked, said = await through_proxy(tmp_path, b"HTTP/1.1 200 Connection established\r\n\r\n")
    assert asked.startswith(b"CONNECT hub.example:6443 HTTP/1.1\r\n")
    assert b"Authorization" not in asked
    assert said == b"hello"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 407 Who are you\r\n\r\n", "the proxy refuses to connect: 407 Who are you"),
        (
            b"HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 502 No\r\n\r\n",
            "the proxy refuses to connect: 502 No",
        ),
        (b"nonsense\r\n\r\n", "no answer of an HTTP proxy"),
        (b"", "no answer of an HTTP proxy"),
    ],
)
async def test_a_proxy_that_does_not(tmp_path: Path, answer: bytes, message: str) -> None:
    with pytest.raises(BaseExceptionGroup) as found:
        await through_proxy(tmp_path, answer)
    failure: BaseException = found.value
    while isinstance(failure, BaseExceptionGroup):
        [failure] = failure.exceptions
    assert isinstance(failure, PodStreamError)
    assert message in str(failure)
