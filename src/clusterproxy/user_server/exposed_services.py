"""Which services users may reach, as a ConfigMap lists them. Pure; the only module that imports yaml.

Source: upstream ``pkg/userserver/service_allowlist.go``, and the strict reading of sigs.k8s.io/yaml. The list is read as
events of the parser: nothing is built of it that it could make large or deep.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import attrs
import yaml

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import quote
from clusterproxy.kube.resource import map_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clusterproxy.kube.resource import Object

    from .target import Target

_FIELDS: Final = ("namespace", "service", "port", "protocol")
_REQUIRED: Final = ("namespace", "service")
_FLAG: Final = "exposed-services-configmap"

_STRING: Final = "tag:yaml.org,2002:str"
_INT: Final = "tag:yaml.org,2002:int"
_NULL: Final = "tag:yaml.org,2002:null"
# YAML has others, which mean something else than they look like.
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]*")

_MAX_SHOWN: Final = 64

# libyaml's, which is faster, where PyYAML was built with it.
_Loader: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@attrs.frozen(kw_only=True)
class ExposedService:
    """An entry of the list. An empty port or protocol stands for all."""

    namespace: str
    service: str
    port: str = ""
    protocol: str = ""

    def matches(self, target: Target) -> bool:
        """Whether the entry is for this service: names are compared to the letter."""
        return (
            (self.namespace, self.service) == (target.namespace, target.service)
            and self.port in {"", target.port}
            and self.protocol in {"", target.proto}
        )


class ExposedServices:
    """A list of them; an empty one exposes nothing."""

    def __init__(self, entries: tuple[ExposedService, ...] = ()) -> None:
        self.entries = entries
        self._by_name: dict[tuple[str, str], list[ExposedService]] = {}
        for entry in entries:
            self._by_name.setdefault((entry.namespace, entry.service), []).append(entry)

    def allows(self, target: Target) -> bool:
        """Whether the service is exposed."""
        found = self._by_name.get((target.namespace, target.service), ())
        return any(entry.matches(target) for entry in found)


def entry_for(target: Target) -> str:
    """Return the line of YAML that exposes a service, with this port and protocol alone."""
    return (
        f"- {{namespace: {quote(target.namespace)}, service: {quote(target.service)}, "
        f"port: {quote(target.port)}, protocol: {quote(target.proto)}}}"
    )


def parse_exposed_services(config_map: Object) -> ExposedServices:
    """Return what all keys of the ConfigMap list.

    Raises:
      ConfigError: one of them is not a list of services. All of it is refused then: an entry that is not understood
        could be one that is meant to keep somebody out.
    """
    entries: list[ExposedService] = []
    for key, text in map_at(config_map, "data").items():
        try:
            entries += _read(text)
        except (_Wrong, yaml.YAMLError, UnicodeError) as error:
            raise ConfigError(_FLAG, f"key {quote(_shown(key))}: {_one_line(error)}") from error
    return ExposedServices(tuple(entries))


class _Wrong(Exception):
    """What is wrong with a list."""


def _read(text: object) -> Iterator[ExposedService]:
    if not isinstance(text, str):
        raise _Wrong("its value is no text")
    loader = _Loader(text)
    try:
        events = _Events(loader)
        if not events.begin():
            return
        index = 0
        while events.item():
            try:
                yield _entry(events)
            except _Wrong as error:
                raise _Wrong(f"entry[{index}]: {error}") from None
            index += 1
        events.end()
    finally:
        loader.dispose()


def _entry(events: _Events) -> ExposedService:
    found: dict[str, str] = {}
    for name in events.fields():
        # As Go's encoding/json: whatever their case.
        field = name.lower()
        if field not in _FIELDS:
            raise _Wrong(f"unknown field {quote(_shown(name))}, known are {', '.join(_FIELDS)}")
        if field in found:
            raise _Wrong(f"field {quote(field)} is there twice")
        found[field] = events.text(field)
    for field in _REQUIRED:
        if not found.get(field):
            raise _Wrong(f"{field} is required")
    return ExposedService(**found)


class _Events:
    """The parser's events, of which only those of a list of flat mappings are taken."""

    def __init__(self, loader: Any) -> None:  # noqa: ANN401  one of two classes
        self._loader = loader

    def _next(self) -> Any:  # noqa: ANN401  yaml's
        return self._loader.get_event()

    def begin(self) -> bool:
        """Go to the first item; return whether there is a list at all."""
        self._next()  # the stream's beginning
        if isinstance(event := self._next(), yaml.StreamEndEvent):
            return False
        event = self._next()
        if isinstance(event, yaml.ScalarEvent) and self._tag(event) == _NULL:
            self.end()
            return False
        if not isinstance(event, yaml.SequenceStartEvent):
            raise _Wrong("it must be a list of services, each item beginning with '- '")
        return True

    def item(self) -> bool:
        """Go into the next item; return whether there is one."""
        event = self._next()
        if isinstance(event, yaml.SequenceEndEvent):
            return False
        if not isinstance(event, yaml.MappingStartEvent):
            raise _Wrong(f"an item must have the fields namespace and service{self._where(event)}")
        return True

    def fields(self) -> Iterator[str]:
        """Go through the names of an item's fields, each of which has one value."""
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _Wrong(f"the name of a field must be text{self._where(event)}")
            yield event.value

    def text(self, field: str) -> str:
        """Return a field's value: text, or a number, which is nearly always meant to be text."""
        event = self._next()
        if not isinstance(event, yaml.ScalarEvent):
            raise _Wrong(f"{field} must be text{self._where(event)}")
        tag = self._tag(event)
        if tag == _NULL:
            return ""
        if tag == _STRING or (tag == _INT and _DECIMAL.fullmatch(event.value)):
            return str(event.value)
        raise _Wrong(
            f"{field}: {quote(_shown(event.value))} must be in quotes, for to YAML it is no text"
        )

    def end(self) -> None:
        """Make sure that nothing follows."""
        self._next()  # the document's end
        if not isinstance(event := self._next(), yaml.StreamEndEvent):
            raise _Wrong(f"there must be one list only{self._where(event)}")

    def _tag(self, event: yaml.ScalarEvent) -> str:
        if event.tag is not None and event.tag != "!":
            return str(event.tag)
        return str(self._loader.resolve(yaml.ScalarNode, event.value, event.implicit))

    def _where(self, event: yaml.Event) -> str:
        hint = "; references (&, *) are not supported" if isinstance(event, yaml.AliasEvent) else ""
        mark: Any = event.start_mark
        return f", line {mark.line + 1}{hint}"


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
