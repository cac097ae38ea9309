"""How client commands end: exit statuses, and the one message that says why."""

from __future__ import annotations

from typing import Final

import click

#: Exit statuses, as docs/cli.md tells them. click ends with 2 for wrong usage by itself.
DIAL_FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
BROKEN: Final = 4
CANNOT_LISTEN: Final = 5
INTERRUPTED: Final = 130


def plain(text: object) -> str:
    """Return a text without what a terminal would take for more than text: peers choose some of it."""
    return "".join(one if one.isprintable() else "�" for one in str(text))


def tell(text: object) -> None:
    """Say something in one line on stderr."""
    click.echo(plain(text), err=True)


class Failure(click.ClickException):
    """Ends the command with an exit status and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(plain(message))
        # click reads it from the instance.
        self.exit_code = status  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
