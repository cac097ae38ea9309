"""The demo as a person runs it, and that nothing is left when it ends."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from clusterproxy.cli.children import LOOPBACK, Program, StageError, keep_running
from clusterproxy.cli.demo_stage import GREETING, HUB_LINK, NAMESPACE, PORTS, output_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.programs

FIRST_PORT = 28090
# `make test` builds it; there it must get through, too.
GO_CLIENT = Path(__file__).parents[2] / "build" / "democlient"
COMMAND = (sys.executable, "-m", "clusterproxy", "demo", f"--port={FIRST_PORT}")


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Give the demo a temporary directory of its own, and look for remains afterwards."""
    yield os.environ | {"TMPDIR": str(tmp_path)}
    assert list(tmp_path.iterdir()) == []
    assert not Path("/run/netns", NAMESPACE).exists()
    assert HUB_LINK not in (name for _, name in socket.if_nameindex())
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as probe:
            assert probe.connect_ex((LOOPBACK, port)) != 0, port


def test_without_a_terminal_it_shows_the_requests_and_exits(environment: dict[str, str]) -> None:
    with_go = ("--go-client", str(GO_CLIENT)) if GO_CLIENT.exists() else ()
    demo = subprocess.run(
        (*COMMAND, *with_go),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stdout.count(f"✔ {GREETING}") == (2 if with_go else 1)
    assert "✘" not in demo.stdout
    if "no network namespace" not in demo.stdout:
        assert "No route to host, as it should be" in demo.stdout


def test_without_namespace_and_curl_it_says_so(environment: dict[str, str], tmp_path: Path) -> None:
    demo = subprocess.run(
        COMMAND,
        env=environment | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "there is no ip command" in demo.stdout
    assert "Python's standard library asks" in demo.stdout
    assert f"✔ {GREETING}" in demo.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_it_stays_until_a_signal(
    environment: dict[str, str], number: signal.Signals
) -> None:
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        COMMAND, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    ) as demo:
        os.close(terminal)
        output = b""
        while b"Ctrl-C stops everything" not in output:
            output += os.read(controller, 4096)
        text = re.sub(r"\x1b\[[0-9;]*m", "", output.decode())
        if "HTTPS-proxy" in output_of("curl", "--version"):
            # The printed line works while the demo runs.
            lines = [line[4:].strip() for line in text.splitlines() if line.startswith("  $ ")]
            directory = next(line for line in lines if line.startswith("cd "))
            request = next(line for line in lines if "--proxytunnel" in line)
            answer = subprocess.run(
                ("sh", "-c", f"{directory} && {request}"),
                capture_output=True,
                timeout=20,
                check=True,
            )
            assert answer.stdout.decode().strip() == GREETING
        demo.send_signal(number)
        assert demo.wait(timeout=20) == 0
    os.close(controller)


def test_a_signal_while_it_starts_leaves_nothing(environment: dict[str, str]) -> None:
    with subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        while b"What runs where" not in demo.stdout.readline():
            pass
        demo.send_signal(signal.SIGTERM)
        demo.stdout.read()
        assert demo.wait(timeout=20) == 1


def test_a_taken_port_is_named(environment: dict[str, str]) -> None:
    with socket.create_server((LOOPBACK, FIRST_PORT + 3)):
        demo = subprocess.run(
            COMMAND, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert demo.returncode == 1
    assert f"port {FIRST_PORT + 3}: Address already in use" in demo.stderr
    assert "--port" in demo.stderr


async def test_a_program_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    program = Program(
        name="short-lived",
        command=(sys.executable, "-c", "import sys; sys.exit('no such flag')"),
    )
    with (
        trio.fail_after(20),
        pytest.raises(StageError, match="short-lived: ended with status 1\n  no such flag"),
    ):
        await keep_running(program, tmp_path)
