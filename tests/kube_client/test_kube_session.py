"""Kubeconfigs, service accounts, certificates, proxies."""

from __future__ import annotations

import base64
import json
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme
from certificates import write_ca, write_pair
from scripted_apiserver import answer, refusal, scripted_apiserver, until, write_kubeconfig

from clusterproxy.addon_agent.upgrade import open_transport
from clusterproxy.errors import ConfigError, KubeUnavailable, Unauthorized
from clusterproxy.kube import official
from clusterproxy.kube import session as session_module
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.resource import CONFIG_MAPS, NAMESPACES

if TYPE_CHECKING:
    from scripted_apiserver import Conversation, ScriptedApiserver

THING = {"kind": "ConfigMap", "metadata": {"name": "a", "namespace": "n"}}
FOUND = answer(200, THING)
UNAUTHORIZED = refusal(401, "Unauthorized", "who are you?")


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    return tmp_path / "kubeconfig"


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


async def ask(server: ScriptedApiserver, config: str) -> str | None:
    """Ask for something; return who one was then."""
    async with open_kube_api(config) as api:
        await api.get(CONFIG_MAPS, "a", "n")
    return server.asked[-1].headers.get("authorization")


# -- bad configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "{",
        "a: b",
        "current-context: x",
        "{current-context: x, contexts: [{name: x}]}",
        "{current-context: x, contexts: [5], clusters: 7}",
        "{current-context: x, contexts: [{name: x, context: {cluster: c}}], clusters: [{name: c, cluster: {}}]}",
        "{current-context: x, contexts: [{name: x, context: {cluster: c}}], clusters: [{name: c, cluster: {server: 5}}]}",
    ],
)
async def test_kubeconfigs_of_any_shape(kubeconfig: Path, text: str) -> None:
    write_text(kubeconfig, text)
    with pytest.raises(ConfigError, match=r"kubeconfig|URL") as caught:
        async with open_kube_api(str(kubeconfig)):
            pytest.fail("it was opened")
    assert caught.value.field == "kubeconfig"


@pytest.mark.parametrize(
    ("user", "cluster"),
    [
        ({"tokenFile": "missing"}, {}),
        ({"client-certificate": "missing"}, {}),
        ({"client-certificate-data": "!"}, {}),
        ({"exec": {"command": "false", "apiVersion": "v1"}}, {}),
        ({"exec": {"command": "/nonexistent", "apiVersion": "v1"}}, {}),
        ({}, {"certificate-authority": "missing"}),
        ({}, {"proxy-url": "socks5://127.0.0.1:1"}),
    ],
)
async def test_what_kubeconfigs_name_must_be_there(
    kubeconfig: Path, user: dict[str, Any], cluster: dict[str, Any]
) -> None:
    config = write_kubeconfig(kubeconfig, "https://127.0.0.1:1", user=user, cluster=cluster)
    with pytest.raises(ConfigError) as caught:
        async with open_kube_api(config):
            pytest.fail("it was opened")
    assert caught.value.field == "kubeconfig"


async def test_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        async with open_kube_api(str(tmp_path / "missing")):
            pytest.fail("it was opened")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no kubeconfig given, and not in a pod"):
        async with open_kube_api():
            pytest.fail("it was opened")


@pytest.mark.parametrize("server", ["ftp://127.0.0.1", "127.0.0.1:6443", "https://"])
async def test_the_apiserver_must_have_a_url(kubeconfig: Path, server: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        async with open_kube_api(write_kubeconfig(kubeconfig, server)):
            pytest.fail("it was opened")


# -- credentials -------------------------------------------------------------------------------------


async def test_kinds_of_credentials(kubeconfig: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "of-plugin"},
    }
    plugin.write_text(f"#!/bin/sh\necho '{json.dumps(credential)}'\n")
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "token").write_text("of-file\n")
    async with scripted_apiserver(FOUND) as server:
        url = f"http://127.0.0.1:{server.port}/"
        for user, expected in (
            ({}, None),
            ({"token": "of-user"}, "Bearer of-user"),
            ({"tokenFile": "token"}, "Bearer of-file"),
            # As client-go.
            ({"token": "of-user", "tokenFile": "token"}, "Bearer of-file"),
            ({"username": "a", "password": "b"}, "Basic YTpi"),
            (
                {"exec": {"command": "./plugin", "apiVersion": credential["apiVersion"]}},
                "Bearer of-plugin",
            ),
        ):
            assert await ask(server, write_kubeconfig(kubeconfig, url, user=user)) == expected
    assert {asked.target for asked in server.asked} == {"/api/v1/namespaces/n/configmaps/a"}


async def test_as_whom_to_act(kubeconfig: Path) -> None:
    user = {
        "token": "mine",
        "as": "j\u00fcrgen",
        "as-uid": "7",
        "as-groups": ["a", "b"],
        "as-user-extra": {"example.org/a%b": ["c"]},
    }
    expected = (
        # UTF-8, as from Go.
        ("Impersonate-User", "j\u00c3\u00bcrgen"),
        ("Impersonate-Uid", "7"),
        ("Impersonate-Group", "a"),
        ("Impersonate-Group", "b"),
        ("Impersonate-Extra-example.org%2Fa%25b", "c"),
    )
    async with scripted_apiserver(FOUND) as server:
        config = write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.port}", user=user)
        assert await ask(server, config) == "Bearer mine"
        headers = server.asked[-1].headers
        assert headers["impersonate-user"] == "j\u00fcrgen"
        assert headers["impersonate-uid"] == "7"
        assert headers["impersonate-extra-example.org%2fa%25b"] == "c"
        # The last of both.
        assert headers["impersonate-group"] == "b"
        async with open_kube_api(config) as api:
            assert (await api.target()).identity == expected


@pytest.mark.parametrize(
    "user",
    [
        {"as-groups": ["a"]},
        {"as-uid": "7"},
        {"as": "a", "as-groups": "b"},
        {"as": "a", "as-user-extra": {"b": "c"}},
        {"as": "a", "as-user-extra": ["c"]},
    ],
)
async def test_as_whom_to_act_must_be_clear(kubeconfig: Path, user: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        async with open_kube_api(write_kubeconfig(kubeconfig, "http://127.0.0.1:1", user=user)):
            pytest.fail("it was opened")
    assert caught.value.field == "kubeconfig"


async def test_a_url_may_have_a_path(kubeconfig: Path) -> None:
    async with scripted_apiserver(FOUND) as server:
        url = f"http://127.0.0.1:{server.port}/k8s/clusters/c-1/"
        await ask(server, write_kubeconfig(kubeconfig, url))
    assert server.asked[0].target == "/k8s/clusters/c-1/api/v1/namespaces/n/configmaps/a"


async def test_a_token_file_is_read_again_after_a_minute_or_when_it_is_refused(
    kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    now = 1000.0
    monkeypatch.setattr(session_module, "_monotonic", lambda: now)
    async with scripted_apiserver(FOUND) as server:
        config = write_kubeconfig(
            kubeconfig, f"http://127.0.0.1:{server.port}", user={"tokenFile": "token"}
        )
        async with open_kube_api(config) as api:

            async def used() -> str:
                await api.get(CONFIG_MAPS, "a", "n")
                return server.asked[-1].headers["authorization"]

            assert await used() == "Bearer first"
            token.write_text("second")
            assert await used() == "Bearer first"
            now += 61
            assert await used() == "Bearer second"
            # A file that is being written, or not there for a moment.
            token.write_text("")
            now += 61
            assert await used() == "Bearer second"
            token.unlink()
            now += 61
            assert await used() == "Bearer second"
            token.write_text("third")
            server.scripts.clear()
            server.scripts.extend([UNAUTHORIZED, FOUND])
            assert await used() == "Bearer third"


async def test_refused_credentials_are_read_again_once(kubeconfig: Path) -> None:
    async with scripted_apiserver(UNAUTHORIZED) as server:
        url = f"http://127.0.0.1:{server.port}"
        config = write_kubeconfig(kubeconfig, url, user={"token": "old"})
        async with open_kube_api(config) as api:
            with pytest.raises(Unauthorized, match="who are you"):
                await api.get(CONFIG_MAPS, "a", "n")
            assert len(server.asked) == 2
            # The file may have been written anew, whatever kind of credentials it has.
            write_kubeconfig(kubeconfig, url, user={"token": "new"})
            server.scripts.clear()
            server.scripts.extend([UNAUTHORIZED, FOUND])
            await api.get(CONFIG_MAPS, "a", "n")
            assert server.asked[-1].headers["authorization"] == "Bearer new"
            # Or it is broken now.
            write_text(kubeconfig, "{")
            server.scripts.clear()
            server.scripts.extend([UNAUTHORIZED, FOUND])
            with pytest.raises(KubeUnavailable, match="kubeconfig"):
                await api.get(CONFIG_MAPS, "a", "n")
            await api.get(CONFIG_MAPS, "a", "n")
            assert server.asked[-1].headers["authorization"] == "Bearer new"


async def test_credentials_that_many_find_refused_are_read_again_once(kubeconfig: Path) -> None:
    async def refuse(talk: Conversation) -> None:
        # Only when all have asked: who is refused twice does not ask again.
        await until(lambda: len(server.asked) >= 3)
        await UNAUTHORIZED(talk)

    async with scripted_apiserver(refuse, refuse, refuse, FOUND) as server:
        plugin = kubeconfig.parent / "plugin"
        credential = {"apiVersion": "v1", "kind": "ExecCredential", "status": {"token": "t"}}
        write_text(plugin, f"#!/bin/sh\necho x >> runs\necho '{json.dumps(credential)}'\n")
        plugin.chmod(0o700)
        user = {"exec": {"command": "./plugin", "apiVersion": "v1"}}
        config = write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.port}", user=user)
        async with open_kube_api(config) as api, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(api.get, CONFIG_MAPS, "a", "n")
    assert read_text(kubeconfig.parent / "runs").count("x") == 2


def read_text(path: Path) -> str:
    return path.read_text()


async def test_no_credentials_for_a_moment(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted_apiserver(FOUND) as server:
        config = write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.port}")
        async with open_kube_api(config) as api:
            with monkeypatch.context() as patched:
                patched.setattr(official.Configuration, "auth_settings", _empty_file)
                with pytest.raises(KubeUnavailable, match="no credentials: the file is empty"):
                    await api.get(CONFIG_MAPS, "a", "n")
            await api.get(CONFIG_MAPS, "a", "n")


def _empty_file(_configuration: object) -> None:
    """What the package raises has no base class but Exception."""
    raise Exception("the file is empty")  # noqa: TRY002


async def test_a_watch_renews_credentials_too(kubeconfig: Path) -> None:
    async with scripted_apiserver(UNAUTHORIZED, refusal(403, "Forbidden", "no")) as server:
        config = write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.port}")
        async with open_kube_api(config) as api:
            with pytest.raises(Exception, match="no"):
                async with api.watch(CONFIG_MAPS):
                    pytest.fail("it began")
    assert len(server.asked) == 2


async def test_a_token_that_is_no_header(kubeconfig: Path) -> None:
    async with scripted_apiserver(FOUND) as server:
        config = write_kubeconfig(
            kubeconfig, f"http://127.0.0.1:{server.port}", user={"token": "a\r\nX-Evil: 1"}
        )
        with pytest.raises(KubeUnavailable, match="header"):
            await ask(server, config)
    assert not server.asked


async def test_a_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = server_context(authority, tmp_path, "127.0.0.1")
    token = tmp_path / "token"
    token.write_text("first\n")
    account = official.incluster_config
    monkeypatch.setattr(account, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(account, "SERVICE_CERT_FILENAME", write_ca(authority, tmp_path))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    async with scripted_apiserver(FOUND, context=context) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        async with open_kube_api() as api:
            await api.get(CONFIG_MAPS, "a", "n")
            assert server.asked[-1].headers["authorization"].lower() == "bearer first"
            token.write_text("second\n")
            server.scripts.clear()
            server.scripts.extend([UNAUTHORIZED, FOUND])
            await api.get(CONFIG_MAPS, "a", "n")
            assert server.asked[-1].headers["authorization"].lower() == "bearer second"


# -- TLS ---------------------------------------------------------------------------------------------


def server_context(authority: trustme.CA, directory: Path, host: str) -> ssl.SSLContext:
    certificate, key = write_pair(authority, directory, "server", host)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


async def test_certificates_of_client_and_server(kubeconfig: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = server_context(authority, tmp_path, "127.0.0.1")
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = write_pair(authority, tmp_path, "client", "me")
    ca = write_ca(authority, tmp_path)

    def data(path: str) -> str:
        return base64.b64encode(Path(path).read_bytes()).decode()

    async with scripted_apiserver(FOUND, context=context) as server:
        url = f"https://127.0.0.1:{server.port}"
        for user, cluster in (
            (
                {"client-certificate": certificate, "client-key": key},
                {"certificate-authority": ca},
            ),
            (
                {
                    "client-certificate-data": data(certificate),
                    "client-key-data": data(key),
                },
                {"certificate-authority-data": data(ca)},
            ),
        ):
            await ask(server, write_kubeconfig(kubeconfig, url, user=user, cluster=cluster))
        config = write_kubeconfig(kubeconfig, url, cluster={"certificate-authority": ca})
        with pytest.raises(KubeUnavailable):
            await ask(server, config)


def test_what_a_kubeconfig_has_in_itself_gets_no_file(
    kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's root is read-only, and a key is better on no disk."""
    certificate, key = write_pair(trustme.CA(), tmp_path, "client", "me")
    encoded = {
        f"{name}-data": base64.b64encode(Path(path).read_bytes()).decode()
        for name, path in (("client-certificate", certificate), ("client-key", key))
    }

    def refused(*_: object, **__: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.mkstemp", refused)

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    authority = base64.b64encode(trustme.CA().cert_pem.bytes()).decode()
    cluster = {"certificate-authority-data": authority}
    write_kubeconfig(kubeconfig, "https://127.0.0.1:1", user=encoded, cluster=cluster)
    counts = set()
    for _ in range(3):
        # What is known already is the same file.
        sessions = session_module.Sessions(str(kubeconfig))
        assert sessions.current().target("x").context is not None
        sessions.close()
        counts.add(open_files())
    assert len(counts) == 1, counts


async def test_a_certificate_must_fit(kubeconfig: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = server_context(authority, tmp_path, "apiserver.test")
    ca = write_ca(authority, tmp_path)
    async with scripted_apiserver(FOUND, context=context) as server:
        url = f"https://127.0.0.1:{server.port}"
        wrong: tuple[tuple[dict[str, Any], str], ...] = (
            ({"certificate-authority": ca}, "mismatch|doesn't match|not valid for"),
            ({"certificate-authority": write_ca(trustme.CA(), tmp_path, "other")}, "verify failed"),
            ({}, "verify failed"),
        )
        for cluster, text in wrong:
            config = write_kubeconfig(kubeconfig, url, cluster=cluster)
            with pytest.raises(KubeUnavailable, match=text):
                await ask(server, config)
        right: tuple[dict[str, Any], ...] = (
            {"certificate-authority": ca, "tls-server-name": "apiserver.test"},
            {"insecure-skip-tls-verify": True},
        )
        for cluster in right:
            await ask(server, write_kubeconfig(kubeconfig, url, cluster=cluster))


@pytest.mark.parametrize("itself", [False, True])
async def test_whatever_a_kubeconfig_trusts_is_an_authority(
    kubeconfig: Path, tmp_path: Path, itself: bool
) -> None:
    """As in Go: one below the root of a company, or the apiserver's certificate itself."""
    authority = trustme.CA().create_child_ca()
    context = server_context(authority, tmp_path, "127.0.0.1")
    ca = write_ca(authority, tmp_path)
    trusted = str(tmp_path / "server.crt") if itself else ca
    async with scripted_apiserver(FOUND, context=context) as server:
        cluster = {"certificate-authority": trusted}
        config = write_kubeconfig(kubeconfig, f"https://127.0.0.1:{server.port}", cluster=cluster)
        await ask(server, config)
        # What streams connect with.
        target = session_module.Sessions(config).current().target("tests")
        transport = await open_transport(target)
        transport.close()


async def test_a_client_certificate_that_is_renewed_in_place(
    kubeconfig: Path, tmp_path: Path
) -> None:
    authority, strangers = trustme.CA(), trustme.CA()
    context = server_context(authority, tmp_path, "127.0.0.1")
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = write_pair(strangers, tmp_path, "client", "me")
    async with scripted_apiserver(FOUND, context=context) as server:
        config = write_kubeconfig(
            kubeconfig,
            f"https://127.0.0.1:{server.port}",
            user={"client-certificate": certificate, "client-key": key},
            cluster={"certificate-authority": write_ca(authority, tmp_path)},
        )
        async with open_kube_api(config) as api:
            with pytest.raises(KubeUnavailable):
                await api.get(NAMESPACES, "a")
            write_pair(authority, tmp_path, "client", "me")
            await api.get(NAMESPACES, "a")


async def test_a_certificate_of_a_plugin_that_has_ended(kubeconfig: Path, tmp_path: Path) -> None:
    """Who insists on certificates answers nothing, not even 401."""
    authority, strangers = trustme.CA(), trustme.CA()
    context = server_context(authority, tmp_path, "127.0.0.1")
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    plugin, said = tmp_path / "plugin", tmp_path / "said"
    plugin.write_text(f"#!/bin/sh\ncat {said}\n")
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    version = "client.authentication.k8s.io/v1"

    def say(issuer: trustme.CA, until: str) -> None:
        certificate, key = write_pair(issuer, tmp_path, "client", "me")
        status = {
            "clientCertificateData": Path(certificate).read_text(),
            "clientKeyData": Path(key).read_text(),
            "expirationTimestamp": until,
        }
        said.write_text(
            json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": status})
        )

    async with scripted_apiserver(FOUND, context=context) as server:
        config = write_kubeconfig(
            kubeconfig,
            f"https://127.0.0.1:{server.port}",
            user={"exec": {"command": "./plugin", "apiVersion": version}},
            cluster={"certificate-authority": write_ca(authority, tmp_path)},
        )
        say(strangers, "2020-01-01T00:00:00Z")
        async with open_kube_api(config) as api:
            with pytest.raises(KubeUnavailable):
                await api.get(NAMESPACES, "a")
            say(authority, "2100-01-01T00:00:00Z")
            await api.get(NAMESPACES, "a")
            # This one holds, and nobody asks for another.
            said.write_text("nothing")
            await api.get(NAMESPACES, "a")
            assert (await api.target()).context is not None


# -- proxies -----------------------------------------------------------------------------------------


async def test_a_proxy_of_the_kubeconfig(kubeconfig: Path) -> None:
    async with scripted_apiserver(FOUND) as proxy:
        config = write_kubeconfig(
            kubeconfig,
            "http://apiserver.test",
            cluster={"proxy-url": f"http://127.0.0.1:{proxy.port}"},
        )
        await ask(proxy, config)
    assert proxy.asked[0].target.startswith("http://apiserver.test/api/v1/")


@pytest.mark.parametrize("server", ["http://apiserver.test", "https://apiserver.test"])
async def test_the_ipv6_address_of_a_proxy(kubeconfig: Path, server: str) -> None:
    config = write_kubeconfig(kubeconfig, server, cluster={"proxy-url": "http://[::1]:1"})
    async with open_kube_api(config) as api:
        # Not as a name.
        with pytest.raises(KubeUnavailable, match="cannot connect to ::1:1"):
            await api.get(NAMESPACES, "a")


@pytest.mark.parametrize("environment", [False, True])
async def test_a_proxy_that_wants_credentials(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, environment: bool
) -> None:
    async with scripted_apiserver(FOUND) as proxy:
        url = f"http://m%40e:s%3Acret@127.0.0.1:{proxy.port}"
        if environment:
            monkeypatch.setenv("HTTP_PROXY", url)
        config = write_kubeconfig(
            kubeconfig, "http://apiserver.test", cluster={} if environment else {"proxy-url": url}
        )
        await ask(proxy, config)
    # As Go has it: m@e:s:cret
    assert proxy.asked[0].headers["proxy-authorization"] == "Basic bUBlOnM6Y3JldA=="


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("socks5://me:secret@p.example", r"not an HTTP proxy: socks5://p\.example$"),
        ("me:secret@p.example:3128", "proxy-url has no scheme, such as http://$"),
    ],
)
async def test_a_password_of_a_proxy_is_not_told(kubeconfig: Path, url: str, message: str) -> None:
    config = write_kubeconfig(kubeconfig, "https://127.0.0.1:1", cluster={"proxy-url": url})
    with pytest.raises(ConfigError, match=message):
        async with open_kube_api(config):
            pytest.fail("it was opened")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
async def test_a_proxy_of_the_environment(
    kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    authority = trustme.CA()
    context = server_context(authority, tmp_path, "apiserver.test")
    connected: list[bytes] = []

    async with scripted_apiserver(FOUND, context=context) as server, scripted_apiserver() as proxy:

        async def tunnel(stream: trio.SocketStream) -> None:
            connected.append(await stream.receive_some(65536))
            upstream = await trio.open_tcp_stream("127.0.0.1", server.port)
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
            async with upstream, trio.open_nursery() as nursery:
                nursery.start_soon(copy, upstream, stream)
                await copy(stream, upstream)
                nursery.cancel_scope.cancel()

        proxy.on_accept = tunnel
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        config = write_kubeconfig(
            kubeconfig,
            "https://apiserver.test:6443",
            cluster={"certificate-authority": write_ca(authority, tmp_path)},
        )
        await ask(server, config)
        assert connected[0].startswith(b"CONNECT apiserver.test:6443 ")
        monkeypatch.setenv("NO_PROXY", ".test")
        with pytest.raises(KubeUnavailable, match=r"cannot look up apiserver\.test"):
            await ask(server, config)


async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
    try:
        while data := await source.receive_some(65536):
            await target.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
