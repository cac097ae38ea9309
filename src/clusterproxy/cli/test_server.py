"""``/proxy-test-server``: konnectivity's test server, a few pages on loopback (upstream: cmd/test-server/main.go)."""

from __future__ import annotations

import contextlib
import logging
import signal
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.errors import ConfigError

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import GO_UINT, INT
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    import trio

    from clusterproxy.http1 import Request, Response

_SUMMARY: Final = "A test http server, url determines behavior for certain tests."
_SUCCESS: Final = b"""<!DOCTYPE html>
<html>
    <head>
        <title>Success</title>
    </head>
    <body>
        <p>The success test page!</p>
    </body>
</html>"""
_DEFAULT_SLEEP_S: Final = 10
# As net/http.Server.MaxHeaderBytes is set there.
_MAX_HEADER_BYTES: Final = 1 << 20

_logger = logging.getLogger("clusterproxy.cli.test_server")


@attrs.frozen(kw_only=True)
class PagesConfig:
    """What the test server is told."""

    server_port: int = 8000
    log_format: str = "text"
    verbosity: int = 0

    def validate(self) -> None:
        """Check the port.

        Raises:
          ConfigError: it may be somebody else's.
        """
        kind = (
            "ephemeral"
            if self.server_port > 49151
            else "reserved"
            if self.server_port < 1024
            else ""
        )
        if kind:
            text = f"please do not try to use {kind} port {self.server_port} for the server port"
            raise ConfigError("server-port", text)


async def run_pages(config: PagesConfig) -> int:
    """Serve until SIGINT or SIGTERM and return 0; what is open then is cut off.

    Raises:
      ConfigError: the port is taken.
    """
    import trio

    from clusterproxy.transport.listener import listen_tcp

    with (
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        listen_tcp("127.0.0.1", config.server_port, "server-port") as sock,
    ):
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve_pages, [listener])
            _logger.info("Starting test http server for client requests.")
            await anext(signals)
            _logger.info("Shutting down server.")
            nursery.cancel_scope.cancel()
    return 0


async def serve_pages(stream: trio.abc.Stream) -> None:
    """Serve one connection to its end; cancellation cuts it off."""
    import trio

    from clusterproxy.http1 import serve_http

    # Of a page that closes it.
    with contextlib.suppress(trio.ClosedResourceError):
        await serve_http(stream, partial(_answer, stream), max_header_bytes=_MAX_HEADER_BYTES)


async def _answer(stream: trio.abc.Stream, request: Request) -> Response:
    import trio

    from clusterproxy.http1 import Response

    if request.path == "/sleep":
        await trio.sleep(_sleep_s(request.query.get("time", [])))
    elif request.path == "/close":
        await stream.aclose()
    elif request.path == "/error":
        return Response.text("Internal Server Error\n", 500)
    elif request.path != "/success":
        return Response.text("404 page not found\n", 404)
    return Response(200, _SUCCESS, "text/html; charset=utf-8")


def _sleep_s(times: list[str]) -> int:
    if len(times) != 1:
        _logger.warning(
            "Sleep time(%s) was length %d defaulting to sleep %d.",
            times,
            len(times),
            _DEFAULT_SLEEP_S,
        )
        return _DEFAULT_SLEEP_S
    try:
        return max(INT.parse(times[0]), 0)
    except ValueError as error:
        _logger.warning(
            "Failed to parse sleep time (%s), default to %d, got error %s.",
            times[0],
            _DEFAULT_SLEEP_S,
            error,
        )
        return _DEFAULT_SLEEP_S


def _flags() -> Iterator[Flag]:
    yield flag_of(PagesConfig, "server-port", GO_UINT, "Port on localhost to listen on.")
    yield from LOG_FLAGS


def pages_flags() -> FlagSet:
    """The flags of the test server."""
    return FlagSet("proxy-test-server", _SUMMARY, _flags())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test server with the flags in *argv* (``sys.argv``) and return its exit status."""
    flags = pages_flags()

    def build(parsed: Parsed) -> PagesConfig:
        return PagesConfig(**parsed.fields(flags))

    def load() -> Callable[[PagesConfig], Awaitable[int]]:
        return run_pages

    return run_program(flags, "server options", build, load, argv)
