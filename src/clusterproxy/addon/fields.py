"""Reads fields of an object that may be of any shape, and notes what is wrong with them. Pure."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

_INT32: Final = 2**31 - 1

_LABEL: Final = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"

# The names that objects may have.
NAMESPACE: Final = re.compile(_LABEL)
SUBDOMAIN: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*")
SERVICE: Final = re.compile("[a-z]([-a-z0-9]*[a-z0-9])?")

_E = TypeVar("_E", bound=StrEnum)


@attrs.frozen
class Problem:
    """Something in a configuration that cannot be used.

    Attributes:
      field: its path, such as ``spec.proxyServer.replicas``.
      message: what is wrong, and what to write instead.
    """

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class Fields:
    """The fields of one object of the configuration. What is wrong with them is noted, and a default taken."""

    def __init__(self, value: object, path: str, problems: list[Problem]) -> None:
        self.given = value is not None
        self.path = path
        self._problems = problems
        self._values: dict[object, Any] = {}
        # Then nothing more is said of what is in it.
        self._unusable = False
        if isinstance(value, dict):
            self._values = cast("dict[object, Any]", value)
        elif value is not None:
            self._unusable = True
            self.problem("", f"must be an object, not {shown(value)}")

    def problem(self, name: str, message: str) -> None:
        self._problems.append(Problem(self._path(name) or "the object", message))

    def _path(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path and name else self.path or name

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def part(self, name: str) -> Fields:
        return self.element(name, self._values.get(name))

    def element(self, called: str, value: object) -> Fields:
        """Return the fields of *value*, which is *called* so in this object."""
        return Fields(value, self._path(called), self._problems)

    def text(self, name: str, default: str = "", *, required: bool = False) -> str:
        value = self._values.get(name)
        if value is None or value == "":
            if required and not self._unusable:
                self.problem(name, "is required and must not be empty")
            return default
        if not isinstance(value, str):
            self.problem(name, f"must be a string, not {shown(value)}")
            return default
        return value

    def name(self, name: str, default: str, pattern: re.Pattern[str], longest: int) -> str:
        """Return the name of an object of the apiserver."""
        text = self.text(name, default)
        if text and (len(text) > longest or not pattern.fullmatch(text)):
            letter = "a letter" if pattern is SERVICE else "a letter or digit"
            dots = "'-' and '.'" if pattern is SUBDOMAIN else "and '-'"
            self.problem(
                name,
                f"{shown(text)} is not a valid name: use up to {longest} lower case letters, digits, "
                f"{dots}, beginning with {letter} and ending with a letter or digit",
            )
        return text

    def integer(self, name: str, default: int, lowest: int, highest: int = _INT32) -> int:
        value = self._values.get(name)
        if value is None:
            return default
        # A JSON number with a point may still be whole.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(name, f"must be a whole number, not {shown(value)}")
            return default
        if not lowest <= value <= highest:
            self.problem(name, f"must be between {lowest} and {highest}, not {shown(value)}")
            return default
        return value

    def choice(self, name: str, default: _E) -> _E:
        text = self.text(name, default)
        try:
            return type(default)(text)
        except ValueError:
            known = ", ".join(type(default))
            self.problem(name, f"must be one of {known}, not {shown(text)}")
            return default

    def items(self, name: str) -> Iterator[tuple[str, object]]:
        """Yield the elements of a list, each with what it is called in this object."""
        value = self._values.get(name)
        if isinstance(value, list):
            for place, element in enumerate(cast("list[object]", value)):
                yield f"{name}[{place}]", element
        elif value is not None:
            self.problem(name, f"must be a list, not {shown(value)}")

    def texts(self, name: str) -> tuple[str, ...]:
        found: list[str] = []
        for called, element in self.items(name):
            if isinstance(element, str):
                found.append(element)
            else:
                self.problem(called, f"must be a string, not {shown(element)}")
        return tuple(found)

    def entries(self, name: str) -> Iterator[tuple[str, object]]:
        """Yield the keys and values of an object."""
        for key, value in self.part(name)._values.items():  # noqa: SLF001  of the same class
            yield str(key), value

    def mapping(self, name: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in self.entries(name):
            if isinstance(value, str):
                found[key] = value
            else:
                self.problem(f"{name}[{shown(key)}]", f"must be a string, not {shown(value)}")
        return found


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
