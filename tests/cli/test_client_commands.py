"""What the commands for people say about wrong options, where no server is needed to tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from clusterproxy.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def complaint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Complaint:
    for name in ("SERVER", "MODE", "CA_CERT", "CERT", "KEY", "SERVER_NAME", "TIMEOUT", "CONFIG"):
        monkeypatch.delenv(f"CLUSTERPROXY_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return Complaint(tmp_path)


class Complaint:
    """Runs a command that cannot go on, and returns its exit status and last line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, arguments)
        assert isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output.splitlines()[-1].removeprefix("Error: ")


@pytest.mark.parametrize("command", [("forward", "cluster1:80"), ("socks",), ("http-proxy",)])
def test_listeners_name_the_file_that_cannot_be_used(
    complaint: Complaint, command: tuple[str, ...]
) -> None:
    path = complaint.directory / "local.sock"
    listening = (*command, f"--listen=unix:{path}")
    status, text = complaint(*listening, "--server=hub:8090", "--ca-cert=/nowhere.pem")
    assert status == 2
    assert text == "--ca-cert: CA certificates /nowhere.pem: No such file or directory"
    status, text = complaint(*listening, "--server=hub")
    assert status == 2
    assert text == "--server: 'hub' is no server: HOST:PORT or unix:///PATH is needed"
    assert not path.exists()


@pytest.mark.parametrize("value", ["nan", "-nan", "0", "-1"])
def test_timeouts_that_are_none(complaint: Complaint, value: str) -> None:
    status, text = complaint("dial", "cluster1:80", "--server=hub:8090", f"--timeout={value}")
    assert status == 2
    assert text.startswith("Invalid value for '--timeout'")


@pytest.mark.parametrize("value", ["nan", "inf", "1e300", "0"])
def test_intervals_that_are_none(complaint: Complaint, value: str) -> None:
    status, text = complaint("status", "--admin=hub:8095", f"--interval={value}")
    assert status == 2
    assert text.startswith("Invalid value for '--interval'")


@pytest.mark.parametrize("address", ["[::1", "hub:65536", "hub:admin"])
def test_admin_ports_that_are_none(complaint: Complaint, address: str) -> None:
    status, text = complaint("status", f"--admin={address}")
    assert status == 3
    assert text.startswith(f"admin port {address} of the proxy server: ")
