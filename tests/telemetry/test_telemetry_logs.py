from __future__ import annotations

import io
import json
import logging
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.telemetry.logs import JsonFormatter, TextFormatter, configure_logging, log_context

if TYPE_CHECKING:
    from collections.abc import Generator

logger = logging.getLogger("clusterproxy.test")
TIME = 1_795_639_561.123


@pytest.fixture(autouse=True)
def _logging_restored() -> Generator[None]:
    root, ours = logging.getLogger(), logging.getLogger("clusterproxy")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()  # basicConfig(force=True) would close pytest's
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {
            "name": "clusterproxy.x",
            "levelname": "INFO",
            "msg": message,
            "created": TIME,
            "msecs": 123.0,
        }
    )
    vars(made).update(extra)
    return made


def test_text_is_one_line_with_fields() -> None:
    line = TextFormatter().format(
        record(
            "agent connected", agent_id="a1", peer="[::1]:80", reason='he said "no"', empty="", n=3
        )
    )
    assert line == (
        "2026-11-25T20:46:01.123Z INFO clusterproxy.x agent connected "
        'agent_id=a1 peer=[::1]:80 reason="he said \\"no\\"" empty="" n=3'
    )


def test_json_is_one_object_with_fields_that_cannot_fake_the_fixed_ones() -> None:
    line = JsonFormatter().format(
        record("hallo\nwörld", level="fake", time="fake", connection_id=7, where=b"x")
    )
    assert json.loads(line) == {
        "time": "2026-11-25T20:46:01.123Z",
        "level": "info",
        "logger": "clusterproxy.x",
        "message": "hallo\nwörld",
        "connection_id": 7,
        "where": "b'x'",
    }
    assert "\n" not in line


@given(st.text(), st.text(), st.text())
def test_no_peer_can_start_a_line_of_its_own(message: str, key: str, value: str) -> None:
    extra = {"x" + key: value}
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record(message.replace("%", ""), **extra))
        assert len(line.splitlines()) == 1
        assert line.isprintable()


def test_control_characters_and_foreign_letters() -> None:
    line = TextFormatter().format(record("a\x1b[2Jb é", city="Köln am Rhein", bad="é\u202e"))
    assert line.endswith(r'clusterproxy.x a\x1b[2Jb é city="Köln am Rhein" bad="\u00e9\u202e"')


def test_a_traceback_is_one_block_or_one_field() -> None:
    error = ValueError("first\nERROR forged")
    failed = record("call failed", exc_info=(type(error), error, None))
    head, *traceback = TextFormatter().format(failed).split("\n")
    assert head.endswith("clusterproxy.x call failed")
    assert traceback == ["    ValueError: first", "    ERROR forged"]
    fields = json.loads(JsonFormatter().format(failed))
    assert fields["exception"].endswith("ValueError: first\nERROR forged")


@pytest.mark.parametrize(
    ("verbosity", "levels"), [(0, ["info"]), (3, ["info"]), (4, ["debug", "info"])]
)
def test_verbosity(verbosity: int, levels: list[str]) -> None:
    stream = io.StringIO()
    configure_logging(format="json", verbosity=verbosity, stream=stream)
    logger.debug("packet")
    logger.info("started")
    logging.getLogger("hpack").info("a header")
    logging.getLogger("hpack").warning("a warning")
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == [
        *levels,
        "warning",
    ]


def test_stderr_is_the_default_and_a_second_call_replaces_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(format="json", verbosity=0, stream=io.StringIO())
    configure_logging(format="text", verbosity=0)
    logger.warning("seen %d", 1, extra={"agent_id": "a"})
    out, err = capsys.readouterr()
    assert not out
    assert err.endswith("Z WARNING clusterproxy.test seen 1 agent_id=a\n")
    assert err.count("\n") == 1


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="log format must be one of text, json, not 'xml'"):
        configure_logging(format="xml", verbosity=0)


async def test_context_follows_tasks_and_ends_with_its_block() -> None:
    stream = io.StringIO()
    configure_logging(format="text", verbosity=0, stream=stream)

    async def connection(number: int) -> None:
        with log_context(connection_id=number):
            await trio.lowlevel.checkpoint()
            logger.info("open", extra={"dial_id": 5})

    with log_context(agent_id="a", connection_id=0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection, 1)
            nursery.start_soon(connection, 2)
        logger.info("idle")
    logger.info("gone")
    lines = [line.partition("clusterproxy.test ")[2] for line in stream.getvalue().splitlines()]
    assert sorted(lines[:2]) == [
        "open agent_id=a connection_id=1 dial_id=5",
        "open agent_id=a connection_id=2 dial_id=5",
    ]
    assert lines[2:] == ["idle agent_id=a connection_id=0", "gone"]
