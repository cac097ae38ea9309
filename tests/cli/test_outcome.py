from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from clusterproxy.cli.main import main
from clusterproxy.cli.outcome import UNREACHABLE, Failure, plain, tell


def test_a_peers_text_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "refused\x1b]0;owned\x07\r\nfine \u2028größe"
    assert plain(text) == "refused�]0;owned���fine �größe"
    tell(text)
    assert capsys.readouterr().err == plain(text) + "\n"
    failure = Failure(UNREACHABLE, text)
    assert failure.exit_code == UNREACHABLE
    assert failure.message == plain(text)


@pytest.mark.parametrize("words", [["server", "--help"], ["dial", "--help"], ["version"]])
def test_a_full_disk_is_told_in_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            main(words, prog_name="clusterproxy")
        # What could not be written is not tried again when the file is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert ended.value.code == 1
    assert capsys.readouterr().err.lower() == "error: [errno 28] no space left on device\n"


def test_help_that_nobody_reads_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            main(["agent", "--help"], prog_name="clusterproxy")
    assert ended.value.code == 1
    assert not capsys.readouterr().err
