"""``clusterproxy``: every program under one name."""

from __future__ import annotations

import importlib

import click

from clusterproxy import __version__


class _GoCommand(click.Command):
    """A program that reads its own arguments, in Go's way, which click would get wrong."""

    def __init__(self, name: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help, add_help_option=False)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return []

    def invoke(self, ctx: click.Context) -> None:
        module = importlib.import_module(f"clusterproxy.cli.{self.name}")
        ctx.exit(module.main(ctx.args))


class _Programs(click.Group):
    """Imports the demo when it is asked for: the proxies' images have no need of it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "demo"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "demo":
            command: click.Command = importlib.import_module("clusterproxy.cli.demo").demo
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Programs)
@click.version_option(__version__, prog_name="clusterproxy")
def main() -> None:
    """Open Cluster Management's Cluster Proxy: konnectivity proxy server and agent."""


main.add_command(_GoCommand("server", "The proxy server, as proxy-server."))
main.add_command(_GoCommand("agent", "The proxy agent, as proxy-agent."))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
