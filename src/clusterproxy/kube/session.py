"""Who a client is and where its apiserver.

Of the ``kubernetes`` package the configuration is used (kubeconfig files with exec plugins and token files, a pod's service account, proxies of
the environment) and the urllib3 pool that it makes, not its models: objects stay as their JSON.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from base64 import b64encode
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic as _monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast
from urllib.parse import quote, unquote_to_bytes, urlsplit
from urllib.request import getproxies

import attrs
import urllib3
from urllib3.exceptions import InsecureRequestWarning

from clusterproxy.errors import ConfigError

from .exchange import VERIFY_FLAGS, bare_host, install
from .official import Configuration, RESTClientObject, incluster_config, kube_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_log = logging.getLogger("clusterproxy.kube")

# They have no types.
_in_cluster: Any = incluster_config
_files: Any = kube_config

# Kept for ever, for nobody knows who has a path of one: a process sees few certificates in its life.
_in_memory: dict[bytes, int] = {}
_in_memory_lock = threading.Lock()


def _file_in_memory(content: str | bytes, *_: object, **__: object) -> str:
    """Return the path of a file with this content, of a certificate or key that the kubeconfig has in itself.

    A pod's root may be read-only, with no place for files; and a key is better on no disk.
    """
    data = content.encode() if isinstance(content, str) else content
    with _in_memory_lock:
        if data not in _in_memory:
            _in_memory[data] = file = os.memfd_create("kubeconfig")
            with open(file, "wb", closefd=False) as written:
                written.write(data)
        return f"/proc/self/fd/{_in_memory[data]}"


_files._create_temp_file_with_content = _file_in_memory  # noqa: SLF001  it takes no other

# What names of headers may have beside letters and digits (RFC 9110 section 5.6.2).
_IN_NAMES: Final = "!#$&'*+-.^_`|~"

# As client-go (transport/token_source.go: cachingTokenSource).
_TOKEN_PERIOD_S: Final = 60.0

#: As many calls run at once.
POOL_SIZE: Final = 16
# Idle connections that are kept. A watch has one as well; what is too much is closed, of which urllib3 warns.
_IDLE: Final = 64


Identity: TypeAlias = tuple[tuple[str, str], ...]
"""Headers, their values in latin-1."""


@attrs.frozen(eq=False)
class Target:
    """What is needed to connect to an apiserver without the pool, for streams that are none of HTTP.

    Attributes:
      path: in front of those of the API, mostly empty.
      context: None for plain HTTP.
      server_name: in the apiserver's certificate.
      authorization: the value of the header, None for none.
      identity: headers that say as whom to act, if not as who one is.
      proxy: host and port of an HTTP proxy, None for none; *proxy_headers* are for it.
      user_agent: what to call oneself.
    """

    host: str
    port: int
    path: str
    context: ssl.SSLContext | None
    server_name: str
    authorization: str | None = attrs.field(repr=False)
    identity: Identity
    proxy: tuple[str, int] | None
    proxy_headers: dict[str, str] = attrs.field(repr=False)
    user_agent: str


@attrs.frozen(eq=False)
class Session:
    """What requests are made with, until credentials have to be read anew."""

    host: str
    pool: urllib3.PoolManager
    _configuration: Configuration
    #: As :attr:`Target.identity`.
    identity: Identity = ()
    _ends: datetime | None = None

    @property
    def over(self) -> bool:
        """Whether its certificate, which a plugin has made, has ended: it takes another one to connect."""
        return self._ends is not None and datetime.now(UTC) >= self._ends

    def authorization(self) -> str | None:
        """Return the value of the header, None for none. Reads files or runs a plugin when it is time to.

        Raises:
          ValueError: that failed.
        """
        try:
            settings: Any = self._configuration.auth_settings().get("BearerToken")
        except Exception as error:
            raise ValueError(f"no credentials: {error}") from error
        value = settings and settings["value"]
        # Files end in a newline, which a header must not have.
        return str(value).strip() if value else None

    def target(self, user_agent: str) -> Target:
        """Return how to connect without the pool. Reads files, as :meth:`authorization` does.

        Raises:
          ValueError: credentials or certificates cannot be read, or the proxy is one that speaks TLS itself.
        """
        parts = urlsplit(self.host)
        secure = parts.scheme == "https"
        proxy = self.pool.proxy if isinstance(self.pool, urllib3.ProxyManager) else None
        if proxy is not None and proxy.scheme != "http":
            raise ValueError(f"streams through a proxy with TLS are not supported: {proxy}")
        try:
            context = _context(self._configuration) if secure else None
        except OSError as error:
            raise ValueError(f"certificates of the kubeconfig: {error}") from error
        return Target(
            host=parts.hostname or "",
            port=parts.port or (443 if secure else 80),
            path=parts.path,
            context=context,
            server_name=self._configuration.tls_server_name or parts.hostname or "",
            authorization=self.authorization(),
            identity=self.identity,
            proxy=None if proxy is None else (bare_host(str(proxy.host)), proxy.port or 80),
            proxy_headers=dict(getattr(self.pool, "proxy_headers", None) or {}),
            user_agent=user_agent,
        )


class Sessions:
    """The session of now. All methods block, and may be called in any thread.

    Args:
      kubeconfig: a file, or several with colons between; without one the pod's service account.

    Raises:
      ConfigError: it is missing or cannot be used, or this is no pod.
    """

    def __init__(self, kubeconfig: str) -> None:
        self._kubeconfig = kubeconfig
        self._lock = threading.Lock()
        self._session = _open(kubeconfig)

    def current(self) -> Session:
        """Return the session to make a request with."""
        return self._session

    def renew(self, used: Session) -> None:
        """Read everything anew, because the apiserver does not know *used* any more, or that is over.

        Raises:
          ConfigError: the kubeconfig is broken now; the session stays.
        """
        with self._lock:
            if self._session is not used:
                return
            self._session = _open(self._kubeconfig)
        # A client certificate counts for the connection that it was shown on.
        used.pool.clear()

    def close(self) -> None:
        """Close idle connections."""
        self._session.pool.clear()


def _open(kubeconfig: str) -> Session:
    configuration = Configuration()
    try:
        pool, of_file = _load(kubeconfig, configuration)
    except ConfigError:
        raise
    except Exception as error:
        # A file may be of any shape, and the loader checks little.
        where = (
            f"kubeconfig {kubeconfig}" if kubeconfig else "no kubeconfig given, and not in a pod"
        )
        message = str(error) or type(error).__name__
        raise ConfigError("kubeconfig", f"{where}: {message}") from error
    install(pool)
    if not configuration.verify_ssl:
        _log.warning("the certificate of the apiserver is not verified, as the kubeconfig wants it")
        urllib3.disable_warnings(InsecureRequestWarning)
    return Session(
        configuration.host.rstrip("/"), pool, configuration, of_file.identity, of_file.ends
    )


@attrs.frozen(kw_only=True)
class _OfFile:
    """What the loader does not tell, or not in every version.

    Attributes:
      ends: when a plugin's certificate does. Of a plugin's token the loader takes care itself. A server that insists on
        certificates ends the handshake, and so never answers that it does not know one.
    """

    proxy: str = ""
    identity: Identity = ()
    ends: datetime | None = None


def _load(kubeconfig: str, configuration: Configuration) -> tuple[urllib3.PoolManager, _OfFile]:
    of_file = _OfFile()
    if kubeconfig:
        of_file = _load_file(kubeconfig, configuration)
    else:
        _in_cluster.load_incluster_config(client_configuration=configuration)
    parts = urlsplit(configuration.host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("kubeconfig", f"no URL of an apiserver: {configuration.host!r}")
    # The constructor looked before it knew the URL.
    configuration.proxy = of_file.proxy or _proxy_of_environment(parts.scheme, parts.hostname)
    configuration.no_proxy = None if of_file.proxy else getproxies().get("no")
    if configuration.proxy:
        configuration.proxy, configuration.proxy_headers = _proxy_and_headers(configuration.proxy)
    if parts.scheme == "https":
        # As each connection will do, to be told now what is wrong.
        _context(configuration)
    configuration.connection_pool_maxsize = _IDLE
    return RESTClientObject(configuration).pool_manager, of_file


def _context(configuration: Configuration) -> ssl.SSLContext:
    """Return the context of one connection, from the files as they are now; raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # As :class:`clusterproxy.kube.exchange._TlsConnection`.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= VERIFY_FLAGS
    if configuration.ssl_ca_cert:
        context.load_verify_locations(configuration.ssl_ca_cert)
    else:
        context.load_default_certs()
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    return context


def _proxy_of_environment(scheme: str, host: str) -> str | None:
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    # As Go (golang.org/x/net/http/httpproxy).
    if proxy is None or host == "localhost" or host.startswith("127.") or host == "::1":
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_and_headers(url: str) -> tuple[str, dict[str, str]]:
    """Return a proxy's URL without credentials, which urllib3 does not look for there, and what is for the proxy alone."""
    # Errors have the URL without them, too.
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ConfigError("kubeconfig", "proxy-url has no scheme, such as http://")
    authority, slash, path = rest.partition("/")
    credentials, at, address = authority.rpartition("@")
    proxy = f"{scheme}{separator}{address}{slash}{path}"
    if scheme not in ("http", "https"):
        raise ConfigError("kubeconfig", f"not an HTTP proxy: {proxy}")
    if not at:
        return proxy, {}
    user, _, password = credentials.partition(":")
    pair = unquote_to_bytes(user) + b":" + unquote_to_bytes(password)
    return proxy, {"Proxy-Authorization": f"Basic {b64encode(pair).decode()}"}


def _load_file(kubeconfig: str, configuration: Any) -> _OfFile:  # noqa: ANN401  its hook has no type
    """Load a kubeconfig."""
    merged = _files.KubeConfigMerger(kubeconfig).config
    if merged is None:
        raise ConfigError("kubeconfig", f"kubeconfig {kubeconfig}: there is no such file")
    loader = _files.KubeConfigLoader(merged, config_base_path=None)
    loader.load_and_set(configuration)
    context = loader.current_context["context"]
    user = _entry(merged, "users", "user", context)
    if user is not None:
        if "exec" in user and not (configuration.api_key or configuration.cert_file):
            # The loader only logs what went wrong.
            raise ConfigError(
                "kubeconfig", f"kubeconfig {kubeconfig}: the exec plugin gave nothing"
            )
        if user.safe_get("tokenFile"):
            path = Path(user.path or kubeconfig).expanduser().parent / str(user["tokenFile"])
            configuration.refresh_api_key_hook = _token_file(path)
    cluster = _entry(merged, "clusters", "cluster", context)
    ends: datetime | None = getattr(loader, "expiry", None)
    return _OfFile(
        proxy=str(cluster.safe_get("proxy-url") or "") if cluster is not None else "",
        identity=() if user is None else tuple(_identity(user.value)),
        ends=None if hasattr(loader, "token") else ends,
    )


def _identity(user: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield what client-go's ``transport/round_trippers.go`` (``NewImpersonatingRoundTripper``) sends."""
    name, uid = user.get("as"), user.get("as-uid")
    groups = _texts(user, "as-groups")
    found: object = user.get("as-user-extra") or {}
    if not isinstance(found, dict):
        raise ConfigError("kubeconfig", "as-user-extra is no map")
    extra = cast("dict[str, object]", found)
    if not name:
        if uid or groups or extra:
            raise ConfigError(
                "kubeconfig", "as-uid, as-groups and as-user-extra are of no use without as"
            )
        return
    yield "Impersonate-User", _carried(name)
    if uid:
        yield "Impersonate-Uid", _carried(uid)
    for group in groups:
        yield "Impersonate-Group", _carried(group)
    for key in extra:
        for value in _texts(extra, key):
            # What the name of no header has is escaped, and the percent sign.
            yield f"Impersonate-Extra-{quote(key, safe=_IN_NAMES)}", _carried(value)


def _texts(where: Mapping[str, object], name: str) -> list[object]:
    found: object = where.get(name) or []
    if not isinstance(found, list):
        raise ConfigError("kubeconfig", f"{name} is no list")
    return cast("list[object]", found)


def _carried(text: object) -> str:
    """Return UTF-8 as a header has it, whose characters are bytes."""
    return str(text).encode().decode("latin-1")


def _entry(merged: Any, plural: str, kind: str, context: Any) -> Any:  # noqa: ANN401
    """Return the node of the context's user or cluster, None without one."""
    name = context.get(kind)
    if not name or not merged.safe_get(plural):
        return None
    entry = merged[plural].get_with_name(name, safe=True)
    return entry[kind] if entry is not None and entry.safe_get(kind) else None


def _token_file(path: Path) -> Callable[[Configuration], None]:
    """Return the hook that reads a token file again each minute; the loader reads it once."""
    due = 0.0

    def refresh(configuration: Configuration) -> None:
        nonlocal due
        if _monotonic() < due:
            return
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            _log.warning("token file not read, the old token stays in use: %s", error)
        else:
            if token:
                configuration.api_key["BearerToken"] = f"Bearer {token}"
        due = _monotonic() + _TOKEN_PERIOD_S

    return refresh
