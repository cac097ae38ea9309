"""Programs that a command starts and stops: the demo's and the benchmark's."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, Final
from urllib.request import urlopen

import attrs
import click
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

LOOPBACK: Final = "127.0.0.1"
READY_TIMEOUT_S: Final = 30


class StageError(click.ClickException):
    """The programs cannot be had, or one of them is gone; the message says why."""


@attrs.frozen(kw_only=True)
class Program:
    """A child process that runs as long as the command."""

    name: str
    command: tuple[str, ...]
    inherited: Sequence[int] = ()
    """File descriptors that it gets under their numbers."""


async def _stop(process: trio.Process) -> None:
    # An agent drains at the first signal and leaves at the second.
    for _ in range(2):
        process.terminate()
        with trio.move_on_after(1):
            await process.wait()
            return
    process.kill()


async def keep_running(
    program: Program,
    directory: Path,
    *,
    task_status: trio.TaskStatus[trio.Process] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run *program* in *directory*, with its output in a file there; cancellation stops it.

    Raises:
        StageError: it ended by itself.
    """
    log = directory / f"{program.name.replace(', ', '-')}.log"
    with log.open("wb") as output:
        # Its own process group: the terminal's Ctrl-C is for the command, which stops its children.
        ended = await trio.run_process(
            program.command,
            cwd=directory,
            stdout=output,
            stderr=output,
            check=False,
            deliver_cancel=_stop,
            process_group=0,
            pass_fds=program.inherited,
            task_status=task_status,
        )
    raise StageError(f"{program.name}: ended with status {ended.returncode}{_last_words(log)}")


def _last_words(log: Path) -> str:
    return "".join(f"\n  {line}" for line in log.read_text(errors="replace").splitlines()[-5:])


def agent_is_connected(health_port: int) -> bool:
    """Ask a server's health port on loopback whether an agent is connected."""
    try:
        with urlopen(f"http://{LOOPBACK}:{health_port}/readyz", timeout=2) as answer:
            return bool(answer.status == http.client.OK)
    except OSError:  # not listening, or 5xx
        return False


async def wait_for_agent(is_ready: Callable[[], bool], server: str, log: Path) -> None:
    """Wait until *is_ready*, which is called in a thread, says that the agent has reached *server*.

    Raises:
        StageError: it takes too long; the message ends with that of the agent's *log*.
    """
    with trio.move_on_after(READY_TIMEOUT_S):
        # Other processes get ready: there is no event to wait for.
        while not await trio.to_thread.run_sync(is_ready):  # noqa: ASYNC110
            await trio.sleep(0.1)
        return
    raise StageError(
        f"no agent reached the {server} server within {READY_TIMEOUT_S} s{_last_words(log)}"
    )


def write_certificates(
    directory: Path, command: str, authorities: Mapping[str, Mapping[str, str]]
) -> None:
    """Write ``NAME-ca.pem`` of each CA, and for each of its identities one PEM file with its key.

    Args:
        command: for whom; an extra of the same name installs what is needed.
        authorities: CA -> name of the file -> identity.

    Raises:
        StageError: trustme is not installed.
    """
    try:
        import trustme
    except ImportError as error:
        message = f"the {command} makes its certificates with trustme: pip install 'clusterproxy[{command}]'"
        raise StageError(message) from error

    for ca_name, identities in authorities.items():
        ca = trustme.CA(organization_name=f"clusterproxy {command}, {ca_name} CA")
        ca.cert_pem.write_to_path(str(directory / f"{ca_name}-ca.pem"))
        for name, identity in identities.items():
            path = directory / f"{name}.pem"
            path.touch(mode=0o600)
            ca.issue_cert(identity).private_key_and_cert_chain_pem.write_to_path(str(path))
