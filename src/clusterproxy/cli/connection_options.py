"""How client commands are told which server to use and how: options, environment, config file."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, TypeVar, cast

import attrs
import click

from .client_config import MODES, default_path, load_context

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

_C = TypeVar("_C", bound="Callable[..., object]")

_PREFIX: Final = "CLUSTERPROXY_"

_ADDRESS: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[!-9;-~]+):[0-9]{1,5}")

# For the sake of completion; whether it is there is asked where it is read.
_FILE: Final = click.Path(dir_okay=False)


@attrs.frozen(kw_only=True)
class ServerAccess:
    """How a proxy server is reached. Empty texts stand for defaults.

    Attributes:
      server: "HOST:PORT", or "unix:///PATH".
      timeout_s: for reaching the server, and again for each dial.
    """

    server: str
    mode: Literal["grpc", "http-connect"]
    ca_cert: str
    cert: str
    key: str
    server_name: str
    timeout_s: float


def no_nan(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """Return an option's value; NaN is within all bounds, for no comparison finds it outside."""
    if math.isnan(value):
        raise click.BadParameter("nan is no number of seconds")
    return value


class NoServerError(click.UsageError):
    """Nobody says which server."""


class ContextOptions(TypedDict):
    """The values of :func:`context_options`."""

    config: str | None
    context: str | None


class ConnectionOptions(ContextOptions):
    """The values of :func:`connection_options`."""

    server: str | None
    mode: str | None
    ca_cert: str | None
    cert: str | None
    key: str | None
    server_name: str | None
    timeout: float


def environment_option(name: str, text: str, **extra: Any) -> Callable[[_C], _C]:  # noqa: ANN401
    """Return an option that the environment may give as well, as ``CLUSTERPROXY_NAME``."""
    variable = _PREFIX + name.upper().replace("-", "_")
    return click.option(f"--{name}", envvar=variable, show_envvar=True, help=text, **extra)


def context_options(command: _C) -> _C:
    """Give a command the options that choose a context of the config file."""
    for option in (
        environment_option("context", "Context of the config file to use.", metavar="NAME"),
        environment_option(
            "config",
            "Config file, if not ~/.config/clusterproxy/config.toml.",
            metavar="FILE",
            type=_FILE,
        ),
    ):
        command = option(command)
    return command


def connection_options(command: _C) -> _C:
    """Give a command the options that :func:`server_access` reads."""
    command = context_options(command)
    # From the last to the first, as decorators are.
    for option in (
        environment_option(
            "timeout",
            "For reaching the server, and again for each dial.",
            type=click.FloatRange(min=0, min_open=True),
            callback=no_nan,
            default=30.0,
            show_default=True,
            metavar="SECONDS",
        ),
        environment_option(
            "server-name", "Name in the server's certificate, if not HOST.", metavar="NAME"
        ),
        environment_option(
            "key", "Key of that certificate, if not in the same file.", metavar="FILE", type=_FILE
        ),
        environment_option(
            "cert", "Certificate to show to the server.", metavar="FILE", type=_FILE
        ),
        environment_option(
            "ca-cert",
            "CAs of the server's certificate, if not the system's.",
            metavar="FILE",
            type=_FILE,
        ),
        environment_option(
            "mode", "What the server speaks.  [default: grpc]", type=click.Choice(MODES)
        ),
        environment_option(
            "server", "The proxy server: HOST:PORT or unix:///PATH.", metavar="ADDRESS"
        ),
    ):
        command = option(command)
    return command


def service_address(text: str) -> str:
    """Return a parameter that names a service, if it does.

    Raises:
      click.BadParameter: it is not HOST:PORT.
    """
    if not _ADDRESS.fullmatch(text):
        raise click.BadParameter(f"{text!r} is no service: HOST:PORT is needed")
    return text


def context_values(options: ContextOptions) -> Mapping[str, str]:
    """Return what the chosen context of the config file says.

    Raises:
      ConfigFileError: the file is wrong or lacks the context.
    """
    given = options["config"]
    path = Path(given) if given else default_path()
    return load_context(path, options["context"] or "", required=bool(given))


def server_access(**options: Unpack[ConnectionOptions]) -> ServerAccess:
    """Put together what options and environment say (click does that), and the config file below them.

    Raises:
      NoServerError: nobody says which server.
      ConfigFileError: the file is wrong or lacks the context.
    """
    file = context_values(options)

    def value(given: str | None, key: str) -> str:
        return given or file.get(key, "")

    server = value(options["server"], "server")
    if not server:
        raise NoServerError(
            "Which server? Give --server HOST:PORT, set CLUSTERPROXY_SERVER, or name one in "
            f"{options['config'] or default_path()}."
        )
    cert = value(options["cert"], "cert")
    return ServerAccess(
        server=server,
        mode=cast('Literal["grpc", "http-connect"]', value(options["mode"], "mode") or "grpc"),
        ca_cert=value(options["ca_cert"], "ca-cert"),
        cert=cert,
        key=value(options["key"], "key") or cert,
        server_name=value(options["server_name"], "server-name"),
        timeout_s=options["timeout"],
    )
