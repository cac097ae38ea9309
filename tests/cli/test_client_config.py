"""Where client commands take the server and its files from, and what is said about wrong config files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner, Result

from clusterproxy.cli.connection_options import (
    ConnectionOptions,
    ServerAccess,
    connection_options,
    server_access,
)

if TYPE_CHECKING:
    from pathlib import Path

FILE = """\
current-context = "hub"

[contexts.hub]
server = "hub:8090"
ca-cert = "certs/ca.crt"   # beside this file
cert = "/etc/client.crt"
key = "~/client.key"
server-name = "proxy.example"

[contexts.edge]
server = "unix:///run/proxy.sock"
mode = "http-connect"
"""


class Shell:
    """Runs a command that only says how it would reach the server."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / ".config/clusterproxy/config.toml"
        self.path.parent.mkdir(parents=True)
        self.environment = {"HOME": str(home), "XDG_CONFIG_HOME": ""}

    def run(self, *arguments: str, **environment: str) -> Result:
        @click.command()
        @connection_options
        def show(**options: Any) -> None:
            self.seen = server_access(**options)

        variables = {f"CLUSTERPROXY_{name}": value for name, value in environment.items()}
        return CliRunner(env=self.environment | variables).invoke(show, arguments)

    def access(self, *arguments: str, **environment: str) -> ServerAccess:
        result = self.run(*arguments, **environment)
        assert result.exit_code == 0, result.output
        return self.seen

    def complaint(self, *arguments: str, **environment: str) -> str:
        """The last line of what is said."""
        result = self.run(*arguments, **environment)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        return result.output.splitlines()[-1].removeprefix("Error: ")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    for name in ConnectionOptions.__annotations__:
        monkeypatch.delenv(f"CLUSTERPROXY_{name.upper()}", raising=False)
    return Shell(tmp_path)


def test_options_alone(shell: Shell) -> None:
    assert shell.access("--server=a:1") == ServerAccess(
        server="a:1", mode="grpc", ca_cert="", cert="", key="", server_name="", timeout_s=30
    )
    access = shell.access(
        "--server=a:1", "--mode=http-connect", "--ca-cert=ca", "--cert=c", "--key=k",
        "--server-name=n", "--timeout=1.5",
    )  # fmt: skip
    assert access == ServerAccess(
        server="a:1",
        mode="http-connect",
        ca_cert="ca",
        cert="c",
        key="k",
        server_name="n",
        timeout_s=1.5,
    )


def test_the_key_may_be_in_the_certificates_file(shell: Shell) -> None:
    assert shell.access("--server=a:1", "--cert=both.pem").key == "both.pem"


def test_the_current_context_and_another(shell: Shell) -> None:
    shell.path.write_text(FILE)
    assert shell.access() == ServerAccess(
        server="hub:8090",
        mode="grpc",
        ca_cert=str(shell.path.parent / "certs/ca.crt"),
        cert="/etc/client.crt",
        key=str(shell.home / "client.key"),
        server_name="proxy.example",
        timeout_s=30,
    )
    edge = ServerAccess(
        server="unix:///run/proxy.sock",
        mode="http-connect",
        ca_cert="",
        cert="",
        key="",
        server_name="",
        timeout_s=30,
    )
    assert shell.access("--context=edge") == edge
    assert shell.access(CONTEXT="edge") == edge
    assert shell.access("--context=edge", CONTEXT="hub") == edge


def test_options_before_environment_before_file(shell: Shell) -> None:
    shell.path.write_text(FILE)
    access = shell.access("--server=option:1", SERVER="env:1", CA_CERT="env.crt")
    assert (access.server, access.ca_cert, access.cert) == (
        "option:1",
        "env.crt",
        "/etc/client.crt",
    )


def test_another_file(shell: Shell, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('current-context = "x"\n[contexts.x]\nserver = "x:1"\nca-cert = "ca"\n')
    assert shell.access(f"--config={other}").ca_cert == str(tmp_path / "ca")
    assert shell.access(CONFIG=str(other)).server == "x:1"


def test_the_file_of_xdg(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "xdg/clusterproxy/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(FILE)
    shell.environment["XDG_CONFIG_HOME"] = str(tmp_path / "xdg")
    assert shell.access().server == "hub:8090"


def test_nobody_says_which_server(shell: Shell) -> None:
    text = shell.complaint()
    for way in ("--server HOST:PORT", "CLUSTERPROXY_SERVER", str(shell.path)):
        assert way in text
    shell.path.write_text(FILE.replace("current-context", "# current-context"))
    assert "Which server?" in shell.complaint()


def test_a_file_or_context_that_is_asked_for_must_be_there(shell: Shell) -> None:
    assert "/nowhere: there is no such config file" in shell.complaint("--config=/nowhere")
    assert "there is no such config file" in shell.complaint("--context=hub")
    shell.path.write_text(FILE)
    text = shell.complaint("--context=hubb")
    assert text == f"{shell.path}: there is no [contexts.hubb] here; there is edge, hub"


def test_a_file_that_cannot_be_read(shell: Shell) -> None:
    shell.path.write_bytes(b"\xff\xfe")
    assert shell.complaint("--server=a:1") == f"{shell.path}: cannot be read: it is no UTF-8 text"
    shell.path.unlink()
    shell.path.mkdir()
    assert "cannot be read: Is a directory" in shell.complaint("--server=a:1")


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ('current-context = "hub\n', "1:23", "not TOML: Illegal character"),
        ("[contexts.hub]\nserver = hub:1\n", "2:10", "not TOML: Invalid value"),
        ("[contexts.hub\n", "1:14", "not TOML: Expected ']'"),
        ("a = [1,\n2", "2", "not TOML: "),
        ('curent-context = "hub"\n', "1", "curent-context: unknown key; did you mean current-context?"),
        ("x = 1\n", "1", "x: unknown key; there is contexts, current-context"),
        ("\n\ncurrent-context = 3\n", "3", "current-context: must be a text"),
        ('# nothing here\ncurrent-context = "no"\n', "2", "there is no [contexts.no] here; there is none"),
        ('contexts = "hub"\n', "1", "contexts: must be tables: [contexts.NAME]"),
        ('[contexts]\nhub = "x"\n', "2", "hub: must be a table: [contexts.hub]"),
        (
            '[contexts.a]\nserver = "a:1"\n\n[contexts.b]\nserver = "b:1"\nca_cert = "x"\n',
            "6",
            "ca_cert: unknown key; did you mean ca-cert?",
        ),
        ('[contexts.a]\nserver = "s"\n[contexts.b]\nserver = 8090\n', "4", "server: must be a text"),
        ('[contexts.a]\nmode = "GRPC"\n', "2", "mode: must be one of grpc, http-connect, not 'GRPC'"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_where(shell: Shell, text: str, line: str, complaint: str) -> None:
    shell.path.write_text(text)
    # Even if options say everything: a broken file should not wait to be found.
    said = shell.complaint("--server=a:1")
    assert said.startswith(f"{shell.path}:{line}: "), said
    assert complaint in said


@pytest.mark.parametrize("arguments", [["--mode=udp"], ["--timeout=0"], ["--timeout=x"], ["--no"]])
def test_wrong_options(shell: Shell, arguments: list[str]) -> None:
    assert shell.complaint("--server=a:1", *arguments)
