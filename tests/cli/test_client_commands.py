"""What the commands for people say about wrong options, where no server is needed to tell."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from clusterproxy.cli import dial as dialling
from clusterproxy.cli.main import main
from clusterproxy.cli.outcome import BROKEN, Failure


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


@pytest.mark.parametrize("address", ["[::1", "hub:65536", "hub:admin", "https://hub:8095"])
def test_admin_ports_that_are_none(complaint: Complaint, address: str) -> None:
    status, text = complaint("status", f"--admin={address}")
    assert status == 3
    assert text.startswith(f"admin port {address} of the proxy server: ")


def test_dial_says_what_is_wrong_with_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(Failure, match="cannot write the output: No space left") as caught:
            dialling._write(b"answer")
    assert caught.value.exit_code == BROKEN
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(Failure, match="cannot write the output: it is closed"):
        dialling._write(b"answer")


def test_dial_says_what_is_wrong_with_its_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "only written").open("wb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(Failure, match="cannot read the input: Bad file") as caught:
            dialling._read()
    assert caught.value.exit_code == BROKEN
    monkeypatch.setattr(sys, "stdin", None)
    assert dialling._read() == b""


def test_whoever_reads_no_more_is_no_failure_of_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(BrokenPipeError):
            dialling._write(b"answer")
