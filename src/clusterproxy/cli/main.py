"""``clusterproxy``: every program under one name."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from clusterproxy import __version__

from .outcome import tell


class _GoCommand(click.Command):
    """A program that reads its own arguments, in Go's way, which click would get wrong."""

    def __init__(self, name: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help, add_help_option=False)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return []

    def invoke(self, ctx: click.Context) -> None:
        module = importlib.import_module(f"clusterproxy.cli.{str(self.name).replace('-', '_')}")
        ctx.exit(module.main(ctx.args))


# Command -> module, where it is called as the module is but for dashes. Imported when asked for: the
# proxies' images have no need of them, and one need not wait for all of them to run one.
_COMMANDS = {
    name: name.replace("-", "_")
    for name in ("bench", "completion", "demo", "dial", "forward", "http-proxy", "socks", "status")
}


class _Programs(click.Group):
    """Imports commands when they are asked for."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as click has it
        """Run a command; a full disk, say, is told in one line."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            tell(f"Error: {error}")
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = _COMMANDS.get(cmd_name)
        if name is None:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(f"clusterproxy.cli.{name}"), name)
        return command


@click.group(
    cls=_Programs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
First steps:
  clusterproxy demo                          see it at work on this machine
  export CLUSTERPROXY_SERVER=hub:8090 CLUSTERPROXY_CA_CERT=ca.crt
  export CLUSTERPROXY_CERT=client.crt CLUSTERPROXY_KEY=client.key
  clusterproxy forward cluster1:443 --listen 8443
  clusterproxy COMMAND --help                options and examples

\b
Instead of the environment, a config file ~/.config/clusterproxy/config.toml:
  current-context = "hub"
  [contexts.hub]
  server = "hub:8090"
  ca-cert = "ca.crt"
  cert = "client.crt"
  key = "client.key\"""",
)
@click.version_option(__version__, prog_name="clusterproxy")
def main() -> None:
    """Open Cluster Management's Cluster Proxy: services behind agents, reached through a server.

    The programs are server, agent, addon-manager, controllers, addon-agent, user-server and service-proxy; the other commands are for
    people.
    """


main.add_command(_GoCommand("server", "The proxy server, as proxy-server."))
main.add_command(_GoCommand("agent", "The proxy agent, as proxy-agent."))
main.add_command(_GoCommand("addon-manager", "The hub's manager of the add-on."))
main.add_command(_GoCommand("controllers", "Keeps the service proxies' certificate."))
main.add_command(_GoCommand("user-server", "HTTPS for users to all managed clusters."))
main.add_command(
    _GoCommand("service-proxy", "HTTPS to a managed cluster's apiserver and services.")
)
main.add_command(_GoCommand("addon-agent", "The managed cluster's add-on agent."))
main.add_command(_GoCommand("test-client", "Requests through a proxy server, to test it."))
main.add_command(_GoCommand("test-server", "Pages on localhost, for the test client."))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
