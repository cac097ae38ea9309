"""How streams find an apiserver: what a kubeconfig says is what they use."""

from __future__ import annotations

import json
import ssl
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme

from clusterproxy.addon_agent.upgrade import open_transport
from clusterproxy.errors import KubeUnavailable
from clusterproxy.kube.client import open_kube_api

if TYPE_CHECKING:
    from pathlib import Path

    from clusterproxy.kube.session import Target


def kubeconfig(directory: Path, server: str, user: dict[str, Any], **cluster: Any) -> str:
    path = directory / "kubeconfig"
    config = {
        "current-context": "a",
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "clusters": [{"name": "a", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "a", "user": user}],
    }
    path.write_text(json.dumps(config))
    return str(path)


async def target(path: str) -> Target:
    async with open_kube_api(path, user_agent="tests") as api:
        return await api.target()


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    found = trustme.CA()
    found.cert_pem.write_to_path(tmp_path / "ca.crt")
    return found


async def test_plain_http(tmp_path: Path) -> None:
    found = await target(kubeconfig(tmp_path, "http://hub.example/clusters/a", {}))
    assert (found.host, found.port, found.path) == ("hub.example", 80, "/clusters/a")
    assert (found.context, found.authorization, found.proxy) == (None, None, None)
    assert found.user_agent == "tests"


async def test_credentials_are_not_told_by_accident(tmp_path: Path) -> None:
    found = await target(kubeconfig(tmp_path, "http://hub.example", {"token": "very-secret"}))
    assert found.authorization == "Bearer very-secret"
    assert "very-secret" not in repr(found)


async def test_mutual_tls(authority: trustme.CA, tmp_path: Path, nursery: trio.Nursery) -> None:
    leaf = authority.issue_cert("me.example")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    leaf.private_key_pem.write_to_path(tmp_path / "tls.key")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("hub.example").configure_cert(server)
    authority.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    names: list[Any] = []

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        async with stream:
            await stream.do_handshake()
            names.append(stream.getpeercert())
            await stream.send_all(b"hello")

    start = partial(trio.serve_ssl_over_tcp, serve, 0, server, host="127.0.0.1")
    listeners = await nursery.start(start)
    port = listeners[0].transport_listener.socket.getsockname()[1]
    path = kubeconfig(
        tmp_path,
        f"https://127.0.0.1:{port}",
        {"client-certificate": "tls.crt", "client-key": "tls.key"},
        **{"certificate-authority": "ca.crt", "tls-server-name": "hub.example"},
    )
    transport = await open_transport(await target(path))
    assert bytes(await transport.receive()) == b"hello"
    transport.close()
    assert names[0]["subjectAltName"] == (("DNS", "me.example"),)
    # By another name it is another's.
    path = kubeconfig(
        tmp_path,
        f"https://localhost:{port}",
        {"client-certificate": "tls.crt", "client-key": "tls.key"},
        **{"certificate-authority": "ca.crt"},
    )
    with pytest.raises(ssl.SSLCertVerificationError):
        await open_transport(await target(path))
    nursery.cancel_scope.cancel()


async def test_as_insecure_as_asked_for(authority: trustme.CA, tmp_path: Path) -> None:
    insecure = {"insecure-skip-tls-verify": True}
    found = await target(kubeconfig(tmp_path, "https://hub.example", {}, **insecure))
    assert found.port == 443
    assert found.context is not None
    assert found.context.verify_mode is ssl.CERT_NONE
    assert not found.context.check_hostname
    given = {"certificate-authority": "ca.crt"}
    found = await target(kubeconfig(tmp_path, "https://hub.example:6443", {}, **given))
    assert found.context is not None
    assert found.context.check_hostname
    assert len(found.context.get_ca_certs()) == 1


@pytest.mark.parametrize(
    ("proxy", "excepted", "expected"),
    [
        ("http://proxy.example:3128", "", ("proxy.example", 3128)),
        ("http://proxy.example", "", ("proxy.example", 80)),
        ("http://[fd00::1]:3128", "", ("fd00::1", 3128)),
        ("http://proxy.example", "hub.example", None),
    ],
)
async def test_the_proxy_of_the_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proxy: str,
    excepted: str,
    expected: tuple[str, int] | None,
) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setenv("no_proxy", excepted)
    assert (await target(kubeconfig(tmp_path, "https://hub.example", {}))).proxy == expected


async def test_a_proxy_that_wants_credentials(tmp_path: Path) -> None:
    cluster = {"proxy-url": "http://me:secret@p.example:3128"}
    found = await target(kubeconfig(tmp_path, "https://hub.example", {}, **cluster))
    assert found.proxy == ("p.example", 3128)
    assert found.proxy_headers == {"Proxy-Authorization": "Basic bWU6c2VjcmV0"}


async def test_a_proxy_with_tls_is_refused(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path, "https://hub.example", {}, **{"proxy-url": "https://p.example"})
    with pytest.raises(KubeUnavailable, match="streams through a proxy with TLS"):
        await target(path)


async def test_certificates_that_are_gone(authority: trustme.CA, tmp_path: Path) -> None:
    given = {"certificate-authority": "ca.crt"}
    path = kubeconfig(tmp_path, "https://hub.example", {}, **given)
    async with open_kube_api(path) as api:
        (tmp_path / "ca.crt").unlink()
        with pytest.raises(KubeUnavailable, match="certificates of the kubeconfig"):
            await api.target()


async def test_new_credentials_after_a_refusal(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path, "http://hub.example", {"token": "old"})
    async with open_kube_api(path) as api:
        first = await api.target()
        kubeconfig(tmp_path, "http://hub.example", {"token": "new"})
        assert (await api.target()).authorization == "Bearer old"
        assert (await api.target(first)).authorization == "Bearer new"
        (tmp_path / "kubeconfig").write_text("nonsense: [")
        with pytest.raises(KubeUnavailable, match="streams: kubeconfig"):
            await api.target(first)
