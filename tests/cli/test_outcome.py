from __future__ import annotations

from typing import TYPE_CHECKING

from clusterproxy.cli.outcome import UNREACHABLE, Failure, plain, tell

if TYPE_CHECKING:
    import pytest


def test_a_peers_text_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "refused\x1b]0;owned\x07\r\nfine \u2028größe"
    assert plain(text) == "refused�]0;owned���fine �größe"
    tell(text)
    assert capsys.readouterr().err == plain(text) + "\n"
    failure = Failure(UNREACHABLE, text)
    assert failure.exit_code == UNREACHABLE
    assert failure.message == plain(text)
