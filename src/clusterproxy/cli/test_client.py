"""``/proxy-test-client``: konnectivity's test client, requests through a proxy server (upstream: cmd/test-client/main.go)."""

from __future__ import annotations

import logging
import signal
import ssl
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import quote as quote_path

import attrs
import h11

from clusterproxy.errors import ClusterProxyError, ConfigError
from clusterproxy.gotext import quote

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import BOOL, INT, STRING
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    import trio

_SUMMARY: Final = "A gRPC proxy Client, primarily used to test the Kubernetes gRPC Proxy Server."
# Responses are told from here on, and this is the default, as upstream.
_VERBOSITY: Final = 4
_READ_BYTES: Final = 65_536

_logger = logging.getLogger("clusterproxy.cli.test_client")


@attrs.frozen(kw_only=True)
class RequestsConfig:
    """What the test client is told."""

    client_cert: str = ""
    client_key: str = ""
    ca_cert: str = ""
    request_proto: str = "http"
    request_path: str = "success"
    request_host: str = "localhost"
    request_port: int = 8000
    proxy_host: str = "localhost"
    proxy_port: int = 8090
    proxy_uds: str = ""
    mode: str = "grpc"
    user_agent: str = "test-client"
    test_requests: int = 1
    test_delay: int = 0
    after_delay: int = 0
    close_idle_conn: bool = True
    log_format: str = "text"
    verbosity: int = _VERBOSITY

    @property
    def service(self) -> str:
        """``HOST:PORT`` of what is asked, with brackets around an IPv6 address."""
        host = f"[{self.request_host}]" if ":" in self.request_host else self.request_host
        return f"{host}:{self.request_port}"

    def validate(self) -> None:
        """Check that the values fit together.

        Raises:
          ConfigError: for the first that does not, in upstream's words.
        """
        if problem := self._problem():
            raise ConfigError(*problem)

    def _problem(self) -> tuple[str, str] | None:
        for name, other in (("key", "cert"), ("cert", "key")):
            path = getattr(self, f"client_{name}")
            if path and not getattr(self, f"client_{other}"):
                text = (
                    f"cannot have client {other} empty when client {name} is set to {quote(path)}"
                )
                return f"client-{other}", text
        if self.request_proto not in ("http", "https"):
            text = f"request protocol must be set to either 'http' or 'https' not {quote(self.request_proto)}"
            return "request-proto", text
        if self.mode not in ("grpc", "http-connect"):
            return (
                "mode",
                f"mode must be set to either 'grpc' or 'http-connect' not {quote(self.mode)}",
            )
        for flag, port, what in (
            ("request-port", self.request_port, "request"),
            ("proxy-port", self.proxy_port, "proxy"),
        ):
            if port > 49151:
                text = f"please do not try to use ephemeral port {port} for the {what} server port"
                return flag, text
        if self.proxy_uds:
            return self._uds_problem()
        if self.proxy_port < 1024:
            text = f"please do not try to use reserved port {self.proxy_port} for the proxy server port"
            return "proxy-port", text
        return self._number_problem()

    def _uds_problem(self) -> tuple[str, str] | None:
        if self.proxy_host:
            return "proxy-host", 'please set proxy host to "" when using UDS'
        if self.proxy_port:
            return "proxy-port", "please set proxy server port to 0 when using UDS"
        if self.client_key or self.client_cert or self.ca_cert:
            text = (
                f"please do not set cert materials when using UDS, key = {self.client_key}, "
                f"cert = {self.client_cert}, CA = {self.ca_cert}"
            )
            return "proxy-uds", text
        return self._number_problem()

    def _number_problem(self) -> tuple[str, str] | None:
        if self.test_requests < 1:
            text = f"please do not ask for fewer than 1 test request({self.test_requests})"
            return "test-requests", text
        for flag, seconds in (("test-delay", self.test_delay), ("after-delay", self.after_delay)):
            if seconds < 0:
                return flag, f"please do not ask for less than a 0 second delay({seconds})"
        return None


_flag = partial(flag_of, RequestsConfig)


class _RequestError(ClusterProxyError):
    """A request came to nothing."""


async def run_requests(config: RequestsConfig) -> int:
    """Send all requests at once, each through a tunnel of its own; return 0, or 1 if one failed, or at SIGINT and SIGTERM."""
    import trio

    status = 1
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def end_by_signal() -> None:
                await anext(signals)
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_by_signal)
            failures = await _Requests(config).run()
            if len(failures) > 1:
                _logger.error("Requests failed: %d", len(failures))
            status = 1 if failures else 0
            nursery.cancel_scope.cancel()
    return status


class _Requests:
    """The requests of one run, and when they may let go of their connections."""

    def __init__(self, config: RequestsConfig) -> None:
        import trio

        self._config = config
        self._unanswered = set(range(1, config.test_requests + 1))
        self._all_answered = trio.Event()
        self._over = trio.Event()
        self._failures: list[str] = []

    async def run(self) -> list[str]:
        """Return the texts of those that failed."""
        import trio

        async with trio.open_nursery() as nursery:
            for number in tuple(self._unanswered):
                nursery.start_soon(self._request, number)
            await self._all_answered.wait()
            await trio.sleep(self._config.after_delay)
            self._over.set()
        return self._failures

    async def _request(self, number: int) -> None:
        try:
            await self._ask(number)
        except ClusterProxyError as error:
            text = str(error)
            _logger.error("Failed request %s", text)  # noqa: TRY400 - its traceback helps nobody
            self._failures.append(text)
        self._answered(number)

    async def _ask(self, number: int) -> None:
        import trio

        from clusterproxy.client import ClientTLS, Server, open_tunnel

        config = self._config
        server = Server(host=config.proxy_host, port=config.proxy_port, path=config.proxy_uds)
        tls = ClientTLS(ca_cert=config.ca_cert, cert=config.client_cert, key=config.client_key)
        async with open_tunnel(
            server,
            mode="grpc" if config.mode == "grpc" else "http-connect",
            tls=None if server.path else tls,
            reusable=False,
            user_agent=config.user_agent,
        ) as tunnel:
            stream = await tunnel.dial(config.service)
            try:
                body = await _get(config, stream)
            except (trio.BrokenResourceError, OSError, h11.RemoteProtocolError) as error:
                raise _RequestError(f"failed to send request to client, got {error!r}") from error
            _logger.debug("HTML Response:\n%s\n", body.decode(errors="replace"))
            if number != config.test_requests:
                await trio.sleep(config.test_delay)
            self._answered(number)
            if not config.close_idle_conn:
                await self._over.wait()

    def _answered(self, number: int) -> None:
        self._unanswered.discard(number)
        if not self._unanswered:
            self._all_answered.set()


async def _get(config: RequestsConfig, stream: trio.abc.Stream) -> bytes:
    """Return the body of the answer, whatever its status.

    Raises:
      trio.BrokenResourceError, OSError, h11.RemoteProtocolError: there is no whole answer.
    """
    import trio

    if config.request_proto == "https":
        context = ssl.create_default_context()
        host = config.request_host
        stream = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
    protocol = h11.Connection(h11.CLIENT)
    path = quote_path(f"/{config.request_path.lstrip('/')}")
    headers = [("Host", config.service), ("User-Agent", "proxy-test-client")]
    request = h11.Request(method="GET", target=path, headers=headers)
    await stream.send_all(
        (protocol.send(request) or b"") + (protocol.send(h11.EndOfMessage()) or b"")
    )
    body = bytearray()
    while not isinstance(event := protocol.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Data):
            body += event.data
        elif event is h11.NEED_DATA:
            protocol.receive_data(bytes(await stream.receive_some(_READ_BYTES)))
    return bytes(body)


def _flags() -> Iterator[Flag]:
    yield _flag("client-cert", STRING, "Certificate file for connections to the proxy server.")
    yield _flag("client-key", STRING, "Key file for connections to the proxy server.")
    yield _flag(
        "ca-cert", STRING, "File of the CAs that the proxy server's certificate comes from."
    )
    yield _flag("request-proto", STRING, "'http' or 'https'.")
    yield _flag("request-path", STRING, "Path of the request.")
    yield _flag("request-host", STRING, "Host to send it to, as the agent sees it.")
    yield _flag("request-port", INT, "Port there.")
    yield _flag("proxy-host", STRING, "Host of the proxy server.")
    yield _flag("proxy-port", INT, "Port of the proxy server.")
    yield _flag("proxy-uds", STRING, "Unix socket of the proxy server, instead of host and port.")
    yield _flag("mode", STRING, "What the proxy server was started with: 'grpc' or 'http-connect'.")
    yield _flag("user-agent", STRING, "User agent to tell the proxy server.")
    yield _flag("test-requests", INT, "How many requests to send, all at once.")
    yield _flag("test-delay", INT, "Seconds for which connections stay open after their answer.")
    yield _flag("after-delay", INT, "Seconds to wait after the last answer.")
    yield _flag("close-idle-conn", BOOL, "Close each connection after its answer, not at the end.")
    yield Flag(
        name="enable-http2-healthchecks",
        kind=BOOL,
        default=True,
        usage="Requests are HTTP/1.1 here.",
        no_effect=True,
    )
    for flag in LOG_FLAGS:
        yield attrs.evolve(flag, default=_VERBOSITY) if flag.name == "v" else flag


def requests_flags() -> FlagSet:
    """The flags of the test client."""
    return FlagSet("proxy-test-client", _SUMMARY, _flags())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test client with the flags in *argv* (``sys.argv``) and return its exit status."""
    flags = requests_flags()

    def build(parsed: Parsed) -> RequestsConfig:
        return RequestsConfig(**parsed.fields(flags))

    def load() -> Callable[[RequestsConfig], Awaitable[int]]:
        return run_requests

    return run_program(flags, "proxy client options", build, load, argv)
