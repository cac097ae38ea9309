"""The config file of the client commands: named contexts, each of which says how a server is reached."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Never, TypeGuard

import click

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MODES: Final = ("grpc", "http-connect")

# Relative ones are meant relative to the config file.
_FILES: Final = ("ca-cert", "cert", "key")

#: What a context may say; each is the name of an option, too.
KEYS: Final = ("server", "mode", *_FILES, "server-name", "admin")

_TOP: Final = ("contexts", "current-context")


class ConfigFileError(click.ClickException):
    """The config file cannot be used; the message names the file and the line."""

    exit_code = 2


def default_path() -> Path:
    """Where the config file is if nobody says (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(base) if base.startswith("/") else Path.home() / ".config"
    return home / "clusterproxy" / "config.toml"


def load_context(path: Path, name: str, *, required: bool) -> Mapping[str, str]:
    """Return what a context says, by the names of :data:`KEYS`.

    Args:
      name: which; empty is the file's ``current-context``, and nothing if it names none.
      required: whether the file must be there.

    Raises:
      ConfigFileError: the file cannot be read or is wrong somewhere, or has no such context.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required or name:
            message = f"{path}: there is no such config file, which --config or --context ask for"
            raise ConfigFileError(message) from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigFileError(f"{path}: cannot be read: {reason}") from error
    return _File(path, text).context(name)


def _is_table(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


class _File:
    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()
        try:
            self._document: Mapping[str, object] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found = re.fullmatch(
                r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error)
            )
            what, line, column = found.groups() if found else (str(error), None, None)
            where = f"{path}:{line}:{column}" if line else f"{path}:{max(1, len(self._lines))}"
            raise ConfigFileError(f"{where}: not TOML: {what}") from error

    def context(self, name: str) -> Mapping[str, str]:
        """Check the whole file, then pick the context."""
        self._check_keys(self._document, _TOP, "")
        current = self._document.get("current-context", "")
        contexts = self._document.get("contexts", {})
        if not isinstance(current, str):
            self._fail("current-context", "", "must be a text, the name of a context")
        if not _is_table(contexts):
            self._fail("contexts", "", "must be tables: [contexts.NAME]")
        checked = {key: self._checked(key, value) for key, value in contexts.items()}
        wanted = name or current
        if not wanted:
            return {}
        if wanted not in checked:
            known = ", ".join(sorted(checked)) or "none"
            message = f"there is no [contexts.{wanted}] here; there is {known}"
            if name:
                raise ConfigFileError(f"{self._path}: {message}")
            self._fail("current-context", "", message)
        return checked[wanted]

    def _checked(self, name: str, table: object) -> Mapping[str, str]:
        section = f"contexts.{name}"
        if not _is_table(table):
            self._fail(name, "contexts", f"must be a table: [{section}]")
        self._check_keys(table, KEYS, section)
        values: dict[str, str] = {}
        for key, value in table.items():
            if not isinstance(value, str):
                self._fail(key, section, "must be a text in quotes")
            if key == "mode" and value not in MODES:
                self._fail(key, section, f"must be one of {', '.join(MODES)}, not {value!r}")
            values[key] = value
            if key in _FILES and value:
                values[key] = str(self._path.parent / Path(value).expanduser())
        return values

    def _check_keys(
        self, table: Mapping[str, object], known: Collection[str], section: str
    ) -> None:
        for key in table:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(known)}"
                self._fail(key, section, f"unknown key; {hint}")

    def _fail(self, key: str, section: str, what: str) -> Never:
        raise ConfigFileError(f"{self._path}:{self._line(key, section)}: {key}: {what}")

    def _line(self, key: str, section: str) -> int:
        """Return the line of a key: tomllib does not tell it. As close as it gets in unusual files."""
        header = re.compile(rf"\s*\[+\s*{re.escape(section)}\s*\]")
        word = re.compile(rf"(?<![\w-]){re.escape(key)}(?![\w-])")
        start = next((at for at, line in enumerate(self._lines) if header.match(line)), 0)
        found = (
            at
            for at, line in enumerate(self._lines)
            if at >= start and word.search(line.partition("#")[0])
        )
        return next(found, start) + 1
