"""``clusterproxy completion``: what shells need to complete its commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    short_help="Completion for bash, zsh and fish.",
    epilog="""\b
Examples:
  source <(clusterproxy completion bash)
  source <(clusterproxy completion zsh)
  clusterproxy completion fish | source
To have it always, put the line into ~/.bashrc, ~/.zshrc or
~/.config/fish/config.fish.""",
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in a shell."""
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101  click's own
    # The variable is the one that click looks for when a program of this name starts.
    script = kind(ctx.find_root().command, {}, "clusterproxy", "_CLUSTERPROXY_COMPLETE")
    click.echo(script.source())
